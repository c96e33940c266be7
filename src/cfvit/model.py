"""The coarse-to-fine vision transformer: configuration, feature reuse and the two stages.

The two stages meet in a `CoarseState`; nothing is kept on the module between calls::

    state = model.coarse(images)
    hard = state.confidence < 0.5
    logits = model.fine(images[hard], state[hard])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm.data
import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

from cfvit import backbones
from cfvit.errors import CfvitError
from cfvit.tokens import (
    accumulate_attention,
    child_positions,
    gather_tokens,
    num_informative,
    rank_cells,
    repeat_for_children,
)

FIRST_ATTENTION_BLOCK = 3
"""The global class attention begins at the 4th block: earlier rows are unstable (Fig. 1a)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What defines a model besides its weights. Saved as part of ``config.json``.

    Attributes:
        backbone: name of a timm ViT with a class token.
        num_classes: size of the head.
        coarse_grid: side ``g`` of the coarse grid in cells; images have ``2 * g * patch`` pixels a side.
        informative_ratio: alpha, the share of cells that the fine stage splits, in [0, 1].
        attention_momentum: beta of Eq. 9, in [0, 1).
        timm_kwargs: further keyword arguments of ``timm.create_model``.
    """

    backbone: str
    num_classes: int = 1000
    coarse_grid: int = 7
    informative_ratio: float = 0.5
    attention_momentum: float = 0.99
    timm_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(self.num_classes >= 1, f"num_classes is {self.num_classes}: give at least 1")
        whole = isinstance(self.coarse_grid, int) and self.coarse_grid >= 1
        _require(whole, f"coarse_grid is {self.coarse_grid!r}: give a whole number of at least 1")
        reserved = {"img_size", "num_classes", "pretrained", "in_chans"} & set(self.timm_kwargs)
        _require(not reserved, f"{', '.join(reserved)} cannot be given to timm: it follows from cfvit's own arguments")
        _require(
            0 <= self.informative_ratio <= 1,
            f"informative_ratio is {self.informative_ratio}: give a share between 0 and 1",
        )
        _require(
            0 <= self.attention_momentum < 1,
            f"attention_momentum is {self.attention_momentum}: give at least 0 and less than 1",
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CfvitError(message)


@dataclass(eq=False)
class CoarseState:
    """What the coarse stage knows of a batch, and all that the fine stage needs of it.

    Index it like a tensor along the batch: ``state[hard]`` with a mask, indices or a slice.

    Attributes:
        logits: ``[B, classes]``, the coarse answer.
        tokens: ``[B, N, D]``, patch tokens after the final norm, for feature reuse.
        embedding: ``[B, N, D]``, patch tokens before the first block, for cells that are not split.
        class_attention: ``[B, N]``, global class attention in float32 (Eq. 9).
    """

    logits: Tensor
    tokens: Tensor
    embedding: Tensor
    class_attention: Tensor

    @property
    def confidence(self) -> Tensor:
        """The highest softmax probability of each image, ``[B]`` in float32."""
        return self.logits.float().softmax(dim=-1).amax(dim=-1)

    def __getitem__(self, index: Any) -> CoarseState:
        return CoarseState(*(getattr(self, f.name)[index] for f in fields(self)))


class CoarseToFineOutput(NamedTuple):
    """Logits of both stages for every image, each ``[B, classes]``."""

    coarse: Tensor
    fine: Tensor


class FeatureReuse(nn.Module):
    """LayerNorm and an MLP on the coarse stage's output tokens (Fig. 4): ``[B, n, D] -> [B, n, D]``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)
        for layer in (self.mlp.fc1, self.mlp.fc2):
            trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(cast(Tensor, layer.bias))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mlp(self.norm(tokens))


