"""Images that two data sets share, found by their content."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence

from cfvit.data import DataSource, ImageError, progress_bar
from cfvit.errors import CfvitError

UNOPENED = -1


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
        sizes = [_size(source, index, advance) for index in range(len(source))]
        there = set(sizes) - {UNOPENED}
        found: dict[bytes, int] = {}
        for index in indices:
            if _size(others, index, advance) in there:
                found.setdefault(_digest(others, index), index)
        shared = []
        for index, size in enumerate(sizes):
            advance(1)
            if found and size != UNOPENED and (digest := _digest(source, index)) in found:
                shared.append((index, found[digest]))
    return shared


def _size(source: DataSource, index: int, advance: Callable[[int], None]) -> int:
    advance(1)
    try:
        with source.stored(index) as file:
            return file.seek(0, io.SEEK_END)
    except (ImageError, OSError):
        return UNOPENED


def _digest(source: DataSource, index: int) -> bytes:
    with source.stored(index) as file:
        return hashlib.sha256(file.read()).digest()
