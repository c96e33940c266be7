"""Images decoded once and held, for runs that would wait for decoding in each epoch."""

from __future__ import annotations

import os
import tempfile
import weakref
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from cfvit.data import DataSource, ImageError, leave_signals_to_the_run, next_batch
from cfvit.errors import CfvitError
from cfvit.evaluation.metrics import progress_bar


@dataclass(frozen=True)
class _Held:
    """Where the pixels of an image lie in the file, or why there are none."""

    target: int
    place: int = 0
    height: int = 0
    width: int = 0
    failure: str | None = None


class _Pixels:
    """Bytes in a temporary file that every loading process maps, and that goes with the object that wrote it.

    A file and not the process's own memory: the system holds it in memory while there is room, and processes that
    do not inherit memory find it all the same.
    """

    def __init__(self) -> None:
        handle, self.name = tempfile.mkstemp(prefix="cfvit-images-")
        self.size = 0
        self._file: IO[bytes] | None = os.fdopen(handle, "wb")
        self._map: np.memmap | None = None
        weakref.finalize(self, _remove, self.name, os.getpid())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_map": None}

    def append(self, pixels: np.ndarray) -> int:
        """Writes an array at the end; returns its place."""
        assert self._file is not None
        place = self.size
        self.size += self._file.write(pixels.tobytes())
        return place

    def close(self) -> None:
        """All is written."""
        if self._file is not None:
            self._file.close()

    def __getitem__(self, part: slice) -> np.ndarray:
        if self._map is None:
            self._map = np.memmap(self.name, dtype=np.uint8, mode="r")
        return self._map[part]


def _remove(name: str, owner: int) -> None:
    if os.getpid() == owner:  # and not a loading process, forked from it
        Path(name).unlink(missing_ok=True)


@dataclass(frozen=True)
class HeldSource(DataSource):
    """A data source whose images are not read from where they came any more.

    Attributes:
        held: of each image.
        pixels: of all images.
    """

    held: tuple[_Held, ...] = ()
    pixels: _Pixels | None = None

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Image and class index, as the source would give them. Raises `ImageError` where it did."""
        held = self.held[index]
        if held.failure is not None or self.pixels is None:
            raise ImageError(held.failure or "is not held")
        shape = held.height, held.width, 3
        pixels = self.pixels[held.place : held.place + held.height * held.width * 3]
        return Image.fromarray(pixels.reshape(shape)), held.target


class _Decoded(Dataset):
    """Pixels ``[H, W, 3]`` and class index of each image of a source, or why it cannot be read."""

    def __init__(self, source: DataSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[np.ndarray | str, int]:
        try:
            image, target = self.source.read(index)
        except ImageError as error:
            return str(error), -1
        return np.asarray(image), target


def hold(source: DataSource, workers: int, leads: bool = True) -> HeldSource:
    """Decodes all images of a source, and gives a source of the same images that need no decoding.

    Their pixels take ``3 * height * width`` bytes each in the folder for temporary files (``TMPDIR``).

    Args:
        workers: processes that decode.
        leads: whether to show progress.

    Raises:
        CfvitError: no room for the pixels.
    """
    decoded = DataLoader(
        _Decoded(source),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=leave_signals_to_the_run,
    )
    held: list[_Held] = []
    try:
        pixels = _Pixels()
        with closing(pixels), progress_bar(len(source), leads) as advance:
            items = iter(decoded)
            for _ in range(len(source)):
                held.append(_append(pixels, *next_batch(items)))
                advance(1)
    except OSError as error:
        raise CfvitError(
            f"the decoded images do not fit into {tempfile.gettempdir()} ({error.strerror or error}; {len(held)} of "
            f"{len(source)} were held): make room, set TMPDIR to another folder, or leave out --hold-decoded"
        ) from error
    return HeldSource(source.dataset, source.class_names, source.targets, tuple(held), pixels)


def _as_it_is(item: Any) -> Any:
    return item


def _append(pixels: _Pixels, image: np.ndarray | str, target: int) -> _Held:
    """Holds an image, or the reason why there is none."""
    if isinstance(image, str):
        return _Held(target, failure=image)
    height, width, _ = image.shape
    return _Held(target, pixels.append(image), height, width)
