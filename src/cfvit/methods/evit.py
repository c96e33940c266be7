"""EViT: inattentive patches are fused into one token.

Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations", ICLR 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cfvit.methods.base import register
from cfvit.methods.plain_blocks import PlainBlocks, attend, classify, embed, transform
from cfvit.modeling.tokens import class_attention_row, gather_tokens, rank_cells

KEEP = 0.7
"""The share of patch tokens that stay each time. The authors lower it from 1 in the first epochs; here it is fixed."""


@register("evit")
class EViT(PlainBlocks):
    """The plain ViT with three reductions of its tokens, in training as well."""

    title = "EViT"

    def in_training(self, network: Any) -> nn.Module:
        return ReorganisingViT(network, KEEP)

    def points(self, network: Any) -> dict[str, Callable[[Tensor], Tensor]]:
        return {f"keep {KEEP}": ReorganisingViT(network, KEEP)}


class ReorganisingViT(nn.Module):
    """A plain ViT in which three blocks fuse the patches that the class token attends to least.

    Args:
        backbone: timm's plain ViT.
        keep: share of the patch tokens that stay each time, in (0, 1].
    """

    def __init__(self, backbone: Any, keep: float) -> None:
        super().__init__()
        self.backbone, self.keep = backbone, keep
        quarter = max(1, len(backbone.blocks) // 4)
        self.places = (quarter, 2 * quarter, 3 * quarter)
        """Counted from 0: blocks 4, 7 and 10 of 12."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, 3, S, S]``."""
        tokens = embed(self.backbone, images)
        for index, block in enumerate(self.backbone.blocks):
            tokens, query, key = attend(block, tokens)
            if index in self.places:
                row = class_attention_row(query, key, block.attn.scale, num_prefix_tokens=1)
                tokens = fuse_inattentive(tokens, row, math.ceil(self.keep * row.shape[1]))
            tokens = transform(block, tokens)
        return classify(self.backbone, tokens)


def fuse_inattentive(tokens: Tensor, class_attention: Tensor, kept: int) -> Tensor:
    """All but the ``kept`` patches of highest class attention become one token, their sum weighted by it.

    Args:
        tokens: ``[B, 1 + n, D]``, the class token first.
        class_attention: ``[B, n]``.

    Returns:
        ``[B, 1 + kept + 1, D]``; the tokens themselves if all are kept.
    """
    if kept >= class_attention.shape[1]:
        return tokens
    patches = tokens[:, 1:]
    attentive, others = rank_cells(class_attention, kept)
    weights = class_attention.gather(1, others).to(tokens.dtype)
    fused = (weights[..., None] * gather_tokens(patches, others)).sum(dim=1, keepdim=True)
    return torch.cat([tokens[:, :1], gather_tokens(patches, attentive), fused], dim=1)
