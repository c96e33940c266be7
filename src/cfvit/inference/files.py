"""From image files to answers, in order, whatever is wrong with some of them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfvit.data import ImageError, eval_transform, open_image
from cfvit.errors import first_line
from cfvit.inference.acceleration import copied_ahead
from cfvit.inference.predictor import FINE, Predictor, StreamedPrediction
from cfvit.modeling.cost import StageMacs, count_macs
from cfvit.modeling.model import CoarseToFineViT

READERS = 4


@dataclass(frozen=True)
class FileAnswer:
    """The answer for one file.

    Attributes:
        path: as it was given.
        label: the class's name, or its number where the model has no names.
        confidence: of the stage that answered.
        stage: 0 if the coarse stage answered, 1 if the fine one did.
        gmacs: what was spent, in 1e9 multiply-accumulates.
    """

    path: Path
    label: str
    confidence: float
    stage: int
    gmacs: float


@dataclass(frozen=True)
class FileFailure:
    """A file that could not be read, and why, in one line."""

    path: Path
    error: str


def classify_files(
    paths: Sequence[Path],
    predictor: Predictor,
    batch_size: int = 32,
    watch: Callable[[list[Path], Tensor], None] = lambda paths, images: None,
    macs: StageMacs | None = None,
    scaled_decode: bool = False,
) -> Iterator[FileAnswer | FileFailure]:
    """Classifies files, yielding in their order; hard images of several batches go on together.

    Args:
        watch: called with the paths and the normalised images of each batch, those that could be read.
        macs: the model's cost, counted if it is not at hand.
        scaled_decode: decode JPEGs for the coarse stage at a half, a quarter or an eighth of their size, where that is
            enough for it, and in full only those that go on. Quicker for large photos; the coarse stage sees slightly
            other pixels. ``watch`` then gets images of ``model.coarse_size``.
    """
    model = predictor.model
    macs = macs or count_macs(model)
    with ThreadPoolExecutor(READERS) as pool:
        whole = partial(_read, transform=eval_transform(model.data_config))
        first = _scaled_reader(model) if scaled_decode else whole
        files = _Files(paths, pool, first, whole, watch)
        answers = predictor.stream(
            copied_ahead(files.batches(batch_size), next(model.parameters())),
            fine_batch=batch_size,
            ordered=True,
            whole=partial(files.in_full, size=model.image_size) if scaled_decode else None,
        )
        for prediction in answers:
            yield from files.answered(prediction, model, macs)
        yield from files.failures()


class _Files:
    """Files on their way through a stream: read in batches, kept in their order until they are answered."""

    def __init__(
        self,
        paths: Sequence[Path],
        pool: ThreadPoolExecutor,
        first: Callable[[Path], Tensor | str],
        whole: Callable[[Path], Tensor | str],
        watch: Callable[[list[Path], Tensor], None],
    ) -> None:
        self.paths, self.pool, self.first, self.whole, self.watch = paths, pool, first, whole, watch
        self.waiting: deque[Path | FileFailure] = deque()
        self.places: dict[int, Path] = {}
        self.late_failures: dict[int, str] = {}
        self.count = 0

    def batches(self, size: int) -> Iterator[Tensor]:
        """The images that can be read, and a note of the others."""
        parts = [self.paths[start : start + size] for start in range(0, len(self.paths), size)]
        readings = chain((self.pool.map(self.first, part) for part in parts), [()])
        for part, (reading, _) in zip(parts, pairwise(readings), strict=True):  # the next part is being read meanwhile
            good: list[Path] = []
            images: list[Tensor] = []
            for path, image in zip(part, reading, strict=True):
                self.waiting.append(FileFailure(path, image) if isinstance(image, str) else path)
                if isinstance(image, Tensor):
                    good.append(path)
                    images.append(image)
            self.places |= dict(enumerate(good, start=self.count))
            self.count += len(good)
            if good:
                stacked = torch.stack(images)
                self.watch(good, stacked)
                yield stacked

    def in_full(self, places: list[int], size: tuple[int, int]) -> Tensor:
        """Whole images of those that go on; one that cannot be read so is grey, and a failure in the end."""
        read = list(self.pool.map(self.whole, [self.places[place] for place in places]))
        self.late_failures |= {
            place: image for place, image in zip(places, read, strict=True) if isinstance(image, str)
        }
        return torch.stack([image if isinstance(image, Tensor) else torch.zeros(3, *size) for image in read])

    def answered(
        self, prediction: StreamedPrediction, model: CoarseToFineViT, macs: StageMacs
    ) -> Iterator[FileAnswer | FileFailure]:
        """The answers of a prediction, each behind the failures that come before it in order."""
        classes = prediction.logits.argmax(dim=-1).tolist()
        for place, index, confidence, stage in zip(
            prediction.index.tolist(), classes, prediction.confidence.tolist(), prediction.stage.tolist(), strict=True
        ):
            yield from self.failures()
            path = self.places.pop(place)
            self.waiting.popleft()
            cost = macs.both if stage == FINE else macs.coarse
            if place in self.late_failures:
                yield FileFailure(path, self.late_failures.pop(place))
            else:
                yield FileAnswer(path, model.label_of(index), confidence, stage, cost / 1e9)

    def failures(self) -> Iterator[FileFailure]:
        """Those that are next in order."""
        while self.waiting and isinstance(failure := self.waiting[0], FileFailure):
            self.waiting.popleft()
            yield failure


def _scaled_reader(model: CoarseToFineViT) -> Callable[[Path], Tensor | str]:
    """What reads an image for the coarse stage alone, at ``model.coarse_size``, from no more pixels than it needs."""
    config = {**model.data_config, "input_size": (3, *model.coarse_size)}
    least = math.ceil(max(model.coarse_size) / config["crop_pct"])
    return partial(_read, transform=eval_transform(config), least=least)


def _read(path: Path, transform: Any, least: int | None = None) -> Tensor | str:
    try:
        return transform(open_image(path, least))
    except ImageError as error:
        return str(error)
    except Exception as error:  # whatever it is, the other files still get their answers
        return f"cannot be prepared ({first_line(error)})"
