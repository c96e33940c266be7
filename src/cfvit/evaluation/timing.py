"""Times that can be compared: calls in turn, the spread of their times, ratios with intervals, and when not to tell."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from cfvit.calibration import Estimate, StageLatency
from cfvit.calibration.binomial import binomial_cdf
from cfvit.modeling.model import CoarseToFineViT

Call = Callable[[], object]

WARM_UP = 2
"""Rounds in front that are not counted: caches fill, compilers compile."""
FEWEST_ROUNDS = 6
"""Fewer rounds give no 95% interval of a median, whatever they say."""
STEADY = 1.05
"""Medians of a reference's first and second half that differ by more say that the machine was busy."""
MATRIX_SIDES = {"cpu": 1024, "cuda": 8192}
"""Sides of the square matrices whose product tells what a device could do."""
SHARP = 1.10
"""An interval whose ends differ by more is too wide to tell."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender's calls.

    Attributes:
        rounds: for each round, the seconds of each of its calls.
    """

    rounds: tuple[tuple[float, ...], ...]

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
        return statistics.median(self.totals)

    @property
    def spread(self) -> float:
        """The interquartile range of the rounds as a share of their median."""
        low, high = np.quantile(self.totals, (0.25, 0.75))
        return float(high - low) / self.median

    @property
    def drift(self) -> float:
        """How many times slower the slower half of the rounds was, the first or the second, by their medians."""
        totals = self.totals
        middle = len(totals) // 2
        if middle == 0:
            return 1.0
        first, second = statistics.median(totals[:middle]), statistics.median(totals[-middle:])
        return max(first, second) / min(first, second)


def time_in_turn(
    calls: Mapping[str, Call | Sequence[Call]],
    rounds: int,
    device: torch.device,
    seconds: float = float("inf"),
) -> dict[str, Timing]:
    """Times contenders in turn, so that a machine that drifts treats all alike.

    Each round has its own order, the same in every run, so that none always follows the same other.

    Args:
        calls: by name, a call, or several that make up a round of it.
        rounds: at most so many are counted, after `WARM_UP` that are not.
        seconds: no round is begun later than this after the first one, but for the first `FEWEST_ROUNDS`.
    """
    series = {name: [given] if callable(given) else list(given) for name, given in calls.items()}
    taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in series}
    begun = time.perf_counter()
    for turn in range(-WARM_UP, rounds):
        if turn == 0:
            begun = time.perf_counter()
        if turn >= FEWEST_ROUNDS and time.perf_counter() - begun > seconds:
            break
        for name in _shuffled(list(series), turn):
            spent = tuple(_seconds(call, device) for call in series[name])
            if turn >= 0:
                taken[name].append(spent)
    return {name: Timing(tuple(spent)) for name, spent in taken.items()}


def _shuffled(names: list[str], turn: int) -> list[str]:
    random.Random(turn).shuffle(names)
    return names


def _seconds(call: Call, device: torch.device) -> float:
    _synchronise(device)
    start = time.perf_counter()
    call()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def percentile(seconds: Sequence[float], share: float, weights: Sequence[float] | None = None) -> float | None:
    """The time that this share of calls does not exceed; None if there are too few calls to tell.

    Args:
        seconds: of each call, at least one.
        share: 0.5 for the median; above it, at least one call has to be expected beyond.
        weights: how much each call counts; by default all alike.
    """
    if share > 0.5 and len(seconds) * (1 - share) < 1 - 1e-9:
        return None
    order = np.argsort(seconds)
    heights = np.cumsum((np.ones(len(seconds)) if weights is None else np.asarray(weights))[order])
    place = int(np.searchsorted(heights, share * heights[-1] * (1 - 1e-12)))
    return float(np.asarray(seconds)[order][place])


def paired_ratio(reference: Sequence[float], seconds: Sequence[float]) -> Estimate:
    """How many times faster than the reference: the median over rounds, with its 95% interval.

    The interval lies between two of the rounds' ratios and assumes nothing of how they are distributed
    (the sign test's). Of fewer than `FEWEST_ROUNDS` rounds it is from 0 to infinity.

    Args:
        reference, seconds: of the same rounds, in order.
    """
    ratios = sorted(one / other for one, other in zip(reference, seconds, strict=True))
    cut = int((binomial_cdf(len(ratios), 0.5) <= 0.025).sum())
    ends = (ratios[cut - 1], ratios[-cut]) if cut else (0.0, float("inf"))
    return Estimate(statistics.median(ratios), *ends)


def lacks_memory(error: Exception) -> bool:
    """Whether it says that something does not fit into memory."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _LACK_OF_MEMORY)


_LACK_OF_MEMORY = ("out of memory", "allocate memory", "size calculation overflowed")


def is_sharp(ratio: Estimate) -> bool:
    """Whether the interval is narrow enough to tell the ratio."""
    return ratio.high <= SHARP * ratio.low


def threshold_for_share(confidence: Tensor, fine_share: float) -> float:
    """The eta at which this share of a batch goes on (to the nearest image, if no two are equally sure).

    Args:
        confidence: ``[B]``, of the coarse stage.
    """
    hard = round(fine_share * len(confidence))
    if hard in (0, len(confidence)):
        return float(hard > 0)
    return confidence.sort().values[hard].item()


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
    return StageLatency(coarse, both)
