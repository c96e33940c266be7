"""EViT: inattentive patches are fused into one token, in training as well; and CF-ViT whose fine stage does so.

Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations", ICLR 2022.
The authors fine-tune for 30 epochs, with a learning rate from 2e-5 to 2e-6, and lower the keep rate from 1 in the first
ones; here it is fixed, and no gradient flows through the weights of what is fused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cfvit.methods import blocks
from cfvit.methods.base import Method, register
from cfvit.methods.cf_vit import CfViT, build_model
from cfvit.methods.plain import KeepRate, PlainBlocks
from cfvit.modeling.config import ModelConfig
from cfvit.modeling.model import CoarseToFineViT
from cfvit.modeling.tokens import class_attention_row, gather_tokens, num_informative, rank_cells


@register("evit")
class EViT(PlainBlocks):
    """The plain ViT with three reductions of its tokens."""

    title = "EViT"
    options_class = KeepRate

    def forward(self, network: Any, images: Tensor) -> Tensor:
        tokens = run_reorganising(network, blocks.embed(network, images), self.options.keep_rate)
        return blocks.classify(network, tokens)


def run_reorganising(backbone: Any, tokens: Tensor, keep: float) -> Tensor:
    """All blocks, between whose halves three reduce the tokens: ``[B, 1 + n, D]`` to what is left of them."""
    places = blocks.places_of_reduction(backbone)
    for index, block in enumerate(backbone.blocks):
        tokens, query, key = blocks.attend(block, tokens)
        if index in places:
            row = class_attention_row(query, key, block.attn.scale, num_prefix_tokens=1)
            tokens = fuse_inattentive(tokens, row, num_informative(keep, row.shape[1]))
        tokens = blocks.transform(block, tokens)
    return tokens


def fuse_inattentive(tokens: Tensor, class_attention: Tensor, kept: int) -> Tensor:
    """All but the ``kept`` patches of highest class attention become one token, their sum weighted by it.

    ``[B, 1 + n, D], [B, n] -> [B, 1 + kept + 1, D]``, the class token first; the tokens themselves if all are kept.
    """
    if kept >= class_attention.shape[1]:
        return tokens
    patches = tokens[:, 1:]
    attentive, others = rank_cells(class_attention, kept)
    weights = class_attention.gather(1, others).to(tokens.dtype)
    fused = (weights[..., None] * gather_tokens(patches, others)).sum(dim=1, keepdim=True)
    return torch.cat([tokens[:, :1], gather_tokens(patches, attentive), fused], dim=1)


class ReorganisingFineStage(CoarseToFineViT):
    """The coarse stage as it is; in the fine one, three blocks fuse the tokens of least class attention."""

    keep = 1.0

    def run_fine(self, tokens: Tensor, rotation: Tensor | None) -> Tensor:
        return run_reorganising(self.backbone, tokens, self.keep)


@register("cf_evit")
class CfEViT(CfViT):
    """Trained, scored and exited as CF-ViT; its folder is its own, as `cfvit.load` would leave the reduction out."""

    title = "CF-ViT with EViT"
    ignored = frozenset({"fine_merged"})
    options_class = KeepRate
    save, load = Method.save, Method.load

    def build(self, config: ModelConfig, weights: str | None = None, class_names: list[str] | None = None) -> Any:
        network: Any = build_model(config, weights, class_names, ReorganisingFineStage)
        blocks.require_plain_vit(network.backbone)
        network.keep = self.options.keep_rate
        return network
