"""In which order calls are timed, what is made of their seconds, and when nothing is told. By a made-up clock."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from cfvit import CoarseToFineViT
from cfvit.evaluation import timing as timing_module
from cfvit.evaluation.timing import (
    FEWEST_ROUNDS,
    WARM_UP,
    Timing,
    is_sharp,
    lacks_memory,
    paired_ratio,
    percentile,
    time_in_turn,
    time_stages,
)

CPU = torch.device("cpu")


class Clock:
    """A clock that only calls move on."""

    def __init__(self) -> None:
        self.now = 0.0

    def call(self, seconds: Iterator[float]) -> Callable[[], None]:
        """A call that takes these seconds, one after another."""

        def run() -> None:
            self.now += next(seconds)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing_module, "time", SimpleNamespace(perf_counter=lambda: made.now))
    return made


def _rounds(*seconds: float) -> Timing:
    return Timing(tuple((each,) for each in seconds))


def test_each_round_has_every_call_once_in_an_order_of_its_own() -> None:
    called: list[str] = []
    time_in_turn({name: lambda name=name: called.append(name) for name in "abcd"}, 6, CPU)
    rounds = ["".join(called[start : start + 4]) for start in range(0, len(called), 4)]
    assert [sorted(each) for each in rounds] == [list("abcd")] * (6 + WARM_UP)
    assert len(set(rounds)) > 1
    again, called[:] = list(called), []
    time_in_turn({name: lambda name=name: called.append(name) for name in "abcd"}, 6, CPU)
    assert called == again


def test_rounds_in_front_are_not_counted_and_seconds_are_kept_in_order(clock: Clock) -> None:
    calls = {"call": clock.call(iter([100, 90, 3, 1, 2]))}
    assert time_in_turn(calls, 3, CPU) == {"call": _rounds(3, 1, 2)}


def test_several_calls_make_a_round(clock: Clock) -> None:
    single = clock.call(iter([*[9] * 2 * WARM_UP, 1, 2, 3, 4]))
    timing = time_in_turn({"call": [single, single]}, 2, CPU)["call"]
    assert timing == Timing(((1, 2), (3, 4)))
    assert (timing.totals, timing.calls, timing.median) == ([3, 7], [1, 2, 3, 4], 5)


@pytest.mark.parametrize(("seconds", "made"), [(0.5, FEWEST_ROUNDS), (7.5, 8), (1e9, 20)])
def test_time_is_limited_but_for_the_fewest_rounds(clock: Clock, seconds: float, made: int) -> None:
    call = clock.call(iter([50.0] * WARM_UP + [1.0] * 20))  # the time before is not counted
    assert len(time_in_turn({"call": call}, 20, CPU, seconds)["call"].rounds) == made


def test_spread_and_drift() -> None:
    assert _rounds(1, 2, 3, 4, 5).spread == pytest.approx((4 - 2) / 3)
    assert _rounds(2, 2, 3, 3).drift == _rounds(3, 3, 2, 2).drift == 1.5
    assert _rounds(2, 3, 2, 3).drift == 1
    assert _rounds(2, 2, 99, 3, 3).drift == 1.5, "the middle one is of neither half"
    assert _rounds(5).drift == 1


def test_percentiles_are_calls_that_were_made() -> None:
    seconds = random.Random(0).sample(range(1, 101), 100)
    assert [percentile(seconds, share) for share in (0.5, 0.95, 0.99)] == [50, 95, 99]


@pytest.mark.parametrize(("share", "needed"), [(0.95, 20), (0.99, 100)])
def test_percentiles_of_too_few_calls_are_not_told(share: float, needed: int) -> None:
    assert percentile([1.0] * needed, share) == 1
    assert percentile([1.0] * (needed - 1), share) is None


def test_percentiles_count_calls_by_weight() -> None:
    seconds, weights = [1.0] * 20 + [5.0] * 20, [0.76] * 20 + [0.24] * 20
    assert percentile(seconds, 0.5, weights) == 1
    assert percentile(seconds, 0.75, weights) == 1
    assert percentile(seconds, 0.77, weights) == 5


def test_a_ratio_is_paired_by_rounds() -> None:
    """A machine that slows down threefold takes nothing from a ratio of neighbours."""
    slow = [1 + 0.2 * turn for turn in range(11)]
    ratio = paired_ratio([2 * each for each in slow], slow)
    assert (ratio.value, ratio.low, ratio.high) == (2, 2, 2)


@pytest.mark.parametrize(("rounds", "cut"), [(6, 1), (8, 1), (9, 2), (12, 3), (20, 6)])
def test_the_interval_is_the_sign_tests(rounds: int, cut: int) -> None:
    """The ranks of the tables for a 95% interval of a median."""
    ratio = paired_ratio([float(each) for each in range(1, rounds + 1)], [1.0] * rounds)
    assert (ratio.low, ratio.high) == (cut, rounds + 1 - cut)


def test_few_rounds_bound_nothing() -> None:
    ratio = paired_ratio([2.0] * (FEWEST_ROUNDS - 1), [1.0] * (FEWEST_ROUNDS - 1))
    assert (ratio.value, ratio.low, ratio.high) == (2, 0, math.inf)
    assert not is_sharp(ratio)
    assert is_sharp(paired_ratio([2.0] * FEWEST_ROUNDS, [1.0] * FEWEST_ROUNDS))


def test_the_interval_holds_the_ratio_as_often_as_it_says() -> None:
    draw = random.Random(0)
    held = 0
    for _ in range(1000):
        reference = [2 * math.exp(draw.gauss(0, 0.2)) for _ in range(10)]
        ratio = paired_ratio(reference, [math.exp(draw.gauss(0, 0.2)) for _ in range(10)])
        held += ratio.low <= 2 <= ratio.high
    assert 960 <= held <= 995  # 97.9% for ten rounds


@pytest.mark.parametrize(("spread", "sharp"), [(0.08, True), (0.12, False)])
def test_a_wide_interval_is_too_noisy(spread: float, sharp: bool) -> None:
    reference = [2.0 * (1 + spread * (turn % 2)) for turn in range(10)]
    assert is_sharp(paired_ratio(reference, [1.0] * 10)) == sharp


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("Storage size calculation overflowed with sizes=[9]"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
)
def test_a_lack_of_memory_is_known_by_its_words(error: Exception, lacks: bool) -> None:
    assert lacks_memory(error) == lacks


@pytest.mark.parametrize(("seconds", "both"), [(6.0, 1500), (1.0, 500)])  # never less than the coarse stage alone
def test_stages_are_timed_by_image(
    seconds: float,
    both: float,
    clock: Clock,
    make_model: Callable[..., CoarseToFineViT],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model()
    monkeypatch.setattr(model, "coarse", lambda images: clock.call(iter([2.0]))())
    monkeypatch.setattr(model, "forward", lambda images: clock.call(iter([seconds]))())
    latency = time_stages(model, torch.zeros(4, 3, *model.image_size), rounds=3)
    assert (latency.coarse, latency.both) == (500, both)
