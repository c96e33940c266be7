"""From image files to answers, in order, whatever is wrong with some of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfvit.data import ImageError, eval_transform, open_image
from cfvit.errors import first_line
from cfvit.inference.predictor import Predictor
from cfvit.inference.stream import FINE, prefetched

READERS = 4


@dataclass(frozen=True)
class FileAnswer:
    """The answer for one file."""

    path: Path  # as it was given
    label: str  # the class's name, or its number where the model has no names
    confidence: float  # of the stage that answered
    stage: int  # 0 if the coarse stage answered, 1 if the fine one did
    gmacs: float  # what was spent, in 1e9 multiply-accumulates


@dataclass(frozen=True)
class FileFailure:
    """A file without an answer, and why, in one line."""

    path: Path
    error: str


def as_row(result: FileAnswer | FileFailure) -> dict[str, Any]:
    """What ``predict`` writes of a file as JSON."""
    return {**asdict(result), "path": str(result.path)}


@dataclass
class Tally:
    """Counts over many files."""

    answered: int = 0  # how many have an answer
    failed: int = 0  # how many have none
    easy: int = 0  # how many were answered by the coarse stage
    gmacs: float = 0.0  # what all answers cost together

    def count(self, row: dict[str, Any]) -> dict[str, Any]:
        """Counts a file by its row, and gives the row back."""
        if "error" in row:
            self.failed += 1
        else:
            self.answered += 1
            self.easy += row["stage"] != FINE
            self.gmacs += row["gmacs"]
        return row


def classify_files(
    paths: Sequence[Path],
    predictor: Predictor,
    batch_size: int = 32,
    watch: Callable[[list[Path], Tensor], None] = lambda paths, images: None,
    scaled_decode: bool = False,
    read: Callable[[Path], Tensor | str] | None = None,
) -> Iterator[FileAnswer | FileFailure]:
    """Classifies files, yielding in their order; hard images of several batches go on together.

    Args:
        watch: called with the paths and the normalised images of each batch, those that could be read.
        scaled_decode: decode JPEGs for the coarse stage at a half, a quarter or an eighth of their size, where that is
            enough for it, and in full only those that go on. Quicker for large photos; the coarse stage sees slightly
            other pixels. ``watch`` then gets images of ``model.coarse_size``.
        read: gives the normalised image of a file, or why there is none, in the place of `read_image`.
    """
    model, macs = predictor.model, predictor.macs
    first = whole = read or partial(read_image, transform=eval_transform(model.data_config))
    if scaled_decode:
        config = {**model.data_config, "input_size": (3, *model.coarse_size)}
        least = math.ceil(max(model.coarse_size) / config["crop_pct"])
        first = partial(read_image, transform=eval_transform(config), least=least)
    with ThreadPoolExecutor(READERS) as pool:
        files = _Files(paths, pool)
        answers = predictor.stream(
            prefetched(files.batches(batch_size, first, watch), predictor.engine.weight),
            fine_batch=batch_size,
            ordered=True,
            whole=partial(files.in_full, whole, model.image_size) if scaled_decode else None,
            on_error=files.failed,
        )
        done = 0
        for answer in answers:
            columns = (answer.index, answer.logits.argmax(dim=-1), answer.confidence, answer.stage)
            for place, label, confidence, stage in zip(*(column.tolist() for column in columns), strict=True):
                number = files.numbers[place]
                yield from map(files.failure, range(done, number))
                done = number + 1
                if number not in files.errors and confidence < 0:  # what is not a number
                    files.errors[number] = "the answer is not a number: the model's weights are damaged, or too large"
                if number in files.errors:
                    yield files.failure(number)
                else:
                    cost = macs.both if stage == FINE else macs.coarse
                    yield FileAnswer(paths[number], model.label_of(label), confidence, stage, cost / 1e9)
        yield from map(files.failure, range(done, len(paths)))


class _Files:
    """Files on their way through a stream: which image of the stream each one is, and what failed.

    Attributes:
        numbers: for each image of the stream, which of the paths it is.
        errors: by the number of a path, why it has no answer.
    """

    def __init__(self, paths: Sequence[Path], pool: ThreadPoolExecutor) -> None:
        self.paths, self.pool = paths, pool
        self.numbers: list[int] = []
        self.errors: dict[int, str] = {}

    def batches(
        self, size: int, read: Callable[[Path], Tensor | str], watch: Callable[[list[Path], Tensor], None]
    ) -> Iterator[Tensor]:
        """The images that can be read."""
        parts = [range(len(self.paths))[start : start + size] for start in range(0, len(self.paths), size)]
        readings = (self.pool.map(read, [self.paths[number] for number in part]) for part in parts)
        for part, (reading, _) in zip(parts, pairwise(chain(readings, [()])), strict=True):  # reads the next meanwhile
            good = self._good(part, reading)
            self.numbers += good
            if good:
                stacked = torch.stack(list(good.values()))
                watch([self.paths[number] for number in good], stacked)
                yield stacked

    def in_full(self, read: Callable[[Path], Tensor | str], size: tuple[int, int], places: list[int]) -> Tensor:
        """Whole images of those that go on; one that can no longer be read is black, and a failure in the end."""
        numbers = [self.numbers[place] for place in places]
        good = self._good(numbers, self.pool.map(read, [self.paths[number] for number in numbers]))
        return torch.stack([good.get(number, torch.zeros(3, *size)) for number in numbers])

    def _good(self, numbers: Sequence[int], read: Iterable[Tensor | str]) -> dict[int, Tensor]:
        """The images among what was read, by the numbers of their paths; the others are errors."""
        found = dict(zip(numbers, read, strict=True))
        self.errors |= {number: image for number, image in found.items() if isinstance(image, str)}
        return {number: image for number, image in found.items() if isinstance(image, Tensor)}

    def failed(self, places: list[int], error: Exception) -> None:
        """Notes why a batch of the stream has no answers."""
        self.errors |= {self.numbers[place]: f"cannot be answered ({first_line(error)})" for place in places}

    def failure(self, number: int) -> FileFailure:
        """Why a file has no answer, in the place of the answer."""
        return FileFailure(self.paths[number], self.errors.pop(number))


def read_image(path: Path, transform: Any, least: int | None = None) -> Tensor | str:
    """What the transform makes of a file's image, or why there is none; ``least`` is that of `open_image`."""
    try:
        return transform(open_image(path, least))
    except ImageError as error:
        return str(error)
    except Exception as error:  # whatever it is, the other files still get their answers
        return f"cannot be prepared ({first_line(error)})"
