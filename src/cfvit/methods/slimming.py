"""What methods that slim the token sequence of a plain ViT have in common: the backbone, a keep rate, a teacher."""

from __future__ import annotations

import copy
import warnings
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from cfvit.methods.base import Method, Options
from cfvit.methods.plain_blocks import PlainBlocks, attend, embed, transform
from cfvit.modeling.config import ModelConfig, Number, configuration


@configuration
class KeepRate(Options):
    """How many tokens are kept."""

    keep_rate: Number = Field(default=0.7, gt=0, le=1, description="share of the patch tokens that stay each time")


class ExtendedViT(nn.Module):
    """A plain ViT and what a method adds to it, by its options; ``trained`` if the ViT starts from trained weights."""

    plan: Tensor | None
    """Numbers of tokens. They stay on the CPU, also in copies without data, by which costs are counted."""

    def __init__(self, backbone: Any, options: Any, trained: bool) -> None:
        super().__init__()
        self.backbone, self.options, self.trained = backbone, options, trained
        self.image_size, self.data_config = backbone.image_size, backbone.data_config
        self.class_names: list[str] | None = backbone.class_names
        self.register_buffer("plan", None)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters for optimisers to leave undecayed."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def _apply(self, fn: Any, recurse: bool = True) -> ExtendedViT:
        plan = self.plan
        super()._apply(fn, recurse)
        self.plan = plan
        return self


class ExtendsPlainViT(Method):
    """A method whose network is an `ExtendedViT`, wrapped in another module in training."""

    network_class: ClassVar[type[ExtendedViT]]
    training_class: ClassVar[type[Any]]

    def build(self, config: ModelConfig, weights: str | None = None, class_names: list[str] | None = None) -> Any:
        backbone = PlainBlocks(self.objective).build(config, weights, class_names)
        return self.network_class(backbone, self.options, weights is not None)

    def in_training(self, network: Any) -> nn.Module:
        return self.training_class(network)

    def is_added(self, name: str) -> bool:
        return not name.startswith("backbone.")


class FrozenTeacher(nn.Module):
    """The backbone as training found it, which the slimmed network imitates: always in evaluation, without gradients.

    A run that is resumed is built from the same initial weights, so its teacher is the same.
    """

    def __init__(self, network: ExtendedViT) -> None:
        super().__init__()
        if not network.trained:
            warnings.warn("the teacher is the backbone and has random weights: give --initial-weights", stacklevel=2)
        self.backbone: Any = copy.deepcopy(network.backbone).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenTeacher:
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits ``[B, classes]`` and the patches after each block, ``[B, n, D]``, the last ones after the norm."""
        tokens, patches = embed(self.backbone, images), []
        for block in self.backbone.blocks:
            tokens = transform(block, attend(block, tokens)[0])
            patches.append(tokens[:, 1:])
        tokens = self.backbone.norm(tokens)
        return self.backbone.forward_head(tokens), [*patches[:-1], tokens[:, 1:]]
