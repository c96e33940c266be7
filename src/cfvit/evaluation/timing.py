"""Times that can be compared: calls in turn, their spread and drift, ratios with intervals."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import scipy
import torch
from torch import Tensor

from cfvit.calibration import Estimate, StageLatency
from cfvit.modeling.model import CoarseToFineViT

Call = Callable[[], object]

WARM_UP = 2
"""The first rounds are not counted: caches fill, compilers compile."""
FEWEST_ROUNDS = 6
"""With fewer rounds there is no 95% interval of a median."""
STEADY = 1.05
"""If the medians of a reference's two halves differ by more, the machine was busy."""
SHARP = 1.10
"""If the ends of an interval differ by more, the ratio is too uncertain to be used."""
MATRIX_SIDES = {"cpu": 1024, "cuda": 8192}
"""Sides of the square matrices by whose product a device's peak speed is measured."""


@dataclass(frozen=True)
class Timing:
    """Seconds of the calls of one contender."""

    rounds: tuple[tuple[float, ...], ...]  # for each round, the seconds of each of its calls

    @property
    def totals(self) -> list[float]:
        """Seconds of each round."""
        return [sum(calls) for calls in self.rounds]

    @property
    def calls(self) -> list[float]:
        """Seconds of each call."""
        return list(chain.from_iterable(self.rounds))

    @property
    def median(self) -> float:
        """Seconds of the median round."""
        return float(np.median(self.totals))

    @property
    def spread(self) -> float:
        """The interquartile range of the rounds, divided by their median."""
        return float(scipy.stats.iqr(self.totals)) / self.median

    @property
    def drift(self) -> float:
        """How many times slower the slower half of the rounds was, the first or the second, by their medians."""
        middle = len(self.rounds) // 2
        if middle == 0:
            return 1.0
        halves = [float(np.median(half)) for half in (self.totals[:middle], self.totals[-middle:])]
        return max(halves) / min(halves)


def time_in_turn(
    calls: Mapping[str, Call | Sequence[Call]],
    rounds: int,
    device: torch.device,
    seconds: float = float("inf"),
) -> dict[str, Timing]:
    """Times contenders in turn, so that a slow phase of the machine affects all alike.

    Each round has its own random order, the same in every run, so that no contender always follows the same other.

    Args:
        calls: by name, one call, or several that make up a round of it.
        rounds: the most rounds that are counted, after `WARM_UP` that are not.
        seconds: no round begins later than this after the first one, except the first `FEWEST_ROUNDS`.
    """

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def duration(call: Call) -> float:
        start = now()
        call()
        return now() - start

    series = {name: [given] if callable(given) else list(given) for name, given in calls.items()}
    measured: dict[str, list[tuple[float, ...]]] = {name: [] for name in series}
    begun = time.perf_counter()
    for turn in range(-WARM_UP, rounds):
        if turn == 0:
            begun = time.perf_counter()
        if turn >= FEWEST_ROUNDS and time.perf_counter() - begun > seconds:
            break
        order = list(series)
        random.Random(turn).shuffle(order)
        for name in order:
            durations = tuple(duration(call) for call in series[name])
            if turn >= 0:
                measured[name].append(durations)
    return {name: Timing(tuple(durations)) for name, durations in measured.items()}


def percentile(seconds: Sequence[float], share: float, weights: Sequence[float] | None = None) -> float | None:
    """The time that this share of calls does not exceed; None if it is above 0.5 and no call is expected beyond it.

    Args:
        weights: how much each call counts; by default all alike.
    """
    if share > 0.5 and len(seconds) * (1 - share) < 1 - 1e-9:
        return None
    counted = [1.0] * len(seconds) if weights is None else weights
    return float(np.quantile(seconds, share * (1 - 1e-12), weights=counted, method="inverted_cdf"))


def paired_ratio(reference: Sequence[float], seconds: Sequence[float]) -> Estimate:
    """How many times faster than the reference, by seconds of the same rounds: the median, with its 95% interval.

    The interval is the sign test's, which assumes nothing about the distribution. With fewer than
    `FEWEST_ROUNDS` rounds it is from 0 to infinity.
    """
    ratios = np.divide(reference, seconds)
    interval = scipy.stats.quantile_test(ratios, q=1, p=0.5).confidence_interval(0.95)
    ends = (0.0, float("inf")) if np.isnan(interval.low) else (float(interval.low), float(interval.high))
    return Estimate(float(np.median(ratios)), *ends)


def is_sharp(ratio: Estimate) -> bool:
    """Whether the interval is narrow enough for the ratio to be used."""
    return ratio.high <= SHARP * ratio.low


def lacks_memory(error: Exception) -> bool:
    """Whether the error says that something does not fit into memory."""
    messages = ("out of memory", "allocate memory", "size calculation overflowed")
    return isinstance(error, MemoryError) or any(message in str(error) for message in messages)


def time_stages(model: CoarseToFineViT, images: Tensor, rounds: int = 10) -> StageLatency:
    """Median time of an image through the coarse stage and through both, in milliseconds.

    Args:
        images: normalised ``[B, 3, S, S]`` on the model's device; one call takes them all.
    """
    model = model.eval()
    with torch.inference_mode():
        calls: dict[str, Call] = {"coarse": lambda: model.coarse(images), "both": lambda: model(images)}
        timings = time_in_turn(calls, rounds, images.device)
    coarse, both = (1e3 * timings[name].median / len(images) for name in calls)
    return StageLatency(coarse, max(coarse, both))  # a busy machine may time them otherwise
