"""The parts of timm's plain ViT, for methods that reorder the tokens between them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from cfvit.errors import UsageError
from cfvit.methods.plain import Plain
from cfvit.modeling.config import ModelConfig
from cfvit.modeling.timm_vit import enter, patch_positions, prefix_tokens


class PlainBlocks(Plain):
    """A method that takes the blocks of timm's plain ViT apart."""

    def build(
        self, config: ModelConfig, initial_weights: str | None = None, class_names: list[str] | None = None
    ) -> Any:
        """The plain ViT, as `cfvit.methods.plain.Plain` builds it.

        Raises:
            UsageError: a backbone whose blocks these parts are not written for.
        """
        network = super().build(config, initial_weights, class_names)
        require_plain_vit(network)
        return network


def require_plain_vit(backbone: Any) -> None:
    """Checks that a backbone is the ViT of DeiT, which these parts are written for.

    Raises:
        UsageError: it is another one.
    """
    kinds = {type(block).__name__ for block in backbone.blocks} | {type(backbone).__name__}
    reason = None
    if kinds != {"Block", "VisionTransformer"}:
        reason = f"timm's plain VisionTransformer, this is {', '.join(sorted(kinds))}"
    elif not all(
        type(block.attn) is Attention and block.attn.gate is None and isinstance(block.attn.norm, nn.Identity)
        for block in backbone.blocks
    ):
        reason = "plain attention"
    elif backbone.pos_embed is None or backbone.no_embed_class:
        reason = "absolute positions, of the class token as well"
    elif backbone.num_prefix_tokens != 1 or backbone.global_pool != "token":
        reason = "a class token that gives the answer and no other token beside the patches"
    elif backbone.dynamic_img_size:
        reason = "images of one size, and this backbone takes any"
    if reason is not None:
        raise UsageError(f"the method is written for {reason}: choose a ViT such as deit_small_patch16_224")


def embed(backbone: Any, images: Tensor) -> Tensor:
    """The sequence that enters the first block, class token first: ``[B, 1 + n, D]``."""
    positions = backbone.pos_embed
    patches = backbone.patch_embed(images) + patch_positions(backbone, positions)
    class_token = prefix_tokens(backbone, positions).expand(len(images), -1, -1)
    return enter(backbone, torch.cat([class_token, patches], dim=1))


def project(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of all heads, each ``[B, H, T, D/H]``."""
    query, key, value = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attention.q_norm(query), attention.k_norm(key), value


def attend(block: Any, tokens: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The attention half of a block, fused: its output tokens, queries and keys.

    Args:
        sizes: ``[B, T]``, how many patches each token stands for: attention is in proportion. None for one each.
    """
    attention = block.attn
    query, key, value = project(attention, block.norm1(tokens))
    bias = None if sizes is None else sizes.log()[:, None, None].expand(-1, -1, query.shape[2], -1)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    update = attention.proj(mixed.transpose(1, 2).flatten(2))
    return tokens + block.drop_path1(block.ls1(update)), query, key


def transform(block: Any, tokens: Tensor) -> Tensor:
    """The MLP half of a block: ``[B, T, D] -> [B, T, D]``."""
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))


def classify(backbone: Any, tokens: Tensor) -> Tensor:
    """The final norm and the head: ``[B, T, D] -> [B, classes]``."""
    return backbone.forward_head(backbone.norm(tokens))
