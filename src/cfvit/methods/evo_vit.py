"""Evo-ViT: half of the patches go through a block, the others follow a representative of theirs.

Xu et al., "Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer", AAAI 2022; as described, not by its
code. Choices that the paper leaves open: the representative is the mean of the patches that it stands for, weighted by
their class attention; a patch that bypasses a block keeps its class attention of before; the mean patch is classified
by the class token's own head, and the class token gives the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from cfvit.methods import blocks
from cfvit.methods.base import Batch, register
from cfvit.methods.plain import KeepRate, PlainBlocks
from cfvit.modeling.config import Number, configuration
from cfvit.modeling.tokens import class_attention_row, gather_tokens, num_informative, rank_cells

MOMENTUM = 0.5
"""Of the running average of class attention."""


@configuration
class SlowShare(KeepRate):
    """How many patches go through a block."""

    keep_rate: Number = Field(default=0.5, gt=0, le=1, description="share of the patches that go through a block")


def evolve(block: Any, tokens: Tensor, average: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A block for the class token, the ``count`` patches of highest class attention and a representative of the rest.

    From tokens ``[B, 1 + n, D]`` and their class attention ``[B, n]`` to both, those that went through it first.
    """
    slow, fast = rank_cells(average, count)
    waiting = average.gather(1, fast)
    weights = (waiting / waiting.sum(dim=1, keepdim=True)).to(tokens.dtype)
    bypassing = gather_tokens(tokens[:, 1:], fast)
    representative = (weights[..., None] * bypassing).sum(dim=1, keepdim=True)
    chosen = torch.cat([tokens[:, :1], gather_tokens(tokens[:, 1:], slow), representative], dim=1)
    chosen, query, key = blocks.attend(block, chosen)
    row = class_attention_row(query, key, block.attn.scale, num_prefix_tokens=1)[:, :count]
    chosen = blocks.transform(block, chosen)
    bypassing = bypassing + chosen[:, -1:] - representative  # what both halves of the block added to it
    seen = MOMENTUM * average.gather(1, slow) + (1 - MOMENTUM) * row
    return torch.cat([chosen[:, :-1], bypassing], dim=1), torch.cat([seen, waiting], dim=1)


@register("evo_vit")
class EvoViT(PlainBlocks):
    """The plain ViT, in training as well; after the first third, blocks compute the patches of most class attention."""

    title = "Evo-ViT"
    options_class = SlowShare

    def forward(self, network: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits by the class token and by the mean patch, ``[B, classes]`` each."""
        tokens, average = blocks.embed(network, images), None
        count = num_informative(self.options.keep_rate, tokens.shape[1] - 1)
        for index, block in enumerate(network.blocks):
            if average is None or index < len(network.blocks) // 3 or count == average.shape[1]:
                tokens, query, key = blocks.attend(block, tokens)
                average = class_attention_row(query, key, block.attn.scale, num_prefix_tokens=1)
                tokens = blocks.transform(block, tokens)
            else:
                tokens, average = evolve(block, tokens, average, count)
        tokens = network.norm(tokens)
        return network.forward_head(tokens), network.head(tokens[:, 1:].mean(dim=1))

    def loss(self, module: Any, batch: Batch, split: float) -> Tensor:
        by_class, by_patches = module(batch.images)
        return 0.5 * self.answer_loss(by_class, batch) + 0.5 * self.answer_loss(by_patches, batch)

    def points(self, network: Any) -> dict[str, Callable[[Tensor], Tensor]]:
        return {self.point: lambda images: self.forward(network, images)[0]}
