"""The plain ViT, for comparison; and what methods share whose network is a plain ViT, or extends one.

A method that only runs the weights of a plain ViT in another way is a `PlainBlocks`; one that adds weights to it is an
`ExtendsPlainViT`.
"""

from __future__ import annotations

import copy
import json
import warnings
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from cfvit.files import atomic_write
from cfvit.methods import blocks
from cfvit.methods.base import Batch, Method, Options, TrainingModule, register
from cfvit.methods.cf_vit import build_model
from cfvit.modeling.config import ModelConfig, Number, configuration
from cfvit.modeling.model import CoarseToFineViT
from cfvit.modeling.weights import CONFIG_FILE, WEIGHTS_FILE, write_weights


@register("plain")
class Plain(Method):
    """The backbone of the coarse-to-fine model, which starts from the same weights as that does."""

    title = "plain ViT"
    point = "plain"
    """What its operating point is called."""

    def build(self, config: ModelConfig, weights: str | None = None, class_names: list[str] | None = None) -> Any:
        return backbone_of(build_model(config, weights, class_names))

    def points(self, network: Any) -> dict[str, Callable[[Tensor], Tensor]]:
        return {self.point: network}

    def save(self, network: Any, folder: Path) -> None:
        """In timm's own format, which it reads as ``local-dir:FOLDER`` and transformers as a model of timm's."""
        elsewhere = ("url", "file", "hf_hub_id", "source")
        described = {k: v for k, v in network.pretrained_cfg.items() if k not in elsewhere} | network.data_config
        write_weights(network, folder / WEIGHTS_FILE)
        with atomic_write(folder / CONFIG_FILE) as file:
            save_config_for_hf(
                network,
                str(file),
                model_config={"label_names": network.class_names, "pretrained_cfg": described},
                model_args={
                    "img_size": network.image_size,
                    **{k: v for k, v in network.timm_kwargs.items() if k != "pretrained_cfg_overlay"},  # described
                },
            )
            config = json.loads(file.read_text())
            config["model_args"].pop("num_classes", None)  # transformers gives timm the number above by itself
            file.write_text(json.dumps(config, indent=2) + "\n")


def backbone_of(model: CoarseToFineViT) -> Any:
    """The plain ViT in a model, with what is needed to use it: preprocessing, class names, image size."""
    network: Any = model.backbone
    network.data_config, network.class_names = model.data_config, model.class_names
    network.image_size, network.timm_kwargs = model.image_size, dict(model.config.timm_kwargs)
    return network


@configuration
class KeepRate(Options):
    """How many tokens are kept."""

    keep_rate: Number = Field(default=0.7, gt=0, le=1, description="share of the patch tokens that stay each time")


class PlainBlocks(Plain):
    """A method that runs the weights of a plain ViT in another way, by `forward`, and adds none to them."""

    def build(self, config: ModelConfig, weights: str | None = None, class_names: list[str] | None = None) -> Any:
        """The plain ViT, as `cfvit.methods.plain.Plain` builds it.

        Raises:
            UsageError: a backbone whose blocks these parts are not written for.
        """
        network = super().build(config, weights, class_names)
        blocks.require_plain_vit(network)
        return network

    @property
    def point(self) -> str:
        """What its operating point is called: the share of the patches that it keeps, if that is an option of it."""
        keep = getattr(self.options, "keep_rate", None)
        return self.name if keep is None else f"keep {keep:g}"

    def points(self, network: Any) -> dict[str, Callable[[Tensor], Tensor]]:
        return {self.point: partial(self.forward, network)}


class ExtendedViT(nn.Module):
    """A plain ViT and what a method adds to it, by its options; ``trained`` if the ViT starts from trained weights."""

    counted: tuple[str, ...] = ()
    """Buffers of numbers of tokens. They stay on the CPU, even in a copy on the meta device, which counts the cost."""

    def __init__(self, backbone: Any, options: Any, trained: bool) -> None:
        super().__init__()
        self.backbone, self.options, self.trained = backbone, options, trained
        self.image_size, self.data_config = backbone.image_size, backbone.data_config
        self.class_names: list[str] | None = backbone.class_names

    def reduce(self, index: int, tokens: Tensor) -> Tensor:
        """What block ``index`` runs on of the tokens before it, ``[B, 1 + n, D]``."""
        return tokens

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, 3, S, S]``."""
        return blocks.classify(self.backbone, blocks.run(self.backbone, images, self.reduce))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters for optimisers to leave undecayed."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def _apply(self, fn: Any, recurse: bool = True) -> ExtendedViT:
        counted = {name: self._buffers[name] for name in self.counted}
        super()._apply(fn, recurse)
        self._buffers |= counted
        return self


class ExtendsPlainViT(PlainBlocks):
    """A method whose network is an `ExtendedViT`."""

    network_class: ClassVar[type[ExtendedViT]]
    save = Method.save

    def build(self, config: ModelConfig, weights: str | None = None, class_names: list[str] | None = None) -> Any:
        return self.network_class(super().build(config, weights, class_names), self.options, weights is not None)

    def training_module(self, network: Any) -> nn.Module:
        module: Any = super().training_module(network)
        module._ddp_params_and_buffers_to_ignore = [f"parts.0.{name}" for name in network.counted]  # on the CPU
        return module

    def points(self, network: Any) -> dict[str, Callable[[Tensor], Tensor]]:
        return {self.point: network}

    def is_added(self, name: str) -> bool:
        return not name.startswith("backbone.")


class SelfDistilled(ExtendsPlainViT):
    """A method whose network learns from a frozen copy of its own backbone, as it was before training.

    A run that is resumed is built from the same initial weights, so its teacher is the same.
    """

    @abstractmethod
    def distil(self, network: Any, teacher: FrozenTeacher, images: Tensor) -> tuple[Tensor, Tensor]:
        """In training: logits ``[B, classes]``, and how far the network is from its teacher, a scalar."""

    def training_module(self, network: Any) -> nn.Module:
        if not network.trained:
            warnings.warn("the teacher is the backbone and has random weights: give --initial-weights", stacklevel=2)
        return TrainingModule(self.distil, network, FrozenTeacher(network.backbone))

    def loss(self, module: Any, batch: Batch, split: float) -> Tensor:
        logits, imitation = module(batch.images)
        return self.answer_loss(logits, batch) + imitation


class FrozenTeacher(nn.Module):
    """A copy of a backbone as it is now: always in evaluation, without gradients."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone: Any = copy.deepcopy(backbone).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenTeacher:
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits ``[B, classes]`` and the patches after each block, ``[B, n, D]``, the last ones after the norm."""
        after: list[Tensor] = []
        tokens = self.backbone.norm(blocks.run(self.backbone, images, after=after))
        return self.backbone.forward_head(tokens), [tokens[:, 1:] for tokens in (*after[:-1], tokens)]
