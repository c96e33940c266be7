"""IA-RED2: interpreters, trained by reward, drop the patches that an image does not need.

Pan et al., "IA-RED2: Interpretability-Aware Redundancy Reduction for Vision Transformers", NeurIPS 2021; as described,
not by its code. Choices that the paper leaves open: all interpreters and the backbone train together; a bias makes
interpreters keep everything at first; a wrong answer is punished by 1; the share in the reward is the mean over groups;
without labels an answer is right that agrees with the teacher's.

Each image keeps a number of patches of its own, so the cost is a mean: over the images answered since the network was
loaded; before that, over the images that training was scored on. Before any training each group keeps the share at
which DeiT-S costs the 3.2 GMACs that the paper prints.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cfvit.methods import blocks
from cfvit.methods.base import Batch, Options, count_points, register
from cfvit.methods.plain import ExtendedViT, ExtendsPlainViT
from cfvit.modeling.config import Number, configuration

GROUPS = 3
KEEP_ABOVE = 0.5
PUBLISHED_SHARE = 0.83
"""Of the patches that enter a group, those that it keeps, before any training."""

FIRST_BIAS = 2.0
PARTS = 1_000_000
"""Shares are stored as whole numbers of such parts, because averaging of weights changes floats only."""


@configuration
class Penalty(Options):
    """What a wrong answer costs."""

    penalty: Number = Field(default=1.0, ge=0, description="tau: a wrong answer is rewarded by -tau")


class Interpreter(nn.Module):
    """How much each token is worth keeping, in (0, 1): ``[B, n, D] -> [B, n]``.

    The mean over heads of the sigmoid of a token's query times the key of a learned policy token.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.norm, self.query, self.key = nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.policy = nn.Parameter(torch.randn(dim) * 0.02)
        self.bias = nn.Parameter(torch.tensor(FIRST_BIAS))

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.query(self.norm(tokens)).unflatten(-1, (self.heads, -1))
        key = self.key(self.policy).unflatten(-1, (self.heads, -1))
        return ((query * key).sum(dim=-1) * self.scale + self.bias).sigmoid().mean(dim=-1)


