"""Other ways of making a ViT cheaper, on timm's ViT, for comparison of speed and cost. Written from the papers.

- `ToMe`: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023.
- `EViT`: Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token
  Reorganizations", ICLR 2022.
- `Cascade`: separate networks for few and for many patches, as in Wang et al., "Not All Images are Worth
  16x16 Words", NeurIPS 2021 (DVT), but without its reuse of features and relationships.
- `LiteralPort`: the early exit of CF-ViT as its paper words it, without anything that this package spares.

They take weights that were made for the plain network, so their speed means something here and their answers little.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from cfvit.modeling.model import FIRST_ATTENTION_BLOCK, CoarseState, CoarseToFineViT
from cfvit.modeling.timm_vit import enter, patch_positions, prefix_tokens
from cfvit.modeling.tokens import (
    accumulate_attention,
    child_positions,
    class_attention_row,
    coarse_image,
    gather_tokens,
    num_informative,
    rank_cells,
)


def why_no_peers(model: CoarseToFineViT) -> str | None:
    """Why the peers cannot be made of a model, or None: they are written for the plain ViT of DeiT."""
    backbone: Any = model.backbone
    kinds = {type(block).__name__ for block in backbone.blocks} | {type(backbone).__name__}
    if kinds != {"Block", "VisionTransformer"}:
        return f"they are written for timm's plain VisionTransformer, this is {', '.join(sorted(kinds))}"
    attentions = [block.attn for block in backbone.blocks]
    plain = all(type(attention) is Attention and attention.gate is None for attention in attentions)
    plain = plain and all(isinstance(attention.norm, nn.Identity) for attention in attentions)
    if not plain or backbone.pos_embed is None or backbone.no_embed_class:
        return "they are written for plain attention and absolute positions"
    if backbone.num_prefix_tokens != 1 or backbone.global_pool != "token":
        return "they are written for a class token that gives the answer and no other token beside the patches"
    if backbone.dynamic_img_size:
        return "they are written for images of one size and this backbone takes any"
    if (model.config.selection, model.config.feature_reuse) != ("attention", "mlp"):
        return "they are written for the paper's selection and feature reuse"
    return None


class ToMe(nn.Module):
    """In each block the most similar patch tokens are merged.

    Args:
        backbone: timm's plain ViT.
        merged: r, by how many tokens a block shortens the sequence.
    """

    def __init__(self, backbone: Any, merged: int) -> None:
        super().__init__()
        self.backbone, self.merged = backbone, merged

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, 3, S, S]``."""
        tokens, sizes = _embed(self.backbone, images), None
        for block in self.backbone.blocks:
            query, key, value = _project(block.attn, block.norm1(tokens))
            tokens = tokens + block.ls1(_attend(block.attn, query, key, value, sizes))
            tokens, sizes = merge_similar(tokens, key.mean(dim=1), sizes, self.merged)
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        return self.backbone.forward_head(self.backbone.norm(tokens))


