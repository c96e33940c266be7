"""DVT: three ViTs of growing grids, each of which takes over what the one before it saw.

Wang et al., "Not All Images are Worth 16x16 Words: Dynamic Transformers for Efficient Image Recognition", NeurIPS 2021;
as described, not by its code. Choices that the paper leaves open: what is reused joins the input of a block's MLP
behind the norm; one MLP makes the relations of all blocks, from the logits of queries and keys alone; the class token
takes over no features; what is reused weighs nothing at first, so that each network begins with what it knows; the etas
are chosen from the last to the first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfvit.errors import UsageError
from cfvit.methods import blocks
from cfvit.methods.base import register
from cfvit.methods.cascade import resized
from cfvit.methods.multi_exit import MultiExit, MultiExitNetwork, StageOutput
from cfvit.methods.plain import Plain
from cfvit.modeling.config import ModelConfig

SMALLER_GRIDS = (7 / 14, 10 / 14)
"""Sides of the first grids, as shares of the last one's."""

HIDDEN, REUSED = 128, 48
"""Channels of the MLP for features: D to 128 to 48."""

Grid = tuple[int, int]


def resize_tokens(tokens: Tensor, old: Grid, new: Grid) -> Tensor:
    """Patches for another grid, bilinearly, the class token as it is: ``[B, 1 + n, C] -> [B, 1 + m, C]``."""
    grid = tokens[:, 1:].transpose(1, 2).unflatten(2, old)
    patches = F.interpolate(grid, new, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    return torch.cat([tokens[:, :1], patches], dim=1)


class FeatureReuse(nn.Module):
    """What a block's MLP takes over of the tokens that the network before gave: ``[B, T, D] -> [B, T', 48]``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.shrink = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, REUSED))

    def forward(self, tokens: Tensor, old: Grid, new: Grid) -> Tensor:
        patches = resize_tokens(self.shrink(tokens), old, new)[:, 1:]
        return F.pad(patches, (0, 0, 1, 0))


def widen(linear: nn.Linear) -> nn.Linear:
    """The layer with `REUSED` more inputs, which at first it does not heed."""
    wide = nn.Linear(linear.in_features + REUSED, linear.out_features)
    with torch.no_grad():
        wide.weight.copy_(F.pad(linear.weight, (0, REUSED)))
        wide.bias.copy_(linear.bias)
    return wide


class RelationReuse(nn.Module):
    """Attention logits of all blocks, ``[B, KH, T, T]``, to what is added to those of the next network, larger."""

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(maps, maps), nn.Linear(maps, maps)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, relations: Tensor, old: Grid, new: Grid) -> Tensor:
        made = self.last(F.gelu(self.first(relations.permute(0, 2, 3, 1))))  # B, query, key, map
        for _ in range(2):  # keys, then queries
            rows = resize_tokens(made.flatten(0, 1), old, new)
            made = rows.unflatten(0, made.shape[:2]).transpose(1, 2)
        return made.permute(0, 3, 1, 2)


class CascadeWithReuse(MultiExitNetwork):
    """The three networks and, before the second and the third, what they take over.

    A stage hands on its tokens after the final norm ``[B, T, D]`` and its blocks' attention logits ``[B, KH, T, T]``.
    """

    def __init__(self, vits: list[Any]) -> None:
        super().__init__(["x".join(map(str, vit.patch_embed.grid_size)) for vit in vits])
        last = vits[-1]
        self.image_size, self.data_config, self.class_names = last.image_size, last.data_config, last.class_names
        later, depth, heads = vits[1:], len(last.blocks), last.blocks[0].attn.num_heads
        for block in (block for vit in later for block in vit.blocks):
            block.mlp.fc1 = widen(block.mlp.fc1)
        self.vits = nn.ModuleList(vits)
        self.features = nn.ModuleList(nn.ModuleList(FeatureReuse(last.embed_dim) for _ in range(depth)) for _ in later)
        self.relations = nn.ModuleList(RelationReuse(depth * heads) for _ in later)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters for optimisers to leave undecayed."""
        vits: list[Any] = list(self.vits)
        return {f"vits.{stage}.{name}" for stage, vit in enumerate(vits) for name in vit.no_weight_decay()}

    def stage(self, index: int, images: Tensor, previous: StageOutput | None) -> StageOutput:
        """A network on the image at its own size, with what the one before has seen, if there was one."""
        vits: list[Any] = list(self.vits)
        vit, relations = vits[index], []
        tokens = blocks.embed(vit, F.interpolate(images, vit.patch_embed.img_size, mode="bilinear", align_corners=True))
        biases = joined = [None] * len(vit.blocks)
        if previous is not None:
            seen_tokens, seen_relations = previous.features
            grids = vits[index - 1].patch_embed.grid_size, vit.patch_embed.grid_size
            features: Any = self.features[index - 1]
            joined = [feature(seen_tokens, *grids) for feature in features]
            biases = self.relations[index - 1](seen_relations, *grids).chunk(len(vit.blocks), dim=1)
        for block, bias, more in zip(vit.blocks, biases, joined, strict=True):
            tokens, query, key = blocks.attend(block, tokens, bias)
            tokens = blocks.transform(block, tokens, more)
            if index + 1 < len(vits):
                relations.append((query * block.attn.scale) @ key.transpose(-2, -1))
        tokens = vit.norm(tokens)
        return StageOutput(vit.forward_head(tokens), (tokens, torch.cat(relations, dim=1)) if relations else None)


@register("dvt")
class DVT(MultiExit):
    """Three networks that learn together."""

    title = "DVT"

    def build(self, config: ModelConfig, weights: str | None = None, class_names: list[str] | None = None) -> Any:
        """Three networks, the smallest grid first; each starts from the same trained weights, if any are given.

        Raises:
            UsageError: a grid too small for three sizes.
        """
        large = Plain(self.objective).build(config, weights, class_names)
        blocks.require_plain_vit(large)
        rows, columns = large.patch_embed.grid_size
        height, width = large.patch_embed.patch_size
        sizes = [(round(rows * share) * height, round(columns * share) * width) for share in SMALLER_GRIDS]
        if len({*sizes, large.image_size}) <= len(sizes):
            raise UsageError(f"a grid of {rows}x{columns} patches has no three sizes: give a --coarse-grid above 1")
        return CascadeWithReuse([*(resized(large, config, size, weights is not None) for size in sizes), large])

    def is_added(self, name: str) -> bool:
        return not name.startswith("vits.")
