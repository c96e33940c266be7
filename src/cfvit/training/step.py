"""One optimiser step: batches, what they are scored on, gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cfvit import data as datasets
from cfvit.errors import CfvitError
from cfvit.modeling.losses import classification_loss, coarse_to_fine_loss, token_label_loss
from cfvit.processes import Process
from cfvit.training.optimizers import orthogonalising_in
from cfvit.training.recipe import Recipe
from cfvit.training.setup import Trained, attention_for_gradients, autocast, dtype_of
from cfvit.training.tokens.label_maps import pool_labels, pool_scores
from cfvit.training.tokens.mixing import class_target, draw_mixed_cells, mix_images, token_target


def take_step(
    recipe: Recipe, trained: Trained, batches: Iterator[Sequence[Tensor]], ratio: float, process: Process
) -> Tensor:
    """One optimiser step on ``accumulate`` batches; returns their mean loss."""
    trained.network.train()
    trained.scheduler.step_update(trained.step)
    total = torch.zeros((), device=process.device)
    for micro in range(recipe.accumulate):
        batch = datasets.next_batch(batches)
        if (batch[1] == datasets.UNREADABLE).any():
            raise CfvitError(
                f"{datasets.FAILURES_IN_A_ROW} or all training images in a row cannot be read: check the data"
            )
        seed = datasets.combine_seeds(recipe.seed, trained.step, micro, process.rank)
        torch.manual_seed(seed)
        last = micro + 1 == recipe.accumulate
        with nullcontext() if last or process.world == 1 else trained.network.no_sync():
            with autocast(recipe, process.device), attention_for_gradients(recipe, process.device):
                loss = _batch_loss(recipe, trained, batch, ratio, seed, process.device) / recipe.accumulate
            trained.scaler.scale(loss).backward()
        total += loss.detach()
    if recipe.clip_grad > 0:
        trained.scaler.unscale_(trained.optimizer)
        nn.utils.clip_grad_norm_(trained.model.parameters(), recipe.clip_grad)
    with orthogonalising_in(dtype_of(recipe, process.device), process.device):
        trained.scaler.step(trained.optimizer)
    trained.scaler.update()
    trained.optimizer.zero_grad(set_to_none=True)
    trained.step += 1
    if trained.average is not None:
        trained.average.update(trained.model, step=trained.step)
    return total


def _batch_loss(
    recipe: Recipe, trained: Trained, batch: Sequence[Tensor], ratio: float, seed: int, device: torch.device
) -> Tensor:
    """The loss of one batch of the loader: images, classes and, if they are on disk, label maps and windows."""
    if recipe.learns_from_tokens:
        return _token_loss(recipe, trained, [part.to(device, non_blocking=True) for part in batch], ratio, seed)
    images, targets = (part.to(device, non_blocking=True) for part in batch)
    images, targets = mix_images(recipe, images, targets, seed, trained.model.config.num_classes)
    return _loss(recipe, trained.network, images, targets, ratio)


def _token_loss(recipe: Recipe, trained: Trained, batch: Sequence[Tensor], ratio: float, seed: int) -> Tensor:
    images, targets, *stored = batch
    model, classes = trained.model, trained.model.config.num_classes
    mixed = draw_mixed_cells(model.grid, seed, images.device) if recipe.mix_token else None
    if trained.teacher is None:
        pool = partial(pool_labels, *stored, num_classes=classes)
    else:
        pool = partial(pool_scores, trained.teacher(images))
    rows, columns = model.grid
    fine, coarse = pool(grid=(2 * rows, 2 * columns)), pool(grid=model.grid)
    output = trained.network(images, informative_ratio=ratio, mixed=mixed)
    target = class_target(targets, mixed, recipe.label_smoothing, classes)
    return token_label_loss(
        output, target, token_target(fine, coarse, output, mixed, columns), recipe.token_label_weight
    )


def _loss(recipe: Recipe, network: Any, images: Tensor, targets: Tensor, ratio: float) -> Tensor:
    if recipe.stages != "both":
        return classification_loss(network(images), targets, recipe.label_smoothing)
    output = network(images, informative_ratio=ratio)
    return coarse_to_fine_loss(output, targets, recipe.label_smoothing, recipe.coarse_loss)
