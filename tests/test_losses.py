"""The training losses against sums written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cfvit import CoarseToFineOutput
from cfvit.modeling.config import Objective
from cfvit.modeling.losses import classification_loss, coarse_to_fine_loss, distillation_loss

BATCH, CLASSES = 4, 5
PAPER = Objective(label_smoothing=0.0)
BOTH_LABELS = {"coarse_label_weight": 1.0, "coarse_fine_weight": 0.0}
"""Eq. 15."""


def _logits(seed: int) -> Tensor:
    return 2 * torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def output() -> CoarseToFineOutput:
    return CoarseToFineOutput(_logits(0).requires_grad_(), _logits(1).requires_grad_())


@pytest.fixture
def hard() -> Tensor:
    return torch.tensor([0, 3, 4, 3])


@pytest.fixture
def soft() -> Tensor:
    return _logits(2).softmax(dim=-1)


def _probabilities(logits: Tensor) -> list[list[float]]:
    rows = []
    for row in logits.tolist():
        total = sum(math.exp(value) for value in row)
        rows.append([math.exp(value) / total for value in row])
    return rows


def _cross_entropy(logits: Tensor, targets: list[list[float]]) -> float:
    pairs = zip(_probabilities(logits), targets, strict=True)
    return sum(-t * math.log(p) for ps, ts in pairs for p, t in zip(ps, ts, strict=True)) / BATCH


def _divergence(fine: Tensor, coarse: Tensor) -> float:
    """``KL(fine || coarse)``, the mean over the batch."""
    pairs = zip(_probabilities(fine), _probabilities(coarse), strict=True)
    return sum(f * math.log(f / c) for fs, cs in pairs for f, c in zip(fs, cs, strict=True)) / BATCH


def _one_hot(hard: Tensor, smoothing: float = 0.0) -> list[list[float]]:
    rest = smoothing / CLASSES
    return [[rest + (1 - smoothing) * (k == label) for k in range(CLASSES)] for label in hard.tolist()]


def test_hard_targets(output: CoarseToFineOutput, hard: Tensor) -> None:
    expected = _cross_entropy(output.fine, _one_hot(hard)) + _divergence(output.fine, output.coarse)
    assert coarse_to_fine_loss(output, hard, PAPER).item() == pytest.approx(expected, rel=1e-5)


def test_label_smoothing_of_hard_targets(output: CoarseToFineOutput, hard: Tensor) -> None:
    expected = _cross_entropy(output.fine, _one_hot(hard, 0.2)) + _divergence(output.fine, output.coarse)
    assert coarse_to_fine_loss(output, hard, Objective(label_smoothing=0.2)).item() == pytest.approx(expected, rel=1e-5)


def test_soft_targets_are_not_smoothed_again(output: CoarseToFineOutput, soft: Tensor) -> None:
    expected = _cross_entropy(output.fine, soft.tolist()) + _divergence(output.fine, output.coarse)
    assert coarse_to_fine_loss(output, soft, Objective(label_smoothing=0.2)).item() == pytest.approx(expected, rel=1e-5)


def test_the_coarse_stage_may_learn_from_the_label(output: CoarseToFineOutput, hard: Tensor, soft: Tensor) -> None:
    """CE + CE (Eq. 15)."""
    for target, smoothing, by_hand in (
        (hard, 0.0, _one_hot(hard)),
        (hard, 0.2, _one_hot(hard, 0.2)),
        (soft, 0.2, soft.tolist()),
    ):
        expected = _cross_entropy(output.fine, by_hand) + _cross_entropy(output.coarse, by_hand)
        objective = Objective(**BOTH_LABELS, label_smoothing=smoothing)
        assert coarse_to_fine_loss(output, target, objective).item() == pytest.approx(expected, rel=1e-5)


def test_each_stage_then_learns_from_the_label_alone(output: CoarseToFineOutput, hard: Tensor) -> None:
    coarse_to_fine_loss(output, hard, Objective(**BOTH_LABELS, label_smoothing=0.0)).backward()
    for logits in output:
        expected = (logits.softmax(-1) - torch.tensor(_one_hot(hard))).detach() / BATCH
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad, expected)


def test_divergence_is_zero_only_between_equals(output: CoarseToFineOutput) -> None:
    assert distillation_loss(output.coarse, output.coarse).item() == pytest.approx(0, abs=1e-6)
    assert distillation_loss(output.coarse, output.fine).item() > 0.1


def test_fine_stage_learns_from_labels_alone(output: CoarseToFineOutput, hard: Tensor) -> None:
    coarse_to_fine_loss(output, hard, PAPER).backward()
    fine = output.fine.detach().clone().requires_grad_()
    classification_loss(fine, hard).backward()
    assert output.fine.grad is not None and fine.grad is not None
    torch.testing.assert_close(output.fine.grad, fine.grad)


def test_coarse_stage_learns_from_the_fine_one_alone(output: CoarseToFineOutput, hard: Tensor) -> None:
    coarse_to_fine_loss(output, hard, PAPER).backward()
    expected = (output.coarse.softmax(-1) - output.fine.softmax(-1)).detach() / BATCH
    assert output.coarse.grad is not None
    torch.testing.assert_close(output.coarse.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_scored_in_float32(
    output: CoarseToFineOutput, hard: Tensor, dtype: torch.dtype
) -> None:
    halves = CoarseToFineOutput(output.coarse.to(dtype), output.fine.to(dtype))
    loss = coarse_to_fine_loss(halves, hard, PAPER)
    assert loss.dtype == torch.float32
    assert (
        loss.item()
        == coarse_to_fine_loss(
            CoarseToFineOutput(*(x.float() for x in halves)), hard, Objective(label_smoothing=0.0)
        ).item()
    )


def test_a_teacher_is_learnt_by_both_stages_at_a_temperature(output: CoarseToFineOutput) -> None:
    teacher = _logits(3)
    objective = Objective(
        label_weight=0.0, coarse_fine_weight=0.0, fine_teacher_weight=3.0, coarse_teacher_weight=0.5, temperature=2.0
    )
    fine, coarse = (4 * _divergence(teacher / 2, logits / 2) for logits in (output.fine, output.coarse))
    loss = coarse_to_fine_loss(output, None, objective, teacher)
    assert loss.item() == pytest.approx(3 * fine + 0.5 * coarse, rel=1e-5)


def test_a_loss_of_nothing_is_refused(fails: Callable[..., Any]) -> None:
    with fails("all weights of the loss are 0"):
        Objective(label_weight=0.0, coarse_fine_weight=0.0)
