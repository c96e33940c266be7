"""The runs of a reproduction: each trained once, resumed or forked where that will do, scored, and kept."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cfvit.checkpoints import WEIGHTS_FILE, atomic_write, load
from cfvit.conditions import Conditions
from cfvit.confidence import ExitRule
from cfvit.data import EvalImages, eval_loader
from cfvit.errors import CfvitError, UsageError, first_line
from cfvit.evaluation.metrics import collect, progress_bar
from cfvit.flops import StageMacs, count_macs
from cfvit.model import CoarseToFineViT
from cfvit.processes import Process, best_device
from cfvit.reproduction.budget import duration
from cfvit.reproduction.studies import DEFAULT, RunSpec
from cfvit.training.loop import (
    ALL_CELLS_FILE,
    CHECKPOINT_FILE,
    FREE_TO_CHANGE,
    FREE_TO_FORK,
    RECIPE_FILE,
    Stopped,
    train,
)
from cfvit.training.preparation import Data, autocast, prepare
from cfvit.training.recipes import Recipe, load_recipe
from cfvit.training.reporting import LOG_FILE

RECORD_FILE, SCORES_FILE = "run.json", "scores.safetensors"


@dataclass(frozen=True, eq=False)
class Scored:
    """What a model answers to some images.

    Attributes:
        logits: one ``[n, classes]`` for each stage that was trained, coarse before fine.
        labels: class indices ``[n]``.
        indices: where each image stands in its data set, ``[n]``.
    """

    logits: tuple[Tensor, ...]
    labels: Tensor
    indices: Tensor


@dataclass(frozen=True)
class RunRecord:
    """What ``run.json`` tells of a run.

    Attributes:
        epochs: that were trained in this folder: of a forked run, those after the fork.
        seconds: they took, with the scoring.
        finished: whether the run is trained and scored.
        forked_from: folder of the run whose first epochs it shares, or None.
        images: how many there are to train on, in the hold-out and in the validation data; empty while unfinished.
        macs: cost of an image, see `StageMacs`; empty while unfinished.
        conditions: see `Conditions`.
        images_per_second: at the eta of parity, or of the plain ViT; None until it is measured.
    """

    name: str
    stages: str
    grid: str
    seed: int
    epochs: int
    seconds: float
    finished: bool
    forked_from: str | None
    images: dict[str, int]
    macs: dict[str, int]
    conditions: dict[str, str]
    images_per_second: float | None = None


@dataclass(frozen=True, eq=False)
class Finished:
    """A run that can be reported: its recipe, record and answers on hold-out and validation images."""

    recipe: Recipe
    folder: Path
    record: RunRecord
    holdout: Scored
    validation: Scored
    macs: StageMacs
    rule: ExitRule = dataclasses.field(default_factory=ExitRule)


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
        deadline: by `time.monotonic`, when the last training has to end; None for no end.
        say: told a line for each run that is trained.
    """

    def __init__(
        self, base: Recipe, folder: Path, deadline: float | None, conditions: Conditions, say: Callable[[str], object]
    ) -> None:
        self.base, self.folder, self.deadline = base, folder, deadline
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
        """All finished runs in the folder, also those of earlier calls."""
        found = []
        for folder in sorted(self.folder.glob("*-seed*")):
            record = read_record(folder)
            if record is not None and record.finished:
                found.append(read_finished(load_recipe("deit", folder / RECIPE_FILE), folder, record))
        return found

    def _train(self, recipe: Recipe, folder: Path) -> Missing | None:
        resume = (folder / CHECKPOINT_FILE).exists()
        fork = None if resume else self._fork_of(recipe, folder)
        record = read_record(folder) or self._new_record(recipe, folder, fork)
        seconds = self._estimate(record)
        if not self._fits(seconds):
            return Missing(folder.name, "does not fit into the budget", seconds)
        begun = f"{'resumed' if resume else 'trained'}{'' if fork is None else f', begun as {fork.name}'}"
        self.say(f"{folder.name}: {record.epochs} epochs, {begun}{_about(seconds)}")
        started = time.monotonic()
        try:
            train(recipe, folder, resume=resume, fork=fork, stop=self._is_over)
        except Stopped:
            self._keep_time(record, folder, started)
            if not self._is_over():  # by a signal: whoever sent it wants the whole command to end
                raise Stopped(f"stopped in {folder.name}: the same command again goes on from there") from None
            left = None if seconds is None else max(0.0, seconds - (time.monotonic() - started))
            return Missing(folder.name, "was stopped by the budget and can be resumed", left)
        self._keep_time(record, folder, started)
        return None

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

    def _keep_time(self, record: RunRecord, folder: Path, started: float) -> None:
        write_record(dataclasses.replace(record, seconds=record.seconds + time.monotonic() - started), folder)

    def _estimate(self, record: RunRecord) -> float | None:
        """Seconds that are left of a run, from what an epoch of finished runs took; None if there are none.

        A run of the same stages and grid tells best, else the dearest is taken.
        """
        known = [r for r in map(read_record, self.folder.glob("*-seed*")) if r is not None and r.finished and r.epochs]
        alike = [r for r in known if (r.stages, r.grid) == (record.stages, record.grid)] or known
        if not alike:
            return None
        return max(0.0, max(r.seconds / r.epochs for r in alike) * record.epochs - record.seconds)

    def _fits(self, seconds: float | None) -> bool:
        return self.deadline is None or time.monotonic() + (seconds or 0.0) < self.deadline

    def _is_over(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def _score(self, recipe: Recipe, folder: Path) -> Finished:
        """Runs the model over hold-out and validation images and keeps what it answers."""
        started = time.monotonic()
        images, model = restore(recipe, folder)
        scored = {}
        for name, dataset in (("holdout", images.holdout), ("validation", images.validation)):
            assert dataset is not None  # `require_splits` has seen to it
            scored[name] = score(_answers_of(recipe, model), recipe, dataset)
        counts = {"train": len(images.train), **{name: len(part.labels) for name, part in scored.items()}}
        record = read_record(folder) or self._new_record(recipe, folder, None)
        with atomic_write(folder / SCORES_FILE) as file:
            save_file({k: v for name, part in scored.items() for k, v in _to_tensors(name, part).items()}, file)
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


def require_splits(recipe: Recipe) -> None:
    """Refuses data without hold-out or validation images before anything is trained.

    Raises:
        CfvitError: says which are missing.
    """
    images, _ = prepare(recipe.replace({"initial_weights": None}), Process(0, 1, torch.device("cpu")))
    if images.holdout is None:
        raise UsageError(f"holdout is {recipe.holdout}: eta is chosen on the hold-out, give a share such as 0.05")
    if images.validation is None:
        raise CfvitError(f"{recipe.data} has no validation images beside train/: name some with --val-data")


def restore(recipe: Recipe, folder: Path) -> tuple[Data, CoarseToFineViT]:
    """The images of a trained run and its model; of a plain ViT, the rest of the model is untrained.

    Raises:
        CfvitError: the folder or the data are no longer what they were.
    """
    process = Process(0, 1, best_device())
    images, model = prepare(recipe.replace({"initial_weights": None}), process)
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


def _to_tensors(name: str, scored: Scored) -> dict[str, Tensor]:
    stages = {f"{name}.logits.{i}": logits.contiguous() for i, logits in enumerate(scored.logits)}
    return {**stages, f"{name}.labels": scored.labels, f"{name}.indices": scored.indices}


def read_record(folder: Path) -> RunRecord | None:
    """What ``run.json`` says, None if there is none.

    Raises:
        CfvitError: it is damaged.
    """
    try:
        return RunRecord(**json.loads((folder / RECORD_FILE).read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise CfvitError(
            f"{folder / RECORD_FILE} is damaged ({first_line(error)}): remove {folder} to train it again"
        ) from error


def write_record(record: RunRecord, folder: Path) -> None:
    """Writes ``run.json``."""
    with atomic_write(folder / RECORD_FILE) as file:
        file.write_text(json.dumps(asdict(record), indent=2) + "\n")


def read_finished(recipe: Recipe, folder: Path, record: RunRecord) -> Finished:
    """A run that was scored before.

    Raises:
        CfvitError: its scores cannot be read.
    """
    try:
        tensors = load_file(folder / SCORES_FILE)
        holdout, validation = (_from_tensors(name, tensors) for name in ("holdout", "validation"))
    except (OSError, SafetensorError, KeyError) as error:
        raise CfvitError(f"{folder / SCORES_FILE} is damaged: remove {folder / RECORD_FILE} to score again") from error
    return Finished(recipe, folder, record, holdout, validation, StageMacs(**record.macs))


def _from_tensors(name: str, tensors: dict[str, Tensor]) -> Scored:
    stages = sorted(key for key in tensors if key.startswith(f"{name}.logits."))
    return Scored(tuple(tensors[key] for key in stages), tensors[f"{name}.labels"], tensors[f"{name}.indices"])


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
