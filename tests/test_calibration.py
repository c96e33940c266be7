"""Wishes against every threshold one by one, promises against many draws, and scipy for the statistics."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from cfvit import CfvitError, StageMacs
from cfvit.calibration import (
    Accuracy,
    Calibration,
    Drop,
    Estimate,
    GmacsBudget,
    LatencyBudget,
    Risk,
    Saving,
    SelectiveRisk,
    StageLatency,
    Target,
    calibrate,
    check_drift,
    rank_images,
)
from cfvit.calibration.calibrated import parse_record
from cfvit.calibration.targets import TESTED, choose_eta, require_reachable
from cfvit.calibration.tradeoff import fit_mixture, fit_temperature, images_needed, paired_difference, share_estimate
from cfvit.modeling.exit import Exit, Measure, confidence_of, goes_on

MACS = StageMacs(coarse=1_000_000_000, fine=3_000_000_000, backbone=5_000_000_000)
LATENCY = StageLatency(coarse=2.0, both=10.0)
MEASURES: tuple[Measure, ...] = ("max_probability", "margin", "entropy", "energy")
TARGETS: tuple[Target, ...] = (
    GmacsBudget(2.5),
    Saving(40),
    LatencyBudget(5),
    Accuracy(60),
    Drop(1.5),
    Risk(0.02, 0.9),
    Risk(0.02, 0.9, "fixed_sequence"),
    SelectiveRisk(0.1, 0.9),
)
CLASSES = 3
REPEATS = 200

Images = tuple[Tensor, Tensor, Tensor]
"""Logits of the coarse and of the fine stage, and labels."""


def _of_lists(case: tuple[list[list[int]], list[list[int]], list[int]]) -> Images:
    coarse, fine, labels = case
    return torch.tensor(coarse, dtype=torch.float32), torch.tensor(fine, dtype=torch.float32), torch.tensor(labels)


_rows = st.lists(st.integers(-3, 3), min_size=CLASSES, max_size=CLASSES)
cases = st.integers(1, 12).flatmap(
    lambda count: st.tuples(
        st.lists(_rows, min_size=count, max_size=count),
        st.lists(_rows, min_size=count, max_size=count),
        st.lists(st.integers(0, CLASSES - 1), min_size=count, max_size=count),
    ).map(_of_lists)
)
"""Whole numbers, so that confidences are often equal."""


def _simulate(count: int, seed: int, *, classes: int = 5, shift: float = 0.0) -> Images:
    """A blurred and a sharper view of the same images; ``shift`` makes all of them harder."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    truth = torch.nn.functional.one_hot(labels, classes) * torch.rand(count, 1, generator=generator) * 5
    noise = torch.randn(2, count, classes, generator=generator)
    fine = truth * (1 - shift) + noise[0]
    return 1.5 * (fine + noise[1]), 2 * fine, labels


@pytest.fixture(scope="module")
def digits() -> Images:
    """Scikit-learn's digits: a linear model on 4 x 4 pixels and one on 8 x 8, scored on what they did not see."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    data: Any = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    views = [torch.nn.functional.avg_pool2d(pixels, side).flatten(1).numpy() for side in (2, 1)]
    seen = slice(0, 300)
    logits = [
        LogisticRegression(max_iter=300).fit(view[seen], data.target[seen]).decision_function(view[300:])
        for view in views
    ]
    return torch.tensor(logits[0]), torch.tensor(logits[1]), labels[300:]


def _drawn(images: Images, count: int, generator: np.random.Generator) -> Images:
    """So many images drawn independently, as from a population."""
    chosen = torch.from_numpy(generator.integers(0, len(images[2]), count))
    coarse, fine, labels = images
    return coarse[chosen], fine[chosen], labels[chosen]


def _calibrate(images: Images, target: Target, **options: Any) -> Calibration:
    return calibrate(*images, MACS, target, **{"latency": LATENCY, "allow_missing_classes": True, **options})


def _outcome(images: Images, eta: float, measure: Measure = "max_probability", temperature: float = 1.0) -> list[int]:
    """Images that go on, right answers, answers that got worse and better than the fine stage's, one by one."""
    coarse, fine, labels = images
    counts = [0, 0, 0, 0]
    for i in range(len(labels)):
        hard = bool(goes_on(confidence_of(coarse[i : i + 1], measure, temperature), eta))
        right = int((fine if hard else coarse)[i].argmax()) == int(labels[i])
        fine_right = int(fine[i].argmax()) == int(labels[i])
        for place, true in enumerate((hard, right, fine_right and not right, right and not fine_right)):
            counts[place] += true
    return counts


def _all_thresholds(images: Images, measure: Measure = "max_probability") -> list[float]:
    """One for each way to part the images, from sending all on to sending none."""
    confidences = sorted(set(confidence_of(images[0], measure).tolist()), reverse=True)
    return [1.0, *(c for c in confidences if 0 < c < 1), 0.0]


