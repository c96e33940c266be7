"""Images of a batch mixed with one another, and what each then stands for: mixup, cutmix, MixToken."""

from __future__ import annotations

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target
from torch import Tensor

from cfvit.modeling.tokens import cells_in_box
from cfvit.training.recipe import Recipe


def mix_images(
    recipe: Recipe, images: Tensor, targets: Tensor | None, seed: int, classes: int
) -> tuple[Tensor, Tensor | None]:
    """Mixup or cutmix by timm, its choices fixed by the seed; all as it is where both are off.

    Args:
        targets: class indices ``[B]``; None for images without labels, which get none.
    """
    if recipe.mixup == 0 and recipe.cutmix == 0:
        return images, targets
    np.random.seed(seed)
    mix = Mixup(
        recipe.mixup,
        recipe.cutmix,
        prob=recipe.mix_probability,
        label_smoothing=recipe.label_smoothing,
        num_classes=classes,
    )
    if targets is None:
        return mix(images, torch.zeros(len(images), dtype=torch.long, device=images.device))[0], None
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
