"""Images decoded once and held, for runs that would wait for decoding in each epoch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import reduction
from typing import IO, Any, cast

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from cfvit.data.datasets import DataSource
from cfvit.data.images import ImageError
from cfvit.data.loading import leave_signals_to_the_run, next_batch, progress_bar
from cfvit.errors import CfvitError


@dataclass(frozen=True)
class _Held:
    """Where the pixels of an image lie in the file, or why there are none."""

    target: int
    place: int = 0
    height: int = 0
    width: int = 0
    failure: str | None = None


class _Pixels:
    """Bytes in a temporary file without a name, which every loading process maps and which goes with the last of them.

    A file, so that the system holds it in memory while there is room, and processes that inherit no memory get it too.
    """

    def __init__(self, file: IO[bytes], size: int = 0) -> None:
        self._file, self.size = file, size
        self._map: np.memmap | None = None

    def append(self, pixels: np.ndarray) -> int:
        """Writes an array at the end; returns its place."""
        place = self.size
        self.size += self._file.write(pixels.tobytes())
        return place

    def seal(self) -> None:
        """All is written: it can be read."""
        self._file.flush()
        if self.size:
            self._map = np.memmap(self._file, dtype=np.uint8, mode="r")

    def read(self, place: int, count: int) -> np.ndarray:
        """So many bytes from a place on."""
        assert self._map is not None
        return self._map[place : place + count]

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (reduction.DupFd(self._file.fileno()), self.size)


def _receive(handle: Any, size: int) -> _Pixels:
    """In a process that did not inherit the pixels."""
    pixels = _Pixels(os.fdopen(handle.detach(), "rb"), size)
    pixels.seal()
    return pixels


@dataclass(frozen=True)
class HeldSource(DataSource):
    """A data source whose images are not read from where they came any more."""

    held: tuple[_Held, ...] = ()  # of each image
    pixels: _Pixels | None = None  # of all images

    def decode(self, index: int) -> tuple[Image.Image, int]:
        """Image and the data set's own class index, as the source would give them. Raises `ImageError` where it did."""
        held = self.held[index]
        if held.failure is not None or self.pixels is None:
            raise ImageError(held.failure or "is not held")
        shape = held.height, held.width, 3
        pixels = self.pixels.read(held.place, held.height * held.width * 3)
        return Image.fromarray(pixels.reshape(shape)), held.target


class _Decoded(Dataset):
    """Pixels ``[H, W, 3]`` and the data set's own class index of each image, or why it cannot be read."""

    def __init__(self, source: DataSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[np.ndarray | str, int]:
        try:
            image, target = self.source.decode(index)
        except ImageError as error:
            return str(error), -1
        return np.asarray(image), target


def hold(source: DataSource, workers: int, leads: bool = True) -> HeldSource:
    """A source of the same images, all of them decoded now by ``workers`` processes, which needs no decoding again.

    Their pixels take ``3 * height * width`` bytes each in the folder for temporary files (``TMPDIR``), for each process
    of a distributed run anew. Raises `CfvitError` if there is no room.
    """
    decoded = DataLoader(
        _Decoded(source),
        batch_size=None,
        num_workers=workers,
        collate_fn=tuple,  # each item as it is
        worker_init_fn=leave_signals_to_the_run,
    )
    held: list[_Held] = []
    with _telling_what_was_held(held, len(source)):
        pixels = _Pixels(cast(IO[bytes], tempfile.TemporaryFile()))  # noqa: SIM115 - it outlives this function
    with progress_bar(len(source), leads) as advance:
        items = iter(decoded)
        for _ in range(len(source)):
            image, target = next_batch(items)
            with _telling_what_was_held(held, len(source)):
                if isinstance(image, str):
                    held.append(_Held(target, failure=image))
                else:
                    held.append(_Held(target, pixels.append(image), *image.shape[:2]))
            advance(1)
    with _telling_what_was_held(held, len(source)):
        pixels.seal()
    return HeldSource(source.dataset, source.class_names, source.targets, tuple(held), pixels)


@contextmanager
def _telling_what_was_held(held: Sequence[_Held], count: int) -> Iterator[None]:
    """An error of the system as one line."""
    try:
        yield
    except OSError as error:
        raise CfvitError(
            f"the decoded images cannot be held ({error.strerror or error}; {len(held)} of {count} were): "
            "make room for temporary files, set TMPDIR to a folder that has some, or leave out --hold-decoded"
        ) from error
