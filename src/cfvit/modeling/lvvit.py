"""LV-ViT (Jiang et al., "All Tokens Matter", NeurIPS 2021), which timm lacks, as models of timm's registry.

A plain ViT but for four things: a stem of three convolutions in front of the patchwise projection,
residual branches divided by ``skip_lam``, no bias on queries, keys and values, and an auxiliary
head on the patch tokens, which takes part in the answer. Importing this file registers
``lvvit_tiny_patch16_224``, ``lvvit_small_patch16_224`` and ``lvvit_medium_patch16_224``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

STEM_WIDTH = 64
AUXILIARY_WEIGHT = 0.25
"""Share of the strongest patch token's answer in the logits."""

COARSE_LOGIT_DIVISOR = 1.25
"""The CF-ViT authors divide LV-ViT's coarse logits, and not the fine ones, by 1 + `AUXILIARY_WEIGHT`."""


class ConvStem(PatchEmbed):
    """Convolutions to half the image's side, then one projection per patch: ``[B, 3, H, W] -> [B, N, D]``."""

    def __init__(self, img_size: Any, patch_size: int, in_chans: int, embed_dim: int, **options: Any) -> None:
        super().__init__(img_size, patch_size, in_chans, embed_dim, **options)
        widths = (in_chans, STEM_WIDTH, STEM_WIDTH, STEM_WIDTH)
        for i, (kernel, stride) in enumerate(((7, 2), (3, 1), (3, 1)), start=1):
            convolution = nn.Conv2d(widths[i - 1], widths[i], kernel, stride, kernel // 2, bias=False)
            self.add_module(f"conv{i}", convolution)
            self.add_module(f"bn{i}", nn.BatchNorm2d(widths[i]))
        self.proj = nn.Conv2d(STEM_WIDTH, embed_dim, patch_size // 2, patch_size // 2)

    def fuse(self) -> None:
        """Folds the batch norms into the convolutions before them, for use without training."""
        for i in (1, 2, 3):
            convolution: Any = self.get_submodule(f"conv{i}")
            norm: Any = self.get_submodule(f"bn{i}")
            setattr(self, f"conv{i}", fuse_conv_bn_eval(convolution, norm))
            setattr(self, f"bn{i}", nn.Identity())

    def features(self, images: Tensor) -> Tensor:
        """What the projection reads: ``[B, 3, H, W] -> [B, 64, H/2, W/2]``."""
        for i in (1, 2, 3):
            images = F.relu(self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(images)))
        return images

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.features(x)).flatten(2).transpose(1, 2)


class Shrink(nn.Module):
    """Divides a residual branch by a constant."""

    def __init__(self, divisor: float) -> None:
        super().__init__()
        self.divisor = divisor

    def forward(self, x: Tensor) -> Tensor:
        return x / self.divisor


_FOREIGN = ("fc_norm", "init_values", "dynamic_img_size", "qkv_bias", "norm_layer", "embed_layer")


class LVViT(VisionTransformer):
    """``skip_lam`` divides the residual branches; the rest is timm's ``VisionTransformer``.

    Raises:
        ValueError: options of timm's that LV-ViT does not have.
    """

    coarse_logit_divisor = COARSE_LOGIT_DIVISOR

    def __init__(self, *, skip_lam: float = 1.0, **options: Any) -> None:
        foreign = [name for name in _FOREIGN if options.pop(name, None)]
        if foreign:
            raise ValueError(f"LV-ViT has no {', '.join(foreign)}")
        if options.get("global_pool", "token") != "token" or options.get("patch_size", 16) % 2:
            raise ValueError("LV-ViT answers from its class token and has patches of an even number of pixels")
        super().__init__(embed_layer=ConvStem, qkv_bias=False, norm_layer=partial(nn.LayerNorm, eps=1e-5), **options)
        self.aux_head = nn.Linear(self.embed_dim, self.num_classes)
        self.init_weights()
        for block in self.blocks:
            block.add_module("ls1", Shrink(skip_lam))
            block.add_module("ls2", Shrink(skip_lam))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.aux_head = nn.Linear(self.embed_dim, num_classes)

    def class_logits(self, x: Tensor) -> Tensor:
        """The class token's own answer: ``[B, T, D] -> [B, classes]``."""
        return super().forward_head(x)

    def token_logits(self, x: Tensor) -> Tensor:
        """The auxiliary head's answer for each patch token: ``[B, p + T, D] -> [B, T, classes]``."""
        return self.aux_head(x[:, self.num_prefix_tokens :])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits:
            return super().forward_head(x, pre_logits=True)
        return self.class_logits(x) + AUXILIARY_WEIGHT * self.token_logits(x).amax(dim=1)


def _cfg(**more: Any) -> dict[str, Any]:
    return {
        "input_size": (3, 224, 224),
        "num_classes": 1000,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.conv1",
        "classifier": ("head", "aux_head"),
        **more,
    }


default_cfgs = generate_default_cfgs(
    {
        "lvvit_tiny_patch16_224": _cfg(),
        "lvvit_small_patch16_224": _cfg(),
        "lvvit_medium_patch16_224": _cfg(crop_pct=1.0),
    }
)


def _create(variant: str, pretrained: bool, **options: Any) -> VisionTransformer:
    options = {"patch_size": 16, "mlp_ratio": 3.0, **options}
    return build_model_with_cfg(LVViT, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **options)


@register_model
def lvvit_tiny_patch16_224(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """LV-ViT-T: 8.5 M parameters, 2.9 GMACs at 224 pixels."""
    sizes = {"embed_dim": 240, "depth": 12, "num_heads": 4, "skip_lam": 1.0}
    return _create("lvvit_tiny_patch16_224", pretrained, **{**sizes, **options})


@register_model
def lvvit_small_patch16_224(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """LV-ViT-S: 26 M parameters, 6.6 GMACs at 224 pixels."""
    sizes = {"embed_dim": 384, "depth": 16, "num_heads": 6, "skip_lam": 2.0}
    return _create("lvvit_small_patch16_224", pretrained, **{**sizes, **options})


@register_model
def lvvit_medium_patch16_224(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """LV-ViT-M: 56 M parameters, 12.7 GMACs at 224 pixels."""
    sizes = {"embed_dim": 512, "depth": 20, "num_heads": 8, "skip_lam": 2.0}
    return _create("lvvit_medium_patch16_224", pretrained, **{**sizes, **options})
