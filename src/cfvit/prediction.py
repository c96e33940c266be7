"""From image files to answers, in order, whatever is wrong with some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfvit.data import ImageError, eval_transform, open_image
from cfvit.errors import first_line
from cfvit.flops import StageMacs, count_macs
from cfvit.inference import FINE, Predictor

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
) -> Iterator[FileAnswer | FileFailure]:
    """Classifies files batch by batch, yielding in their order.

    Args:
        watch: called with the paths and the normalised images ``[B, 3, S, S]`` of each batch, those
            that could be read.
        macs: the model's cost, counted if it is not at hand.
    """
    transform = eval_transform(predictor.model.data_config)
    macs = macs or count_macs(predictor.model)
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            read = list(pool.map(lambda path: _read(path, transform), batch))
            good = [(path, image) for path, image in zip(batch, read, strict=True) if isinstance(image, Tensor)]
            answers: Iterator[FileAnswer] = iter(())
            if good:
                images = torch.stack([image for _, image in good])
                answers = _answers([path for path, _ in good], images, predictor, macs)
                watch([path for path, _ in good], images)
            for path, image in zip(batch, read, strict=True):
                yield FileFailure(path, image) if isinstance(image, str) else next(answers)


def _read(path: Path, transform: Any) -> Tensor | str:
    try:
        return transform(open_image(path))
    except ImageError as error:
        return str(error)
    except Exception as error:  # whatever it is, the other files still get their answers
        return f"cannot be prepared ({first_line(error)})"


def _answers(paths: list[Path], images: Tensor, predictor: Predictor, macs: StageMacs) -> Iterator[FileAnswer]:
    prediction = predictor(images)
    classes = prediction.logits.argmax(dim=-1).tolist()
    rows = zip(paths, classes, prediction.confidence.tolist(), prediction.stage.tolist(), strict=True)
    for path, index, confidence, stage in rows:
        cost = macs.both if stage == FINE else macs.coarse
        yield FileAnswer(path, predictor.model.label_of(index), confidence, stage, cost / 1e9)
