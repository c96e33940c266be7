"""The one file that knows timm's vision transformers.

A backbone is timm's own ``VisionTransformer``, unchanged, so that its weights load key for key.
The functions here take it apart: embedding of all or of a few patches, the blocks with or
without the class token's attention row, the head. The two-stage method is in `model`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp, PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from cfvit.errors import CfvitError
from cfvit.tokens import class_attention_row, coarse_image, cut_children
from cfvit.weights import read_weights

# timm reports a resampled position embedding with a warning; here it is the normal case.
logging.getLogger("timm.models._builder").setLevel(logging.ERROR)


def patch_size(backbone: str, **timm_kwargs: Any) -> int:
    """The side of a patch, in pixels, of a timm model by its name.

    Raises:
        CfvitError: timm has no such model, or it cannot be read in two stages.
    """
    return _skeleton(backbone, **timm_kwargs).patch_embed.patch_size[0]


def create_backbone(
    name: str,
    *,
    img_size: int,
    num_classes: int,
    pretrained: bool | str | Path | Mapping[str, Tensor] = False,
    **timm_kwargs: Any,
) -> VisionTransformer:
    """Timm's model ``name`` at ``img_size`` pixels, its position embedding resampled to fit.

    Args:
        pretrained: True for timm's own weights (downloaded or cached), a local file of such
            weights, or their state dict. A head for another number of classes is dropped.

    Raises:
        CfvitError: unknown or unsuitable model, or weights that cannot be had or do not fit.
    """
    check = _skeleton(name, **timm_kwargs)
    if img_size % check.patch_embed.patch_size[0]:
        raise CfvitError(
            f"image side {img_size} is not a multiple of {name}'s patch side "
            f"{check.patch_embed.patch_size[0]}: choose another coarse_grid"
        )
    options: dict[str, Any] = {"img_size": img_size, "num_classes": num_classes, **timm_kwargs}
    if pretrained is True:
        return _with_timm_weights(name, options)
    model = cast(VisionTransformer, timm.create_model(name, **options))
    if pretrained is not False:
        given = pretrained if isinstance(pretrained, Mapping) else read_weights(Path(pretrained))
        _fill(model, dict(given), name)
    return model


def _with_timm_weights(name: str, options: dict[str, Any]) -> VisionTransformer:
    try:
        return cast(VisionTransformer, timm.create_model(name, pretrained=True, **options))
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CfvitError(f"timm's weights of {name} cannot be had ({reason}): give a local file instead") from error


def _fill(model: VisionTransformer, weights: dict[str, Tensor], name: str) -> None:
    """Loads weights under timm's own keys, positions resampled; all but a head of other classes must fit."""
    weights = checkpoint_filter_fn(weights, model, adapt_layer_scale=True)
    own = model.state_dict()
    head = {key for key in own if key.startswith("head.")}
    if any(key not in weights or weights[key].shape != own[key].shape for key in head):
        weights = {key: tensor for key, tensor in weights.items() if key not in head}
    else:
        head = set()
    expected = {key: tensor for key, tensor in own.items() if key not in head}
    require_fit(expected, weights, f"the given weights do not fit {name}")
    model.load_state_dict(weights, strict=False)