# the trade-off ---------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(images=cases, measure=st.sampled_from(MEASURES), temperature=st.sampled_from([1.0, 0.3, 2.5]))
def test_every_split_has_a_threshold_that_makes_it(images: Images, measure: Measure, temperature: float) -> None:
    trade = rank_images(*images, measure, temperature)
    splits = set()
    for go_on in trade.reachable.tolist():
        eta = trade.threshold(go_on)
        better = int(trade.better[go_on])
        expected = [go_on, int(trade.right[go_on]), int(trade.worse[go_on]), better]
        assert _outcome(images, eta, measure, temperature) == expected
        assert trade.gone_on(eta) == go_on
        splits.add(go_on)
    ranked = trade.ranked.tolist()
    assert splits >= {sum(r < c for r in ranked) for c in ranked}
    assert np.all(np.diff(trade.worse) <= 0)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.2, 0.8, 0.5), (0.31, 0.37, 0.34), (0.9991, 0.9999, 0.9995), (0.5, 1.0, 0.8), (0.0, 0.0121, 0.006)],
)
def test_a_threshold_is_a_short_number_away_from_both(low: float, high: float, expected: float) -> None:
    images = _confident([low, high])
    assert rank_images(*images, "margin").threshold(1) == expected


def _confident(margins: list[float]) -> Images:
    """Two classes whose probabilities have these distances."""
    first = torch.tensor(margins, dtype=torch.float64)
    coarse = torch.stack([torch.log((1 + first) / 2), torch.log((1 - first) / 2).clamp(min=-200)], dim=1)
    return coarse, coarse, torch.zeros(len(margins), dtype=torch.long)


@settings(max_examples=200, deadline=None)
@given(low=st.floats(0, 1, width=32), steps=st.integers(1, 5))
@example(low=1 - 2**-24, steps=1)
@example(low=1 - 2**-23, steps=2)
@example(low=0.0, steps=1)
def test_neighbours_in_float32_are_parted(low: float, steps: int) -> None:
    high = np.float32(low)
    for _ in range(steps):
        high = np.nextafter(high, np.float32(2))
    if high > 1:
        return
    pair = torch.tensor([low, float(high)])
    trade = replace(rank_images(*_confident([0.1, 0.9])), ranked=pair)
    eta = trade.threshold(1)
    assert 0 < eta < 1
    assert goes_on(pair, eta).tolist() == [True, False]


# wishes ----------------------------------------------------------------------------------------


def _cost(go_on: int, count: int) -> float:
    return 1 + 3 * go_on / count


@settings(max_examples=60, deadline=None)
@given(images=cases, budget=st.sampled_from([1.0, 1.5, 2.0, 3.1, 4.0, 9.0]), unit=st.integers(0, 2))
def test_budgets_give_the_most_accurate_threshold_within(images: Images, budget: float, unit: int) -> None:
    """The same budget in GMACs, as a saving of the backbone's 5, and in milliseconds of 2 to 10."""
    wishes = (GmacsBudget(budget), Saving(max(0, 100 * (1 - budget / 5))), LatencyBudget(2 + (budget - 1) / 3 * 8))
    count = len(images[2])
    outcomes = [_outcome(images, eta)[:2] for eta in _all_thresholds(images)]
    best = max((right, -go_on) for go_on, right in outcomes if _cost(go_on, count) <= budget + 1e-6)
    chosen = _calibrate(images, wishes[unit])
    go_on, right, *_ = _outcome(images, chosen.threshold)
    assert (right, -go_on) == best


@settings(max_examples=60, deadline=None)
@given(images=cases, percent=st.sampled_from([0.0, 20.0, 33.0, 50.0, 80.0, 100.0]))
def test_accuracy_is_reached_at_least_cost_or_the_best_is_named(images: Images, percent: float) -> None:
    outcomes = [_outcome(images, eta)[:2] for eta in _all_thresholds(images)]
    enough = [go_on for go_on, right in outcomes if 100 * right / len(images[2]) >= percent - 1e-6]
    if enough:
        assert _outcome(images, _calibrate(images, Accuracy(percent)).threshold)[0] == min(enough)
        return
    with pytest.raises(CfvitError, match="out of reach") as caught:
        _calibrate(images, Accuracy(percent))
    named = re.search(r"best is ([\d.]+)% at eta ([\d.e-]+);", str(caught.value))
    assert named is not None
    right = _outcome(images, float(named[2]))[1]
    assert 100 * right / len(images[2]) == pytest.approx(float(named[1]), abs=0.01)
    assert right == max(right for _, right in outcomes)
    _calibrate(images, Accuracy(float(named[1])))


