"""The coarse stage alone: a plain ViT of the coarse grid, for comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cfvit.checkpoints import load, save
from cfvit.methods.base import Batch, Method, register
from cfvit.methods.cf_vit import build_model
from cfvit.methods.plain import single_answer_loss
from cfvit.modeling.config import ModelConfig
from cfvit.modeling.model import CoarseToFineViT


class _CoarseStage(nn.Module):
    """Images to coarse logits. What only the fine stage uses gets no gradients."""

    def __init__(self, model: CoarseToFineViT) -> None:
        super().__init__()
        self.model = model
        for part in (model.feature_reuse, model.backbone.pos_embed):
            if part is not None:
                part.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model.coarse(images).logits


@register("coarse_only")
class CoarseOnly(Method):
    """The coarse stage is trained and scored; the saved model never goes on to the fine stage."""

    title = "CF-ViT's coarse stage alone"

    def build(self, config: ModelConfig, weights: str | None = None, class_names: list[str] | None = None) -> Any:
        return build_model(config, weights, class_names)

    def in_training(self, network: CoarseToFineViT) -> nn.Module:
        return _CoarseStage(network)

    def loss(self, running: Any, batch: Batch, split: float) -> Tensor:
        return single_answer_loss(running(batch.images), batch, self)

    def points(self, network: CoarseToFineViT) -> dict[str, Callable[[Tensor], Tensor]]:
        return {"coarse": lambda images: network.coarse(images).logits}

    def choose_exit(
        self, network: CoarseToFineViT, logits: dict[str, Tensor], labels: Tensor, max_drop: float
    ) -> dict[str, float]:
        network.threshold = 0.0  # the fine stage has learnt nothing
        return {"threshold": 0.0}

    def load(self, network: CoarseToFineViT, folder: Path) -> CoarseToFineViT:
        return load(folder)

    def save(self, network: CoarseToFineViT, folder: Path) -> None:
        network.threshold = 0.0  # also without a hold-out
        save(network, folder)
