"""DynamicViT: three predictors decide which patches go on.

Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021; as described,
not by its code. The paper trains for 30 epochs, the predictors with a hundred times the learning rate of the backbone,
which it freezes for five: ``--added-lr-scale 100 --added-only-epochs 5``. By default one rate holds for all weights, as
for every method of this harness.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfvit.methods import blocks
from cfvit.methods.base import register
from cfvit.methods.plain import ExtendedViT, FrozenTeacher, KeepRate, SelfDistilled
from cfvit.modeling.losses import distillation_loss

RATIO_WEIGHT, TOKEN_WEIGHT, TEACHER_WEIGHT = 2.0, 0.5, 0.5
"""Of the squared distance to the wanted share, of the patches' distance to the teacher's, of the divergence from it."""


class KeepPredictor(nn.Module):
    """From patches to the log-probabilities of keeping and of dropping each: ``[B, n, D], [B, n] -> [B, n, 2]``.

    Half of the channels stay a patch's own, the other half become the mean over the patches that are still kept.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.look = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.decide = nn.Sequential(
            nn.Linear(dim, dim // 2),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4),
            nn.GELU(),
            nn.Linear(dim // 4, 2),
            nn.LogSoftmax(dim=-1),
        )

    def forward(self, patches: Tensor, kept: Tensor) -> Tensor:
        own, shared = self.look(patches).chunk(2, dim=-1)
        weights = kept[..., None] / kept.sum(dim=1)[:, None, None].clamp(min=1)
        mean = (weights * shared).sum(dim=1, keepdim=True)
        return self.decide(torch.cat([own, mean.expand_as(shared)], dim=-1))


class SparsifiedViT(ExtendedViT):
    """A plain ViT with predictors before three blocks, where the patches that they rank highest go on."""

    def __init__(self, backbone: Any, options: Any, trained: bool) -> None:
        super().__init__(backbone, options, trained)
        places, rate = blocks.places_of_reduction(backbone), options.keep_rate
        self.shares = {place: rate**stage for stage, place in enumerate(places, start=1)}
        """Of all patches that are kept, by the block before which others are dropped."""
        self.predictors = nn.ModuleList(KeepPredictor(backbone.embed_dim) for _ in places)

    def predict(self, index: int, patches: Tensor, kept: Tensor) -> Tensor:
        """What the predictor before block ``index`` says."""
        return self.predictors[list(self.shares).index(index)](patches, kept)

    def reduce(self, index: int, tokens: Tensor) -> Tensor:
        if index not in self.shares:
            return tokens
        scores = self.predict(index, tokens[:, 1:], tokens.new_ones(len(tokens), tokens.shape[1] - 1))[..., 0]
        count = math.floor(round(self.backbone.patch_embed.num_patches * self.shares[index], 6))
        return blocks.keep_highest(tokens, scores, max(1, count))

    def decide(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """In training, decisions are drawn by Gumbel's trick and mask the attention, which gives gradients.

        Returns:
            The tokens after the norm ``[B, 1 + n, D]``, the decisions ``[B, n]``, and the share of the patches that is
            kept at each stage, ``[B]``.
        """
        tokens, shares = blocks.embed(self.backbone, images), []
        kept = tokens.new_ones(len(tokens), tokens.shape[1] - 1)
        for index, block in enumerate(self.backbone.blocks):
            if index in self.shares:
                kept = kept * F.gumbel_softmax(self.predict(index, tokens[:, 1:], kept), hard=True)[..., 0]
                shares.append(kept.mean(dim=1))
            tokens = blocks.transform(block, blocks.attend_kept(block, tokens, F.pad(kept, (1, 0), value=1.0)))
        return self.backbone.norm(tokens), kept, shares


@register("dynamicvit")
class DynamicViT(SelfDistilled):
    """Trained with masks towards the keep rate of each stage and the backbone's own answers; answers by dropping."""

    title = "DynamicViT"
    options_class = KeepRate
    network_class = SparsifiedViT

    def distil(self, network: Any, teacher: FrozenTeacher, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits; and the distances to the wanted shares, to the teacher's patches and to its answer."""
        tokens, kept, shares = network.decide(images)
        logits = network.backbone.forward_head(blocks.hide_dropped(tokens, kept))
        teacher_logits, patches = teacher(images)
        wanted = tokens.new_tensor(list(network.shares.values()))[: len(shares)]
        ratio = (torch.stack(shares, dim=1) - wanted).square().mean()
        distance = (tokens[:, 1:] - patches[-1]).square().mean(dim=-1)
        imitation = (kept * distance).sum() / kept.sum().clamp(min=1)
        divergence = distillation_loss(logits, teacher_logits)
        return logits, RATIO_WEIGHT * ratio + TOKEN_WEIGHT * imitation + TEACHER_WEIGHT * divergence
