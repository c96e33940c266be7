"""The runs of a reproduction: each trained once, resumed or forked where that will do, scored, and kept."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cfvit.benchmark.conditions import Conditions
from cfvit.checkpoints import WEIGHTS_FILE, load
from cfvit.data import EvalImages, eval_loader, progress_bar
from cfvit.errors import CfvitError, UsageError, first_line
from cfvit.evaluation.metrics import collect
from cfvit.modeling.cost import StageMacs, count_macs
from cfvit.modeling.model import CoarseToFineViT
from cfvit.paper.budget import Budget, Clock, duration, time_left
from cfvit.paper.records import (
    Finished,
    RunRecord,
    Scored,
    read_finished,
    read_record,
    write_record,
    write_scores,
)
from cfvit.paper.studies import DEFAULT, RunSpec
from cfvit.processes import Process, best_device
from cfvit.training.log import LOG_FILE
from cfvit.training.loop import (
    ALL_CELLS_FILE,
    CHECKPOINT_FILE,
    FREE_TO_CHANGE,
    FREE_TO_FORK,
    RECIPE_FILE,
    Stopped,
    train,
)
from cfvit.training.recipe import Recipe, load_recipe
from cfvit.training.setup import Data, autocast, prepare, steps_per_epoch

AS_IT_IS: Mapping[str, Any] = {"initial_weights": None, "hold_decoded": False}
"""What a recipe need not prepare where nothing is trained."""


@dataclass(frozen=True)
class Missing:
    """A run that is not there: why, and the seconds that it would have taken, if that can be told."""

    name: str
    reason: str
    seconds: float | None = None


class Runs:
    """The runs in ``folder``, one sub-folder for each, named after what is run and its seed.

    Args:
        base: the recipe that all of them change.
        budget: the time for all trainings.
        train_images: how many images there are to train on.
        say: told a line for each run that is trained.
    """

    def __init__(
        self,
        base: Recipe,
        folder: Path,
        budget: Budget,
        train_images: int,
        conditions: Conditions,
        say: Callable[[str], object],
    ) -> None:
        self.base, self.folder, self.budget, self.train_images = base, folder, budget, train_images
        self.conditions, self.say = conditions, say

    def make(self, spec: RunSpec, seed: int) -> Finished | Missing:
        """The run, trained and scored first if it is not, unless the time left is too short.

        Raises:
            CfvitError: the folder holds a run of another recipe; a training that fails.
            Stopped: by Ctrl-C or SIGTERM.
        """
        folder = self.folder / f"{spec.name}-seed{seed}"
        try:
            recipe = spec.recipe(self.base, seed)
        except UsageError as error:
            return Missing(folder.name, f"cannot be trained so: {error}")
        _require_recipe(recipe, folder)
        record = read_record(folder)
        if record is not None and record.finished:
            return read_finished(recipe, folder, record)
        if not _is_trained(recipe, folder):
            missing = self._train(recipe, folder)
            if missing is not None:
                return missing
        return self._score(recipe, folder)

    def finished(self) -> list[Finished]:
        """All finished runs in the folder, also those of earlier calls; one without its recipe is left out and told."""
        found = []
        for folder in sorted(self.folder.glob("*-seed*")):
            record = read_record(folder)
            if record is None or not record.finished:
                continue
            if not (folder / RECIPE_FILE).is_file():
                self.say(f"{folder} has no {RECIPE_FILE} and is left out: remove it, or put its recipe back")
                continue
            found.append(read_finished(load_recipe("deit", folder / RECIPE_FILE), folder, record))
        return found

    def _train(self, recipe: Recipe, folder: Path) -> Missing | None:
        resume = (folder / CHECKPOINT_FILE).exists()
        fork = None if resume else self._fork_of(recipe, folder)
        record = read_record(folder) or self._new_record(recipe, folder, fork)
        seconds = time_left(record, self._records())
        if not self.budget.fits(seconds):
            return Missing(folder.name, "does not fit into the budget", seconds)
        begun = f"{'resumed' if resume else 'trained'}{'' if fork is None else f', begun as {fork.name}'}"
        self.say(f"{folder.name}: {record.epochs} epochs, {begun}{_about(seconds)}")
        clock = Clock(self.budget.is_over)
        try:
            train(recipe, folder, resume=resume, fork=fork, stop=clock)
        except Stopped:
            record = self._timed(record, clock)
            write_record(record, folder)
            if not self.budget.is_over():  # by a signal: whoever sent it wants the whole command to end
                raise Stopped(f"stopped in {folder.name}: the same command again goes on from there") from None
            left = time_left(record, self._records())
            return Missing(folder.name, "was stopped by the budget and can be resumed", left)
        write_record(dataclasses.replace(self._timed(record, clock), done=float(record.epochs)), folder)
        return None

    def _records(self) -> list[RunRecord]:
        found = map(read_record, self.folder.glob("*-seed*"))
        return [record for record in found if record is not None]

    def _fork_of(self, recipe: Recipe, folder: Path) -> Path | None:
        """The default run of the same seed, where all that differs comes after its epochs of all cells."""
        default = self.folder / f"{DEFAULT}-seed{recipe.seed}"
        if default == folder or not (default / ALL_CELLS_FILE).exists():
            return None
        changed = _changed_fields(recipe, load_recipe("deit", default / RECIPE_FILE))
        return default if set(changed) <= FREE_TO_FORK else None

    def _new_record(self, recipe: Recipe, folder: Path, fork: Path | None) -> RunRecord:
        shared = 0 if fork is None else round(recipe.all_cells_share * recipe.epochs)
        return RunRecord(
            name=folder.name,
            stages=recipe.stages,
            grid=str(recipe.coarse_grid),
            seed=recipe.seed,
            epochs=recipe.epochs - shared,
            seconds=0.0,
            finished=False,
            forked_from=None if fork is None else fork.name,
            images={},
            macs={},
            conditions=asdict(self.conditions),
        )

    def _untimed_record(self, recipe: Recipe, folder: Path) -> RunRecord:
        """Of a run that was trained by another command, so that its seconds are those of the scoring alone."""
        return dataclasses.replace(self._new_record(recipe, folder, None), epochs=0)

    def _timed(self, record: RunRecord, clock: Clock) -> RunRecord:
        steps = steps_per_epoch(self.base, self.train_images, 1)
        return dataclasses.replace(
            record,
            seconds=record.seconds + clock.seconds,
            done=min(float(record.epochs), (record.done or 0.0) + clock.steps / steps),
            epoch_seconds=record.epoch_seconds if clock.pace is None else clock.pace * steps,
        )

    def _score(self, recipe: Recipe, folder: Path) -> Finished:
        """Runs the model over hold-out and validation images and keeps what it answers."""
        started = time.monotonic()
        images, model = restore(recipe, folder)
        scored = {}
        for name, dataset in (("holdout", images.holdout), ("validation", images.validation)):
            assert dataset is not None  # `require_splits` has seen to it
            scored[name] = score(_answers_of(recipe, model), recipe, dataset)
        counts = {"train": len(images.train), **{name: len(part.labels) for name, part in scored.items()}}
        record = read_record(folder) or self._untimed_record(recipe, folder)
        write_scores(folder, scored)
        record = dataclasses.replace(
            record,
            seconds=record.seconds + time.monotonic() - started,
            finished=True,
            images=counts,
            macs=asdict(count_macs(model)),
        )
        write_record(record, folder)
        return Finished(recipe, folder, record, scored["holdout"], scored["validation"], StageMacs(**record.macs))


def _about(seconds: float | None) -> str:
    return "" if seconds is None else f", about {duration(seconds)}"


def require_splits(recipe: Recipe) -> Data:
    """The images of a recipe; refuses data without hold-out or validation images before anything is trained.

    Raises:
        CfvitError: says which are missing.
    """
    images, _ = prepare(recipe.replace(AS_IT_IS), Process(0, 1, torch.device("cpu")))
    if images.holdout is None:
        raise UsageError(f"holdout is {recipe.holdout}: eta is chosen on the hold-out, give a share such as 0.05")
    if images.validation is None:
        raise CfvitError(f"{recipe.data} has no validation images: name some with --val-data")
    return images


def restore(recipe: Recipe, folder: Path) -> tuple[Data, CoarseToFineViT]:
    """The images of a trained run and its model; of a plain ViT, the rest of the model is untrained.

    Raises:
        CfvitError: the folder or the data are no longer what they were.
    """
    process = Process(0, 1, best_device())
    images, model = prepare(recipe.replace(AS_IT_IS), process)
    if recipe.stages != "backbone":
        return images, load(folder).to(process.device)
    try:
        model.backbone.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CfvitError(f"{folder} is damaged ({first_line(error)}): remove it to train it again") from error
    return images, model.eval()


def _answers_of(recipe: Recipe, model: CoarseToFineViT) -> Callable[[Tensor], Sequence[Tensor]]:
    """What was trained, as images to logits of each of its stages."""
    if recipe.stages == "backbone":
        return lambda images: (model.backbone(images),)
    if recipe.stages == "coarse":
        return lambda images: (model.coarse(images).logits,)
    return model


def score(forward: Callable[[Tensor], Sequence[Tensor]], recipe: Recipe, images: EvalImages) -> Scored:
    """Runs a model over images in the recipe's precision, with a progress bar; by its seed where cells are random.

    Raises:
        CfvitError: not one image can be read.
    """
    device = best_device()
    loader = eval_loader(images, recipe.eval_batch_size, recipe.workers, device)
    torch.manual_seed(recipe.seed)
    with progress_bar(len(images)) as advance, autocast(recipe, device):
        collected = collect(forward, loader, device, advance)
    if len(collected.labels) == 0:
        raise CfvitError(f"none of the {len(images)} images can be read: check the data")
    return Scored(collected.logits, collected.labels, collected.indices)


def _require_recipe(recipe: Recipe, folder: Path) -> None:
    """Refuses a folder that holds a run of another recipe."""
    path = folder / RECIPE_FILE
    if not path.exists():
        return
    was = load_recipe("deit", path)
    changed = _changed_fields(recipe, was)
    if changed:
        name = changed[0]
        raise CfvitError(
            f"{folder} holds a run with {name} {getattr(was, name)!r}, not {getattr(recipe, name)!r}: "
            "give the same recipe as before, or choose another --out"
        )


def _changed_fields(recipe: Recipe, other: Recipe) -> list[str]:
    """Fields that change what is computed and differ."""
    ours, theirs = ({**asdict(each), "coarse_grid": each.grid} for each in (recipe, other))
    return [name for name in ours if name not in FREE_TO_CHANGE | {"eval_interval"} and ours[name] != theirs[name]]


def _is_trained(recipe: Recipe, folder: Path) -> bool:
    """Whether the log tells of an evaluation after the last epoch, also of a run by `cfvit train` on many GPUs."""
    try:
        lines = [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
    except (OSError, ValueError):
        return False
    ends = {line["epoch"] + 1 for line in lines if line.get("event") == "eval"}
    return recipe.epochs in ends and (folder / WEIGHTS_FILE).exists()
