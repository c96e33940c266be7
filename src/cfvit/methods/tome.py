"""ToMe: in each block the most similar tokens are merged.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from cfvit.methods.base import Options, register
from cfvit.methods.plain_blocks import PlainBlocks, attend, classify, embed, transform
from cfvit.modeling.config import configuration
from cfvit.modeling.tokens import merge_similar


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
    """A plain ViT whose blocks merge patch tokens; each shortens the sequence by r, which is ``merged``."""

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