class InterpretedViT(ExtendedViT):
    """A plain ViT with an interpreter before each third of its blocks."""

    plan: Tensor
    counted = ("plan",)

    def __init__(self, backbone: Any, options: Any, trained: bool) -> None:
        super().__init__(backbone, options, trained)
        depth, heads = len(backbone.blocks), backbone.blocks[0].attn.num_heads
        self.starts = [depth * group // GROUPS for group in range(GROUPS)]
        self.interpreters = nn.ModuleList(Interpreter(backbone.embed_dim, heads) for _ in self.starts)
        shares = PUBLISHED_SHARE ** torch.arange(1, GROUPS + 1, device="cpu")
        self.register_buffer("plan", torch.cat([shares * PARTS, shares.new_zeros(1)]).long())
        """The share of all patches that each group keeps, in `PARTS`, mean over images; last, the number of images."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, 3, S, S]``, each with the patches that it needs."""
        return self.answer(images)[0]

    def answer(self, images: Tensor) -> tuple[Tensor, list[list[int]]]:
        """Logits, and the number of tokens of each image by group.

        The tokens of all images lie in one row, since they differ in number; only attention is computed image by image.
        """
        tokens = blocks.embed(self.backbone, images)
        lengths, row = [tokens.shape[1]] * len(images), tokens.flatten(0, 1)[None]
        counts = []
        for index, block in enumerate(self.backbone.blocks):
            if index in self.starts:
                kept = self.interpreters[self.starts.index(index)](row)[0] >= KEEP_ABOVE
                parts = [F.pad(part[1:], (1, 0), value=True) for part in kept.split(lengths)]  # class tokens stay
                row, lengths = row[:, torch.cat(parts)], torch.stack([part.sum() for part in parts]).tolist()
                counts.append(lengths)
            images_of = [part.split(lengths, dim=2) for part in blocks.project(block.attn, block.norm1(row))]
            mixed = [F.scaled_dot_product_attention(*image) for image in zip(*images_of, strict=True)]
            row = blocks.transform(block, blocks.add_mixed(block, row, torch.cat(mixed, dim=2)))
        return torch.cat([blocks.classify(self.backbone, image) for image in row.split(lengths, dim=1)]), counts

    def with_counts(self, images: Tensor, counts: list[int]) -> Tensor:
        """The same with given numbers of patches in each group, those that are worth most."""

        def reduce(index: int, tokens: Tensor) -> Tensor:
            if index not in self.starts:
                return tokens
            group = self.starts.index(index)
            return blocks.keep_highest(tokens, self.interpreters[group](tokens[:, 1:]), counts[group])

        return blocks.classify(self.backbone, blocks.run(self.backbone, images, reduce))

    def play(self, images: Tensor, decide: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """In training: dropped patches are masked, as images of a batch drop different ones.

        Args:
            decide: from how much patches are worth to 1 for those that are kept and 0 for the others.

        Returns:
            Logits ``[B, classes]``; the share of all patches that each group keeps, ``[B, groups]``; and the
            log-probability of the decisions, mean over patches, ``[B]``.
        """
        tokens = blocks.embed(self.backbone, images)
        kept = tokens.new_ones(len(tokens), tokens.shape[1] - 1)
        shares, log_probability, seen = [], tokens.new_zeros(len(tokens)), None
        for index, block in enumerate(self.backbone.blocks):
            if index in self.starts:
                worth = self.interpreters[self.starts.index(index)](tokens[:, 1:].detach()).float()
                decision = decide(worth.detach())
                likelihood = torch.where(decision > 0, worth, 1 - worth).clamp(min=1e-6).log()
                log_probability = log_probability + (kept * likelihood).mean(dim=1)
                kept = kept * decision
                shares.append(kept.mean(dim=1))
                seen = F.pad(kept > 0, (1, 0), value=True)[:, None, None]
            tokens = blocks.transform(block, blocks.attend(block, tokens, seen)[0])
        logits = blocks.classify(self.backbone, blocks.hide_dropped(tokens, kept))
        return logits, torch.stack(shares, dim=1), log_probability


def reward(logits: Tensor, shares: Tensor, answer: Tensor, penalty: float) -> Tensor:
    """``1 - share^2`` of images that are answered rightly, ``-penalty`` of others: ``[B]``."""
    return torch.where(logits.argmax(dim=-1) == answer, 1 - shares.mean(dim=1).square(), -penalty)


@register("ia_red2")
class IaRed2(ExtendsPlainViT):
    """Interpreters learn by REINFORCE against the reward of their likeliest decisions, the backbone by the labels."""

    title = "IA-RED2"
    engines = ("eager", "torch")
    options_class = Penalty
    network_class = InterpretedViT

    @property
    def point(self) -> str:
        return f"above {KEEP_ABOVE}"

    def forward(self, network: Any, images: Tensor) -> tuple[Tensor, ...]:
        """What ``play`` gives of drawn decisions, and logits and shares of the likeliest ones."""
        network.plan[-1] = 0  # answers by the weights of before no longer count
        drawn = network.play(images, torch.bernoulli)
        with torch.no_grad():
            logits, shares, _ = network.play(images, lambda worth: (worth >= KEEP_ABOVE).to(worth.dtype))
        return *drawn, logits, shares

    def loss(self, module: Any, batch: Batch, split: float) -> Tensor:
        """The reward over that of the likeliest decisions raises or lowers the probability of those drawn."""
        logits, shares, log_probability, greedy_logits, greedy_shares = module(batch.images)
        answer = batch.teacher if batch.target is None else batch.target
        assert answer is not None
        answer = answer.argmax(dim=-1) if answer.is_floating_point() else answer
        drawn = reward(logits, shares, answer, self.options.penalty)
        greedy = reward(greedy_logits, greedy_shares, answer, self.options.penalty)
        gain = -((drawn - greedy).detach() * log_probability).mean()
        return self.answer_loss(logits, batch) + gain

    def answers(self, network: Any, images: Tensor) -> dict[str, Tensor]:
        """Logits at the one operating point; what the images keep is counted, for `macs`."""
        logits, counts = network.answer(images)
        *shares, before = network.plan.tolist()
        patches, total = network.backbone.patch_embed.num_patches, before + len(images)
        for group, lengths in enumerate(counts):
            kept = PARTS * sum(length - 1 for length in lengths) / patches
            shares[group] = (before * shares[group] + kept) / total
        network.plan.copy_(torch.tensor([*shares, total]).round())
        return {self.point: logits}

    def load(self, network: Any, folder: Path) -> Any:
        network = super().load(network, folder)
        network.plan[-1] = 0  # what is answered from now on is counted anew
        return network

    def macs(self, network: Any) -> dict[str, int]:
        """At the mean share of patches that images keep."""
        counts = (network.backbone.patch_embed.num_patches * network.plan[:-1] / PARTS).round().int().tolist()
        return count_points(network, lambda meta: {self.point: partial(meta.with_counts, counts=counts)})
