"""Making the label maps of a data set with a teacher."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from cfvit.checkpoints import atomic_write
from cfvit.data import UNREADABLE, DataSource, EvalImages, ImageError, eval_loader
from cfvit.errors import CfvitError
from cfvit.training.teacher import Teacher
from cfvit.training.token_labels import MAX_CLASSES, label_path_of, read_label_map

MAP_SIZE = 18
TOP_SCORES = 5
"""Places on a side of a published label map, and scores at each."""


@dataclass(frozen=True)
class LabelCounts:
    """What `make_token_labels` did.

    Attributes:
        made: label maps written.
        there: label maps that were there.
        unreadable: names of images without a label map, and why.
    """

    made: int
    there: int
    unreadable: list[tuple[str, str]]


def make_token_labels(
    source: DataSource, teacher: Teacher, out: Path, *, size: int = MAP_SIZE, batch_size: int = 32, workers: int = 2
) -> LabelCounts:
    """Writes the label map of every image that has none yet, with a progress bar.

    The teacher sees the whole image, squashed to its input size, so that shares of the map are
    shares of the image. A map is ``[2, 5, size, size]`` in half precision, fewer than 5 where there
    are fewer classes. See `cfvit.training.token_labels.read_label_map`.

    Args:
        source: the training images.
        out: gets a folder per class.

    Raises:
        CfvitError: other classes than the teacher's, two images with one place for their maps, maps of
            another size in ``out``, a full disk. What has been written is kept and used by another call.
    """
    teacher.require_classes(source.class_names)
    _require_countable_classes(source)
    _require_own_paths(source, out)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("images", total=len(source))
        missing = []
        for index in range(len(source)):
            if _is_there(label_path_of(out, source, index), len(source.class_names), size):
                progress.advance(task)
            else:
                missing.append(index)
        unreadable: list[tuple[str, str]] = []
        images = EvalImages(source, {**teacher.data_config, "crop_pct": 1.0, "crop_mode": "squash"}, missing)
        for batch in eval_loader(images, batch_size, workers, teacher.device):
            unreadable += _label_batch(source, teacher, out, size, *batch)
            progress.advance(task, len(batch[0]))
    return LabelCounts(len(missing) - len(unreadable), len(source) - len(missing), unreadable)


def _label_batch(
    source: DataSource, teacher: Teacher, out: Path, size: int, images: Tensor, targets: Tensor, indices: Tensor
) -> list[tuple[str, str]]:
    """Writes the maps of the readable images; names of the others, and why."""
    readable = targets != UNREADABLE
    if readable.any():
        maps = _top_scores(teacher.dense(images[readable].to(teacher.device)), size).cpu()
        for index, label_map in zip(indices[readable].tolist(), maps, strict=True):
            _write(label_path_of(out, source, index), label_map)
    return [(source.name(index), _reason(source, index)) for index in indices[~readable].tolist()]


def _require_countable_classes(source: DataSource) -> None:
    count = len(source.class_names)
    if count > MAX_CLASSES:
        raise CfvitError(
            f"{count} classes are more than label maps can hold, {MAX_CLASSES}: train with the teacher itself"
        )


def _require_own_paths(source: DataSource, out: Path) -> None:
    """Refuses maps that would overwrite one another or turn up among the classes of the data."""
    reader: Any = getattr(source.dataset, "reader", None)
    root = getattr(reader, "root", None)
    if root and out.resolve().is_relative_to(Path(root).resolve()):
        raise CfvitError(f"{out} lies within the data, where its folders would be classes: choose another folder")
    owners: dict[str, int] = {}
    for index in range(len(source)):
        owner = owners.setdefault(str(label_path_of(Path(), source, index)), index)
        if owner != index:
            raise CfvitError(
                f"{source.name(owner)} and {source.name(index)} would share a label map: rename one of them"
            )


def _is_there(path: Path, num_classes: int, size: int) -> bool:
    """Whether a readable map is there; a damaged one is made again."""
    if not path.exists():
        return False
    try:
        shape = read_label_map(path, num_classes).shape
    except CfvitError:
        return False
    if shape[-2:] != (size, size):
        raise CfvitError(f"{path} is of {shape[-2]} x {shape[-1]} places, not {size}: choose another folder or size")
    return True


def _reason(source: DataSource, index: int) -> str:
    try:
        source.read(index)
    except ImageError as error:
        return str(error)
    return "could not be read a moment ago"


def _top_scores(logits: Tensor, size: int) -> Tensor:
    """The highest scores and their classes: ``[B, C, h, w] -> [B, 2, k, size, size]`` in half precision."""
    logits = F.interpolate(logits.float(), (size, size), mode="bilinear", antialias=True)
    scores, classes = logits.topk(min(TOP_SCORES, logits.shape[1]), dim=1)
    maps = torch.stack([scores, classes.float()], dim=1).half()
    if not maps.isfinite().all():
        raise CfvitError("the teacher gives scores beyond half precision: check its weights")
    return maps


def _write(path: Path, label_map: Tensor) -> None:
    content = io.BytesIO()  # writing straight to a full disk, torch would not say that it is full
    torch.save(label_map.clone(), content)
    with atomic_write(path) as file:
        file.write_bytes(content.getvalue())
