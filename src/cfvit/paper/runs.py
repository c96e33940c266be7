"""The runs of a reproduction: each trained once, resumed or forked where possible, scored, and kept."""

from __future__ import annotations

import json
import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cfvit.benchmark.conditions import Conditions
from cfvit.calibration import Accuracy, rank_images
from cfvit.calibration.targets import choose_eta
from cfvit.checkpoints import WEIGHTS_FILE
from cfvit.data import EvalImages
from cfvit.errors import CfvitError, UsageError, first_line
from cfvit.evaluation.metrics import Collected, SweepPoint, collect_with_progress, sweep, top_k_accuracy
from cfvit.files import atomic_write
from cfvit.methods.base import Method, create_method
from cfvit.modeling.cost import StageMacs, count_macs
from cfvit.modeling.exit import Exit, goes_on
from cfvit.modeling.model import CoarseToFineViT
from cfvit.paper.studies import DEFAULT, RunSpec
from cfvit.processes import Process, best_device
from cfvit.training import loop
from cfvit.training.log import LOG_FILE
from cfvit.training.loop import Stopped, train
from cfvit.training.recipe import Recipe, load_recipe
from cfvit.training.setup import RunImages, autocast, prepare, steps_per_epoch

RECORD_FILE, SCORES_FILE = "run.json", "scores.safetensors"
TRIAL_STEPS = 4
"""Steps by which the time of a training is estimated if no other run tells it."""


@dataclass(frozen=True, eq=False)
class Result:
    """A trained network that a study can report: its cost and its answers."""

    method: Method
    macs: Mapping[str, int]  # of an image by operating point; ``fine_in_paper`` is the fine stage as the paper counts
    validation: Collected  # answers to the images that it is scored on, by operating point, cheapest first
    holdout: Collected | None  # answers to the images that eta is chosen on, None if there are none
    open: Callable[[], tuple[Any, EvalImages]]  # the network and the validation images
    seed: int | None = None  # of its training; None of a model that was given
    rule: Exit = field(default_factory=Exit)  # how its confidence is measured
    untrained: bool = False  # whether its weights are those that its run started from

    @property
    def stages(self) -> StageMacs:
        """The cost of both stages."""
        return StageMacs(coarse=self.macs["coarse"], fine=self.macs["fine"] - self.macs["coarse"], backbone=0)

    def goes_on(self, eta: float) -> Tensor:
        """Which validation images the fine stage answers, ``[n]`` of bool."""
        return goes_on(self.rule.coarse(self.validation.logits["coarse"]), eta)

    def at(self, etas: Sequence[float]) -> list[SweepPoint]:
        """Accuracy and cost on the validation images at each eta."""
        logits, labels = self.validation.logits, self.validation.labels
        return sweep(logits["coarse"], logits["fine"], labels, self.stages, etas, self.rule)

    def parity(self, plain: Result, below: float = 0.0) -> float | None:
        """The cheapest eta whose accuracy on the hold-out is at least the plain ViT's there; None if none is.

        Args:
            below: points that may be lost.
        """
        assert self.holdout is not None and plain.holdout is not None
        both = self.holdout.logits["coarse"], self.holdout.logits["fine"]
        trade = rank_images(*both, self.holdout.labels, self.rule.measure, self.rule.coarse_temperature)
        try:
            return choose_eta(Accuracy(top1(plain.holdout) - below), trade, self.stages)
        except CfvitError:  # out of reach
            return None