def require_fit(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], complaint: str, spelled: Callable[[str], str] = str
) -> None:
    """Compares names and shapes of weights with those that a module has.

    Args:
        complaint: how the message begins.
        spelled: our name of a weight to the one to show.

    Raises:
        CfvitError: names the first missing, unknown or misshapen weights.
    """
    problems = [f"missing {spelled(name)}" for name in own if name not in weights]
    problems += [f"unknown {spelled(name)}" for name in weights if name not in own]
    problems += [
        f"{spelled(name)} is {list(tensor.shape)} where {list(own[name].shape)} is needed"
        for name, tensor in weights.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CfvitError(f"{complaint}: {'; '.join(problems[:5])}{more}")


def _skeleton(name: str, **timm_kwargs: Any) -> VisionTransformer:
    """The model without memory for its weights, once it is known to be suitable."""
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*patch*")[:4] or ["deit_small_patch16_224"]
        raise CfvitError(f"timm has no model {name!r}: choose a ViT with a class token, such as {', '.join(near)}")
    try:
        with torch.device("meta"):
            model = timm.create_model(name, **timm_kwargs)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CfvitError(f"timm cannot build {name} with {timm_kwargs} ({reason}): change the arguments") from error
    reason = _unsuitable(model)
    if reason:
        raise CfvitError(f"{name} {reason}: choose a plain ViT with a class token, such as deit_small_patch16_224")
    return cast(VisionTransformer, model)


def _unsuitable(model: nn.Module) -> str | None:
    """Why a model cannot be read in two stages, or None."""
    if type(model) is not VisionTransformer:
        return f"is a {type(model).__name__}, not a plain timm VisionTransformer"
    if not model.has_class_token:
        return "has no class token, whose attention chooses the informative cells"
    if model.global_pool not in ("token", "avg"):
        return f"pools by {model.global_pool!r}, which is not read here"
    plain = all(type(b) is Block and type(b.attn) is Attention for b in model.blocks)
    if not plain or type(model.patch_embed) is not PatchEmbed or model.pos_embed is None:
        return "does not consist of timm's plain blocks, patch and position embedding"
    if model.patch_embed.patch_size[0] != model.patch_embed.patch_size[1]:
        return f"has patches of {model.patch_embed.patch_size} pixels, which are not square"
    return None


def resample_positions(backbone: VisionTransformer, positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """A position embedding for another grid, prefix entries kept: ``[1, T, D] -> [1, T', D]``."""
    prefix = 0 if backbone.no_embed_class else backbone.num_prefix_tokens
    return resample_abs_pos_embed(positions, new_size=list(grid), num_prefix_tokens=prefix)


def mlp_width(backbone: VisionTransformer) -> int:
    """Hidden channels of the MLP in a block."""
    return cast(nn.Linear, cast(Mlp, backbone.blocks[0].mlp).fc1).out_features


def prefix_tokens(backbone: VisionTransformer, positions: Tensor) -> Tensor:
    """Class token (and register tokens), with their own entries of ``positions``: ``[1, p, D]``."""
    tokens = [backbone.cls_token] + ([] if backbone.reg_token is None else [backbone.reg_token])
    prefix = torch.cat(cast(list[Tensor], tokens), dim=1)
    return prefix if backbone.no_embed_class else prefix + positions[:, : backbone.num_prefix_tokens]


def patch_positions(backbone: VisionTransformer, positions: Tensor) -> Tensor:
    """The entries of a position embedding that belong to patches: ``[1, N, D]``."""
    return positions if backbone.no_embed_class else positions[:, backbone.num_prefix_tokens :]


def embed_coarse(backbone: VisionTransformer, images: Tensor) -> Tensor:
    """Coarse patches of full images, without positions: ``[B, C, S, S] -> [B, N, D]``."""
    embed = backbone.patch_embed
    return embed.norm(embed.proj(coarse_image(images)).flatten(2).transpose(1, 2))


def embed_children(backbone: VisionTransformer, images: Tensor, cells: Tensor) -> Tensor:
    """Fine patches of the given cells only, without positions: ``[B, C, S, S], [B, k] -> [B, 4k, D]``.

    The convolution of the patch embedding is a linear map of each patch, so the tokens equal
    those of embedding the whole image and gathering.
    """
    embed = backbone.patch_embed
    pixels = cut_children(images, cells, embed.patch_size).flatten(2)
    return embed.norm(F.linear(pixels, embed.proj.weight.flatten(1), embed.proj.bias))


def enter(backbone: VisionTransformer, tokens: Tensor) -> Tensor:
    """What timm does between the position embedding and the first block."""
    return backbone.norm_pre(backbone.pos_drop(tokens))


def block_with_class_attention(backbone: VisionTransformer, index: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Timm's block ``index``, and the class token's attention row from the same projection.

    Args:
        tokens: ``[B, T, D]``.

    Returns:
        The block's output ``[B, T, D]`` and the row ``[B, N]`` over the patches in float32.
    """
    block = cast(Block, backbone.blocks[index])
    update, row = _attend(cast(Attention, block.attn), block.norm1(tokens), backbone.num_prefix_tokens)
    tokens = tokens + block.drop_path1(block.ls1(update))
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens)))), row


def _attend(attention: Attention, x: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """Timm's ``Attention.forward``, fused, that also gives the class token's row."""
    batch, length, _ = x.shape
    qkv = attention.qkv(x).reshape(batch, length, 3, attention.num_heads, attention.head_dim)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    query, key = attention.q_norm(query), attention.k_norm(key)
    dropout = attention.attn_drop.p if attention.training else 0.0
    out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    out = attention.norm(out.transpose(1, 2).reshape(batch, length, attention.attn_dim))
    if attention.gate is not None:
        out = out * attention.gate(x).sigmoid()
    row = class_attention_row(query, key, attention.scale, num_prefix_tokens)
    return attention.proj_drop(attention.proj(out)), row
