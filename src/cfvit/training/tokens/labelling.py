"""Making the label maps of a data set with a teacher."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cfvit.data import UNREADABLE, DataSource, EvalImages, ImageError, difference_of_classes, eval_loader, progress_bar
from cfvit.errors import CfvitError
from cfvit.files import atomic_write
from cfvit.training.teacher import Teacher
from cfvit.training.tokens.label_maps import (
    MAX_CLASSES,
    ORIGIN_FILE,
    MapsOrigin,
    label_path_of,
    read_label_map,
    read_origin,
    require_own_maps,
)

MAP_SIZE = 18
TOP_SCORES = 5
"""Places on a side of a published label map, and scores at each."""

_MAX_SCORE = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class LabelCounts:
    """What `make_token_labels` did."""

    made: int  # label maps written
    kept: int  # label maps that were there
    unreadable: list[tuple[str, str]]  # names of images without a label map, and why


def make_token_labels(
    source: DataSource, teacher: Teacher, out: Path, *, size: int = MAP_SIZE, batch_size: int = 32, workers: int = 2
) -> LabelCounts:
    """Writes the label map of every image that has none yet, with a progress bar.

    The teacher sees the whole image, squashed to its input size, so that shares of the map are
    shares of the image. A map is ``[2, 5, size, size]`` in half precision, fewer than 5 where there
    are fewer classes; see `to_label_maps`.

    Args:
        out: gets ``labels.json``, a `cfvit.training.tokens.label_maps.MapsOrigin`, and a folder per class.

    Raises:
        CfvitError: other classes than the teacher's, two images with one place for their maps, maps of another or
            unknown origin in ``out``, a full disk. What has been written is kept and used by another call.
    """
    teacher.require_classes(source.class_names)
    if len(source.class_names) > MAX_CLASSES:
        raise CfvitError(
            f"{len(source.class_names)} classes are more than label maps can hold, {MAX_CLASSES}: "
            "train with the teacher itself"
        )
    root = getattr(getattr(source.dataset, "reader", None), "root", None)
    if root and out.resolve().is_relative_to(Path(root).resolve()):
        raise CfvitError(f"{out} lies within the data, where its folders would be classes: choose another folder")
    require_own_maps(source)
    _claim(out, MapsOrigin(teacher.name, teacher.weights_sha256(), source.class_names, size, version("cfvit")))
    unreadable: list[tuple[str, str]] = []
    shape = (2, min(TOP_SCORES, len(source.class_names)), size, size)

    def is_there(index: int) -> bool:
        """Whether an image has its map; a damaged one and one of another shape are made again."""
        try:
            return read_label_map(label_path_of(out, source, index), len(source.class_names)).shape == shape
        except CfvitError:
            return False

    missing: list[int] = []
    with progress_bar(len(source)) as advance:
        for index in range(len(source)):
            missing += [] if is_there(index) else [index]
            advance(1)
    images = EvalImages(source, {**teacher.data_config, "crop_pct": 1.0, "crop_mode": "squash"}, missing)
    with progress_bar(len(missing)) as advance:
        for pixels, targets, places in eval_loader(images, batch_size, workers, teacher.device):
            readable = targets != UNREADABLE
            if readable.any():
                maps = to_label_maps(teacher.dense(pixels[readable].to(teacher.device)), size).cpu()
                for index, label_map in zip(places[readable].tolist(), maps, strict=True):
                    _write(label_path_of(out, source, index), label_map)
            for index in places[~readable].tolist():
                try:
                    source.read(index)
                    reason = "could not be read a moment ago"
                except ImageError as error:
                    reason = str(error)
                unreadable.append((source.name(index), reason))
            advance(len(places))
    return LabelCounts(len(missing) - len(unreadable), len(source) - len(missing), unreadable)


def to_label_maps(logits: Tensor, size: int) -> Tensor:
    """Label maps of a teacher's logits at each place: the highest, and their classes.

    Softmax does not mind by how much all logits of a place are shifted, but a reader of maps takes
    the classes that are not stored to have score 0. So the scores are shifted until the softmax with
    that 0 gives these classes together what the teacher gives them: by the log of the mean of their
    exponentials. Where every class is stored, the highest is shifted to 0, near which half precision
    is finest. Scores that are not finite raise `CfvitError`.

    Args:
        logits: ``[B, C, h, w]``; interpolated to ``size`` places on a side.

    Returns:
        ``[B, 2, k, size, size]`` in half precision, k at most 5. Where that does not reach to the mean
        of the classes that are not stored, the scores keep their distance from the highest.
    """
    logits = F.interpolate(logits.float(), (size, size), mode="bilinear", antialias=True)
    logits = logits - logits.amax(dim=1, keepdim=True)
    scores, classes = logits.topk(min(TOP_SCORES, logits.shape[1]), dim=1)
    others = logits.shape[1] - scores.shape[1]
    if others:
        unstored = logits.scatter(1, classes, -math.inf)
        mean = unstored.logsumexp(dim=1, keepdim=True) - math.log(others)
        scores = scores - mean.clamp(min=-_MAX_SCORE)
    maps = torch.stack([scores.clamp(min=-_MAX_SCORE), classes.float()], dim=1).half()
    if not maps.isfinite().all():
        raise CfvitError("the teacher gives scores that are not finite: check its weights")
    return maps


def _claim(out: Path, origin: MapsOrigin) -> None:
    """Writes down what the maps in a folder will be made of, or compares it with what is written there."""
    was = read_origin(out)
    differs = None
    if was is None:
        if any(out.glob("*/*.pt")):
            raise CfvitError(f"{out} holds label maps of unknown origin, without {ORIGIN_FILE}: give another --out")
        with atomic_write(out / ORIGIN_FILE) as file:
            file.write_text(json.dumps(asdict(origin), indent=2) + "\n")
    elif was.weights_sha256 != origin.weights_sha256:
        which = f"not {origin.teacher}" if was.teacher != origin.teacher else "with other weights"
        differs = f"are by teacher {was.teacher}, {which}"
    elif was.size != origin.size:
        differs = f"are of {was.size} x {was.size} places, not {origin.size}"
    elif classes := difference_of_classes(origin.class_names, was.class_names):
        differs = f"are of other classes ({classes})"
    if differs:
        raise CfvitError(f"the label maps in {out} {differs}: give another --out, or remove the folder")


def _write(path: Path, label_map: Tensor) -> None:
    content = io.BytesIO()  # writing straight to a full disk, torch would not say that it is full
    torch.save(label_map.clone(), content)
    with atomic_write(path) as file:
        file.write_bytes(content.getvalue())
