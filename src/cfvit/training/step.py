"""One optimiser step: batches, images mixed with one another (mixup, cutmix, MixToken), gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target
from torch import Tensor, nn

from cfvit.data import FAILURES_IN_A_ROW, UNREADABLE, combine_seeds, next_batch
from cfvit.errors import CfvitError
from cfvit.methods.base import Batch, TokenLabels
from cfvit.modeling.tokens import cells_in_box
from cfvit.processes import Process
from cfvit.training.recipe import Recipe
from cfvit.training.setup import TrainState, attention_for_gradients, autocast, dtype_of, orthogonalising_in
from cfvit.training.tokens import pool_labels, pool_scores


def take_step(
    recipe: Recipe, state: TrainState, batches: Iterator[Sequence[Tensor]], split: float, process: Process
) -> Tensor:
    """One optimiser step on ``accumulate`` batches; returns their mean loss.

    Args:
        split: share of cells that are split.
    """
    state.network.train()
    state.scheduler.step_update(state.step)
    total = torch.zeros((), device=process.device)
    for micro in range(recipe.accumulate):
        loaded = next_batch(batches)
        if (loaded[1] == UNREADABLE).any():
            raise CfvitError(f"{FAILURES_IN_A_ROW} or all training images in a row cannot be read: check the data")
        seed = combine_seeds(recipe.seed, state.step, micro, process.rank)
        torch.manual_seed(seed)
        last = micro + 1 == recipe.accumulate
        with nullcontext() if last or process.world == 1 else state.network.no_sync():
            with autocast(recipe, process.device):
                batch = make_batch(recipe, state, loaded, seed, process.device)
                with attention_for_gradients(recipe, process.device):
                    loss = state.method.loss(state.network, batch, split) / recipe.accumulate
            state.scaler.scale(loss).backward()
        total += loss.detach()
    if recipe.clip_grad > 0:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), recipe.clip_grad)
    with orthogonalising_in(dtype_of(recipe, process.device), process.device):
        state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    if state.average is not None:
        state.average.update(state.model, step=state.step)
    return total


def make_batch(recipe: Recipe, state: TrainState, loaded: Sequence[Tensor], seed: int, device: torch.device) -> Batch:
    """What a step learns from: images mixed with one another, their labels, and what the teacher says of them.

    Args:
        loaded: images, class indices and, where they are on disk, label maps and windows.
        seed: fixes what is mixed.
    """
    images, targets, *stored = (part.to(device, non_blocking=True) for part in loaded)
    classes = len(state.model.class_names)
    if recipe.learns_from_tokens:
        rows, columns = state.model.grid
        mixed = draw_mixed_cells((rows, columns), seed, images.device) if recipe.mix_token else None
        if state.teacher is None:
            pool = partial(pool_labels, *stored, num_classes=classes)
        else:
            pool = partial(pool_scores, state.teacher.places(images))
        labels = TokenLabels(pool(grid=(2 * rows, 2 * columns)), pool(grid=(rows, columns)), columns, mixed)
        return Batch(images, class_target(targets, mixed, recipe.label_smoothing, classes), token_labels=labels)
    images, target = mix_images(recipe, images, targets if recipe.uses_labels else None, seed, classes)
    return Batch(images, target, None if state.teacher is None else state.teacher.answer(images))


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
