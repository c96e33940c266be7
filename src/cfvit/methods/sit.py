"""SiT: learned mixtures halve the tokens three times, and the unslimmed network teaches each layer.

Zong et al., "Self-slimmed Vision Transformer", ECCV 2022; as described, not by its code. Choices that the paper leaves
open: the class token is not mixed; one reverse module serves all blocks of a stage; layers are compared on patches.

On LV-ViT-S it costs 4.97 GMACs where the paper prints 4.0: LV-ViT's stem alone costs 1.35, and all that comes after it,
with the paper's numbers of tokens, 3.62. The paper's stem must be a cheaper one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cfvit.methods import blocks
from cfvit.methods.base import register
from cfvit.methods.plain import ExtendedViT, FrozenTeacher, KeepRate, SelfDistilled
from cfvit.modeling.config import Number, configuration
from cfvit.modeling.losses import distillation_loss

TOKEN_WEIGHT, TEACHER_WEIGHT = 2.0, 2.0
"""Of the layers' distance to the teacher's, and of the divergence from its answer."""

STARTS = (9 / 16, 12 / 16, 14 / 16)
"""Where stages begin, in shares of the depth: [9, 3, 2, 2] blocks of LV-ViT-S."""


@configuration
class Slimming(KeepRate):
    """How many tokens a stage has."""

    keep_rate: Number = Field(default=0.5, gt=0, le=1, description="tokens of a stage, as a share of those before it")


class Mixtures(nn.Module):
    """New tokens, each a mean of the old ones by weights that they give themselves: ``[B, n, D] -> [B, m, D]``.

    With fewer than before it slims; with more it is the reverse of that.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, count))
        self.scale = nn.Parameter(torch.ones(1, 1, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        weights = (self.scale * self.score(tokens)).softmax(dim=1)
        return weights.transpose(1, 2) @ tokens


class SelfSlimmedViT(ExtendedViT):
    """A plain ViT with fewer tokens from stage to stage."""

    def __init__(self, backbone: Any, options: Any, trained: bool) -> None:
        super().__init__(backbone, options, trained)
        depth, patches, dim = len(backbone.blocks), backbone.patch_embed.num_patches, backbone.embed_dim
        counts = [max(1, math.floor(round(patches * options.keep_rate**k, 6))) for k in (1, 2, 3)]
        starts = [min(depth - 1, int(depth * start)) for start in STARTS] if options.keep_rate < 1 else []
        self.stages = [sum(start <= index for start in starts) for index in range(depth)]
        """The stage of each block; the first has all tokens."""
        self.slim = nn.ModuleList(Mixtures(dim, counts[k]) for k in range(len(starts)))
        self.restore = nn.ModuleList(Mixtures(dim, patches) for _ in starts)

    def reduce(self, index: int, tokens: Tensor) -> Tensor:
        for stage in range(self.stages[index - 1] if index else 0, self.stages[index]):
            tokens = torch.cat([tokens[:, :1], self.slim[stage](tokens[:, 1:])], dim=1)
        return tokens


@register("sit")
class SiT(SelfDistilled):
    """Slimmed in training as well, and taught by the backbone that it started from."""

    title = "SiT"
    options_class = Slimming
    network_class = SelfSlimmedViT

    def distil(self, network: Any, teacher: FrozenTeacher, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits; and the distances to the teacher's layers and to its answer."""
        (teacher_logits, wanted), after, distances = teacher(images), list[Tensor](), []
        normed = network.backbone.norm(blocks.run(network.backbone, images, network.reduce, after))
        for stage, tokens, patches in zip(network.stages, (*after[:-1], normed), wanted, strict=True):
            own = network.restore[stage - 1](tokens[:, 1:]) if stage else tokens[:, 1:]
            distances.append(F.mse_loss(own, patches))
        logits = network.backbone.forward_head(normed)
        divergence = distillation_loss(logits, teacher_logits)
        return logits, TOKEN_WEIGHT * torch.stack(distances).mean() + TEACHER_WEIGHT * divergence
