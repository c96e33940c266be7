"""What images a calibration can be made of: sound logits, every class, and none that the model was trained on."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from cfvit.calibration.targets import count_images
from cfvit.data import DataSource, ImageError, progress_bar
from cfvit.errors import CfvitError

_NAMED_CLASSES = 5


def check_logits(logits: Tensor, stage: str) -> None:
    """Refuses logits that are not ``[n, classes]``, are of no image, or are not finite.

    Raises:
        CfvitError: says which image is the first that is not finite.
    """
    if not isinstance(logits, Tensor):
        raise CfvitError(f"{stage} logits are a {type(logits).__name__}: give a tensor of floats [images, classes]")
    if logits.ndim != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        kind = str(logits.dtype).removeprefix("torch.")
        raise CfvitError(f"{stage} logits are {kind} of shape {list(logits.shape)}: give floats [images, classes]")
    if len(logits) == 0:
        raise CfvitError(f"{stage} logits are of no image: give at least one")
    if not logits.isfinite().all():
        bad = (~logits.isfinite()).any(dim=1).nonzero().flatten()
        raise CfvitError(
            f"{stage} logits of {len(bad)} of {len(logits)} images are not finite, image {int(bad[0])} first: "
            "leave these out, or run the model in float32"
        )


def missing_classes(present: Collection[int], names: Sequence[object], images: int) -> str:
    """A clause that tells which classes, by ``names``, have none of the images; empty if there is none.

    ``present`` has the indices of those that have.
    """
    there = set(present)
    missing = [repr(name) for index, name in enumerate(names) if index not in there]
    if len(missing) < 2:
        return f"class {missing[0]} has none of the {count_images(images)}" if missing else ""
    others = len(missing) - _NAMED_CLASSES
    named = f"{', '.join(missing[:_NAMED_CLASSES])}{f' and {others} more' if others > 0 else ''}"
    return f"classes {named} have none of the {count_images(images)}"


def require_classes(present: Collection[int], names: Sequence[object], images: int, allow_missing: bool) -> str:
    """As `missing_classes`. Raises `CfvitError` if one is missing and that is not allowed."""
    missing = missing_classes(present, names, images)
    if missing and not allow_missing:
        raise CfvitError(f"{missing}: add some, or pass allow_missing_classes=True (--allow-missing-classes)")
    return missing


def check_logits_and_labels(coarse: Tensor, fine: Tensor, labels: Tensor) -> None:
    """Refuses logits that cannot be used, and labels that do not fit them.

    Raises:
        CfvitError: says what is wrong with which of them.
    """
    check_logits(coarse, "coarse")
    check_logits(fine, "fine")
    if not isinstance(labels, Tensor):
        raise CfvitError(f"labels are a {type(labels).__name__}: give a tensor of class indices [images]")
    if coarse.shape != fine.shape or labels.shape != coarse.shape[:1]:
        shapes = f"{list(coarse.shape)}, {list(fine.shape)} and {list(labels.shape)}"
        raise CfvitError(f"coarse logits, fine logits and labels are {shapes}: give [n, classes] twice and [n]")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        kind = str(labels.dtype).removeprefix("torch.")
        raise CfvitError(f"labels are {kind}: give class indices as whole numbers")
    classes = coarse.shape[1]
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise CfvitError(f"a label is {int(outside[0])}: give class indices from 0 to {classes - 1}")


def refuse_training_images(source: DataSource, training: DataSource, indices: Sequence[int]) -> None:
    """Refuses images that are among those of ``indices`` on which the model was trained, with a progress bar.

    Open the source anew to load it: a tar that is read here is not fit for loading processes. The `CfvitError` says how
    many there are, and which is the first.
    """
    shared = shared_images(source, training, indices)
    if shared:
        ours, theirs = shared[0]
        what = "1 image is" if len(shared) == 1 else f"{len(shared)} of {len(source)} images are"
        raise CfvitError(
            f"{what} among the training images, {source.name(ours)} first, which is {training.name(theirs)} there: "
            "calibrate on images that the model was not trained on"
        )


def shared_images(source: DataSource, others: DataSource, indices: Sequence[int]) -> list[tuple[int, int]]:
    """Images of a source that are stored byte for byte alike among some of another, each with its first likeness there.

    Only files of equal size are read. What cannot be opened is left out.
    """
    with progress_bar(2 * len(source) + len(indices)) as advance:

        def size_of(images: DataSource, index: int) -> int | None:
            advance(1)
            try:
                with images.stored(index) as file:
                    return file.seek(0, io.SEEK_END)
            except (ImageError, OSError):
                return None

        def digest(images: DataSource, index: int) -> bytes:
            with images.stored(index) as file:
                return hashlib.sha256(file.read()).digest()

        sizes = [size_of(source, index) for index in range(len(source))]
        there = set(sizes) - {None}
        found: dict[bytes, int] = {}
        for index in indices:
            if size_of(others, index) in there:
                found.setdefault(digest(others, index), index)
        shared = []
        for index, size in enumerate(sizes):
            advance(1)
            if found and size is not None and (content := digest(source, index)) in found:
                shared.append((index, found[content]))
    return shared
