"""CF-ViT, the method of this package: both stages of one network, an exit between them; and its coarse stage alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cfvit.calibration import choose_threshold
from cfvit.checkpoints import initialise, load, save
from cfvit.inference.engines import Engine
from cfvit.inference.engines.pytorch import TorchEngine
from cfvit.methods.base import Batch, Method, TokenLabels, register
from cfvit.modeling.config import ModelConfig
from cfvit.modeling.exit import goes_on
from cfvit.modeling.losses import coarse_to_fine_loss, token_label_loss, token_target
from cfvit.modeling.model import CoarseToFineViT


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
    ignored = frozenset()

    def build(self, config: ModelConfig, weights: str | None = None, class_names: list[str] | None = None) -> Any:
        return build_model(config, weights, class_names)

    def forward(self, network: Any, images: Tensor, split: float = 1.0, labels: TokenLabels | None = None) -> Any:
        """Logits of both stages, and where there are labels for tokens those of each token of the fine sequence."""
        if labels is None:
            return network(images, informative_ratio=split)
        return network.forward_tokens(images, informative_ratio=split, mixed=labels.mixed)

    def loss(self, module: Any, batch: Batch, split: float) -> Tensor:
        """The paper's loss on both stages' logits, or LV-ViT's with a label for each token; a scalar."""
        labels = batch.token_labels
        output = module(batch.images, split, labels)
        if labels is None:
            return coarse_to_fine_loss(output, batch.target, self.objective, batch.teacher)
        assert batch.target is not None
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


@register("coarse_only")
class CoarseOnly(Method):
    """The coarse stage is trained and scored; the saved model never goes on to the fine stage."""

    title = "CF-ViT's coarse stage alone"
    build, load = CfViT.build, CfViT.load

    def forward(self, network: Any, images: Tensor) -> Tensor:
        return network.coarse(images).logits

    def training_module(self, network: Any) -> nn.Module:
        for part in (network.feature_reuse, network.backbone.pos_embed):
            if part is not None:
                part.requires_grad_(False)  # only the fine stage uses it
        return super().training_module(network)

    def points(self, network: Any) -> dict[str, Callable[[Tensor], Tensor]]:
        return {"coarse": partial(self.forward, network)}

    def choose_exit(self, network: Any, logits: dict[str, Tensor], labels: Tensor, max_drop: float) -> dict[str, float]:
        network.threshold = 0.0  # the fine stage has learnt nothing
        return {}

    def save(self, network: CoarseToFineViT, folder: Path) -> None:
        network.threshold, network.trained = 0.0, None  # also without a hold-out
        save(network, folder)
