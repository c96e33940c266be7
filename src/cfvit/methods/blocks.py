"""The blocks of timm's plain ViT and of LV-ViT in parts, for methods that drop, merge or mix tokens between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from cfvit.errors import UsageError
from cfvit.modeling.timm_vit import enter, patch_positions, prefix_tokens
from cfvit.modeling.tokens import gather_tokens, rank_cells


def require_plain_vit(backbone: Any) -> None:
    """Checks that a backbone is the ViT of DeiT, or LV-ViT, which these parts are written for.

    Raises:
        UsageError: it is another one.
    """
    kind, blocks = type(backbone).__name__, {type(block).__name__ for block in backbone.blocks}
    reason = None
    if kind not in ("VisionTransformer", "LVViT") or blocks != {"Block"}:
        reason = f"timm's plain VisionTransformer or LV-ViT, this is {', '.join([kind, *sorted(blocks)])}"
    elif not all(
        type(block.attn) is Attention and block.attn.gate is None and isinstance(block.attn.norm, nn.Identity)
        for block in backbone.blocks
    ):
        reason = "plain attention"
    elif backbone.pos_embed is None:
        reason = "absolute positions"
    elif backbone.num_prefix_tokens != 1 or backbone.global_pool != "token":
        reason = "a class token that gives the answer and no other token beside the patches"
    if reason is not None:
        raise UsageError(f"the method is written for {reason}: choose a ViT such as deit_small_patch16_224")
    if backbone.dynamic_img_size:
        raise UsageError(
            "the method is written for images of one size, and this backbone takes any: give "
            "--timm-kwargs.dynamic-img-size false, or choose a ViT such as deit_small_patch16_224"
        )


def run(
    backbone: Any,
    images: Tensor,
    reduce: Callable[[int, Tensor], Tensor] = lambda _, tokens: tokens,
    after: list[Tensor] | None = None,
) -> Tensor:
    """All blocks: from images ``[B, 3, S, S]`` to the sequence after the last one, ``[B, 1 + n, D]``.

    Args:
        reduce: from the number of a block and the tokens before it to those that it runs on.
        after: takes up the sequence after each block.
    """
    tokens = embed(backbone, images)
    for index, block in enumerate(backbone.blocks):
        tokens = run_block(block, reduce(index, tokens))
        if after is not None:
            after.append(tokens)
    return tokens


def embed(backbone: Any, images: Tensor) -> Tensor:
    """The sequence that enters the first block, class token first: ``[B, 1 + n, D]``."""
    positions = backbone.pos_embed
    patches = backbone.patch_embed(images) + patch_positions(backbone, positions)
    class_token = prefix_tokens(backbone, positions).expand(len(images), -1, -1)
    return enter(backbone, torch.cat([class_token, patches], dim=1))


def run_block(block: Any, tokens: Tensor) -> Tensor:
    """A whole block: ``[B, T, D] -> [B, T, D]``."""
    return transform(block, attend(block, tokens)[0])


def project(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of all heads, each ``[B, H, T, D/H]``."""
    query, key, value = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attention.q_norm(query), attention.k_norm(key), value


def attend(block: Any, tokens: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The attention half of a block, fused: its output tokens, queries and keys.

    Args:
        bias: added to the attention's logits, ``[B, 1 or H, 1 or T, T]``; where it is bool, False forbids a key.
    """
    query, key, value = project(block.attn, block.norm1(tokens))
    bias = None if bias is None else bias.expand(-1, -1, query.shape[2], -1)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return add_mixed(block, tokens, mixed), query, key


def attend_kept(block: Any, tokens: Tensor, kept: Tensor) -> Tensor:
    """The attention half of a block in training, where tokens that were dropped are seen by themselves alone.

    Kept tokens come out as if the others were not there, and gradients reach the decisions, as each exponential of
    the softmax is multiplied by its key's.

    Args:
        kept: ``[B, T]``, 1 for tokens that are kept and 0 for those that are dropped.
    """
    query, key, value = project(block.attn, block.norm1(tokens))
    logits = ((query * block.attn.scale) @ key.transpose(-2, -1)).float()
    itself = torch.eye(tokens.shape[1], device=tokens.device)
    seen = itself + (1 - itself) * kept[:, None, None]
    weights = (logits - logits.detach().amax(dim=-1, keepdim=True)).exp() * seen
    maps = weights / weights.sum(dim=-1, keepdim=True)
    return add_mixed(block, tokens, maps.to(value.dtype) @ value)


def add_mixed(block: Any, tokens: Tensor, mixed: Tensor) -> Tensor:
    """The end of a block's attention half, on the values that its heads mixed: ``[B, H, T, D/H] -> [B, T, D]``."""
    return tokens + block.drop_path1(block.ls1(block.attn.proj(mixed.transpose(1, 2).flatten(2))))


def transform(block: Any, tokens: Tensor, joined: Tensor | None = None) -> Tensor:
    """The MLP half of a block: ``[B, T, D] -> [B, T, D]``.

    Args:
        joined: further channels for an MLP that takes more than the tokens' own, ``[B, T, d]``.
    """
    normed = block.norm2(tokens)
    update = block.mlp(normed if joined is None else torch.cat([normed, joined], dim=-1))
    return tokens + block.drop_path2(block.ls2(update))


def places_of_reduction(backbone: Any) -> tuple[int, int, int]:
    """After each quarter of the blocks but the last, where several methods drop tokens: 3, 6 and 9 of 12, from 0."""
    quarter = max(1, len(backbone.blocks) // 4)
    return quarter, 2 * quarter, 3 * quarter


def keep_highest(tokens: Tensor, scores: Tensor, count: int) -> Tensor:
    """The class token and the k patches of highest score, in order: ``[B, 1 + n, D], [B, n] -> [B, 1 + k, D]``."""
    if count >= scores.shape[1]:
        return tokens
    kept = rank_cells(scores, count)[0].sort(dim=1).values
    return torch.cat([tokens[:, :1], gather_tokens(tokens[:, 1:], kept)], dim=1)


def hide_dropped(tokens: Tensor, kept: Tensor) -> Tensor:
    """In training, patches that were dropped become one that is kept, for heads that look at all, as LV-ViT's does.

    ``[B, 1 + n, D], [B, n] -> [B, 1 + n, D]``
    """
    patches, one = tokens[:, 1:], gather_tokens(tokens[:, 1:], kept.argmax(dim=1, keepdim=True))
    return torch.cat([tokens[:, :1], torch.where(kept[..., None] > 0, patches, one)], dim=1)


def classify(backbone: Any, tokens: Tensor) -> Tensor:
    """The final norm and the head: ``[B, T, D] -> [B, classes]``."""
    return backbone.forward_head(backbone.norm(tokens))
