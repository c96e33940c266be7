"""CF-ViT, the method of this package: both stages of one network, an exit between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cfvit.calibration import choose_threshold
from cfvit.checkpoints import initialise, load, save
from cfvit.inference.engines import Engine
from cfvit.inference.engines.pytorch import TorchEngine
from cfvit.methods.base import Batch, Method, register
from cfvit.modeling.config import ModelConfig
from cfvit.modeling.exit import goes_on
from cfvit.modeling.losses import coarse_to_fine_loss, token_label_loss, token_target
from cfvit.modeling.model import CoarseToFineOutput, CoarseToFineViT, TokenOutput


class _BothStages(nn.Module):
    """The model as it runs in a training step: with an answer of each token where token labels ask for it."""

    def __init__(self, model: CoarseToFineViT) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, images: Tensor, split: float, tokens: bool, mixed: Tensor | None
    ) -> CoarseToFineOutput | TokenOutput:
        if tokens:
            return self.model.forward_tokens(images, informative_ratio=split, mixed=mixed)
        return self.model(images, informative_ratio=split)


def build_model(
    config: ModelConfig,
    weights: str | None,
    class_names: list[str] | None,
    kind: type[CoarseToFineViT] = CoarseToFineViT,
) -> CoarseToFineViT:
    """A coarse-to-fine model with random or trained weights."""
    model = kind(config)
    model.class_names = class_names
    if weights is not None:
        initialise(model, weights)
    return model


@register("cf_vit")
class CfViT(Method):
    """Both stages are trained, scored and saved (Chen et al., AAAI 2023)."""

    title = "CF-ViT"

    def build(self, config: ModelConfig, weights: str | None = None, class_names: list[str] | None = None) -> Any:
        return build_model(config, weights, class_names)

    def in_training(self, network: CoarseToFineViT) -> nn.Module:
        return _BothStages(network)

    def loss(self, running: nn.Module, batch: Batch, split: float) -> Tensor:
        """The paper's loss on both stages' logits, or LV-ViT's with a label for each token; a scalar."""
        labels = batch.token_labels
        if labels is None:
            output = running(batch.images, split, False, None)
            return coarse_to_fine_loss(output, batch.target, self.objective, batch.teacher)
        assert batch.target is not None
        output = running(batch.images, split, True, labels.mixed)
        target = token_target(labels.fine, labels.coarse, output, labels.mixed, labels.columns)
        return token_label_loss(output, batch.target, target, self.objective.token_label_weight)

    def points(self, network: Any) -> dict[str, Callable[[Tensor], Tensor]]:
        return {"coarse": lambda images: network.coarse(images).logits, "fine": lambda images: network(images).fine}

    def answers(self, network: Any, images: Tensor) -> dict[str, Tensor]:
        return network(images)._asdict()  # both in one pass

    def engine(self, network: Any, compile: bool | None = None) -> Engine:
        return TorchEngine(network, compile)

    def exits(self, network: Any, logits: dict[str, Tensor]) -> Tensor | None:
        eta = network.threshold
        return None if eta is None else goes_on(network.exit.coarse(logits["coarse"]), eta).long()

    def choose_exit(
        self, network: CoarseToFineViT, logits: dict[str, Tensor], labels: Tensor, max_drop: float
    ) -> dict[str, float]:
        rule = network.exit  # of a calibrated model it may be another than the paper's
        both = logits["coarse"], logits["fine"]
        network.threshold = choose_threshold(*both, labels, max_drop, rule.measure, rule.coarse_temperature)
        return {"threshold": network.threshold}

    def load(self, network: Any, folder: Path) -> Any:
        return load(folder)

    def save(self, network: CoarseToFineViT, folder: Path) -> None:
        save(network, folder)
