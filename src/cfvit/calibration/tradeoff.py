"""All thresholds at once: images ranked by confidence, right answers behind each, temperatures, and intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor

from cfvit.errors import CfvitError
from cfvit.modeling.cost import StageMacs
from cfvit.modeling.exit import Measure, confidence_of, goes_on

NO_ANSWER = -1
"""In the place of a class: the logits are not finite, which is never right."""

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.1, 10.0
_HALVINGS = 16
_MOST_DIGITS = 9


@dataclass(frozen=True)
class Estimate:
    """A figure of the calibration images, and the interval that holds it for images of their kind."""

    value: float  # as counted
    low: float  # ends of the confidence interval
    high: float  # ends of the confidence interval

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise CfvitError(f"an estimate of {self.value} is outside its interval: calibrate again")

    def mapped(self, change: Callable[[float], float]) -> Estimate:
        """The estimate of a quantity that rises or falls with this one."""
        ends = sorted((change(self.low), change(self.high)))
        return Estimate(change(self.value), ends[0], ends[1])


def share_estimate(hits: int, count: int, level: float) -> Estimate:
    """A share with Clopper and Pearson's exact interval, all in [0, 1].

    Args:
        level: probability with which the interval holds the true share, such as 0.95.
    """
    outside, quantile = (1 - level) / 2, scipy.special.betaincinv
    low = quantile(hits, count - hits + 1, outside) if hits else 0.0
    high = quantile(hits + 1, count - hits, 1 - outside) if hits < count else 1.0
    return Estimate(hits / count, float(low), float(high))


def paired_difference(more: int, less: int, count: int, level: float) -> Estimate:
    """The difference of two shares of the same images, in [-1, 1].

    Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions
    based on paired data", 2012.

    Args:
        more, less: images that only the first share counts, and that only the second one does.
    """
    first, second = (more + 1) / (count + 2), (less + 1) / (count + 2)
    difference = first - second
    width = scipy.stats.norm.ppf((1 + level) / 2) * math.sqrt((first + second - difference**2) / (count + 2))
    value = (more - less) / count
    return Estimate(value, max(-1.0, min(value, difference - width)), min(1.0, max(value, difference + width)))


def images_needed(share: float, confidence: float) -> int:
    """How many images, none of them counted, show with this confidence that a share is at most ``share``."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-share))


def answers_of(logits: Tensor) -> Tensor:
    """The class that logits ``[n, classes]`` answer, ``[n]``; `NO_ANSWER` where one of them is not finite."""
    return logits.argmax(dim=-1).where(logits.isfinite().all(dim=-1), NO_ANSWER)


@dataclass(frozen=True)
class Operation:
    """What an eta does."""

    accuracy: Estimate  # top-1 in percent
    fine_share: Estimate  # share of images that go on, in [0, 1]
    gmacs: Estimate  # mean cost of an image, in 1e9 multiply-accumulates
    saving: Estimate  # of the plain backbone's MACs, in percent

    @property
    def exit_percent(self) -> Estimate:
        """Images that exit at the coarse stage, in percent."""
        return self.fine_share.mapped(lambda share: 100 * (1 - share))


@dataclass(frozen=True, eq=False)
class TradeOff:
    """Every way in which a threshold can part n images, by how many of the least confident go on."""

    ranked: Tensor  # confidences of the coarse stage in rising order, ``[n]`` in float32
    right: np.ndarray  # ``[n + 1]``, right answers if k images go on, for k from 0 to n
    worse: np.ndarray  # ``[n + 1]``, wrong answers where the fine stage is right; falls with k
    # ``[n + 1]``, wrong answers of the coarse stage among the n - k that do not go on; falls with k
    wrong_exits: np.ndarray
    reachable: np.ndarray  # the k that a threshold gives, rising: images of equal confidence stay together

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self.ranked)

    @property
    def better(self) -> np.ndarray:
        """``[n + 1]``, right answers where the fine stage is wrong."""
        return self.right - self.right[-1] + self.worse

    def gone_on(self, eta: float) -> int:
        """How many images go on at an eta."""
        return int(goes_on(self.ranked, eta).sum())

    def accuracy(self, go_on: int, level: float) -> Estimate:
        """Top-1 in percent if this many images go on, with its interval."""
        return share_estimate(int(self.right[go_on]), self.images, level).mapped(lambda share: 100 * share)

    def operate(self, eta: float, macs: StageMacs, level: float) -> Operation:
        """What an eta does, with intervals. At 0 and 1 it is certain how many images go on, whatever the images."""
        go_on = self.gone_on(eta)
        certain = Estimate(*(go_on / self.images,) * 3)
        share = share_estimate(go_on, self.images, level) if 0 < eta < 1 else certain
        return Operation(
            accuracy=self.accuracy(go_on, level),
            fine_share=share,
            gmacs=share.mapped(lambda share: macs.expected(share) / 1e9),
            saving=share.mapped(lambda share: 100 * (1 - macs.expected(share) / macs.backbone)),
        )

    def threshold(self, go_on: int) -> float:
        """An eta at which this many images go on, which is one of `reachable`.

        0 for none and 1 for all; else a short number well between the confidences that it parts.
        """
        if go_on == 0:
            return 0.0
        if go_on == self.images:
            return 1.0
        bottom, top = max(float(self.ranked[go_on - 1]), 0.0), float(self.ranked[go_on])
        margin = (top - bottom) / 4
        for digits in range(1, _MOST_DIGITS):
            number = round((bottom + top) / 2, digits)
            if bottom + margin <= number <= top - margin and bottom < np.float32(number) <= top:
                return number  # a number which parts the two in float32 as well
        return min(top, float(np.nextafter(1.0, 0.0)))  # at 1 all would go on


