"""Adaptive inference: the coarse answer where it is confident, the fine stage for the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cfvit.errors import CfvitError
from cfvit.model import CoarseToFineViT

COARSE, FINE = 0, 1


@dataclass(frozen=True, eq=False)
class Prediction:
    """Answers in the order of the images.

    Attributes:
        logits: ``[B, classes]``, of the stage that answered.
        confidence: ``[B]`` in float32, by the model's `ExitRule`; -1 where it is not a number.
        stage: ``[B]``, 0 where the coarse stage answered and 1 where the fine stage did.
    """

    logits: Tensor
    confidence: Tensor
    stage: Tensor


def goes_on(confidence: Tensor, threshold: float) -> Tensor:
    """Which images need the fine stage: ``[B] -> [B]`` of bool.

    Those below the threshold. At 1 every image goes on, even one whose softmax rounds to 1; at 0
    none does. A confidence that is not a number goes on.
    """
    if threshold >= 1:
        return torch.ones_like(confidence, dtype=torch.bool)
    if threshold <= 0:
        return torch.zeros_like(confidence, dtype=torch.bool)
    return ~(confidence >= threshold)


class Predictor:
    """Classifies batches, running the fine stage only on the images that need it.

    Args:
        model: put into evaluation mode; its device and precision are used as they are.
        threshold: eta in [0, 1]; by default the model's calibrated one. Either is compared with the
            confidence that ``model.exit_rule`` measures, the highest softmax probability unless the
            model was calibrated for another.

    Raises:
        CfvitError: a threshold outside [0, 1], or none given and none calibrated.
    """

    def __init__(self, model: CoarseToFineViT, threshold: float | None = None) -> None:
        eta = model.threshold if threshold is None else threshold
        if eta is None:
            raise CfvitError("the model has no calibrated threshold: give one between 0 and 1")
        if not 0 <= eta <= 1:
            raise CfvitError(f"threshold is {eta}: give a confidence between 0 (coarse only) and 1 (always fine)")
        self.model = model.eval()
        self.threshold = float(eta)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Prediction:
        """Classifies normalised images ``[B, 3, S, S]``, B >= 0, on any device.

        Raises:
            CfvitError: images of another shape.
        """
        parameter = next(self.model.parameters())
        images = images.to(parameter.device, parameter.dtype)
        state = self.model.coarse(images)
        logits, rule = state.logits, self.model.exit_rule
        confidence = rule.coarse(logits)
        hard = goes_on(confidence, self.threshold).nonzero().flatten()
        if len(hard):
            logits, confidence = logits.clone(), confidence.clone()
            logits[hard] = self.model.fine(images[hard], state[hard])
            confidence[hard] = rule.fine(logits[hard])
        stage = torch.full_like(confidence, COARSE, dtype=torch.long)
        stage[hard] = FINE
        return Prediction(logits, confidence, stage)
