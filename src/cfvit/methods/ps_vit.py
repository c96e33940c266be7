"""PS-ViT: one nested choice of patches for all images, made from the last block to the first, then fine-tuned.

Tang et al., "Patch Slimming for Efficient Vision Transformers", CVPR 2022; as described, not by its code. The nested
masks are one order of the patches and a number for each block. Choices that the paper leaves open: the masks follow
from the first training batch; the impact of a patch is the attention that needed tokens pay to it, times the length of
its value; the error is of a block's output for the needed tokens, relative to what the block adds to them. Until masks
are chosen, the numbers fall evenly from block to block, so that DeiT-S costs the 2.6 GMACs that the paper prints.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from cfvit.errors import UsageError
from cfvit.methods import blocks
from cfvit.methods.base import Options, register
from cfvit.methods.plain import ExtendedViT, ExtendsPlainViT
from cfvit.modeling.config import Number, configuration

LAST_SHARE = 0.14
"""Of the patches in the last block, before masks are chosen."""

STEP = 1 / 28
"""Share of the patches that is added at a time, until the error is small enough: 7 of 196."""


@configuration
class Tolerance(Options):
    """How exactly the slimmed blocks compute."""

    tolerance: Number = Field(default=0.06, gt=0, lt=1, description="relative error that dropping may cause in a block")


class PatchSlimmedViT(ExtendedViT):
    """A plain ViT whose block ``k`` has the first ``plan[k]`` patches of an order."""

    plan: Tensor
    order: Tensor
    chosen: Tensor
    counted = ("plan", "chosen")

    def __init__(self, backbone: Any, options: Any, trained: bool) -> None:
        super().__init__(backbone, options, trained)
        count, depth = backbone.patch_embed.num_patches, len(backbone.blocks)
        shares = torch.linspace(1, LAST_SHARE, depth, device="cpu")
        self.register_buffer("plan", (count * shares).round().long())
        self.register_buffer("order", torch.arange(count))
        self.register_buffer("chosen", torch.tensor(False, device="cpu"))

    def forward(self, images: Tensor, counts: list[int] | None = None) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, 3, S, S]``, with so many patches in each block, or ``plan``."""
        counts = counts or self.plan.tolist()
        tokens = blocks.embed(self.backbone, images)
        tokens = torch.cat([tokens[:, :1], tokens[:, 1:][:, self.order[: counts[0]]]], dim=1)
        for block, count in zip(self.backbone.blocks, counts, strict=True):
            tokens = blocks.run_block(block, tokens[:, : 1 + count])
        return blocks.classify(self.backbone, tokens)

    @torch.no_grad()
    def choose(self, images: Tensor) -> None:
        """Chooses the patches of each block, those that the block after it needs and the fewest others that do.

        Args:
            images: ``[B, 3, S, S]``; the masks are for all images, and these stand for them.
        """
        training = self.training
        self.eval()  # no block is left out at random
        inputs = [blocks.embed(self.backbone, images)]
        blocks.run(self.backbone, images, after=inputs)
        patches = inputs[0].shape[1] - 1
        step = max(1, round(STEP * patches))
        kept, counts = torch.zeros(1, dtype=torch.long, device=images.device), []  # the class token, which is token 0
        for block, before, whole in zip(
            reversed(self.backbone.blocks), reversed(inputs[:-1]), reversed(inputs[1:]), strict=True
        ):
            needed = kept
            scores = impact(block, before, needed).index_fill(0, needed, -torch.inf)
            others = scores.argsort(descending=True)[: 1 + patches - len(needed)]
            added = (whole[:, needed] - before[:, needed]).square().sum()
            for count in [*range(0, len(others), step), len(others)]:
                kept = torch.cat([needed, others[:count]])
                error = (blocks.run_block(block, before[:, kept])[:, : len(needed)] - whole[:, needed]).square().sum()
                if error <= self.options.tolerance * added:
                    break
            counts.insert(0, len(kept) - 1)
        rest = torch.arange(patches + 1, device=images.device)
        self.order.copy_(torch.cat([kept, rest[~torch.isin(rest, kept)]])[1:] - 1)
        self.plan.copy_(torch.tensor(counts))
        self.chosen.fill_(True)
        self.train(training)


def impact(block: Any, tokens: Tensor, needed: Tensor) -> Tensor:
    """What each token matters to the needed ones, mean over images: ``[B, T, D], [n] -> [T]``."""
    query, key, value = blocks.project(block.attn, block.norm1(tokens))
    maps = (query[:, :, needed] * block.attn.scale @ key.transpose(-2, -1)).softmax(dim=-1)
    return (maps.sum(dim=2) * value.norm(dim=-1)).mean(dim=(0, 1))


@register("ps_vit")
class PsViT(ExtendsPlainViT):
    """Masks from the first batch, then training with the patches really dropped."""

    title = "PS-ViT"
    options_class = Tolerance
    network_class = PatchSlimmedViT

    def forward(self, network: Any, images: Tensor) -> Tensor:
        """Logits of images ``[B, 3, S, S]``, by which masks are chosen if there are none yet."""
        if not (network.chosen or images.is_meta):
            if dist.is_initialized():
                raise UsageError("the masks of ps_vit are chosen by one process: start training without torchrun")
            network.choose(images)
        return network(images)

    def points(self, network: Any) -> dict[str, Callable[[Tensor], Tensor]]:
        return {"masks": partial(network, counts=network.plan.tolist())}