@settings(max_examples=60, deadline=None)
@given(images=cases, share=st.sampled_from([0.05, 0.2, 0.4, 0.7]), confidence=st.sampled_from([0.5, 0.8, 0.95]))
def test_risk_is_the_lowest_threshold_whose_bound_holds(images: Images, share: float, confidence: float) -> None:
    """By scipy's binomial: ``upper_bound`` over all splits, ``fixed_sequence`` over its grid from the top."""
    count = len(images[2])

    def granted(eta: float) -> bool:
        go_on, _, worse, _ = _outcome(images, eta)
        bound = stats.beta.ppf(confidence, worse + 1, count - worse) if worse < count else 1.0
        return bool(go_on == count or bound <= share)

    fewest = min(_outcome(images, eta)[0] for eta in _all_thresholds(images) if granted(eta))
    assert _outcome(images, _calibrate(images, Risk(share, confidence)).threshold)[0] == fewest

    def rejected(eta: float) -> bool:
        return bool(stats.binom.cdf(_outcome(images, eta)[2], count, share) <= 1 - confidence)

    chosen = _calibrate(images, Risk(share, confidence, "fixed_sequence")).threshold
    place = TESTED.tolist().index(chosen)
    assert chosen == 1 or rejected(chosen)
    assert place == 0 or not rejected(float(TESTED[place - 1]))


def test_an_accuracy_that_no_threshold_reaches_names_the_best(fails: Callable[..., Any]) -> None:
    coarse = torch.tensor([[3.0, 0], [0, 2], [0, 1], [1, 0]])
    with fails(r"^an accuracy of 99.9% is out of reach: the best is 75.00% at eta 0; ask for at most that$"):
        _calibrate((coarse, coarse, torch.tensor([0, 1, 0, 0])), Accuracy(99.9))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            GmacsBudget(0.9),
            r"^0.9 GMACs is out of reach: the coarse stage alone takes 1 GMACs at eta 0; ask for at least that$",
        ),
        (Saving(90), r"^a saving of 90% is out of reach: the most is 80.00% at eta 0; ask for at most that$"),
        (
            LatencyBudget(1.5),
            r"^1.5 ms is out of reach: the coarse stage alone takes 2 ms at eta 0; ask for at least that$",
        ),
    ],
)
def test_what_is_out_of_reach_names_what_is_not(target: Target, message: str, fails: Callable[..., Any]) -> None:
    with fails(message):
        _calibrate(_simulate(20, 0), target)
    for reachable in (GmacsBudget(1), Saving(80), LatencyBudget(2)):
        assert _calibrate(_simulate(20, 0), reachable).fine_share.value == 0


@pytest.mark.parametrize("target", [Accuracy(1), Drop(1), Risk(0.1), GmacsBudget(1), Saving(80), LatencyBudget(2)])
def test_what_may_be_within_reach_is_not_refused_without_images(target: Target) -> None:
    require_reachable(target, MACS, LATENCY)


def test_times_of_ragged_batches_are_averaged_over_how_many_images_go_on() -> None:
    times = (2.0, 7.0, 8.0, 9.5)
    latency = StageLatency(times[0], times[-1], times[1:-1])
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        chances = [share ** sum(hard) * (1 - share) ** (3 - sum(hard)) for hard in itertools.product((0, 1), repeat=3)]
        each = [times[sum(hard)] for hard in itertools.product((0, 1), repeat=3)]
        assert latency.expected(share) == pytest.approx(sum(c * t for c, t in zip(chances, each, strict=True)))
    images = _simulate(60, 0)
    straight = _calibrate(images, LatencyBudget(6), latency=StageLatency(2, 9.5))
    ragged = _calibrate(images, LatencyBudget(6), latency=latency)
    assert ragged.fine_share.value < straight.fine_share.value
    assert ragged.latency is not None
    assert ragged.latency.value == pytest.approx(latency.expected(ragged.fine_share.value))
    assert ragged.latency.value <= 6


def test_a_latency_wish_needs_measured_times(fails: Callable[..., Any]) -> None:
    with fails("pass latency="):
        _calibrate(_simulate(20, 0), LatencyBudget(5), latency=None)
    assert _calibrate(_simulate(20, 0), Drop(1), latency=None).latency is None


# promises --------------------------------------------------------------------------------------


def _most_breaks(chance: float) -> int:
    """As many of the repeats as happen by chance, but once in a thousand."""
    return int(stats.binom.ppf(0.999, REPEATS, chance))


def _worse_everywhere(population: Images, eta: float) -> float:
    coarse, fine, labels = population
    exits = ~goes_on(confidence_of(coarse), eta)
    lost = exits & (coarse.argmax(-1) != labels) & (fine.argmax(-1) == labels)
    return lost.double().mean().item()


