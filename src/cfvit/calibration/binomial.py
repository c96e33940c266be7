"""Shares with their intervals: Clopper and Pearson's by scipy, paired differences by Bonett and Price."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import scipy

from cfvit.errors import CfvitError


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
    interval = scipy.stats.binomtest(hits, count).proportion_ci(level, method="exact")
    return Estimate(hits / count, float(interval.low), float(interval.high))


def paired_difference(more: int, less: int, count: int, level: float) -> Estimate:
    """The difference of two shares of the same images, in [-1, 1].

    Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions
    based on paired data", 2012.

    Args:
        more, less: images that only the first share counts, and that only the second one does.
    """
    first, second = (more + 1) / (count + 2), (less + 1) / (count + 2)
    difference = first - second
    width = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt((first + second - difference**2) / (count + 2))
    value = (more - less) / count
    return Estimate(value, max(-1.0, min(value, difference - width)), min(1.0, max(value, difference + width)))


def images_needed(share: float, confidence: float) -> int:
    """How many images, none of them counted, show with this confidence that a share is at most ``share``."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-share))
