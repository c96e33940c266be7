"""ViTs of transformers in timm's terms: their configuration, preprocessing and names of weights.

timm's network computes the same as theirs once it has their sizes and their epsilon, which is not timm's. Importing
this file registers ``transformers_vit``, which is timm's ViT with such arguments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.layers import LayerNorm, SwiGLUPacked
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from cfvit.errors import CfvitError

BACKBONE = "transformers_vit"

default_cfgs = generate_default_cfgs(
    {f"{BACKBONE}.untrained": {"input_size": (3, 224, 224), "first_conv": "patch_embed.proj", "classifier": "head"}}
)


@register_model
def transformers_vit(
    pretrained: bool = False,
    *,
    norm_eps: float = 1e-12,
    swiglu: bool = False,
    distilled: bool = False,
    **kwargs: Any,
) -> VisionTransformer:
    """A ViT whose arguments are numbers and names, as in a configuration of transformers.

    Args:
        norm_eps: of all LayerNorms.
        swiglu: gated MLPs, as in DINOv2 giant.
        distilled: a distillation token with a head of its own, as in DeiT.
    """
    return build_model_with_cfg(
        VisionTransformerDistilled if distilled else VisionTransformer,
        BACKBONE,
        pretrained,
        pretrained_filter_fn=partial(checkpoint_filter_fn, adapt_layer_scale=True),
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        norm_layer=partial(LayerNorm, eps=norm_eps),
        **({"mlp_layer": SwiGLUPacked} if swiglu else {}),
        **kwargs,
    )


_KINDS = {"vit": 1e-12, "deit": 1e-12, "dinov2": 1e-6, "dinov2_with_registers": 1e-6}
"""What can be converted, with transformers' default of ``layer_norm_eps``."""

_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu", "swish": "silu"}
_ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh")
"""Transformers' names of activations, and timm's."""

_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, which transformers' preprocessing stores."""


def timm_arguments(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `transformers_vit` by a ``config.json`` of transformers; another kind of model raises `CfvitError`.

    Args:
        weights: under timm's names; they tell whether a DeiT has two heads.
    """
    kind, activation = config.get("model_type"), config.get("hidden_act", "gelu")
    if kind not in _KINDS:
        raise CfvitError(f"a {kind} of transformers cannot be converted: give a {', '.join(_KINDS)}")
    if activation not in _ACTIVATIONS:
        raise CfvitError(f"hidden_act is {activation!r}: give a model with one of {', '.join(_ACTIVATIONS)}")
    width, patch = config.get("hidden_size", 768), config.get("patch_size", 14 if "dinov2" in kind else 16)
    arguments: dict[str, Any] = {
        "embed_dim": width,
        "depth": config.get("num_hidden_layers", 12),
        "num_heads": config.get("num_attention_heads", 12),
        "patch_size": patch,
        "qkv_bias": config.get("qkv_bias", True),
        "act_layer": _ACTIVATIONS[activation],
        "norm_eps": config.get("layer_norm_eps", _KINDS[kind]),
    }
    if "dinov2" not in kind:
        two_heads = "head_dist.weight" in weights
        return {
            **arguments,
            "mlp_ratio": config.get("intermediate_size", 4 * width) / width,
            **({"distilled": True} if two_heads else {}),
            **({"reg_tokens": 1, "no_embed_class": True} if "dist_token" in weights and not two_heads else {}),
        }
    ratio = config.get("mlp_ratio", 4)
    if config.get("use_swiglu_ffn", False):  # two thirds of the width, to a multiple of 8, and as many for the gates
        ratio = 2 * ((int(int(width * ratio) * 2 / 3) + 7) // 8 * 8) / width
        arguments |= {"swiglu": True, "act_layer": "silu"}
    registers = config.get("num_register_tokens", 4) if kind == "dinov2_with_registers" else 0
    return {
        **arguments,
        "mlp_ratio": ratio,
        "init_values": config.get("layerscale_value", 1.0),
        **({"reg_tokens": registers, "no_embed_class": True} if registers else {}),
    }


def preprocessing(kind: str, config: Mapping[str, Any]) -> tuple[tuple[int, int] | None, dict[str, Any]]:
    """The image's height and width, None if not stated, and the rest as timm's ``pretrained_cfg_overlay``.

    Args:
        kind: ``model_type``, by which transformers' defaults differ.
        config: ``preprocessor_config.json``, or nothing.
    """
    imagenet = kind != "vit"
    shape, crop = (_sides(config[key]) if config.get(key) else None for key in ("size", "crop_size"))
    crop = crop if config.get("do_center_crop", False) else None
    squashed = crop is None and "shortest_edge" not in (config.get("size") or {"shortest_edge": 0})
    return crop or shape, {
        "interpolation": _INTERPOLATIONS.get(config.get("resample", 2), "bicubic"),
        "mean": list(config.get("image_mean") or (IMAGENET_DEFAULT_MEAN if imagenet else IMAGENET_INCEPTION_MEAN)),
        "std": list(config.get("image_std") or (IMAGENET_DEFAULT_STD if imagenet else IMAGENET_INCEPTION_STD)),
        "crop_pct": min(crop) / min(shape) if crop and shape else 1.0,
        "crop_mode": "squash" if squashed else "center",
    }


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or (size["height"], size["width"])
    return (size, size) if isinstance(size, int) else (size[0], size[1])


_TIMM_NAMES = [
    (r"^(vit|deit|dinov2|dinov2_with_registers|vision_model|clip\.vision_model)\.", ""),
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.(position_embeddings|position_embedding\.weight)$", "pos_embed"),
    (r"^embeddings\.(patch_embeddings\.projection|patch_embedding)\.", "patch_embed.proj."),
    (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"\.(attention\.attention|attention|self_attn)\.(query|key|value|q_proj|k_proj|v_proj)\.", r".attn.\2."),
    (r"\.attn\.([qkv])[a-z_]*\.", r".attn.\1."),
    (r"\.(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.(intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(layernorm|post_layernorm)\.", "norm."),
    (r"^(classifier|cls_classifier|visual_projection)\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
]
"""Names of `ViT`, `DeiT`, `Dinov2`, `Dinov2WithRegisters` and `CLIPVision`, in either spelling of theirs, as timm's."""


def timm_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in transformers' spelling under timm's names, others as they are: the network computes the same.

    A pooler, a mask token and a text tower, of which timm's ViTs have nothing, are left out.
    """
    if not any(re.search(r"(^|\.)embeddings\.patch_embedding", name) for name in tensors):
        return tensors
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _TIMM_NAMES:
            name = re.sub(pattern, replacement, name)
        if not name.startswith(("pooler.", "text_model.", "text_projection.", "logit_scale")):
            renamed[name] = tensor
    renamed = {name: t for name, t in renamed.items() if name not in ("mask_token", "embeddings.position_ids")}
    for name in [name for name in renamed if ".attn.q." in name]:
        parts = [renamed.pop(name.replace(".attn.q.", f".attn.{part}."), None) for part in "qkv"]
        if all(part is not None for part in parts):
            renamed[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([p for p in parts if p is not None])
    if "cls_token" in renamed:
        renamed["cls_token"] = renamed["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in renamed and renamed["pos_embed"].ndim == 2:
        renamed["pos_embed"] = renamed["pos_embed"][None]
    if "reg_token" in renamed and "pos_embed" in renamed:  # timm's are without positions for class token and registers
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:]
    if "norm_pre.weight" in renamed and "head.weight" in renamed and "head.bias" not in renamed:
        renamed["head.bias"] = torch.zeros(len(renamed["head.weight"]))  # CLIP's projection has none
    return renamed
