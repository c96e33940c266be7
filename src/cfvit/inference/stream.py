"""Streams of batches: the hard images of many batches go through the fine stage together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cfvit.errors import CfvitError
from cfvit.inference.engines import Engine
from cfvit.modeling.batches import Rows, check_images
from cfvit.modeling.exit import goes_on

FAILED, COARSE, FINE = -1, 0, 1


@dataclass(eq=False)
class Prediction(Rows):
    """Answers in the order of the images.

    Attributes:
        logits: ``[B, classes]``, of the stage that answered.
        confidence: ``[B]`` in float32, by the model's `Exit`; -1 where it is not a number.
        stage: ``[B]``, 0 where the coarse stage answered and 1 where the fine stage did.
    """

    logits: Tensor
    confidence: Tensor
    stage: Tensor


@dataclass(eq=False)
class StreamedPrediction(Prediction):
    """Answers from a stream.

    Attributes:
        stage: also -1 for an image whose batch failed; its logits are not numbers and its confidence is -1.
        index: ``[n]``, which image of the stream each answer is of, counted from 0; on the CPU.
    """

    index: Tensor


@dataclass(eq=False)
class HardImages(Rows):
    """Images that wait for the fine stage, their place in the stream, and what the coarse stage knows of them."""

    images: Tensor
    index: Tensor
    state: Rows


class HardQueue:
    """Hard images in the order in which they came."""

    def __init__(self) -> None:
        self.parts: list[HardImages] = []

    def __len__(self) -> int:
        return sum(len(part.index) for part in self.parts)

    def put(self, hard: HardImages) -> None:
        """Adds images at the end."""
        if len(hard.index):
            self.parts.append(hard)

    def take(self, most: int) -> HardImages:
        """Removes the first images, at most so many."""
        joined = self.parts[0] if len(self.parts) == 1 else HardImages.join(self.parts)
        rest = joined[most:]
        self.parts = []
        self.put(HardImages.join([rest]) if len(rest.index) < most else rest)  # a small view would keep all in memory
        return joined[:most]


@dataclass(frozen=True, eq=False)
class Stream:
    """How a stream is answered; see `cfvit.Predictor.stream` for the settings without a comment."""

    engine: Engine  # what runs the stages
    threshold: float  # eta
    fine_batch: int
    patience: int
    whole: Callable[[list[int]], Tensor] | None
    on_error: Callable[[list[int], Exception], None] | None

    def answers(self, batches: Iterable[Tensor]) -> Iterator[StreamedPrediction]:
        """Each image's answer once, as soon as it is there."""
        queue, source = HardQueue(), iter(batches)
        seen, failure = 0, None
        while failure is None:
            images = None
            try:
                images = next(source)
                answered, hard = self._run_coarse(images, seen)
                queue.put(hard)
            except StopIteration:
                break
            except Exception as error:
                if images is not None:
                    error.add_note(f"in the batch that begins with image {seen} of the stream, counted from 0")
                if self.on_error is None or not isinstance(images, Tensor):  # a source that raised cannot go on
                    failure = error
                    break
                answered = self._failed(torch.arange(seen, seen + len(images)), error)
            seen += len(images)
            if len(answered.index):
                yield answered
            images = answered = hard = None  # else they would live until the next batch is there
            while queue.parts and (
                len(queue) >= self.fine_batch or seen - int(queue.parts[0].index[0]) > self.patience
            ):
                yield self._run_fine(queue.take(self.fine_batch))
        while queue.parts:
            yield self._run_fine(queue.take(self.fine_batch))
        if failure is not None:
            raise failure

    @torch.inference_mode()
    def _run_coarse(self, images: Tensor, first: int) -> tuple[StreamedPrediction, HardImages]:
        """The coarse stage: answers for easy images, and the others."""
        model = self.engine.model
        check_images(images, model.image_size if self.whole is None else model.coarse_size)
        images = placed(images, self.engine.weight)
        state, confidence = self.engine.coarse(images)
        on = goes_on(confidence, self.threshold).cpu()  # the only wait for the device
        places = [which.nonzero().flatten() for which in (~on, on)]
        easy, hard = (rows.to(images.device, non_blocking=True) for rows in places)
        answered = StreamedPrediction(
            state.logits[easy], confidence[easy], torch.full_like(easy, COARSE), first + places[0]
        )
        return answered, HardImages(images[hard], first + places[1], state[hard])

    @torch.inference_mode()
    def _run_fine(self, hard: HardImages) -> StreamedPrediction:
        """The fine stage."""
        try:
            images = hard.images
            if self.whole is not None:
                images = self.whole(hard.index.tolist())
                check_images(images, self.engine.model.image_size)
                images = placed(images, self.engine.weight)
            if len(images) != len(hard.index):
                raise CfvitError(
                    f"{len(images)} whole images for {len(hard.index)} places: give one for each, in order"
                )
            logits, confidence = self.engine.fine(images, hard.state)
        except Exception as error:
            return self._failed(hard.index, error)
        return StreamedPrediction(logits, confidence, torch.full_like(confidence, FINE, dtype=torch.long), hard.index)

    def _failed(self, index: Tensor, error: Exception) -> StreamedPrediction:
        """Takes the place of the answers of a batch that failed, if the stream goes on; else raises."""
        if self.on_error is None:
            error.add_note(f"images of the stream without an answer: {', '.join(map(str, index.tolist()))}")
            raise error
        self.on_error(index.tolist(), error)
        logits = self.engine.weight.new_full((len(index), self.engine.model.config.num_classes), torch.nan)
        confidence = torch.full_like(logits[:, 0], -1, dtype=torch.float32)
        return StreamedPrediction(logits, confidence, torch.full_like(confidence, FAILED, dtype=torch.long), index)


