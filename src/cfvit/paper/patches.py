"""Figure 1 of the paper: a plain ViT on a part of its patches, and its class attention at both patch sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cfvit.errors import CfvitError
from cfvit.modeling import timm_vit as anatomy
from cfvit.modeling.model import CoarseToFineViT
from cfvit.modeling.timm_vit import Backbone
from cfvit.modeling.tokens import gather_tokens, rank_cells
from cfvit.plots.explain import explain
from cfvit.plots.figures import AttentionPicture


@dataclass(frozen=True)
class HighestLowest:
    """Fig. 1(a): top-1 in percent of a plain ViT on a part of its patches."""

    highest: list[float]  # on those with the highest class attention in each block
    lowest: list[float]  # on those with the lowest
    whole: float  # on all patches


@torch.inference_mode()
def class_attention_of_blocks(backbone: Backbone, images: Tensor) -> Tensor:
    """The class token's attention row in every block of a plain ViT, averaged over heads (Eq. 2).

    From normalised images ``[B, 3, H, W]`` to ``[depth, B, N]`` in float32, over patches numbered row by row.
    """
    count = cast(Any, backbone.patch_embed).num_patches
    tokens = _sequence(backbone, images, torch.arange(count, device=images.device).expand(len(images), -1))
    rotation = anatomy.fine_rotation(backbone)
    rows = []
    for index in range(len(backbone.blocks)):
        tokens, row = anatomy.block_with_class_attention(backbone, index, tokens, rotation)
        rows.append(row)
    return torch.stack(rows)


@torch.inference_mode()
def answer_from_patches(backbone: Backbone, images: Tensor, kept: Tensor) -> Tensor:
    """A plain ViT's logits ``[B, classes]`` of ``[B, 3, H, W]`` if it sees only some patches, each at its own position.

    ``kept`` has their numbers ``[B, k]``, row by row; their order does not matter.
    """
    rotation = anatomy.gather_rotation(anatomy.fine_rotation(backbone), kept)
    tokens = anatomy.run_blocks(backbone, _sequence(backbone, images, kept), rotation)
    return backbone.forward_head(backbone.norm(tokens))


def _sequence(backbone: Backbone, images: Tensor, kept: Tensor) -> Tensor:
    """What enters the first block: the prefix and the kept patches, ``[B, p + k, D]``."""
    embed: Any = backbone.patch_embed
    patches, positions = embed(images).flatten(1, -2), backbone.pos_embed  # some of timm's stems keep rows and columns
    if positions is not None:
        patches = patches + anatomy.patch_positions(backbone, positions)
    prefix = anatomy.prefix_tokens(backbone, positions).expand(len(images), -1, -1)
    return anatomy.enter(backbone, torch.cat([prefix, gather_tokens(patches, kept)], dim=1))


@torch.inference_mode()
def score_highest_lowest(
    backbone: Backbone,
    loader: DataLoader,
    device: torch.device,
    kept: int,
    on_batch: Callable[[int], None] = lambda images: None,
) -> HighestLowest:
    """Scores a plain ViT on the patches of highest and of lowest class attention in each block (Fig. 1a).

    Costs two passes for each block, and two more.

    Args:
        loader: batches of `cfvit.data.datasets.EvalImages`; images that cannot be read are left out.
        kept: how many patches are left, of each kind.
        on_batch: called with the number of images done, for a progress bar.

    Raises:
        CfvitError: ``kept`` out of range, or not one image can be read.
    """
    patches = cast(Any, backbone.patch_embed).num_patches
    if not 1 <= kept <= patches:
        raise CfvitError(f"{kept} of {patches} patches to keep: give 1 to {patches}")
    backbone = backbone.eval().to(device)
    right, total = torch.zeros(1 + 2 * len(backbone.blocks), dtype=torch.long), 0
    for images, labels, _ in loader:
        readable = labels >= 0
        if readable.any():
            shown = images[readable].to(device)
            answers = [backbone(shown)]
            for row in class_attention_of_blocks(backbone, shown):
                for scores in (row, -row):
                    answers.append(answer_from_patches(backbone, shown, rank_cells(scores, kept)[0]))
            right += (torch.stack(answers).argmax(dim=-1).cpu() == labels[readable]).sum(dim=1)
        total += int(readable.sum())
        on_batch(len(images))
    if total == 0:
        raise CfvitError("none of the images can be read: check the data")
    whole, *parts = (100 * right.double() / total).tolist()
    return HighestLowest(parts[0::2], parts[1::2], whole)


@torch.inference_mode()
def attention_pictures(coarse: CoarseToFineViT, fine: Backbone, images: Tensor) -> list[AttentionPicture]:
    """The last block's class attention on coarse patches and a plain ViT's on fine ones, of ``[B, 3, H, W]`` (Fig. 1b).

    The coarse stage is looked at without Eq. 9's average over blocks. Images of another size than either model's raise
    `CfvitError`.
    """
    coarse, fine = coarse.eval(), fine.eval()
    last = copy.copy(coarse)  # shares the weights
    last.config = replace(coarse.config, attention_momentum=0.0, selection="attention")
    size = tuple(cast(Any, fine.patch_embed).img_size)
    if tuple(images.shape[-2:]) != size:
        height, width = images.shape[-2:]
        raise CfvitError(f"images of {height} x {width} pixels for a plain ViT of {size[0]} x {size[1]}: give one size")
    parameter = next(fine.parameters())
    rows = class_attention_of_blocks(fine, images.to(parameter.device, parameter.dtype))[-1].cpu()
    grid = cast(Any, fine.patch_embed).grid_size
    return [
        AttentionPicture(explanation.image, explanation.attention, row.reshape(grid).numpy())
        for explanation, row in zip(explain(last, images, 1.0), rows, strict=True)
    ]