def _risks(population: Images, count: int, choose: Callable[[Images], float]) -> np.ndarray:
    """The true risk of each of many choices, each from images of its own."""
    generator = np.random.default_rng(0)
    return np.array(
        [_worse_everywhere(population, choose(_drawn(population, count, generator))) for _ in range(REPEATS)]
    )


def _choose_naively(images: Images, share: float) -> float:
    """The lowest threshold that is good enough on the images at hand."""
    trade = rank_images(*images)
    fits = trade.reachable[trade.worse[trade.reachable] <= share * trade.images]
    return trade.threshold(int(fits[0]))


@pytest.mark.parametrize("source", ["simulated", "digits"])
def test_promises_are_kept_as_often_as_promised(source: str, digits: Images) -> None:
    population = digits if source == "digits" else _simulate(20_000, 1)
    share, count = 0.02, 600

    def chosen_by(method: Any) -> np.ndarray:
        target = Risk(share, 0.9, method)
        return _risks(population, count, lambda images: choose_eta(target, rank_images(*images), MACS))

    assert _worse_everywhere(population, 0) > 2 * share, "a promise that nothing can break"
    naive = _risks(population, count, lambda images: _choose_naively(images, share))
    assert (naive > share).sum() > _most_breaks(0.1), "a promise that anyone would keep"
    for method in ("upper_bound", "fixed_sequence"):
        risks = chosen_by(method)
        assert (risks > share).sum() <= _most_breaks(0.1), method
        assert risks.mean() > share / 4, f"{method} saves next to nothing"


@pytest.mark.parametrize("source", ["simulated", "digits", "surest are worst"])
def test_few_answers_of_the_coarse_stage_are_wrong_as_often_as_promised(source: str, digits: Images) -> None:
    coarse, fine, labels = digits if source == "digits" else _simulate(20_000, 1)
    if source == "surest are worst":  # then the share of wrong answers rises with eta
        coarse = torch.where(confidence_of(coarse)[:, None] > 0.8, coarse.roll(1, dims=1), coarse)
    confidence, wrong = confidence_of(coarse), (coarse.argmax(-1) != labels).double()
    share = wrong.mean().item() / 2
    generator = np.random.default_rng(0)
    risks, etas = [], []
    for _ in range(REPEATS):
        drawn = _drawn((coarse, fine, labels), 600, generator)
        etas.append(choose_eta(SelectiveRisk(share, 0.9), rank_images(*drawn), MACS))
        exits = ~goes_on(confidence, etas[-1])
        risks.append(wrong[exits].mean().item() if exits.any() else 0.0)
    assert (np.array(risks) > share).sum() <= _most_breaks(0.1)
    assert source == "surest are worst" or np.mean(risks) > share / 4, "it saves next to nothing"


def test_of_the_images_that_exit_those_that_are_wrong_are_told() -> None:
    images = _simulate(2000, 3)
    chosen = _calibrate(images, SelectiveRisk(0.1))
    exits = ~goes_on(confidence_of(images[0]), chosen.threshold)
    assert 0 < exits.sum() < 2000
    wrong = (images[0].argmax(-1) != images[2])[exits].double().mean().item()
    assert chosen.wrong_exits is not None
    assert chosen.wrong_exits.value == pytest.approx(wrong)
    assert chosen.wrong_exits.low < wrong < chosen.wrong_exits.high < 0.1
    assert "at most 10% of the coarse stage's answers are wrong" in chosen.promise
    few = _calibrate(_simulate(40, 0), SelectiveRisk(0.05))
    assert (few.threshold, few.wrong_exits) == (1, None)
    assert "40 images are too few to promise this of a threshold below 1: at least 86 are needed" in few.warnings


def test_calibrate_gives_the_promise_in_words_and_the_figures_of_its_images() -> None:
    images = _simulate(2000, 3)
    chosen = _calibrate(images, Risk(0.01))
    assert chosen.promise.startswith(
        "with a probability of at least 95% over the choice of the 2000 images, at most 1%"
    )
    assert chosen.warnings == ()
    go_on, right, worse, better = _outcome(images, chosen.threshold)
    assert 0 < go_on < 2000
    assert stats.beta.ppf(0.95, worse + 1, 2000 - worse) <= 0.01
    assert chosen.exit_share == pytest.approx(1 - go_on / 2000)
    figures = {
        "accuracy": right / 20,
        "drop": (worse - better) / 20,
        "worse": worse / 2000,
        "fine_share": go_on / 2000,
        "gmacs": 1 + 3 * go_on / 2000,
        "saving": 100 - 20 * (1 + 3 * go_on / 2000),
        "latency": 2 + 8 * go_on / 2000,
        "coarse_accuracy": _outcome(images, 0)[1] / 20,
        "fine_accuracy": _outcome(images, 1)[1] / 20,
    }
    for name, value in figures.items():
        estimate = getattr(chosen, name)
        assert estimate.value == pytest.approx(value), name
        assert estimate.low < value < estimate.high, name
    assert "none" in _calibrate(images, Drop(1)).promise


