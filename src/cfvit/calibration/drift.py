"""Whether images in use still look like those that the threshold was chosen on. No labels needed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cfvit.calibration.calibrated import Calibration, ConfidenceProfile, check_logits
from cfvit.errors import CfvitError
from cfvit.inference.predictor import goes_on
from cfvit.modeling.exit import confidence_of

_FEW = 100
_TERMS = np.arange(1, 101)


@dataclass(frozen=True)
class Drift:
    """Images in use against the calibration images, by the coarse stage alone.

    Attributes:
        drifted: whether one of the two tests rejects "drawn alike" at half of ``alpha``.
        sentence: what was found and what to do.
        images: how many were compared.
        alpha: how often an alarm is false, at most.
        expected_fine_share, fine_share: share that goes on, in calibration and now, in [0, 1].
        fine_share_p: p-value of Fisher's exact test that the two are of one kind.
        expected_confidence, confidence: the coarse stage's median, in calibration (at the stored
            quantiles) and now.
        distance: between both distributions of the confidence, in [0, 1] (Kolmogorov and Smirnov,
            at the stored quantiles).
        distance_p: its p-value, too high rather than too low.
    """

    drifted: bool
    sentence: str
    images: int
    alpha: float
    expected_fine_share: float
    fine_share: float
    fine_share_p: float
    expected_confidence: float
    confidence: float
    distance: float
    distance_p: float


def check_drift(calibration: Calibration, coarse_logits: Tensor, alpha: float = 0.01) -> Drift:
    """Compares images in use with the calibration images: do as many go on, and is the confidence alike?

    That both are alike is no proof that accuracy is. Ask once for a batch of images, or divide
    ``alpha`` by the number of times that you will ask.

    Args:
        coarse_logits: of images in use, ``[m, classes]``.
        alpha: how often an alarm may be false, in (0, 1).

    Raises:
        CfvitError: logits that are not finite, of no image, or of other classes; alpha out of range.
    """
    check_logits(coarse_logits, "coarse")
    if coarse_logits.shape[1] != calibration.classes:
        raise CfvitError(
            f"logits of {coarse_logits.shape[1]} classes, calibrated on {calibration.classes}: give the same model's"
        )
    if not 0 < alpha < 1:
        raise CfvitError(f"alpha is {alpha}: give a probability between 0 and 1, such as 0.01")
    confidence = confidence_of(coarse_logits, calibration.measure, calibration.coarse_temperature).cpu()
    count = len(confidence)
    gone_on = int(goes_on(confidence, calibration.threshold).sum())
    before = round(calibration.fine_share.value * calibration.images)
    share_p = _same_share_p(before, calibration.images, gone_on, count)
    distance = _distance(calibration.profile, confidence.numpy())
    distance_p = _distance_p(distance, calibration.images, count)
    found = Drift(
        drifted=min(share_p, distance_p) < alpha / 2,
        sentence="",
        images=count,
        alpha=alpha,
        expected_fine_share=calibration.fine_share.value,
        fine_share=gone_on / count,
        fine_share_p=share_p,
        expected_confidence=calibration.profile.median,
        confidence=float(confidence.median()),
        distance=distance,
        distance_p=distance_p,
    )
    return Drift(**{**vars(found), "sentence": _sentence(found)})


def _same_share_p(hits: int, count: int, other_hits: int, other_count: int) -> float:
    """Fisher's exact test of two shares, twice the smaller tail of the hypergeometric distribution."""
    drawn = hits + other_hits
    possible = np.arange(max(0, drawn - other_count), min(count, drawn) + 1)
    weight = _log_choose(count, possible) + _log_choose(other_count, drawn - possible)
    weight = np.exp(weight - weight.max())
    weight /= weight.sum()
    at_most, at_least = weight[possible <= hits].sum(), weight[possible >= hits].sum()
    return float(min(1.0, 2 * min(at_most, at_least)))


def _log_choose(count: int, chosen: np.ndarray) -> np.ndarray:
    log_factorials = torch.lgamma(torch.arange(1, count + 2, dtype=torch.float64)).numpy()
    return log_factorials[count] - log_factorials[chosen] - log_factorials[count - chosen]


def _distance(profile: ConfidenceProfile, confidence: np.ndarray) -> float:
    values = np.array(profile.values, dtype=np.float32)
    shares = np.searchsorted(np.sort(confidence), values, side="right") / len(confidence)
    return float(np.abs(shares - np.array(profile.shares)).max())


def _distance_p(distance: float, count: int, other_count: int) -> float:
    """Two-sample p-value of Kolmogorov's limit with Stephens' correction for few images (1970)."""
    root = math.sqrt(count * other_count / (count + other_count))
    scaled = (root + 0.12 + 0.11 / root) * distance
    if scaled < 0.2:
        return 1.0  # by 1e-12; the series below would need more terms
    series = np.where(_TERMS % 2, 2, -2) * np.exp(-2 * (_TERMS * scaled) ** 2)
    return float(series.sum().clip(0, 1))


def _sentence(drift: Drift) -> str:
    level = drift.alpha / 2
    few = f", as far as {drift.images} can tell" if drift.images < _FEW else ""
    if drift.fine_share_p < level:
        before, now = drift.expected_fine_share, drift.fine_share
        how = f"{now / before:.2g} times as many images go on as in" if before else "images go on, unlike in"
        shares = f"{100 * now:.3g}% instead of {100 * before:.3g}%"
        return f"{how} the calibration set ({shares}, {_p(drift.fine_share_p)}): recalibrate"
    if drift.distance_p < level:
        return (
            "about as many images go on, but confidence is distributed otherwise than in the calibration set "
            f"(distance {drift.distance:.2f}, {_p(drift.distance_p)}): recalibrate"
        )
    return f"looks like the calibration set ({_p(min(drift.fine_share_p, drift.distance_p))}){few}"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"
