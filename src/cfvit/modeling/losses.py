"""What training minimises."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cfvit.modeling.config import Objective
from cfvit.modeling.model import CoarseToFineOutput, TokenOutput
from cfvit.modeling.tokens import child_positions, gather_tokens, mirrored_sources


def coarse_to_fine_loss(
    output: CoarseToFineOutput, target: Tensor | None, objective: Objective, teacher: Tensor | None = None
) -> Tensor:
    """The sum of the objective's terms; by default ``CE(fine, target) + KL(fine || coarse)`` (Eq. 14).

    Args:
        output: logits of both stages, ``[B, classes]`` each.
        target: class indices ``[B]``, or probabilities ``[B, classes]`` from mixup; None without labels.
        objective: the weights. Label smoothing is for class indices only; mixup smooths its own targets.
        teacher: a trained network's logits for the same views, ``[B, classes]``.

    Returns:
        The mean over the batch, a scalar. No gradient reaches the fine stage through the coarse stage's term.
    """
    coarse_weights = objective.coarse_label_weight, objective.coarse_teacher_weight
    loss = answer_loss(output.fine, target, teacher, objective)
    loss = loss + answer_loss(output.coarse, target, teacher, objective, coarse_weights)
    if objective.coarse_fine_weight:
        loss = loss + objective.coarse_fine_weight * distillation_loss(output.coarse, output.fine)
    return loss


def answer_loss(
    logits: Tensor,
    target: Tensor | None,
    teacher: Tensor | None,
    objective: Objective,
    weights: tuple[float, float] | None = None,
) -> Tensor:
    """The loss of one answer ``[B, classes]``, by its label and by its teacher, each as of `coarse_to_fine_loss`.

    Args:
        weights: of the label's term and of the teacher's; by default the fine stage's.
    """
    of_label, of_teacher = weights or (objective.label_weight, objective.fine_teacher_weight)
    loss = logits.new_zeros((), dtype=torch.float32)
    if target is not None and of_label:
        loss = loss + of_label * classification_loss(logits, target, objective.label_smoothing)
    if teacher is not None and of_teacher:
        loss = loss + of_teacher * distillation_loss(logits, teacher, objective.temperature)
    return loss


def token_label_loss(output: TokenOutput, target: Tensor, token_target: Tensor, weight: float) -> Tensor:
    """``CE(fine, target) + weight * CE(tokens, token_target) + KL(fine || coarse)``.

    Args:
        output: from ``CoarseToFineViT.forward_tokens``.
        target: class probabilities ``[B, classes]``.
        token_target: class probabilities of the area that each token covers, ``[B, T, classes]``.
        weight: of the tokens' mean cross-entropy; 0.5 in the LV-ViT paper, 1 in the CF-ViT authors' runs.
    """
    tokens = classification_loss(output.tokens.flatten(0, 1), token_target.flatten(0, 1))
    return classification_loss(output.fine, target) + weight * tokens + distillation_loss(output.coarse, output.fine)


def token_target(fine: Tensor, coarse: Tensor, output: TokenOutput, mixed: Tensor | None, columns: int) -> Tensor:
    """The label of the area that each token of the mixed sequence covers, ``[B, 4k + N - k, classes]``.

    Args:
        fine: labels pooled to the fine grid, ``[B, 4N, classes]``.
        coarse: labels pooled to the coarse grid, ``[B, N, classes]``.
        output: which cells were split.
        mixed: ``[N]``, True for the cells that MixToken replaced by the mirror image's, whose labels hold there.
        columns: of the coarse grid.
    """
    if mixed is not None:
        cells = torch.arange(len(mixed), device=mixed.device)
        sources = mirrored_sources(mixed, len(coarse))
        coarse = coarse[sources, cells]
        children = child_positions(cells[None], columns)[0]
        fine = torch.zeros_like(fine).index_copy(1, children, fine[sources.repeat_interleave(4, dim=1), children])
    split = gather_tokens(fine, child_positions(output.informative, columns))
    return torch.cat([split, gather_tokens(coarse, output.others)], dim=1)


def classification_loss(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy in float32; ``target`` as in `coarse_to_fine_loss`."""
    smoothing = 0.0 if target.is_floating_point() else label_smoothing
    return F.cross_entropy(logits.float(), target, label_smoothing=smoothing)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, batch mean; the teacher gets no gradient.

    The factor keeps gradients of a size as T changes (Hinton et al., "Distilling the Knowledge in a Neural
    Network", 2015).
    """
    divergence = F.kl_div(
        (student.float() / temperature).log_softmax(dim=-1),
        (teacher.detach().float() / temperature).log_softmax(dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2