def in_order(answers: Iterator[StreamedPrediction]) -> Iterator[StreamedPrediction]:
    """The same answers by rising index, each as soon as all before it are there."""
    waiting: list[StreamedPrediction] = []
    following = 0
    for answer in answers:
        waiting.append(answer)
        if (answer.index == following).any():
            joined = StreamedPrediction.join(waiting)
            joined = joined[joined.index.argsort()]
            gaps = joined.index != following + torch.arange(len(joined.index))  # a gap shifts all that come after it
            ready = int((~gaps).sum())
            yield joined[:ready]
            waiting = [joined[ready:]]
            following += ready


def placed(images: Tensor, weight: Tensor) -> Tensor:
    """Images on the device and in the precision of a weight. Copies from pinned memory to a GPU are asynchronous.

    Images are converted on the device: else torch would convert them on the host first, into memory that is not pinned.
    """
    overlaps = weight.device.type != "cpu"  # what the CPU reads at once has to be there
    there = images.to(weight.device, non_blocking=overlaps)
    return there.to(weight.dtype) if images.is_floating_point() else there  # integers are to be refused, not converted


def prefetched(batches: Iterable[Tensor], weight: Tensor) -> Iterator[Tensor]:
    """Batches of images as `placed` gives them; each is copied to a GPU while the one before it is computed on.

    A batch is asked for before the previous one is given. So do not use this for images that come one by one and are
    waited for, nor for a source that fills the same pinned memory again. If the source raises, what came before
    is given first. On a CPU nothing is copied or asked for early.
    """
    if weight.device.type != "cuda":
        yield from (placed(batch, weight) for batch in batches)
        return
    beside = torch.cuda.Stream(weight.device)

    def copy_beside(batch: Tensor) -> tuple[Tensor, Any]:
        if batch.device.type == "cpu":
            batch = batch.pin_memory()
        else:
            beside.wait_stream(torch.cuda.current_stream(weight.device))  # which may still be writing it
            batch.record_stream(beside)
        with torch.cuda.stream(beside):
            return placed(batch, weight), beside.record_event()

    copies, failure = map(copy_beside, batches), None
    following = next(copies, None)
    while following is not None:
        images, done = following
        try:
            following = next(copies, None)
        except Exception as error:
            following, failure = None, error
        computing = torch.cuda.current_stream(weight.device)
        computing.wait_event(done)
        images.record_stream(computing)  # its memory must not be filled again before it was computed on
        yield images
    if failure is not None:
        raise failure
