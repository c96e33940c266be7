"""ToMe: in each block the most similar tokens are merged.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cfvit.methods.base import Options, register
from cfvit.methods.plain_blocks import PlainBlocks, attend, classify, embed, transform
from cfvit.modeling.config import configuration
from cfvit.modeling.tokens import gather_tokens, rank_cells


@configuration
class Merging(Options):
    """How many tokens are merged."""

    merged: int = Field(default=13, ge=0, description="r, the number of tokens that each block merges away")


@register("tome")
class ToMe(PlainBlocks):
    """The plain ViT with merging, in training as well."""

    title = "ToMe"
    options_class = Merging

    def in_training(self, network: Any) -> nn.Module:
        return MergingViT(network, self.options.merged)

    def points(self, network: Any) -> dict[str, Callable[[Tensor], Tensor]]:
        return {f"r={self.options.merged}": MergingViT(network, self.options.merged)}


class MergingViT(nn.Module):
    """A plain ViT whose blocks merge patch tokens.

    Args:
        backbone: timm's plain ViT.
        merged: r, by how many tokens a block shortens the sequence.
    """

    def __init__(self, backbone: Any, merged: int) -> None:
        super().__init__()
        self.backbone, self.merged = backbone, merged

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, 3, S, S]``."""
        tokens, sizes = embed(self.backbone, images), None
        for block in self.backbone.blocks:
            bias = None if sizes is None else sizes.log()[:, None, None]  # attention in proportion to size
            tokens, _, key = attend(block, tokens, bias)
            tokens, sizes = merge_similar(tokens, key.mean(dim=1), sizes, self.merged)
            tokens = transform(block, tokens)
        return classify(self.backbone, tokens)


def merge_similar(tokens: Tensor, keys: Tensor, sizes: Tensor | None, count: int) -> tuple[Tensor, Tensor | None]:
    """Bipartite soft matching: every other patch may be merged into the most similar one of the rest.

    Args:
        tokens: ``[B, 1 + n, D]``, the class token first, which is never merged.
        keys: ``[B, 1 + n, d]``; tokens are similar by the cosine of their keys.
        sizes: ``[B, 1 + n]``, how many patches each token stands for; None for one each.
        count: how many tokens are merged away, those with the most similar partners; at most half of the patches.

    Returns:
        Tokens ``[B, 1 + n - count, D]``, each the mean of its patches, and their sizes.
    """
    count = min(count, (tokens.shape[1] - 1) // 2)
    if count <= 0:
        return tokens, sizes
    if sizes is None:
        sizes = tokens.new_ones(tokens.shape[:2])
    directions = F.normalize(keys[:, 1:], dim=-1)
    similarity, partner = (directions[:, 0::2] @ directions[:, 1::2].transpose(1, 2)).max(dim=-1)
    going, staying = rank_cells(similarity, count)
    partner = partner.gather(1, going)

    def merge(values: Tensor) -> Tensor:
        movable, fixed = values[:, 0::2], values[:, 1::2]
        moved = gather_tokens(movable, going)
        fixed = fixed.scatter_add(1, partner[..., None].expand_as(moved), moved)
        return torch.cat([gather_tokens(movable, staying), fixed], dim=1)

    weights = sizes[:, 1:, None]
    merged = merge(weights)
    patches = merge(tokens[:, 1:] * weights) / merged
    return torch.cat([tokens[:, :1], patches], dim=1), torch.cat([sizes[:, :1], merged[..., 0]], dim=1)
