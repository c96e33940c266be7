"""Exact statements about shares: binomial tails, Clopper and Pearson's interval, paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import torch

from cfvit.errors import CfvitError

_HALVINGS = 50


@dataclass(frozen=True)
class Estimate:
    """A figure of the calibration images, and the interval that holds it for images of their kind.

    Attributes:
        value: as counted.
        low, high: ends of the confidence interval.
    """

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise CfvitError(f"an estimate of {self.value} is outside its interval: calibrate again")

    def mapped(self, change: Callable[[float], float]) -> Estimate:
        """The estimate of a quantity that rises or falls with this one."""
        ends = sorted((change(self.low), change(self.high)))
        return Estimate(change(self.value), ends[0], ends[1])


def binomial_probabilities(count: int, share: float) -> np.ndarray:
    """``P(X = k)`` for k from 0 to ``count`` and X binomial: ``[count + 1]`` in float64.

    Args:
        share: probability of each of ``count`` events, in (0, 1).
    """
    return np.exp(_log_probabilities(count, share))


def binomial_cdf(count: int, share: float) -> np.ndarray:
    """``P(X <= k)`` for k from 0 to ``count`` and X binomial: ``[count + 1]`` in float64.

    Args:
        share: probability of each of ``count`` events, in (0, 1).
    """
    return np.exp(np.logaddexp.accumulate(_log_probabilities(count, share))).clip(max=1)


@lru_cache(maxsize=8)
def _log_choose(count: int) -> np.ndarray:
    factorials = torch.lgamma(torch.arange(1, count + 2, dtype=torch.float64)).numpy()
    return factorials[-1] - factorials - factorials[::-1]


def _log_probabilities(count: int, share: float) -> np.ndarray:
    hits = np.arange(count + 1)
    return _log_choose(count) + hits * math.log(share) + (count - hits) * math.log1p(-share)


def _tail(hits: int, count: int, share: float) -> float:
    return float(binomial_probabilities(count, share)[: hits + 1].sum())


def upper_bound(hits: int, count: int, alpha: float) -> float:
    """The share at which ``hits`` of ``count`` or fewer have probability ``alpha``.

    The true share is above it with probability at most ``alpha``, whatever it is (Clopper and
    Pearson, 1934). Found by bisection.
    """
    if hits >= count:
        return 1.0
    low, high = hits / count, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _tail(hits, count, middle) > alpha else (low, middle)
        if high - low < 1e-9:
            break
    return high


def share_estimate(hits: int, count: int, level: float) -> Estimate:
    """A share with Clopper and Pearson's exact interval, all in [0, 1].

    Args:
        level: probability with which the interval holds the true share, such as 0.95.
    """
    alpha = (1 - level) / 2
    return Estimate(hits / count, 1 - upper_bound(count - hits, count, alpha), upper_bound(hits, count, alpha))


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
