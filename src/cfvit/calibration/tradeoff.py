"""All thresholds at once: images ranked by confidence, and how many answers are right behind each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from cfvit.calibration.binomial import Estimate, share_estimate
from cfvit.modeling.exit import Measure, confidence_of

_MOST_DIGITS = 9


@dataclass(frozen=True, eq=False)
class TradeOff:
    """Every way in which a threshold can part n images, by how many of the least confident go on.

    Attributes:
        ranked: confidences of the coarse stage in rising order, ``[n]`` in float32.
        right: ``[n + 1]``, right answers if k images go on, for k from 0 to n.
        worse: ``[n + 1]``, wrong answers where the fine stage is right; falls with k.
        reachable: the k that a threshold gives, rising: images of equal confidence stay together.
    """

    ranked: np.ndarray
    right: np.ndarray
    worse: np.ndarray
    reachable: np.ndarray

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self.ranked)

    @property
    def better(self) -> np.ndarray:
        """``[n + 1]``, right answers where the fine stage is wrong."""
        return self.right - self.right[-1] + self.worse

    def gone_on(self, thresholds: np.ndarray) -> np.ndarray:
        """How many images go on at each eta, as `cfvit.inference.predictor.goes_on` decides: ``[m] -> [m]``."""
        below = np.searchsorted(self.ranked, thresholds.astype(np.float32), side="left")
        return np.where(thresholds >= 1, self.images, np.where(thresholds <= 0, 0, below))

    def fine_share(self, eta: float, level: float) -> Estimate:
        """The share of images that go on at an eta, in [0, 1]: none at 0 and all at 1, whatever the images.

        Args:
            level: of the interval.
        """
        go_on = int(self.gone_on(np.array([eta]))[0])
        if 0 < eta < 1:
            return share_estimate(go_on, self.images, level)
        certain = go_on / self.images
        return Estimate(certain, certain, certain)

    def threshold(self, go_on: int) -> float:
        """An eta at which this many images go on, which is one of `reachable`.

        0 for none and 1 for all; else a short number well between the confidences that it parts.
        """
        if go_on == 0:
            return 0.0
        if go_on == self.images:
            return 1.0
        return _number_between(self.ranked[go_on - 1], self.ranked[go_on])


def rank_images(
    coarse: Tensor, fine: Tensor, labels: Tensor, measure: Measure = "max_probability", temperature: float = 1.0
) -> TradeOff:
    """Ranks images by the confidence of the coarse stage and counts right answers behind every place.

    Args:
        coarse, fine: logits ``[n, classes]``.
        labels: class indices ``[n]``.
        measure, temperature: of the coarse stage's confidence.
    """
    confidence = confidence_of(coarse, measure, temperature).cpu().numpy()
    order = np.argsort(confidence, kind="stable")
    ranked = confidence[order]
    coarse_right = (coarse.argmax(-1) == labels).cpu().numpy()[order]
    fine_right = (fine.argmax(-1) == labels).cpu().numpy()[order]
    apart = np.concatenate([[True], ranked[1:] > ranked[:-1], [True]])
    return TradeOff(
        ranked=ranked,
        right=np.append(0, fine_right.cumsum()) + _sums_from(coarse_right),
        worse=_sums_from(fine_right & ~coarse_right),
        reachable=np.flatnonzero(apart),
    )


def _sums_from(values: np.ndarray) -> np.ndarray:
    """Sums of all values from each place to the end: ``[n] -> [n + 1]``."""
    return np.append(values[::-1].cumsum()[::-1], 0)


def _number_between(low: np.float32, high: np.float32) -> float:
    """A number in (low, high] and below 1 with few decimals, which parts the two in float32 as well."""
    bottom, top = max(float(low), 0.0), float(high)
    margin = (top - bottom) / 4
    for digits in range(1, _MOST_DIGITS):
        number = round((bottom + top) / 2, digits)
        if bottom + margin <= number <= top - margin and bottom < np.float32(number) <= top:
            return number
    return min(top, float(np.nextafter(1.0, 0.0)))  # at 1 all would go on