def test_logits_may_have_gradients() -> None:
    coarse, fine, labels = _simulate(300, 0)
    expected = calibrate(coarse, fine, labels, MACS, Saving(40), coarse_weight=0.2)
    coarse, fine = coarse.requires_grad_(), fine.requires_grad_()
    assert calibrate(coarse, fine, labels, MACS, Saving(40), coarse_weight=0.2) == expected
    assert check_drift(expected, coarse) == check_drift(expected, coarse.detach())
    assert fit_mixture(coarse, fine, labels) == fit_mixture(coarse.detach(), fine.detach(), labels)


def test_at_eta_1_nothing_is_lost_for_certain() -> None:
    chosen = _calibrate(_simulate(100, 3), Drop(0))
    assert chosen.threshold < 1
    assert chosen.drop.low < chosen.drop.high
    chosen = _calibrate(_simulate(20, 3), Risk(0.01))
    assert chosen.threshold == 1
    assert chosen.drop == chosen.worse == Estimate(0.0, 0.0, 0.0)


@pytest.mark.parametrize(("target", "share"), [(GmacsBudget(1), 0), (Drop(0), 1)])
def test_how_many_go_on_is_certain_at_the_ends(target: Target, share: int) -> None:
    right, labels = 9 * torch.eye(2), torch.tensor([0, 1])
    chosen = _calibrate((right.flip(0), right, labels), target)
    certain = {"fine_share": share, "gmacs": 1 + 3 * share, "saving": 80 - 60 * share, "latency": 2 + 8 * share}
    assert chosen.threshold == share
    for name, value in certain.items():
        found = getattr(chosen, name)
        assert (found.low, found.value, found.high) == (pytest.approx(value),) * 3, name
    assert chosen.accuracy.low < chosen.accuracy.high


def test_warnings_say_what_cannot_be_known() -> None:
    images = _simulate(40, 0)
    too_few = _calibrate(images, Risk(0.01))
    assert too_few.threshold == 1
    assert too_few.warnings == (
        "40 images are too few to promise this of a threshold below 1: at least 299 are needed",
    )
    assert "one of 40 images is 2.5 points" in _calibrate(images, Drop(1)).warnings[0]
    costly = StageMacs(coarse=3, fine=3, backbone=4)
    assert "more than the plain backbone's" in calibrate(*images, costly, Drop(0)).warnings[-1]
    one_class = torch.zeros(40, dtype=torch.long)
    (said,) = _calibrate((images[0], images[1], one_class), Drop(5)).warnings
    assert said == "classes 1, 2, 3, 4 have none of the 40 images, so nothing is known of them"
    (said,) = _calibrate((torch.zeros(40, 5), images[1], images[2]), Drop(5)).warnings
    assert said.startswith("all images have the same confidence")


@pytest.mark.parametrize(("share", "confidence"), [(0.01, 0.95), (0.02, 0.9), (0.5, 0.5), (0.001, 0.99)])
def test_so_many_images_are_needed_and_no_fewer(share: float, confidence: float) -> None:
    needed = images_needed(share, confidence)
    assert stats.beta.ppf(confidence, 1, needed) <= share + 1e-9
    assert needed == 1 or stats.beta.ppf(confidence, 1, needed - 1) > share


# statistics ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (1, 1), (3, 40), (40, 40), (499, 1000), (12_000, 50_000)])
def test_shares_have_clopper_and_pearsons_interval(hits: int, count: int) -> None:
    expected = stats.binomtest(hits, count).proportion_ci(0.9, method="exact")
    estimate = share_estimate(hits, count, 0.9)
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=1e-7)


def test_paired_interval_holds_the_difference_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    draws = generator.multinomial(400, [0.06, 0.02, 0.92], REPEATS)
    held = 0
    for more, less, _ in draws.tolist():
        estimate = paired_difference(more, less, 400, 0.9)
        assert estimate.value == (more - less) / 400
        held += estimate.low <= 0.04 <= estimate.high
    assert _most_breaks(0.1) >= REPEATS - held >= 5


# confidence ------------------------------------------------------------------------------------


