"""Timm's vision transformers taken apart: stem, positions, rotations, blocks.

Every function takes timm's own model and reads it; nothing is kept. Here and in `backbones` alone
is timm's ``VisionTransformer`` (and ``Eva``, its kin with rotary positions) known. A sequence is
the prefix (class token, distillation token, registers) followed by patches of either size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention, HybridEmbed, resample_abs_pos_embed
from timm.layers.attention import AttentionRope
from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    apply_rot_embed_cat,
    build_rotary_pos_embed,
)
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import (
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cfvit.modeling.tokens import CHILDREN, class_attention_row, cut_children, gather_tokens, merge_similar

Backbone = VisionTransformer | Eva
ATTENTIONS = (Attention, EvaAttention, AttentionRope)
"""The kinds of attention that `_attend` computes as timm does."""

EXTRA_TOKENS = ("cls_token", "dist_token", "reg_token")
"""What timm calls the tokens in front of the patches, in their order."""


def patch_side(backbone: Backbone) -> tuple[int, int]:
    """Height and width of a patch in pixels of the image."""
    return cast(Any, backbone.patch_embed).feat_ratio(as_scalar=False)


def mlp_width(backbone: Backbone) -> int:
    """Hidden channels of the MLP in a block."""
    block: Any = backbone.blocks[0]
    if isinstance(block, ParallelScalingBlock):
        return block.in_split[0]
    mlp: Any = block.ffns[0].mlp if isinstance(block, ParallelThingsBlock) else block.mlp
    return mlp.fc2.in_features


# Embedding


def embed_coarse(backbone: Backbone, images: Tensor) -> Tensor:
    """Coarse patches of images at half their sides, without positions: ``[B, C, H/2, W/2] -> [B, N, D]``."""
    embed: Any = backbone.patch_embed
    return _norm(embed)(embed.proj(_features(embed, images)).flatten(2).transpose(1, 2))


def embed_children(backbone: Backbone, images: Tensor, cells: Tensor, sources: Tensor | None = None) -> Tensor:
    """Fine patches of the given cells only, without positions: ``[B, C, H, W], [B, k] -> [B, 4k, D]``.

    The projection of the patch embedding is a linear map of each patch, so the tokens equal those
    of embedding the whole image and gathering. A convolutional stem in front of it reads across
    patches and runs on the whole image; there only the projection is saved.

    Args:
        sources: ``[B, k]``, the image of the batch that each cell is cut from; by default its own.
    """
    embed: Any = backbone.patch_embed
    if isinstance(embed.proj, nn.Identity):
        grid = _features(embed, images)
        return cut_children(grid, cells, (1, 1), sources).flatten(2)
    pixels = cut_children(_features(embed, images), cells, embed.proj.kernel_size, sources).flatten(2)
    return _norm(embed)(F.linear(pixels, embed.proj.weight.flatten(1), embed.proj.bias))


def _features(embed: Any, images: Tensor) -> Tensor:
    """What the patchwise projection reads: the image, or what a convolutional stem makes of it."""
    if hasattr(embed, "features"):
        return embed.features(images)
    if isinstance(embed, HybridEmbed):
        maps = embed.backbone(images)
        return maps[-1] if isinstance(maps, (list, tuple)) else maps
    return images


def _norm(embed: nn.Module) -> Callable[[Tensor], Tensor]:
    return getattr(embed, "norm", nn.Identity())


# Positions


def resample_positions(
    backbone: Backbone, positions: Tensor, old_grid: tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    """A position embedding for another grid, prefix entries kept: ``[1, T, D] -> [1, T', D]``."""
    prefix = 0 if backbone.no_embed_class else backbone.num_prefix_tokens
    return resample_abs_pos_embed(positions, list(grid), list(old_grid), num_prefix_tokens=prefix)


def prefix_tokens(backbone: Backbone, positions: Tensor | None) -> Tensor:
    """Class token (distillation token, registers), with their own entries of ``positions``: ``[1, p, D]``."""
    prefix = torch.cat([token for name in EXTRA_TOKENS if (token := getattr(backbone, name, None)) is not None], dim=1)
    if positions is None or backbone.no_embed_class:
        return prefix
    return prefix + positions[:, : backbone.num_prefix_tokens]


def patch_positions(backbone: Backbone, positions: Tensor) -> Tensor:
    """The entries of a position embedding that belong to patches: ``[1, N, D]``."""
    return positions if backbone.no_embed_class else positions[:, backbone.num_prefix_tokens :]


def enter(backbone: Backbone, tokens: Tensor) -> Tensor:
    """What timm does between the position embedding and the first block."""
    return backbone.norm_pre(backbone.pos_drop(tokens))


# Rotary positions: sines and cosines of angles that are linear in a patch's coordinates


def fine_rotation(backbone: Backbone) -> Tensor | None:
    """Rotations of all fine patches ``[..., 4N, R]``, for every block and head alike or not; None without."""
    rope: Any = getattr(backbone, "rope", None)
    if rope is None:
        return None
    if getattr(rope, "feat_shape", None) is not None:
        return rope.get_embed()
    return rope.get_embed(shape=list(cast(Any, backbone.patch_embed).grid_size))


def cell_rotation(backbone: Backbone, fine: Tensor | None, children: Tensor, grid: tuple[int, int]) -> Tensor | None:
    """Rotations of all cells, each by the position of its centre: ``[..., 4N, R] -> [..., N, R]``.

    Args:
        fine: from `fine_rotation`.
        children: ``[1, 4N]``, the children of all cells on the fine grid.

    DINOv3 measures positions from the image's centre in shares of its side: there the rotations of the
    coarse grid itself are those of the centres. EVA-02 and its kin count patches, perhaps scaled to a reference
    grid: timm computes the centres' angles. Elsewhere (learned frequencies, mrope) the centre's angle is the mean of
    the children's, which the mean of their sines and cosines points to while they are less than half a turn apart.
    """
    if fine is None:
        return None
    rope: Any = backbone.rope  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(rope, RotaryEmbeddingDinoV3):
        return rope.get_embed(shape=list(grid)).to(fine)
    if isinstance(rope, RotaryEmbeddingCat):  # cell r has its centre at fine patch 2r + 1/2
        bands: Any = rope.bands  # in units of patches, unless scaled to a grid of reference
        centres = build_rotary_pos_embed(
            list(grid),
            bands=2 * bands if rope.ref_feat_shape is None else bands,
            in_pixels=False,
            ref_feat_shape=rope.ref_feat_shape,
            grid_offset=(rope.grid_offset + 0.5) / 2,
            grid_indexing=rope.grid_indexing,
            rotate_half=rope.rotate_half,
            device=fine.device,
        )
        return torch.cat(centres, dim=-1).to(fine)
    corners = fine[..., children[0], :].float().unflatten(-2, (-1, CHILDREN)).mean(dim=-2)
    sine, cosine = corners.chunk(2, dim=-1)
    return (corners / (sine.square() + cosine.square()).sqrt().tile(2)).to(fine)  # ONNX has no hypot


def gather_rotation(rotation: Tensor | None, positions: Tensor) -> Tensor | None:
    """The rotations of each image's own patches: ``[..., N, R], [B, k] -> [..., B, 1 or H, k, R]``."""
    if rotation is None:
        return None
    if rotation.ndim == 2:
        return gather_tokens(rotation[None], positions)[:, None]
    return rotation[:, :, positions].transpose(1, 2)  # depth, heads, B, k, R


def join_rotations(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Rotations of a sequence from those of its two parts."""
    return None if first is None or second is None else torch.cat([first, second], dim=-2)


# Blocks


def run_blocks(backbone: Backbone, tokens: Tensor, rotation: Tensor | None, stop: int | None = None) -> Tensor:
    """Timm's blocks up to ``stop``, as timm runs them: ``[B, T, D] -> [B, T, D]``."""
    for index, block in enumerate(backbone.blocks[:stop]):
        rope = {} if rotation is None else {"rope": _rotation_of_block(backbone, rotation, index)}
        tokens = _checkpointed(backbone, block)(tokens, **rope)
    return tokens


def refuses_merging(backbone: Backbone) -> bool:
    """Whether `run_merging` is not for it: merged tokens have no rotary position, and the first alone is kept apart."""
    return getattr(backbone, "rope", None) is not None or backbone.num_prefix_tokens != 1


def run_merging(backbone: Backbone, tokens: Tensor, merged: int) -> Tensor:
    """All of timm's blocks; after the first third of them, similar patches are merged before each (ToMe).

    Attention is in proportion to how many patches a token stands for. Unlike in ToMe, whole blocks run, of any kind,
    and tokens are compared by their features; and merging begins later, which loses less at the same cost.

    Args:
        tokens: ``[B, 1 + n, D]``, the class token first.
        merged: by how many tokens the sequence is shortened each time.
    """
    sizes = None
    for index, block in enumerate(backbone.blocks):
        if index >= max(1, len(backbone.blocks) // 3):
            tokens, sizes = merge_similar(tokens, tokens, sizes, merged)
        bias = {} if sizes is None else {"attn_mask": sizes.log()[:, None, None].expand(-1, -1, tokens.shape[1], -1)}
        tokens = _checkpointed(backbone, block)(tokens, **bias)
    return tokens


def _checkpointed(backbone: Backbone, run: Callable[..., Any]) -> Callable[..., Any]:
    """As given or, after timm's ``set_grad_checkpointing``, computed anew in the backward pass to save memory."""
    if backbone.grad_checkpointing and torch.is_grad_enabled():
        return partial(checkpoint, run, use_reentrant=False)
    return run


def block_with_class_attention(
    backbone: Backbone, index: int, tokens: Tensor, rotation: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Timm's block ``index``, ``[B, T, D] -> [B, T, D]``, and the class token's attention row from the same projection.

    The row ``[B, N]`` is over the patches, in float32. ``rotation`` is of all patches, where positions are rotary.
    """
    block = backbone.blocks[index]
    rope = None if rotation is None else _rotation_of_block(backbone, rotation, index)
    return _checkpointed(backbone, BLOCKS[type(block)])(block, tokens, rope, backbone.num_prefix_tokens)


def _rotation_of_block(backbone: Backbone, rotation: Tensor, index: int) -> Tensor:
    return rotation[index] if getattr(backbone, "rope_mixed", False) else rotation


def _pre_norm_block(block: Any, x: Tensor, rope: Tensor | None, prefix: int) -> tuple[Tensor, Tensor]:
    update, row = _attend(block.attn, block.norm1(x), rope, prefix)
    x = x + block.drop_path1(_scaled(block, 1, update))
    return x + block.drop_path2(_scaled(block, 2, block.mlp(block.norm2(x)))), row


def _scaled(block: Any, branch: int, update: Tensor) -> Tensor:
    """A branch under its layer scale, which timm's two families of blocks name differently."""
    if isinstance(block, EvaBlock):
        gamma = getattr(block, f"gamma_{branch}")
        return update if gamma is None else gamma * update
    return getattr(block, f"ls{branch}")(update)


def _post_norm_block(block: Any, x: Tensor, rope: Tensor | None, prefix: int) -> tuple[Tensor, Tensor]:
    update, row = _attend(block.attn, x, rope, prefix)
    x = x + block.drop_path1(block.norm1(update))
    return x + block.drop_path2(block.norm2(block.mlp(x))), row


def _parallel_branches_block(block: Any, x: Tensor, rope: Tensor | None, prefix: int) -> tuple[Tensor, Tensor]:
    """Several attentions side by side; the row is their mean."""
    updates, rows = [], []
    for branch in block.attns:
        update, row = _attend(branch.attn, branch.norm(x), rope, prefix)
        updates.append(branch.drop_path(branch.ls(update)))
        rows.append(row)
    x = x + torch.stack(updates).sum(dim=0)
    return x + torch.stack([branch(x) for branch in block.ffns]).sum(dim=0), torch.stack(rows).mean(dim=0)


def _parallel_scaling_block(block: Any, x: Tensor, rope: Tensor | None, prefix: int) -> tuple[Tensor, Tensor]:
    """Attention and MLP side by side, from one projection; timm's block runs, the row is computed beside it."""
    weight, bias = block.in_proj.weight, block.in_proj.bias
    hidden, width = block.in_split[0], block.in_split[1]
    normed = block.in_norm(x)

    def project(tokens: Tensor, start: int) -> Tensor:
        part = None if bias is None else bias[start : start + width]
        heads = F.linear(tokens, weight[start : start + width], part)
        return heads.unflatten(-1, (block.num_heads, block.head_dim))

    query = block.q_norm(project(normed[:, :1], hidden)).transpose(1, 2)
    key = block.k_norm(project(normed, hidden + width)).transpose(1, 2)
    return block(x), class_attention_row(query, key, block.scale, prefix)


BLOCKS: dict[type[nn.Module], Callable[[Any, Tensor, Tensor | None, int], tuple[Tensor, Tensor]]] = {
    Block: _pre_norm_block,
    EvaBlock: _pre_norm_block,
    ResPostBlock: _post_norm_block,
    EvaBlockPostNorm: _post_norm_block,
    ParallelThingsBlock: _parallel_branches_block,
    ParallelScalingBlock: _parallel_scaling_block,
}
"""The kinds of blocks that are known, and how each gives the class token's attention row."""


def _attend(attention: Any, x: Tensor, rope: Tensor | None, prefix: int) -> tuple[Tensor, Tensor]:
    """Timm's attention, fused, that also gives the class token's row: ``[B, T, D] -> [B, T, D], [B, N]``."""
    query, key, value = _project(attention, x)
    query, key = attention.q_norm(query), attention.k_norm(key)
    if rope is not None:
        half = getattr(attention, "rotate_half", False)
        query, key = (
            torch.cat([part[:, :, :prefix], apply_rot_embed_cat(part[:, :, prefix:], rope, half=half)], dim=2).type_as(
                value
            )
            for part in (query, key)
        )
    groups = getattr(attention, "num_kv_groups", 1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    dropout = attention.attn_drop.p if attention.training else 0.0
    out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    out = attention.norm(out.transpose(1, 2).flatten(2))
    if attention.gate is not None:
        out = out * attention.gate(x).sigmoid()
    row = class_attention_row(query, key, attention.scale, prefix)
    return attention.proj_drop(attention.proj(out)), row


def _project(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, H, T, D/H]`` from whichever projections there are."""
    if attention.qkv is None:
        parts = (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x))
        head_dim = parts[0].shape[-1] // attention.num_heads
        query, key, value = (part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in parts)
        return query, key, value
    if getattr(attention, "q_bias", None) is None:
        qkv = attention.qkv(x)
    else:
        qkv = F.linear(x, attention.qkv.weight, torch.cat([attention.q_bias, attention.k_bias, attention.v_bias]))
    query, key, value = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value
