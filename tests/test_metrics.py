"""Sweeps and thresholds against one image at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cfvit import CoarseToFineViT, StageMacs
from cfvit.calibration import choose_threshold
from cfvit.data import open_data
from cfvit.evaluation.metrics import collect, evaluate_model, sweep, top_k_accuracy
from cfvit.modeling.exit import goes_on
from cfvit.processes import Process

CLASSES = 3
CPU = Process(0, 1, torch.device("cpu"))
MACS = StageMacs(coarse=1_000_000_000, fine=3_000_000_000, backbone=5_000_000_000)

cases = st.integers(1, 12).flatmap(
    lambda count: st.tuples(
        st.lists(st.lists(st.integers(-3, 3), min_size=CLASSES, max_size=CLASSES), min_size=count, max_size=count),
        st.lists(st.lists(st.integers(-3, 3), min_size=CLASSES, max_size=CLASSES), min_size=count, max_size=count),
        st.lists(st.integers(0, CLASSES - 1), min_size=count, max_size=count),
    )
)
"""Logits of both stages and labels; whole numbers, so that confidences are often equal."""


def _confidence(coarse: Tensor) -> Tensor:
    return coarse.softmax(dim=-1).amax(dim=-1)


def _tensors(case: tuple[list[list[int]], list[list[int]], list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    coarse, fine, labels = case
    return torch.tensor(coarse, dtype=torch.float32), torch.tensor(fine, dtype=torch.float32), torch.tensor(labels)


def _one_by_one(coarse: Tensor, fine: Tensor, labels: Tensor, eta: float) -> tuple[int, int]:
    """How many images are answered rightly and how many go on, as a predictor decides."""
    right, gone_on = 0, 0
    for i in range(len(labels)):
        hard = bool(goes_on(_confidence(coarse[i : i + 1]), eta))
        answer = fine[i] if hard else coarse[i]
        right += int(answer.argmax() == labels[i])
        gone_on += hard
    return right, gone_on


@settings(max_examples=60, deadline=None)
@given(case=cases, eta=st.floats(0, 1))
def test_sweep_is_the_predictor_image_by_image(
    case: tuple[list[list[int]], list[list[int]], list[int]], eta: float
) -> None:
    coarse, fine, labels = _tensors(case)
    thresholds = [0.0, eta, *_confidence(coarse).tolist(), 1.0]
    points = sweep(coarse, fine, labels, MACS, thresholds)
    assert [point.threshold for point in points] == thresholds
    for point in points:
        right, gone_on = _one_by_one(coarse, fine, labels, point.threshold)
        assert point.accuracy == pytest.approx(100 * right / len(labels))
        assert point.exit_share == pytest.approx(1 - gone_on / len(labels))
        assert point.gmacs == pytest.approx(1 + 3 * gone_on / len(labels))


def test_sweep_sends_all_on_at_1_even_what_rounds_to_1() -> None:
    coarse, fine = torch.tensor([[100.0, 0, 0], [0, 1, 0]]), torch.tensor([[0.0, 1, 0], [0, 1, 0]])
    below, at = sweep(coarse, fine, torch.tensor([0, 1]), MACS, [0.999, 1])
    assert (below.exit_share, below.accuracy) == (0.5, 100)
    assert (at.exit_share, at.accuracy) == (0, 50)


def test_sweep_sends_on_what_is_not_a_number() -> None:
    coarse, fine = torch.tensor([[torch.nan] * 3, [0, 1, 0]]), torch.tensor([[0.0, 0, 1], [1, 0, 0]])
    (point,) = sweep(coarse, fine, torch.tensor([2, 1]), MACS, [0.4])
    assert (point.exit_share, point.accuracy) == (0.5, 100)


@settings(max_examples=100, deadline=None)
@given(case=cases, max_drop=st.sampled_from([0.0, 1.0, 10.0, 25.0, 100.0]))
def test_chosen_threshold_is_the_lowest_that_holds_from_there_on(
    case: tuple[list[list[int]], list[list[int]], list[int]], max_drop: float
) -> None:
    """Against every way in which a threshold can part the images, from the top down."""
    coarse, fine, labels = _tensors(case)
    allowed = (fine.argmax(-1) == labels).sum().item() - max_drop / 100 * len(labels) - 1e-6
    lowest, gone_on = 1.0, len(labels)
    for eta in [1.0, *sorted(set(_confidence(coarse).tolist()), reverse=True), 0.0]:
        right, going_on = _one_by_one(coarse, fine, labels, eta)
        if right < allowed:
            break
        lowest, gone_on = eta, going_on

    chosen = choose_threshold(coarse, fine, labels, max_drop)

    assert _one_by_one(coarse, fine, labels, chosen)[1] == gone_on, f"{chosen} instead of {lowest}"


def test_chosen_threshold_spares_images_whose_confidence_rounds_to_1() -> None:
    """The second image exits below eta = 1, where it is right; the first one has to go on."""
    coarse, fine = torch.tensor([[0.0, 1, 0], [0, 100, 0]]), torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    eta = choose_threshold(coarse, fine, torch.tensor([0, 1]), 0)
    assert goes_on(_confidence(coarse), eta).tolist() == [True, False]


def test_chosen_threshold_is_a_number_even_if_a_confidence_is_not() -> None:
    """The first image has to go on; the second one goes on at any threshold above 0."""
    coarse, fine = torch.tensor([[0.0, 1, 0], [torch.nan] * 3]), torch.tensor([[1.0, 0, 0], [1, 0, 0]])
    eta = choose_threshold(coarse, fine, torch.tensor([0, 0]), 0)
    assert 0 < eta <= 1
    assert goes_on(_confidence(coarse), eta).tolist() == [True, True]


def test_chosen_threshold_of_extremes() -> None:
    right, wrong = torch.tensor([[2.0, 0, 0], [0, 1, 0]]), torch.tensor([[0.0, 2, 0], [1, 0, 0]])
    labels = torch.tensor([0, 1])
    assert choose_threshold(right, wrong, labels, 0) == 0
    assert choose_threshold(wrong, right, labels, 0) == 1
    assert choose_threshold(wrong, right, labels, 100) == 0


def test_what_is_not_a_finite_number_is_counted_apart_and_never_right(
    make_model: Callable[..., CoarseToFineViT], colours: Path
) -> None:
    """A network whose fine stage answers nothing, scored on images of which it would get the first class right."""
    model = make_model(num_classes=3)
    head = cast(Any, model.backbone.head)
    with torch.no_grad():
        head.bias[0] = 100.0
        assert model.feature_reuse is not None
        model.feature_reuse.norm.bias[0] = torch.nan
    result = evaluate_model(model, open_data(str(colours), "validation"), [0.0, 1.0], 16, 0, CPU)
    coarse, fine = result.stages
    assert (coarse.not_finite, fine.not_finite, result.images) == (0, 33, 33)
    assert (coarse.top1, fine.top1, fine.top5) == (pytest.approx(100 / 3), 0, 0)
    assert [point.accuracy for point in result.sweep] == [pytest.approx(coarse.top1), 0]


@pytest.mark.parametrize(("k", "expected"), [(1, 25), (2, 50), (3, 75), (5, 100), (9, 100)])
def test_top_k_accuracy(k: int, expected: float) -> None:
    """Labels on places 1, 2, 3 and 5; a ``k`` beyond the number of classes means all."""
    logits = torch.tensor([5.0, 4, 3, 2, 1]).repeat(4, 1)
    assert top_k_accuracy(logits, torch.tensor([0, 1, 2, 4]), k) == expected


def test_collect_restores_the_order_and_leaves_out_the_unreadable() -> None:
    """Batches come as (images, labels, indices); a label below 0 marks an unreadable image."""
    images = torch.arange(5.0)[:, None]
    order = [torch.tensor([3, 0]), torch.tensor([4, 1, 2])]
    labels = torch.tensor([10, -1, 12, 13, -1])
    loader = cast(Any, [(images[batch], labels[batch], batch) for batch in order])
    done: list[int] = []

    collected = collect(lambda x: {"coarse": x, "fine": 2 * x}, loader, torch.device("cpu"), done.append)

    assert collected.labels.tolist() == [10, 12, 13]
    assert collected.indices.tolist() == [0, 2, 3]
    assert collected.unreadable == [1, 4]
    assert {at: x.flatten().tolist() for at, x in collected.logits.items()} == {"coarse": [0, 2, 3], "fine": [0, 4, 6]}
    assert done == [2, 3]
