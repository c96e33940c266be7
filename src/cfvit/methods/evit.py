"""EViT: inattentive patches are fused into one token.

Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations", ICLR 2022.
The authors lower the keep rate from 1 in the first epochs; here it is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cfvit.methods.base import register
from cfvit.methods.plain_blocks import PlainBlocks, attend, classify, embed, places_of_reduction, transform
from cfvit.methods.slimming import KeepRate
from cfvit.modeling.tokens import class_attention_row, gather_tokens, rank_cells


@register("evit")
class EViT(PlainBlocks):
    """The plain ViT with three reductions of its tokens, in training as well."""

    title = "EViT"
    options_class = KeepRate

    def in_training(self, network: Any) -> nn.Module:
        return ReorganisingViT(network, self.options.keep_rate)

    def points(self, network: Any) -> dict[str, Callable[[Tensor], Tensor]]:
        return {f"keep {self.options.keep_rate:g}": self.in_training(network)}


class ReorganisingViT(nn.Module):
    """A plain ViT in which three blocks keep a share of the patches, and fuse those of least class attention."""

    def __init__(self, backbone: Any, keep: float) -> None:
        super().__init__()
        self.backbone, self.keep = backbone, keep

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, 3, S, S]``."""
        return classify(self.backbone, run_reorganising(self.backbone, embed(self.backbone, images), self.keep))


def run_reorganising(backbone: Any, tokens: Tensor, keep: float) -> Tensor:
    """All blocks, between whose halves three reduce the tokens: ``[B, 1 + n, D]`` to what is left of them."""
    places = places_of_reduction(backbone)
    for index, block in enumerate(backbone.blocks):
        tokens, query, key = attend(block, tokens)
        if index in places:
            row = class_attention_row(query, key, block.attn.scale, num_prefix_tokens=1)
            tokens = fuse_inattentive(tokens, row, math.ceil(keep * row.shape[1]))
        tokens = transform(block, tokens)
    return tokens


def fuse_inattentive(tokens: Tensor, class_attention: Tensor, kept: int) -> Tensor:
    """All but the ``kept`` patches of highest class attention become one token, their sum weighted by it.

    ``[B, 1 + n, D], [B, n] -> [B, 1 + kept + 1, D]``, the class token first; the tokens themselves if all are kept.
    """
    if kept >= class_attention.shape[1]:
        return tokens
    patches = tokens[:, 1:]
    attentive, others = rank_cells(class_attention, kept)
    weights = class_attention.gather(1, others).to(tokens.dtype)
    fused = (weights[..., None] * gather_tokens(patches, others)).sum(dim=1, keepdim=True)
    return torch.cat([tokens[:, :1], gather_tokens(patches, attentive), fused], dim=1)
