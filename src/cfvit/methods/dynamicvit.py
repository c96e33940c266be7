"""DynamicViT: three predictors decide which patches go on.

Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021; as described,
not by its code. The paper trains the predictors with a hundred times the learning rate of the backbone, which it
freezes for five epochs; here one rate and one schedule hold for all, as for every method of this harness.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfvit.methods.base import Batch, register
from cfvit.methods.plain import single_answer_loss
from cfvit.methods.plain_blocks import (
    attend,
    attend_kept,
    classify,
    embed,
    keep_highest,
    places_of_reduction,
    transform,
)
from cfvit.methods.slimming import ExtendedViT, ExtendsPlainViT, FrozenTeacher, KeepRate
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
        self.places = places_of_reduction(backbone)
        self.predictors = nn.ModuleList(KeepPredictor(backbone.embed_dim) for _ in self.places)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, 3, S, S]``."""
        tokens = embed(self.backbone, images)
        count = tokens.shape[1] - 1
        for index, block in enumerate(self.backbone.blocks):
            if index in self.places:
                stage = self.places.index(index)
                patches = tokens[:, 1:]
                scores = self.predictors[stage](patches, patches.new_ones(patches.shape[:2]))[..., 0]
                share = self.options.keep_rate ** (stage + 1)
                tokens = keep_highest(tokens, scores, max(1, math.floor(round(count * share, 6))))
            tokens = transform(block, attend(block, tokens)[0])
        return classify(self.backbone, tokens)


class Decided(NamedTuple):
    """What training needs of a batch: logits, patches after the norm ``[B, n, D]``, decisions ``[B, n]``, shares kept
    at each stage ``[B, 3]``, and the teacher's logits and patches."""

    logits: Tensor
    patches: Tensor
    kept: Tensor
    shares: Tensor
    teacher_logits: Tensor
    teacher_patches: Tensor


class DecidingViT(nn.Module):
    """The network in training: decisions are drawn by Gumbel's trick and mask the attention, which gives gradients."""

    def __init__(self, network: SparsifiedViT) -> None:
        super().__init__()
        self.network, self.teacher = network, FrozenTeacher(network)

    def forward(self, images: Tensor) -> Decided:
        """Logits of all patches with masks, and what the loss compares: shares kept, patches, and the teacher's."""
        network, shares = self.network, []
        vit = network.backbone
        tokens = embed(vit, images)
        kept = tokens.new_ones(len(tokens), tokens.shape[1] - 1)
        for index, block in enumerate(vit.blocks):
            if index in network.places:
                scores = network.predictors[network.places.index(index)](tokens[:, 1:], kept)
                kept = kept * F.gumbel_softmax(scores, hard=True)[..., 0]
                shares.append(kept.mean(dim=1))
            tokens = transform(block, attend_kept(block, tokens, F.pad(kept, (1, 0), value=1.0)))
        tokens = vit.norm(tokens)
        logits, patches = self.teacher(images)
        return Decided(vit.forward_head(tokens), tokens[:, 1:], kept, torch.stack(shares, 1), logits, patches[-1])


@register("dynamicvit")
class DynamicViT(ExtendsPlainViT):
    """Trained with masks towards the keep rate of each stage and the backbone's own answers; answers by dropping."""

    title = "DynamicViT"
    options_class = KeepRate
    network_class = SparsifiedViT
    training_class = DecidingViT

    def loss(self, running: Any, batch: Batch, split: float) -> Tensor:
        """The labels' loss, the distance to the wanted shares, and to the teacher's patches and answer."""
        output: Decided = running(batch.images)
        wanted = [self.options.keep_rate ** (stage + 1) for stage in range(output.shares.shape[1])]
        ratio = (output.shares - output.shares.new_tensor(wanted)).square().mean()
        distance = (output.patches - output.teacher_patches).square().mean(dim=-1)
        imitation = (output.kept * distance).sum() / output.kept.sum().clamp(min=1)
        divergence = distillation_loss(output.logits, output.teacher_logits)
        own = RATIO_WEIGHT * ratio + TOKEN_WEIGHT * imitation + TEACHER_WEIGHT * divergence
        return single_answer_loss(output.logits, batch, self) + own

    def points(self, network: Any) -> dict[str, Callable[[Tensor], Tensor]]:
        return {f"keep {self.options.keep_rate:g}": network}