def merge_similar(tokens: Tensor, keys: Tensor, sizes: Tensor | None, count: int) -> tuple[Tensor, Tensor | None]:
    """Bipartite soft matching: every other patch may go into the most similar one of the rest.

    Args:
        tokens: ``[B, 1 + n, D]``, the class token first, which is never merged.
        keys: ``[B, 1 + n, d]``, whose cosines tell how similar tokens are.
        sizes: ``[B, 1 + n]``, for how many patches each token stands; None for one each.
        count: how many tokens go, those with the most similar partners; at most half of the patches.

    Returns:
        Tokens ``[B, 1 + n - count, D]``, each the mean of its patches, and their sizes.
    """
    count = min(count, (tokens.shape[1] - 1) // 2)
    if count <= 0:
        return tokens, sizes
    if sizes is None:
        sizes = tokens.new_ones(tokens.shape[:2])
    directions = F.normalize(keys[:, 1:], dim=-1)
    similarity, partner = (directions[:, 0::2] @ directions[:, 1::2].transpose(1, 2)).max(dim=-1)
    going, staying = rank_cells(similarity, count)
    partner = partner.gather(1, going)

    def merge(values: Tensor) -> Tensor:
        movable, fixed = values[:, 0::2], values[:, 1::2]
        moved = gather_tokens(movable, going)
        fixed = fixed.scatter_add(1, partner[..., None].expand_as(moved), moved)
        return torch.cat([gather_tokens(movable, staying), fixed], dim=1)

    weights = sizes[:, 1:, None]
    merged = merge(weights)
    patches = merge(tokens[:, 1:] * weights) / merged
    return torch.cat([tokens[:, :1], patches], dim=1), torch.cat([sizes[:, :1], merged[..., 0]], dim=1)


class EViT(nn.Module):
    """In three blocks the patches that the class token attends to least are fused into one token.

    Args:
        backbone: timm's plain ViT.
        keep: share of the patch tokens that stay each time, in (0, 1].
    """

    def __init__(self, backbone: Any, keep: float) -> None:
        super().__init__()
        self.backbone, self.keep = backbone, keep
        quarter = max(1, len(backbone.blocks) // 4)
        self.places = (quarter, 2 * quarter, 3 * quarter)
        """From 0: blocks 4, 7 and 10 of 12."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, 3, S, S]``."""
        tokens = _embed(self.backbone, images)
        for index, block in enumerate(self.backbone.blocks):
            query, key, value = _project(block.attn, block.norm1(tokens))
            tokens = tokens + block.ls1(_attend(block.attn, query, key, value))
            if index in self.places:
                row = class_attention_row(query, key, block.attn.scale, num_prefix_tokens=1)
                tokens = fuse_inattentive(tokens, row, math.ceil(self.keep * row.shape[1]))
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        return self.backbone.forward_head(self.backbone.norm(tokens))


def fuse_inattentive(tokens: Tensor, class_attention: Tensor, kept: int) -> Tensor:
    """All but the ``kept`` patches of highest class attention become one token, their sum weighted by it.

    Args:
        tokens: ``[B, 1 + n, D]``, the class token first.
        class_attention: ``[B, n]``.

    Returns:
        ``[B, 1 + kept + 1, D]``; the tokens themselves if none goes.
    """
    if kept >= class_attention.shape[1]:
        return tokens
    patches = tokens[:, 1:]
    attentive, others = rank_cells(class_attention, kept)
    weights = class_attention.gather(1, others).to(tokens.dtype)
    fused = (weights[..., None] * gather_tokens(patches, others)).sum(dim=1, keepdim=True)
    return torch.cat([tokens[:, :1], gather_tokens(patches, attentive), fused], dim=1)


class Cascade:
    """Two networks: one for the image at half its side, and where that one is not sure, one for the whole image.

    Args:
        small: from whole images to logits and their confidence, by a plain ViT for images at half the side.
        large: a plain ViT.
        goes_on: from confidences ``[B]`` to which images the large one answers.
    """

    def __init__(
        self,
        small: Callable[[Tensor], tuple[Tensor, Tensor]],
        large: Callable[[Tensor], Tensor],
        goes_on: Callable[[Tensor], Tensor],
    ) -> None:
        self.small, self.large, self.goes_on = small, large, goes_on

    def __call__(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, 3, S, S]``."""
        logits, confidence = self.small(images)
        hard = self.goes_on(confidence).nonzero().flatten()
        if len(hard):
            logits = logits.index_copy(0, hard, self.large(images[hard]))
        return logits


class LiteralPort(nn.Module):
    """CF-ViT's early exit step by step as the paper words it, run eagerly.

    Full attention maps in every block, all fine patches embedded and the features of all cells reused, the four
    children of a cell gathered one by one, and images that exit picked on the host.

    Args:
        model: of a plain ViT, with the paper's selection and feature reuse; its weights are used as they are.
        goes_on: from the coarse stage's confidences ``[B]`` to which images go on.
    """

    def __init__(self, model: CoarseToFineViT, goes_on: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.goes_on = model, goes_on

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, 3, S, S]``."""
        state = self.coarse(images)
        going = self.goes_on(self.model.exit.coarse(state.logits)).tolist()
        hard = [place for place, goes in enumerate(going) if goes]
        logits = state.logits.clone()
        if hard:
            logits[hard] = self.fine(images[hard], state[hard])
        return logits

    def coarse(self, images: Tensor) -> CoarseState:
        """Steps up to the coarse answer (Eqs. 5 to 9)."""
        backbone: Any = self.model.backbone
        positions = self.model.coarse_pos_embed
        assert positions is not None
        projected = backbone.patch_embed.proj(coarse_image(images)).flatten(2).transpose(1, 2)
        embedding = projected + patch_positions(backbone, positions)
        tokens, attention = self._run(self._with_class_token(embedding, positions))
        logits = backbone.forward_head(tokens)
        return CoarseState(logits, tokens[:, 1:], embedding, attention, tokens[:, 0])

    def fine(self, images: Tensor, state: CoarseState) -> Tensor:
        """Steps from the selection to the fine answer (Eqs. 10 to 13): logits ``[B, classes]``."""
        model, backbone = self.model, self.model.backbone
        positions = backbone.pos_embed
        assert positions is not None and model.feature_reuse is not None
        count = num_informative(model.config.informative_ratio, state.class_attention.shape[1])
        informative, others = rank_cells(state.class_attention, count)
        patches = backbone.patch_embed(images) + patch_positions(backbone, positions)
        features = model.feature_reuse(state.tokens)
        children = child_positions(informative, model.grid[1])
        parts = [
            gather_tokens(patches, children[:, corner::4]) + gather_tokens(features, informative) for corner in range(4)
        ]
        parts.append(gather_tokens(state.embedding, others))
        tokens, _ = self._run(self._with_class_token(torch.cat(parts, dim=1), positions))
        return backbone.forward_head(tokens)

    def _with_class_token(self, patches: Tensor, positions: Tensor) -> Tensor:
        class_token = prefix_tokens(self.model.backbone, positions)
        return torch.cat([class_token.expand(len(patches), -1, -1), patches], dim=1)

    def _run(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """All blocks and the norm, and the global class attention ``[B, n]``."""
        backbone: Any = self.model.backbone
        tokens, average = enter(backbone, tokens), None
        first = min(FIRST_ATTENTION_BLOCK, len(backbone.blocks) - 1)
        for index, block in enumerate(backbone.blocks):
            query, key, value = _project(block.attn, block.norm1(tokens))
            maps = (query * block.attn.scale @ key.transpose(-2, -1)).softmax(dim=-1)
            tokens = tokens + block.ls1(block.attn.proj((maps @ value).transpose(1, 2).flatten(2)))
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
            if index >= first:
                row = maps.mean(dim=1)[:, 0, 1:].float()
                average = accumulate_attention(average, row, self.model.config.attention_momentum)
        assert average is not None
        return backbone.norm(tokens), average


def _embed(backbone: Any, images: Tensor) -> Tensor:
    """The sequence that enters the first block, class token first: ``[B, 1 + n, D]``."""
    positions = backbone.pos_embed
    patches = backbone.patch_embed(images) + patch_positions(backbone, positions)
    return enter(backbone, torch.cat([prefix_tokens(backbone, positions).expand(len(images), -1, -1), patches], dim=1))


def _project(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of all heads, each ``[B, H, T, D/H]``."""
    query, key, value = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attention.q_norm(query), attention.k_norm(key), value


def _attend(attention: Any, query: Tensor, key: Tensor, value: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Fused attention, in proportion to the ``sizes [B, T]`` of the tokens attended to if these are given."""
    bias = None if sizes is None else sizes.log()[:, None, None].expand(-1, -1, query.shape[2], -1)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return attention.proj(mixed.transpose(1, 2).flatten(2))