class CoarseToFineViT(nn.Module):
    """A ViT that reads an image coarsely, and again with its informative cells split 2 x 2.

    Build one with `create_model` or `cfvit.load`. ``backbone`` is timm's model at the full image
    size; its own position embedding serves the fine stage. All other weights are the position
    embedding of the coarse grid and the feature reuse.

    Attributes:
        config: the `ModelConfig` it was built from.
        data_config: preprocessing in timm's keys (``input_size``, ``mean``, ``std``, ...).
        class_names: a name for each class, or None.
        threshold: the calibrated confidence at which the coarse answer is given, or None.
    """

    def __init__(
        self, config: ModelConfig, pretrained_backbone: bool | str | Path | Mapping[str, Tensor] = False
    ) -> None:
        super().__init__()
        patch = backbones.patch_size(config.backbone, **config.timm_kwargs)
        self.config = config
        self.grid = (config.coarse_grid, config.coarse_grid)
        self.image_size = 2 * config.coarse_grid * patch
        self.backbone = backbones.create_backbone(
            config.backbone,
            img_size=self.image_size,
            num_classes=config.num_classes,
            pretrained=pretrained_backbone,
            **config.timm_kwargs,
        )
        fine_positions = self.backbone.pos_embed
        assert fine_positions is not None
        coarse = backbones.resample_positions(self.backbone, fine_positions.detach(), self.grid)
        self.coarse_pos_embed = nn.Parameter(coarse.clone())
        if pretrained_backbone is False:
            trunc_normal_(self.coarse_pos_embed, std=0.02)
        dim, hidden = self.backbone.embed_dim, backbones.mlp_width(self.backbone)
        self.feature_reuse = FeatureReuse(dim, hidden)

        self.data_config: dict[str, Any] = timm.data.resolve_model_data_config(self.backbone)
        self.data_config["input_size"] = (3, self.image_size, self.image_size)
        self.class_names: list[str] | None = None
        self.threshold: float | None = None

    def no_weight_decay(self) -> set[str]:
        """Names of parameters for optimisers to leave undecayed: positions and extra tokens."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()} | {"coarse_pos_embed"}

    def label_of(self, index: int) -> str:
        """The name of a class, or its number where the model has no names."""
        return self.class_names[index] if self.class_names else str(index)

    def coarse(self, images: Tensor) -> CoarseState:
        """The first stage: every image at half its side (Eqs. 5 to 9).

        Args:
            images: normalised, ``[B, 3, S, S]`` with ``S = image_size``.

        Raises:
            CfvitError: images of another shape.
        """
        self._check(images)
        backbone = self.backbone
        positions = self.coarse_pos_embed
        embedding = backbones.embed_coarse(backbone, images) + backbones.patch_positions(backbone, positions)
        prefix = backbones.prefix_tokens(backbone, positions).expand(len(images), -1, -1)
        tokens = backbones.enter(backbone, torch.cat([prefix, embedding], dim=1))

        depth = len(backbone.blocks)
        first = min(FIRST_ATTENTION_BLOCK, depth - 1)
        tokens = backbone.blocks[:first](tokens)
        attention = None
        for index in range(first, depth):
            tokens, row = backbones.block_with_class_attention(backbone, index, tokens)
            attention = accumulate_attention(attention, row, self.config.attention_momentum)
        assert attention is not None

        tokens = backbone.norm(tokens)
        logits = backbone.forward_head(tokens)
        return CoarseState(logits, tokens[:, backbone.num_prefix_tokens :], embedding, attention)

    def fine(self, images: Tensor, state: CoarseState, *, informative_ratio: float | None = None) -> Tensor:
        """The second stage: informative cells split, the others as the coarse stage saw them (Eqs. 10 to 13).

        Args:
            images: ``[B, 3, S, S]``, those that ``state`` describes, in its order.
            state: from `coarse`, indexed to these images.
            informative_ratio: instead of the configured share, in [0, 1]; 1 splits all cells.

        Returns:
            Logits ``[B, classes]``.

        Raises:
            CfvitError: images of another shape or number than the state's, a ratio out of range.
        """
        self._check(images)
        if len(images) != len(state.logits):
            raise CfvitError(f"{len(images)} images with the state of {len(state.logits)}: index both alike")
        ratio = self.config.informative_ratio if informative_ratio is None else informative_ratio
        _require(0 <= ratio <= 1, f"informative_ratio is {ratio}: give a share between 0 and 1")
        informative, others = rank_cells(state.class_attention, num_informative(ratio, state.tokens.shape[1]))

        backbone = self.backbone
        positions = backbone.pos_embed
        assert positions is not None
        reused = self.feature_reuse(gather_tokens(state.tokens, informative))
        children = (
            backbones.embed_children(backbone, images, informative)
            + gather_tokens(backbones.patch_positions(backbone, positions), child_positions(informative, self.grid[1]))
            + repeat_for_children(reused)
        )
        prefix = backbones.prefix_tokens(backbone, positions).expand(len(images), -1, -1)
        tokens = torch.cat([prefix, children, gather_tokens(state.embedding, others)], dim=1)
        return backbone.forward_head(backbone.norm(backbone.blocks(backbones.enter(backbone, tokens))))

    def forward(self, images: Tensor, *, informative_ratio: float | None = None) -> CoarseToFineOutput:
        """Both stages for every image, as in training and in the sweep over thresholds."""
        state = self.coarse(images)
        return CoarseToFineOutput(state.logits, self.fine(images, state, informative_ratio=informative_ratio))

    def _check(self, images: Tensor) -> None:
        side = self.image_size
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise CfvitError(f"images of shape {list(images.shape)}: give normalised [B, 3, {side}, {side}]")


def create_model(
    backbone: str,
    *,
    num_classes: int = 1000,
    coarse_grid: int = 7,
    informative_ratio: float = 0.5,
    attention_momentum: float = 0.99,
    pretrained_backbone: bool | str | Path | Mapping[str, Tensor] = False,
    **timm_kwargs: Any,
) -> CoarseToFineViT:
    """A coarse-to-fine model on a timm ViT.

    Args:
        backbone: a timm ViT with a class token, such as ``"deit_small_patch16_224"``.
        num_classes: size of the head.
        coarse_grid: side of the coarse grid in cells; the image side follows, ``2 * coarse_grid * patch``.
        informative_ratio: alpha, the share of cells that the fine stage splits.
        attention_momentum: beta of the global class attention.
        pretrained_backbone: True for timm's own weights, or a local file or state dict of them.
            The position embedding is resampled for both grids.
        timm_kwargs: passed on to ``timm.create_model`` (``drop_path_rate``, ``depth``, ...).

    Raises:
        CfvitError: an unknown or unsuitable backbone, a value out of range, weights that do not fit.
    """
    config = ModelConfig(
        backbone=backbone,
        num_classes=num_classes,
        coarse_grid=coarse_grid,
        informative_ratio=informative_ratio,
        attention_momentum=attention_momentum,
        timm_kwargs=timm_kwargs,
    )
    return CoarseToFineViT(config, pretrained_backbone)