def top1(answers: Collected, point: str | None = None) -> float:
    """Top-1 in percent at an operating point; by default at the last one."""
    return top_k_accuracy(answers.logits[point or list(answers.logits)[-1]], answers.labels, 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Run(Result):
    """A result that was trained here."""

    recipe: Recipe
    folder: Path
    record: Record


@dataclass(frozen=True)
class Missing:
    """A run that is not there: why, and the seconds that it would take, if they are known."""

    name: str
    reason: str
    seconds: float | None = None


@dataclass(frozen=True)
class Record:
    """What ``run.json`` says of a run."""

    name: str
    method: str
    grid: str
    seed: int
    epochs: int  # that are trained in this folder; of a forked run, those after the fork
    conditions: dict[str, str]  # see `Conditions`
    forked_from: str | None = None  # folder of the run whose first epochs it shares
    done: float = 0.0  # epochs that were trained by this command, with a fraction
    seconds: float = 0.0  # time of the training and the scoring
    epoch_seconds: float | None = None  # time of an epoch by the steps of the last call, without its start
    finished: bool = False  # whether the run is trained and scored
    images: dict[str, int] = field(default_factory=dict)  # of training, hold-out and validation; empty while unfinished
    macs: dict[str, int] = field(default_factory=dict)  # see `Result`; empty while unfinished
    images_per_second: float | None = None  # at the eta of parity, or of the plain ViT; None until it is measured

    def write(self, folder: Path) -> None:
        """Writes ``run.json``."""
        with atomic_write(folder / RECORD_FILE) as file:
            file.write_text(json.dumps(asdict(self), indent=2) + "\n")


def read_record(folder: Path) -> Record | None:
    """What ``run.json`` says, None if there is none. A damaged one raises `CfvitError`."""
    try:
        return Record(**json.loads((folder / RECORD_FILE).read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise CfvitError(
            f"{folder / RECORD_FILE} is damaged ({first_line(error)}): remove {folder} to train it again"
        ) from error


# Time


def parse_budget(text: str) -> float:
    """``2h``, ``90m`` or ``300s`` in seconds.

    Raises:
        UsageError: anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip().lower())
    if found is None or float(found[1]) == 0:
        raise UsageError(f"budget is {text!r}: give a time such as 2h, 90m or 300s")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def time_left(record: Record, others: Sequence[Record]) -> float | None:
    """Seconds until a run is trained; None if neither the run nor another one tells.

    By its own pace, else by the slowest run of the same method and grid, else by the slowest of all.
    """
    alike = [other for other in others if (other.method, other.grid) == (record.method, record.grid)]
    for known in ([record], alike, others):
        if paces := [each.epoch_seconds for each in known if each.epoch_seconds is not None]:
            return max(paces) * (record.epochs - record.done)
    return None


# Training and scoring


class Runs:
    """The runs in a folder, a sub-folder for each, named after the run and its seed.

    Args:
        base: the recipe that all of them change.
        budget: seconds from now until the last training has to end; None for no end.
        train_images: how many images there are to train on.
        say: receives a line for each run that is trained.
    """

    def __init__(
        self,
        base: Recipe,
        folder: Path,
        budget: float | None,
        train_images: int,
        conditions: Conditions,
        say: Callable[[str], object],
    ) -> None:
        self.base, self.folder, self.conditions, self.say = base, folder, conditions, say
        self.deadline = math.inf if budget is None else time.monotonic() + budget
        self.steps = steps_per_epoch(base, train_images, 1)

    def time_is_up(self) -> bool:
        """Whether nothing is left of the budget."""
        return time.monotonic() >= self.deadline

    def make(self, spec: RunSpec, seed: int) -> Run | Missing:
        """The run, first trained and scored if it is not there, unless the time left is too short.

        Raises:
            CfvitError: the folder holds a run of another recipe; a training that fails.
            Stopped: by Ctrl-C or SIGTERM.
        """
        folder = self.folder / f"{spec.name}-seed{seed}"
        try:
            recipe = spec.recipe(self.base, seed)
        except UsageError as error:
            return Missing(folder.name, f"cannot be trained so: {error}")
        if (folder / loop.RECIPE_FILE).exists():
            was = load_recipe("deit", folder / loop.RECIPE_FILE)
            if changed := _changed_fields(recipe, was):
                name = changed[0]
                raise CfvitError(
                    f"{folder} holds a run with {name} {getattr(was, name)!r}, not {getattr(recipe, name)!r}: "
                    "give the same recipe as before, or choose another --out"
                )
        grid = "x".join(map(str, dict.fromkeys(recipe.grid)))  # 7 for 7 x 7
        new = Record(folder.name, recipe.method, grid, seed, recipe.epochs, asdict(self.conditions))
        record = read_record(folder) or new
        if not record.finished:
            # the log tells of an evaluation after the last epoch, also of a run by `cfvit train` on many GPUs
            ends = {line["epoch"] + 1 for line in _read_log(folder) if line.get("event") == "eval"}
            if recipe.epochs not in ends or not (folder / WEIGHTS_FILE).exists():
                record = self._train(recipe, folder, record)
            if isinstance(record, Missing):
                return record
            self._score(recipe, folder, record)
        return read_run(recipe, folder)

    def finished(self) -> list[Run]:
        """All finished runs in the folder, also of earlier calls."""
        found = sorted(self.folder.glob(f"*-seed*/{loop.RECIPE_FILE}"))
        done = [path for path in found if (record := read_record(path.parent)) is not None and record.finished]
        return [read_run(load_recipe("deit", path), path.parent) for path in done]

    def _train(self, recipe: Recipe, folder: Path, record: Record) -> Record | Missing:
        """Trains a run as far as the budget allows."""
        resume, fork = (folder / loop.CHECKPOINT_FILE).exists(), None
        default = self.folder / f"{DEFAULT}-seed{recipe.seed}"
        if not resume and default != folder and (default / loop.ALL_CELLS_FILE).exists():
            changed = _changed_fields(recipe, load_recipe("deit", default / loop.RECIPE_FILE))
            fork = default if set(changed) <= loop.FREE_TO_FORK else None
        if fork is not None:
            left = recipe.epochs - round(recipe.all_cells_share * recipe.epochs)
            record = replace(record, epochs=left, forked_from=fork.name)
        others = [each for each in map(read_record, self.folder.glob("*-seed*")) if each is not None]
        seconds = time_left(record, others)
        if seconds is None and time.monotonic() < self.deadline < math.inf:
            self.say(f"{folder.name}: {TRIAL_STEPS} steps are tried, to estimate its time")
            with tempfile.TemporaryDirectory() as trial:
                stopped, steps, pace = _timed(without_startup(recipe), Path(trial), lambda steps: steps >= TRIAL_STEPS)
            if stopped and steps < TRIAL_STEPS:
                raise Stopped(f"stopped in {folder.name}: the same command again begins it")
            seconds = None if pace is None else pace * self.steps * record.epochs
        if time.monotonic() + (seconds or 0.0) >= self.deadline:
            return Missing(folder.name, "does not fit into the budget", seconds)
        begun = f"{'resumed' if resume else 'trained'}{'' if fork is None else f', begun as {fork.name}'}"
        about = "" if seconds is None else f", about {duration(seconds)}"
        self.say(f"{folder.name}: {record.epochs} epochs, {begun}{about}")
        started = time.monotonic()
        stopped, steps, pace = _timed(recipe, folder, lambda steps: self.time_is_up(), resume=resume, fork=fork)
        record = replace(
            record,
            seconds=record.seconds + time.monotonic() - started,
            done=min(record.epochs, record.done + steps / self.steps) if stopped else float(record.epochs),
            epoch_seconds=record.epoch_seconds if pace is None else pace * self.steps,
        )
        record.write(folder)
        if stopped and not self.time_is_up():  # by a signal: whoever sent it wants the whole command to end
            raise Stopped(f"stopped in {folder.name}: the same command again goes on from there")
        reason = "was stopped by the budget and can be resumed"
        return Missing(folder.name, reason, time_left(record, others)) if stopped else record

    def _score(self, recipe: Recipe, folder: Path, record: Record) -> None:
        """Runs the model over hold-out and validation images, and keeps its answers and its record."""
        started = time.monotonic()
        images, method, network = restore(recipe, folder)
        tensors, counts = {}, {"train": len(images.train)}
        for name, dataset in (("holdout", images.holdout), ("validation", images.validation)):
            assert dataset is not None  # data without are refused before anything is trained
            scored = score(lambda batch: method.answers(network, batch), recipe, dataset)
            counts[name] = len(scored.labels)
            tensors |= {f"{name}.logits.{i}.{at}": x.contiguous() for i, (at, x) in enumerate(scored.logits.items())}
            tensors |= {f"{name}.labels": scored.labels, f"{name}.indices": scored.indices}
        with atomic_write(folder / SCORES_FILE) as file:
            save_file(tensors, file)
        seconds = record.seconds + time.monotonic() - started
        macs = method.macs(network)
        if isinstance(network, CoarseToFineViT):
            macs["fine_in_paper"] = count_macs(network).both_in_paper
        replace(record, seconds=seconds, finished=True, images=counts, macs=macs).write(folder)


def _timed(recipe: Recipe, folder: Path, stops: Callable[[int], bool], **how: Any) -> tuple[bool, int, float | None]:
    """Trains until ``stops`` is true of the number of steps that are done.

    Returns:
        Whether it was stopped, the number of steps, and the seconds of one without the first, which waits for data and
        compilers; None after a single step.
    """
    ends: list[float] = []

    def stop() -> bool:
        ends.append(time.monotonic())
        return stops(len(ends))

    try:
        train(recipe, folder, stop=stop, **how)
        stopped = False
    except Stopped:
        stopped = True
    return stopped, len(ends), (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else None


def _changed_fields(recipe: Recipe, other: Recipe) -> list[str]:
    """Fields that change what is computed and differ."""
    ours, theirs, free = recipe.to_dict(), other.to_dict(), loop.FREE_TO_CHANGE | {"eval_interval"}
    return [name for name in ours if name not in free and ours[name] != theirs[name]]


def _read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a training's log; empty if there is none, or if it is damaged."""
    try:
        return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
    except (OSError, ValueError):
        return []


def logged_speed(folder: Path) -> dict[str, float]:
    """The median ``images_per_second`` and ``matrix_share`` of a training by its log; empty if it has none."""
    lines = _read_log(folder)
    values = {name: [line[name] for line in lines if name in line] for name in ("images_per_second", "matrix_share")}
    return {name: statistics.median(numbers) for name, numbers in values.items() if numbers}


def read_run(recipe: Recipe, folder: Path) -> Run:
    """A finished run. Scores that cannot be read raise `CfvitError`."""
    record = read_record(folder)
    assert record is not None
    try:
        tensors = load_file(folder / SCORES_FILE)
        parts = []
        for name in ("validation", "holdout"):
            keys = sorted(key for key in tensors if key.startswith(f"{name}.logits."))
            logits = {key.rpartition(".")[2]: tensors[key] for key in keys}
            parts.append(Collected(logits, tensors[f"{name}.labels"], tensors[f"{name}.indices"], []))
    except (OSError, SafetensorError, KeyError) as error:
        raise CfvitError(f"{folder / SCORES_FILE} is damaged: remove {folder / RECORD_FILE} to score again") from error

    def reopen() -> tuple[Any, EvalImages]:
        images, _, network = restore(recipe, folder)
        assert images.validation is not None
        return network, images.validation

    method = create_method(recipe.method, recipe, recipe.method_options)
    own: dict[str, Any] = {"recipe": recipe, "folder": folder, "record": record}
    return Run(method, record.macs, parts[0], parts[1], reopen, record.seed, **own)


def without_startup(recipe: Recipe) -> Recipe:
    """The recipe without what costs time and only a training needs. Without labels the first weights stay to teach."""
    lighter: dict[str, Any] = {"initial_weights": None, "initial_share": 0.0} if recipe.uses_labels else {}
    return recipe.replace({**lighter, "hold_decoded": False})


def restore(recipe: Recipe, folder: Path) -> tuple[RunImages, Method, Any]:
    """The images, the method and the network of a trained run, if folder and data are still what they were."""
    process = Process(0, 1, best_device())
    images, network = prepare(without_startup(recipe), process)
    method = create_method(recipe.method, recipe, recipe.method_options)
    return images, method, method.load(network, folder).to(process.device)


def score(forward: Callable[[Tensor], Mapping[str, Tensor]], recipe: Recipe, images: EvalImages) -> Collected:
    """Runs a network over images in the recipe's precision, with a progress bar; random cells follow the recipe's seed.

    Raises:
        CfvitError: not one image can be read.
    """
    process = Process(0, 1, best_device())
    torch.manual_seed(recipe.seed)
    with autocast(recipe, process.device):
        return collect_with_progress(forward, images, recipe.eval_batch_size, recipe.workers, process)[0]


def read_images(images: EvalImages, indices: Sequence[int]) -> Tensor:
    """Images by their numbers in the data set."""
    place = {index: item for item, index in enumerate(images.indices)}
    return torch.stack([images[place[index]][0] for index in indices]).to(best_device())
