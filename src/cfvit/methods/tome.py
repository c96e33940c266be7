"""ToMe: in each block the most similar tokens are merged, in training as well.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from cfvit.methods import blocks
from cfvit.methods.base import Options, register
from cfvit.methods.plain import PlainBlocks
from cfvit.modeling.config import configuration
from cfvit.modeling.tokens import merge_similar


@configuration
class Merging(Options):
    """How many tokens are merged."""

    merged: int = Field(default=13, ge=0, description="r, the number of tokens that each block merges away")


@register("tome")
class ToMe(PlainBlocks):
    """The plain ViT whose blocks merge patch tokens; each shortens the sequence by r, which is ``merged``."""

    title = "ToMe"
    options_class = Merging

    @property
    def point(self) -> str:
        return f"r={self.options.merged}"

    def forward(self, network: Any, images: Tensor) -> Tensor:
        tokens, sizes = blocks.embed(network, images), None
        for block in network.blocks:
            bias = None if sizes is None else sizes.log()[:, None, None]  # attention in proportion to size
            tokens, _, key = blocks.attend(block, tokens, bias)
            tokens, sizes = merge_similar(tokens, key.mean(dim=1), sizes, self.options.merged)
            tokens = blocks.transform(block, tokens)
        return blocks.classify(network, tokens)
