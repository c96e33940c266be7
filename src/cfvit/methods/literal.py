"""CF-ViT's two stages step by step as its paper words them, without anything that this package spares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfvit.checkpoints import load
from cfvit.errors import UsageError
from cfvit.methods import blocks
from cfvit.methods.base import register
from cfvit.methods.cf_vit import CfViT, build_model
from cfvit.modeling.config import ModelConfig
from cfvit.modeling.model import FIRST_ATTENTION_BLOCK, CoarseState, CoarseToFineViT
from cfvit.modeling.timm_vit import enter, patch_positions, prefix_tokens
from cfvit.modeling.tokens import (
    accumulate_attention,
    child_positions,
    coarse_image,
    gather_tokens,
    num_informative,
    rank_cells,
)


@register("literal")
class Literal(CfViT):
    """The same network as cf_vit, with the same answers, as a direct port of the paper runs it."""

    title = "literal port"
    engines = ("eager",)

    def build(self, config: ModelConfig, weights: str | None = None, class_names: list[str] | None = None) -> Any:
        """A `LiteralPort`.

        Raises:
            UsageError: a backbone, a selection or a feature reuse that it is not written for.
        """
        network = build_model(config, weights, class_names, LiteralPort)
        blocks.require_plain_vit(network.backbone)
        if hasattr(network.backbone, "token_logits"):
            raise UsageError("the method is written for patches of the image itself: choose a ViT, not LVViT")
        if (config.selection, config.feature_reuse, config.fine_merged) != ("attention", "mlp", 0):
            raise UsageError(
                "the method is written for the paper's selection and feature reuse, without merging: leave them"
            )
        return network

    def load(self, network: Any, folder: Path) -> Any:
        saved = load(folder)
        network.load_state_dict(saved.state_dict())
        network.exit = saved.exit
        return network.eval()


class LiteralPort(CoarseToFineViT):
    """Full attention maps in every block, all fine patches embedded and the features of all cells reused, and the four
    children of a cell gathered one by one."""

    def coarse(self, images: Tensor) -> CoarseState:
        """Steps up to the coarse answer (Eqs. 5 to 9), of images ``[B, 3, S, S]``."""
        backbone: Any = self.backbone
        positions = self.coarse_pos_embed
        assert positions is not None
        projected = backbone.patch_embed.proj(coarse_image(images)).flatten(2).transpose(1, 2)
        embedding = projected + patch_positions(backbone, positions)
        tokens, attention = self._run(embedding, positions)
        return CoarseState(backbone.forward_head(tokens), tokens[:, 1:], embedding, attention, tokens[:, 0])

    def fine(self, images: Tensor, state: CoarseState, *, informative_ratio: float | None = None) -> Tensor:
        """Steps from the selection to the fine answer (Eqs. 10 to 13): logits ``[B, classes]``."""
        backbone: Any = self.backbone
        ratio = self.config.informative_ratio if informative_ratio is None else informative_ratio
        count = num_informative(ratio, state.class_attention.shape[1])
        informative, others = rank_cells(state.class_attention, count)
        patches = backbone.patch_embed(images) + patch_positions(backbone, backbone.pos_embed)
        assert self.feature_reuse is not None
        features = self.feature_reuse(state.tokens)
        children = child_positions(informative, self.grid[1])
        parts = [
            gather_tokens(patches, children[:, corner::4]) + gather_tokens(features, informative) for corner in range(4)
        ]
        parts.append(gather_tokens(state.embedding, others))
        tokens, _ = self._run(torch.cat(parts, dim=1), backbone.pos_embed)
        return self.exit.answer(state.logits, backbone.forward_head(tokens))

    def _run(self, patches: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Class token, all blocks and the norm; and the global class attention ``[B, n]``."""
        backbone: Any = self.backbone
        class_token = prefix_tokens(backbone, positions).expand(len(patches), -1, -1)
        tokens = enter(backbone, torch.cat([class_token, patches], dim=1))
        average = None
        first = min(FIRST_ATTENTION_BLOCK, len(backbone.blocks) - 1)
        for index, block in enumerate(backbone.blocks):
            query, key, value = blocks.project(block.attn, block.norm1(tokens))
            maps = (query * block.attn.scale @ key.transpose(-2, -1)).softmax(dim=-1)
            update = block.attn.proj((maps @ value).transpose(1, 2).flatten(2))
            tokens = blocks.transform(block, tokens + block.drop_path1(block.ls1(update)))
            if index >= first:
                row = maps.detach().mean(dim=1)[:, 0, 1:].float()
                average = accumulate_attention(average, row, self.config.attention_momentum)
        assert average is not None
        return backbone.norm(tokens), average