def test_measures_of_an_image_by_hand() -> None:
    logits = torch.tensor([[math.log(6), math.log(3), 0.0]])
    p = np.array([0.6, 0.3, 0.1])
    expected = {
        "max_probability": 0.6,
        "margin": 0.3,
        "entropy": 1 + (p * np.log(p)).sum() / math.log(3),
        "energy": (1 + math.log(10) / (1 + math.log(10))) / 2,
    }
    for measure in MEASURES:
        assert confidence_of(logits, measure).item() == pytest.approx(expected[measure], abs=1e-6)
    warm = np.sqrt(p) / np.sqrt(p).sum()
    assert confidence_of(logits, temperature=2).item() == pytest.approx(warm[0], abs=1e-6)
    energy = 2 * np.log(np.sqrt([6, 3, 1]).sum())
    assert confidence_of(logits, "energy", 2).item() == pytest.approx((1 + energy / (1 + energy)) / 2, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    logits=st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=1, max_size=5),
    measure=st.sampled_from(MEASURES),
)
def test_every_measure_lies_between_0_and_1(logits: list[list[float]], measure: Measure) -> None:
    confidence = confidence_of(torch.tensor(logits), measure)
    assert confidence.dtype == torch.float32
    assert ((confidence >= 0) & (confidence <= 1)).all()


@pytest.mark.parametrize("measure", MEASURES)
def test_ends_mean_the_same_for_every_measure(measure: Measure) -> None:
    images = _simulate(60, 5)
    assert _calibrate(images, Drop(100), measure=measure).threshold == 0
    assert _calibrate(images, Drop(100), measure=measure).fine_share.value == 0
    assert _calibrate(images, Risk(1e-6), measure=measure).fine_share.value == 1


@pytest.mark.parametrize("truth", [0.4, 1.0, 3.0])
def test_fitted_temperature_is_the_one_that_drew_the_labels(truth: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20_000, 4, generator=generator)
    labels = (logits / truth).softmax(dim=-1).multinomial(1, generator=generator).flatten()
    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(truth, rel=0.05)
    losses = [
        torch.nn.functional.cross_entropy(logits / t, labels).item() for t in (0.98 * fitted, fitted, 1.02 * fitted)
    ]
    assert losses[1] == min(losses)


def test_fitted_temperature_stays_in_range_where_there_is_no_least() -> None:
    logits = torch.tensor([[5.0, 0], [0, 5]])
    assert fit_temperature(logits, torch.tensor([0, 1])) == pytest.approx(0.1, rel=1e-3)
    assert fit_temperature(logits, torch.tensor([1, 0])) == pytest.approx(10, rel=1e-3)


def test_fitted_mixture_is_the_one_that_drew_the_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    coarse, fine = 2 * torch.randn(2, 20_000, 4, generator=generator)
    labels = (0.5 * coarse + 1.5 * fine).softmax(dim=-1).multinomial(1, generator=generator).flatten()
    weight, temperature = fit_mixture(coarse, fine, labels)
    assert (weight, temperature) == pytest.approx((0.25, 0.5), rel=0.1)
    answer = Exit(coarse_weight=weight).answer(coarse, fine)
    torch.testing.assert_close(answer / temperature, 0.5 * coarse + 1.5 * fine, atol=0.5, rtol=0.1)
    assert fit_mixture(coarse, fine, fine.argmax(dim=-1)) == pytest.approx((0, 0.1), abs=0.01)


def test_a_mixture_is_calibrated_as_the_fine_stage() -> None:
    coarse, fine, labels = _simulate(500, 4)
    mixed = 0.7 * fine + 0.3 * coarse
    chosen = _calibrate((coarse, fine, labels), Saving(50), coarse_weight=0.3)
    expected = _calibrate((coarse, mixed, labels), Saving(50))
    assert chosen == replace(expected, coarse_weight=0.3)
    assert chosen.exit == Exit(eta=expected.threshold, coarse_weight=0.3)


# files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: type(target).__name__)
@pytest.mark.parametrize("measure", ["max_probability", "energy"])
def test_a_calibration_survives_json(target: Target, measure: Measure) -> None:
    latency = LATENCY if isinstance(target, LatencyBudget) else None
    chosen = _calibrate(_simulate(300, 2), target, measure=measure, latency=latency, coarse_temperature=1.5)
    text = json.dumps(asdict(chosen), allow_nan=False)
    assert parse_record(Calibration, text, "calibration") == chosen