@torch.no_grad()  # logits may come straight from a model
def rank_images(
    coarse: Tensor, fine: Tensor, labels: Tensor, measure: Measure = "max_probability", temperature: float = 1.0
) -> TradeOff:
    """Ranks images by the confidence of the coarse stage and counts right answers behind every place.

    Args:
        coarse, fine: logits ``[n, classes]``; ``labels`` are class indices ``[n]``.
        measure, temperature: of the coarse stage's confidence.
    """
    ranked, order = confidence_of(coarse, measure, temperature).cpu().sort(stable=True)
    coarse_right = (answers_of(coarse) == labels).cpu()[order].numpy()
    fine_right = (answers_of(fine) == labels).cpu()[order].numpy()
    apart = torch.ones(len(ranked) + 1, dtype=torch.bool)
    apart[1:-1] = ranked[1:] > ranked[:-1]
    coarse_sums, fine_sums, lost_sums = (
        np.append(0, hits.cumsum()) for hits in (coarse_right, fine_right, fine_right & ~coarse_right)
    )
    return TradeOff(
        ranked=ranked,
        right=fine_sums + coarse_sums[-1] - coarse_sums,
        worse=lost_sums[-1] - lost_sums,
        wrong_exits=len(ranked) - np.arange(len(ranked) + 1) - coarse_sums[-1] + coarse_sums,
        reachable=apart.nonzero().flatten().numpy(),
    )


def best_measure(coarse: Tensor, answers: Tensor, labels: Tensor, temperature: float = 1.0) -> Measure:
    """The measure with the most right answers, in the mean over all numbers of images that can go on.

    At the one number that a target comes to, chance decides more.

    Args:
        coarse: logits ``[n, classes]``.
        answers: to images that go on, ``[n, classes]``.
        labels: class indices ``[n]``.
        temperature: of the coarse stage's confidence.
    """
    return max(get_args(Measure), key=lambda each: rank_images(coarse, answers, labels, each, temperature).right.mean())


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature at which the softmax of ``logits / temperature`` has the least cross entropy.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. The loss is convex in the
    inverse temperature, so its slope is bisected. Answers that are all right have no least: the
    result stays within [0.1, 10]. For a promise of `Risk`, fit it on other images than those that
    the threshold is chosen on.

    Args:
        logits: ``[n, classes]``, finite.
        labels: class indices ``[n]``.
    """
    logits = logits.float()
    truth = logits.gather(1, labels[:, None].long()).double().mean()
    low, high = math.log(LOWEST_TEMPERATURE), math.log(HIGHEST_TEMPERATURE)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        expected = ((logits / math.exp(middle)).softmax(dim=-1) * logits).sum(dim=-1).double().mean()
        # too sharp a softmax expects higher logits than the labels have
        low, high = (middle, high) if expected > truth else (low, middle)
    return math.exp((low + high) / 2)


@torch.no_grad()
def fit_mixture(coarse: Tensor, fine: Tensor, labels: Tensor) -> tuple[float, float]:
    """The mixture of both stages' answers with the least cross entropy, for images that both have seen.

    A product of experts with a temperature for each, ``softmax(a * coarse + b * fine)``: the loss is convex in the two.

    Args:
        coarse, fine: logits ``[n, classes]``, finite.
        labels: class indices ``[n]``.

    Returns:
        ``coarse_weight`` and ``fine_temperature`` of a `cfvit.modeling.exit.Exit`: ``a / (a + b)``, ``1 / (a + b)``.
    """
    logits = torch.stack([coarse, fine]).double()
    truth = logits.gather(2, labels.long().expand(2, -1)[..., None])[..., 0]

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        """The cross entropy and its gradient: what logits are expected under the mixture, less those of the labels."""
        mixed = torch.tensordot(torch.from_numpy(weights), logits, 1)
        expected = (mixed.softmax(dim=-1) * logits).sum(dim=-1)
        return F.cross_entropy(mixed, labels.long()).item(), (expected - truth).mean(dim=-1).numpy()

    bounds = [(0, 1 / LOWEST_TEMPERATURE), (1 / HIGHEST_TEMPERATURE, 1 / LOWEST_TEMPERATURE)]
    a, b = scipy.optimize.minimize(loss, np.array([0.0, 1.0]), jac=True, bounds=bounds).x.tolist()
    return a / (a + b), 1 / (a + b)
