"""A cascade of two plain ViTs: one for the image at half its side, and another where the first is not sure.

The idea of Wang et al., "Not All Images are Worth 16x16 Words", NeurIPS 2021 (DVT), without its reuse of features and
relationships.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cfvit.files import atomic_write
from cfvit.methods.base import Batch, TokenLabels, register
from cfvit.methods.cf_vit import CfViT
from cfvit.methods.plain import Plain
from cfvit.modeling.backbones import create_backbone
from cfvit.modeling.batches import Rows
from cfvit.modeling.config import ModelConfig
from cfvit.modeling.exit import Exit, HasExit
from cfvit.modeling.model import CoarseToFineOutput
from cfvit.modeling.tokens import coarse_image
from cfvit.modeling.weights import Weights


@dataclass(eq=False)
class SmallAnswer(Rows):
    """What the small network says of a batch: logits ``[B, classes]``."""

    logits: Tensor


def resized(large: Any, config: ModelConfig, size: tuple[int, int], trained: bool) -> Any:
    """Another network like ``large`` for smaller images, with its weights if it is trained, else with random ones.

    Args:
        size: height and width of the images in pixels.
    """
    small: Any = create_backbone(
        config.backbone,
        img_size=size,
        num_classes=config.num_classes,
        pretrained=trained and Weights("the large network", large.state_dict(), large.patch_embed.grid_size),
        **config.timm_kwargs,
    )
    small.data_config, small.image_size = {**large.data_config, "input_size": (3, *size)}, size
    small.timm_kwargs = large.timm_kwargs
    return small


class CascadeOfViTs(HasExit, nn.Module):
    """Two ViTs without shared weights, in the form of a coarse stage, at half the image's side, and a fine stage."""

    def __init__(self, config: ModelConfig, small: Any, large: Any) -> None:
        super().__init__()
        self.config, self.small, self.large = config, small, large
        self.image_size, self.coarse_size = large.image_size, small.image_size
        self.data_config: dict[str, Any] = large.data_config
        self.class_names: list[str] | None = large.class_names
        self.exit = Exit()

    def coarse(self, images: Tensor) -> SmallAnswer:
        """The small network's answer to images of ``image_size`` or ``coarse_size``."""
        small = images if images.shape[-2:] == self.coarse_size else coarse_image(images)
        return SmallAnswer(self.small(small))

    def fine(self, images: Tensor, state: SmallAnswer) -> Tensor:
        """The large network's logits, whatever the small one said."""
        return self.large(images)

    def forward(self, images: Tensor) -> CoarseToFineOutput:
        return CoarseToFineOutput(self.small(coarse_image(images)), self.large(images))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters for optimisers to leave undecayed."""
        parts = {"small": self.small, "large": self.large}
        return {f"{part}.{name}" for part, vit in parts.items() for name in vit.no_weight_decay()}


@register("cascade")
class Cascade(CfViT):
    """Both networks learn from the labels, side by side; an image exits by the small network's confidence."""

    title = "cascade of two ViTs"
    ignored = ModelConfig.of_fine_stage

    def build(self, config: ModelConfig, weights: str | None = None, class_names: list[str] | None = None) -> Any:
        """Two plain ViTs, the small one for images of half the side; both start from the same trained weights."""
        large = Plain(self.objective).build(config, weights, class_names)
        size = (large.image_size[0] // 2, large.image_size[1] // 2)
        return CascadeOfViTs(config, resized(large, config, size, weights is not None), large)

    def forward(self, network: Any, images: Tensor, split: float = 1.0, labels: TokenLabels | None = None) -> Any:
        return network(images)

    def loss(self, module: Any, batch: Batch, split: float) -> Tensor:
        small, large = module(batch.images)
        return self.answer_loss(small, batch) + self.answer_loss(large, batch)

    def save(self, network: Any, folder: Path) -> None:
        """Each network in timm's own format, and the threshold between them."""
        for name in ("small", "large"):
            vit = getattr(network, name)
            vit.class_names = network.class_names
            Plain(self.objective).save(vit, folder / name)
        with atomic_write(folder / "cascade.json") as file:
            file.write_text(json.dumps({"threshold": network.threshold}) + "\n")

    def load(self, network: Any, folder: Path) -> Any:
        for name in ("small", "large"):
            Plain(self.objective).load(getattr(network, name), folder / name)
        network.threshold = json.loads((folder / "cascade.json").read_text())["threshold"]
        return network.eval()
