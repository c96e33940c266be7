"""What training minimises."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cfvit.modeling.model import CoarseToFineOutput, TokenOutput
from cfvit.modeling.variants import CoarseLoss


def coarse_to_fine_loss(
    output: CoarseToFineOutput, target: Tensor, label_smoothing: float = 0.0, coarse_loss: CoarseLoss = "kl"
) -> Tensor:
    """``CE(fine, target) + KL(fine || coarse)`` (Eq. 14): the fine stage learns from the label, the coarse from it.

    Args:
        output: logits of both stages, ``[B, classes]`` each.
        target: class indices ``[B]``, or probabilities ``[B, classes]`` from mixup.
        label_smoothing: applied to class indices only; mixup smooths its own targets.
        coarse_loss: ``"ce"`` puts ``CE(coarse, target)`` in the place of the divergence (Eq. 15).

    Returns:
        The mean over the batch, a scalar. No gradient reaches the fine stage through the KL term.
    """
    fine = classification_loss(output.fine, target, label_smoothing)
    if coarse_loss == "ce":
        return fine + classification_loss(output.coarse, target, label_smoothing)
    return fine + distillation_loss(output.coarse, output.fine)


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


def classification_loss(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy in float32; ``target`` as in `coarse_to_fine_loss`."""
    smoothing = 0.0 if target.is_floating_point() else label_smoothing
    return F.cross_entropy(logits.float(), target, label_smoothing=smoothing)


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``KL(softmax(teacher) || softmax(student))``, batch mean; the teacher gets no gradient."""
    return F.kl_div(
        student.float().log_softmax(dim=-1),
        teacher.detach().float().log_softmax(dim=-1),
        reduction="batchmean",
        log_target=True,
    )
