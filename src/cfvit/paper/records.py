"""What is kept of a run beside its model: a record of its training, and its answers."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cfvit.errors import CfvitError, first_line
from cfvit.files import atomic_write
from cfvit.modeling.cost import StageMacs
from cfvit.modeling.exit import Exit
from cfvit.training.log import LOG_FILE
from cfvit.training.recipe import Recipe

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
        epochs: that are trained in this folder: of a forked run, those after the fork; 0 where the training was not
            timed, as by `cfvit train`.
        seconds: they took, with the scoring.
        finished: whether the run is trained and scored.
        forked_from: folder of the run whose first epochs it shares, or None.
        images: how many there are to train on, in the hold-out and in the validation data; empty while unfinished.
        macs: cost of an image, see `StageMacs`; empty while unfinished.
        conditions: see `Conditions`.
        images_per_second: at the eta of parity, or of the plain ViT; None until it is measured.
        done: epochs, with a fraction, that took ``seconds``; None in records of before this was kept.
        epoch_seconds: what an epoch takes by the steps of the last call, its start left out; None until it is known.
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
    done: float | None = None
    epoch_seconds: float | None = None


@dataclass(frozen=True, eq=False)
class Finished:
    """A run that can be reported: its recipe, record and answers on hold-out and validation images."""

    recipe: Recipe
    folder: Path
    record: RunRecord
    holdout: Scored
    validation: Scored
    macs: StageMacs
    rule: Exit = dataclasses.field(default_factory=Exit)


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


def logged_pace(folder: Path) -> dict[str, float]:
    """The median ``images_per_second`` and ``matrix_share`` that a run's log tells of its training, if it does."""
    try:
        lines = [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
    except (OSError, ValueError):
        return {}
    told = {name: [line[name] for line in lines if name in line] for name in ("images_per_second", "matrix_share")}
    return {name: statistics.median(values) for name, values in told.items() if values}


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


def write_scores(folder: Path, parts: Mapping[str, Scored]) -> None:
    """Writes ``scores.safetensors``: answers by the name of the images, ``holdout`` and ``validation``."""
    with atomic_write(folder / SCORES_FILE) as file:
        save_file({key: value for name, part in parts.items() for key, value in _to_tensors(name, part).items()}, file)


def _to_tensors(name: str, scored: Scored) -> dict[str, Tensor]:
    stages = {f"{name}.logits.{i}": logits.contiguous() for i, logits in enumerate(scored.logits)}
    return {**stages, f"{name}.labels": scored.labels, f"{name}.indices": scored.indices}
