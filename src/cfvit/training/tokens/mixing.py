"""Images of a batch mixed with one another, and what each then stands for: mixup, cutmix, MixToken."""

from __future__ import annotations

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target
from torch import Tensor

from cfvit.modeling.model import TokenOutput
from cfvit.modeling.tokens import cells_in_box, child_positions, gather_tokens, mirrored_sources
from cfvit.training.recipe import Recipe


def mix_images(recipe: Recipe, images: Tensor, targets: Tensor, seed: int, classes: int) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix by timm, its choices fixed by the seed; the targets as they are where both are off."""
    if recipe.mixup == 0 and recipe.cutmix == 0:
        return images, targets
    np.random.seed(seed)
    mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=classes)
    return mix(images, targets)


def draw_mixed_cells(grid: tuple[int, int], seed: int, device: torch.device) -> Tensor:
    """MixToken's cells: a box of uniformly drawn area and place, ``[N]`` with True inside."""
    np.random.seed(seed)
    (top, bottom, left, right), _ = cutmix_bbox_and_lam((*grid,), float(np.random.beta(1.0, 1.0)))
    return cells_in_box((top, left, bottom, right), grid, device)


def class_target(targets: Tensor, mixed: Tensor | None, smoothing: float, classes: int) -> Tensor:
    """Class probabilities ``[B, classes]``: image ``b`` and its mirror image by the share of mixed cells."""
    share = 0.0 if mixed is None else float(mixed.float().mean())
    return mixup_target(targets, classes, 1.0 - share, smoothing)


def token_target(fine: Tensor, coarse: Tensor, output: TokenOutput, mixed: Tensor | None, columns: int) -> Tensor:
    """The label of the area that each token of the mixed sequence covers, ``[B, 4k + N - k, classes]``.

    Args:
        fine: labels pooled to the fine grid, ``[B, 4N, classes]``.
        coarse: labels pooled to the coarse grid, ``[B, N, classes]``.
        output: which cells were split.
        mixed: from `draw_mixed_cells`; there the mirror image's labels hold.
        columns: of the coarse grid.
    """
    if mixed is not None:
        cells = torch.arange(len(mixed), device=mixed.device)
        sources = mirrored_sources(mixed, len(coarse))
        coarse = coarse[sources, cells]
        children = child_positions(cells[None], columns)[0]
        fine = torch.zeros_like(fine).index_copy(1, children, fine[sources.repeat_interleave(4, dim=1), children])
    split = gather_tokens(fine, child_positions(output.informative, columns))
    return torch.cat([split, gather_tokens(coarse, output.others)], dim=1)