def _changed(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    data = json.loads(json.dumps(data))
    *parents, last = path.split(".")
    inner = data
    for key in parents:
        inner = inner[key]
    if value is KeyError:
        del inner[last]
    else:
        inner[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("threshold", KeyError, "^calibration.threshold is missing"),
        ("eta", 0.5, "^calibration.eta is unknown"),
        ("threshold", "0.5", "^calibration.threshold is '0.5': Input should be a valid number"),
        ("threshold", 1.5, "threshold is 1.5"),
        ("threshold", math.nan, "threshold is nan"),
        ("threshold", True, "threshold is True"),
        ("images", 10.0, "^calibration.images is 10.0: Input should be a valid integer"),
        ("images", 0, "calibration.images is 0: "),
        ("measure", "hope", "measure is 'hope'"),
        ("measure", ["margin"], "measure is "),
        ("coarse_temperature", 0, "coarse_temperature is 0"),
        ("coarse_weight", 1, "coarse_weight is 1"),
        ("level", 1, "level is 1"),
        ("warnings", "none", "warnings is 'none'"),
        ("warnings", [1], "warnings.0 is 1"),
        ("target", {"points": 1.0}, "target is {'points': 1.0}: .*'kind'"),
        ("target.kind", "Wish", "target is .* 'GmacsBudget', "),
        ("target.points", -1, "drop is -1"),
        ("target.points", None, "target.Drop.points is None"),
        ("target.share", 0.1, "target.Drop.share is unknown"),
        ("accuracy", None, "accuracy is None"),
        ("accuracy.low", 101, "outside its interval"),
        ("gmacs.low", KeyError, "^calibration.gmacs.low is missing"),
        ("profile.values", [], "confidence profile"),
        ("profile.shares", [0.5], "confidence profile"),
    ],
)
def test_a_damaged_calibration_is_refused(path: str, value: Any, message: str, fails: Callable[..., Any]) -> None:
    data = asdict(_calibrate(_simulate(300, 2), Drop(1)))
    with fails(message):
        parse_record(Calibration, json.dumps(_changed(data, path, value)), "calibration")
    parse_record(Calibration, json.dumps(data), "calibration")


def test_what_is_no_dictionary_is_refused(fails: Callable[..., Any]) -> None:
    with fails(r"^calibration is \[1\]: "):
        parse_record(Calibration, "[1]", "calibration")


# bad input -------------------------------------------------------------------------------------

LOGITS, LABELS = torch.tensor([[1.0, 0], [0, 1], [2, 0]]), torch.tensor([0, 1, 0])
BROKEN = torch.tensor([[1.0, 0], [torch.nan, 1], [torch.inf, 0]])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((BROKEN, LOGITS, LABELS), "coarse logits of 2 of 3 images are not finite, image 1 first"),
        ((LOGITS, BROKEN, LABELS), "fine logits of 2 of 3 images are not finite"),
        ((LOGITS, LOGITS[:2], LABELS), r"are \[3, 2\], \[2, 2\] and \[3\]: give"),
        ((LOGITS, LOGITS, LABELS[:2]), r"and \[2\]"),
        ((LOGITS, LOGITS, LABELS[:, None]), r"and \[3, 1\]"),
        ((LOGITS[:0], LOGITS[:0], LABELS[:0]), "coarse logits are of no image"),
        ((LOGITS[0], LOGITS[0], LABELS), r"coarse logits are float32 of shape \[2\]"),
        ((LOGITS, LOGITS.long(), LABELS), "fine logits are int64"),
        ((LOGITS, LOGITS, LABELS.float()), "labels are float32"),
        ((LOGITS, LOGITS, LABELS - 1), "a label is -1: give class indices from 0 to 1"),
        ((LOGITS, LOGITS, LABELS + 1), "a label is 2"),
        ((LOGITS, LOGITS, 0 * LABELS), "^class 1 has none of the 3 images: add some, or pass allow_missing"),
        (
            (torch.zeros(1, 9), torch.zeros(1, 9), LABELS[:1]),
            "^classes 1, 2, 3, 4, 5 and 3 more have none of the 1 image:",
        ),
    ],
)
def test_images_that_cannot_be_used_are_refused(images: Images, message: str, fails: Callable[..., Any]) -> None:
    with fails(message):
        calibrate(*images, MACS, Drop(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GmacsBudget(0), "gmacs is 0"),
        (lambda: GmacsBudget(math.inf), "gmacs is inf"),
        (lambda: Saving(100), "saving is 100: give a percentage from 0 to below 100"),
        (lambda: Saving(-1), "saving is -1"),
        (lambda: LatencyBudget(-2), "latency is -2"),
        (lambda: Accuracy(101), "accuracy is 101"),
        (lambda: Accuracy("high"), "accuracy is 'high'"),  # type: ignore[arg-type]
        (lambda: Drop(math.nan), "drop is nan"),
        (lambda: Drop(True), "drop is True"),
        (lambda: Risk(0), "share of the risk is 0"),
        (lambda: Risk(0.1, 1), "confidence of the risk is 1"),
        (lambda: Risk(0.1, 0.9, "luck"), "method of the risk is 'luck'"),  # type: ignore[arg-type]
        (lambda: StageLatency(0, 1), "coarse latency is 0"),
        (lambda: StageLatency(2, 1), "both stages take 1 ms and the coarse one 2 ms"),
        (lambda: StageLatency(1, 3, (2.5, 2)), "fewer images of a batch that go on take longer than more"),
        (lambda: confidence_of(LOGITS, "hope"), "measure is 'hope'"),  # type: ignore[arg-type]
        (lambda: confidence_of(LOGITS, temperature=0), "temperature is 0"),
        (lambda: confidence_of(LOGITS[:, :1], "entropy"), "of 1 class"),
        (lambda: calibrate(LOGITS, LOGITS, LABELS, MACS, Drop(1), level=95), "level is 95"),
        (lambda: calibrate(LOGITS, LOGITS, LABELS, MACS, Drop(1), fine_temperature=-1), "fine_temperature is -1"),
        (lambda: calibrate(LOGITS, LOGITS, LABELS, MACS, 0.5), "target is 0.5: give one of GmacsBudget, "),  # type: ignore[arg-type]
        (lambda: calibrate(LOGITS.numpy(), LOGITS, LABELS, MACS, Drop(1)), "coarse logits are a ndarray: give a"),  # type: ignore[arg-type]
        (lambda: calibrate(LOGITS, LOGITS, [0, 1], MACS, Drop(1)), "labels are a list: give a tensor"),  # type: ignore[arg-type]
        (lambda: StageLatency(1, 3, (math.nan,)), "a latency in between is nan"),
        (lambda: confidence_of(LOGITS, temperature="2"), "temperature is '2'"),  # type: ignore[arg-type]
        (lambda: MACS.expected("half"), "fine_share is 'half'"),  # type: ignore[arg-type]
    ],
)
def test_values_out_of_range_are_refused(make: Callable[[], object], message: str, fails: Callable[..., Any]) -> None:
    with fails(message):
        make()


