"""What is timed, in which order, and what the figures beside the times are. Times themselves are not judged."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cfvit import CoarseToFineViT, Predictor, count_macs
from cfvit.evaluation import bench as bench_module
from cfvit.evaluation.bench import BenchRow, Timing, bench, threshold_for_share, time_in_turn
from cfvit.inference import goes_on

CPU = torch.device("cpu")


def test_calls_take_turns() -> None:
    called: list[str] = []
    calls: dict[str, Callable[[], object]] = {name: lambda name=name: called.append(name) for name in "abc"}
    time_in_turn(calls, 3, CPU)
    assert called == list("abc") * (3 + 2)


def test_the_first_two_rounds_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the call moves on."""
    now = 0
    seconds = iter([100, 90, 3, 1, 2])

    def call() -> None:
        nonlocal now
        now += next(seconds)

    monkeypatch.setattr(bench_module, "time", SimpleNamespace(perf_counter=lambda: now))
    assert time_in_turn({"call": call}, 3, CPU) == {"call": Timing(median=2, fastest=1, slowest=3)}


@pytest.mark.parametrize(("share", "sent"), [(0, 0), (0.1, 1), (0.25, 2), (0.5, 4), (0.95, 8), (1, 8)])
def test_threshold_sends_exactly_the_share(share: float, sent: int) -> None:
    confidence = torch.tensor([0.9, 0.2, 0.5, 1.0, 0.4, 0.3, 0.6, 0.7])
    assert goes_on(confidence, threshold_for_share(confidence, share)).sum() == sent


@pytest.mark.parametrize(("share", "sent"), [(0, 0), (1, 3)])
def test_threshold_sends_none_or_all_even_of_what_rounds_to_1(share: float, sent: int) -> None:
    confidence = torch.ones(3)
    assert goes_on(confidence, threshold_for_share(confidence, share)).sum() == sent


@pytest.fixture(scope="module")
def model(make_model: Callable[..., CoarseToFineViT]) -> CoarseToFineViT:
    return make_model()


@pytest.fixture
def images(model: CoarseToFineViT, make_images: Callable[..., Tensor]) -> Tensor:
    return make_images(model, 4)


def test_rows_follow_from_the_times_and_the_macs(
    model: CoarseToFineViT, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    timings: dict[str, Timing] = {}

    def record(*arguments: Any) -> dict[str, Timing]:
        timings.update(time_in_turn(*arguments))
        return timings

    monkeypatch.setattr(bench_module, "time_in_turn", record)
    rows = bench(model, images, 0.25, rounds=2)
    macs = count_macs(model)
    assert [row.name for row in rows] == ["backbone", "coarse", "both", "predictor, 25% fine"]
    costs = [macs.backbone, macs.coarse, macs.both, macs.coarse + macs.fine / 4]
    for row, cost, timing in zip(rows, costs, timings.values(), strict=True):
        assert row == BenchRow(
            name=row.name,
            batch_size=4,
            images_per_second=4 / timing.median,
            speedup=timings["backbone"].median / timing.median,
            macs_ratio=macs.backbone / cost,
            spread=timing.slowest / timing.fastest,
        )


def test_each_row_times_what_it_names(model: CoarseToFineViT, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    results: dict[str, Any] = {}

    def call_each(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, Timing]:
        results.update({name: call() for name, call in calls.items()})
        return time_in_turn({name: lambda: None for name in calls}, rounds, device)

    monkeypatch.setattr(bench_module, "time_in_turn", call_each)
    bench(model, images, 0.5)
    with torch.no_grad():
        both, plain = model(images), model.backbone(images)
    torch.testing.assert_close(results["backbone"], plain)
    torch.testing.assert_close(results["coarse"].logits, both.coarse)
    torch.testing.assert_close(results["both"], both)
    assert results["predictor"].stage.sum() == 2
    hard = results["predictor"].stage == 1
    torch.testing.assert_close(results["predictor"].logits, torch.where(hard[:, None], both.fine, both.coarse))


def test_the_share_is_that_of_whole_images(model: CoarseToFineViT, images: Tensor) -> None:
    assert bench(model, images[:1], 0.25, rounds=1)[-1].name == "predictor, 0% fine"
    (*_, predictor) = bench(model, images[:3], 0.25, rounds=1)
    assert predictor.name == "predictor, 33% fine"
    assert predictor.macs_ratio == pytest.approx(count_macs(model).backbone / count_macs(model).expected(1 / 3))


def test_figures_that_are_at_hand_are_not_counted_again(
    model: CoarseToFineViT, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    macs = count_macs(model)
    monkeypatch.setattr(bench_module, "count_macs", lambda model: pytest.fail("counted again"))
    assert bench(model, images, 0.5, rounds=1, macs=macs)[1].macs_ratio == macs.backbone / macs.coarse


def test_the_model_is_left_as_a_predictor_needs_it(model: CoarseToFineViT, images: Tensor) -> None:
    before = Predictor(model, 1)(images).logits
    bench(model.train(), images, 0.5, rounds=1)
    assert not model.training
    assert torch.equal(Predictor(model, 1)(images).logits, before)