@pytest.mark.parametrize("value", ["0.5", None, [1], 1j, math.nan, math.inf, True])
@pytest.mark.parametrize("name", ["level", "coarse_temperature", "fine_temperature", "coarse_weight"])
def test_what_is_no_number_is_refused(name: str, value: Any, fails: Callable[..., Any]) -> None:
    given: dict[str, Any] = {name: value}
    with fails(f"{name} is {re.escape(repr(value))}: give "):
        calibrate(LOGITS, LOGITS, LABELS, MACS, Drop(1), **given)


# drift -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["simulated", "digits"])
def test_drift_does_not_cry_wolf(source: str, digits: Images) -> None:
    population = digits if source == "digits" else _simulate(5000, 1)
    generator = np.random.default_rng(1)
    alarms = 0
    for _ in range(REPEATS):
        chosen = _calibrate(_drawn(population, 300, generator), Saving(30))
        alarms += check_drift(chosen, _drawn(population, 200, generator)[0], alpha=0.05).drifted
    assert alarms <= _most_breaks(0.05)


@pytest.mark.parametrize("measure", MEASURES)
def test_drift_sees_harder_images(measure: Measure) -> None:
    chosen = _calibrate(_simulate(2000, 1), Saving(50), measure=measure)
    found = check_drift(chosen, _simulate(500, 2, shift=0.7)[0])
    assert found.drifted
    assert found.fine_share > found.expected_fine_share
    assert re.match(r"^[\d.]+ times as many images go on as in .* p < 0.001\): recalibrate$", found.sentence)


def test_drift_sees_another_distribution_behind_the_same_share() -> None:
    coarse, fine, labels = _simulate(2000, 1)
    chosen = _calibrate((coarse, fine, labels), Saving(50))
    confidence = confidence_of(coarse)
    extreme = torch.where(goes_on(confidence, chosen.threshold)[:, None], 0.01 * coarse, 9 * coarse)
    found = check_drift(chosen, extreme)
    assert found.drifted
    assert found.fine_share_p > 0.5
    assert "confidence is distributed otherwise" in found.sentence


def test_drift_says_so_if_there_is_none() -> None:
    chosen = _calibrate(_simulate(2000, 1), Saving(50))
    assert check_drift(chosen, _simulate(2000, 9)[0]).sentence.startswith("looks like the calibration set (p = ")
    few = check_drift(chosen, _simulate(10, 9)[0])
    assert few.sentence.endswith(", as far as 10 can tell")
    assert asdict(few)["images"] == 10


def test_drift_of_the_calibration_images_themselves_is_none() -> None:
    images = _simulate(777, 4)
    chosen = _calibrate(images, Drop(1))
    found = check_drift(chosen, images[0])
    assert (found.distance, found.fine_share) == (0, found.expected_fine_share)
    assert found.distance_p == found.fine_share_p == 1


@pytest.mark.parametrize(
    ("logits", "alpha", "message"),
    [
        (LOGITS, 0.01, "logits of 2 classes, calibrated on 5"),
        (torch.zeros(0, 5), 0.01, "of no image"),
        (torch.full((2, 5), torch.nan), 0.01, "not finite"),
        (torch.zeros(2, 5), 1.0, "alpha is 1.0"),
    ],
)
def test_drift_refuses_what_it_cannot_compare(
    logits: Tensor, alpha: float, message: str, fails: Callable[..., Any]
) -> None:
    with fails(message):
        check_drift(_calibrate(_simulate(50, 0), Drop(1)), logits, alpha)
