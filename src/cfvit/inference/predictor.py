"""Adaptive inference: the coarse answer where it is confident, the fine stage for the rest."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from cfvit.errors import CfvitError
from cfvit.inference.acceleration import placed
from cfvit.inference.stages import Stages
from cfvit.modeling.exit import goes_on
from cfvit.modeling.model import CoarseState, CoarseToFineViT

COARSE, FINE = 0, 1
FINE_BATCH = {"cpu": 32, "cuda": 256}
"""Images of a stream that the fine stage takes together, by device; elsewhere as on a GPU."""

PATIENCE = 256
"""So many batches of the fine stage may pass in images before a hard image of a stream waits no longer for company."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """Answers in the order of the images.

    Attributes:
        logits: ``[B, classes]``, of the stage that answered.
        confidence: ``[B]`` in float32, by the model's `Exit`; -1 where it is not a number.
        stage: ``[B]``, 0 where the coarse stage answered and 1 where the fine stage did.
    """

    logits: Tensor
    confidence: Tensor
    stage: Tensor


@dataclass(frozen=True, eq=False)
class StreamedPrediction(Prediction):
    """Answers from a stream.

    Attributes:
        index: ``[n]``, which image of the stream each answer is of, counted from 0; on the CPU.
    """

    index: Tensor

    def __getitem__(self, rows: slice | Tensor) -> StreamedPrediction:
        index = self.index[rows.cpu() if isinstance(rows, Tensor) else rows]
        if isinstance(rows, Tensor):
            rows = rows.to(self.logits.device, non_blocking=True)
        return StreamedPrediction(self.logits[rows], self.confidence[rows], self.stage[rows], index)


@dataclass(frozen=True, eq=False)
class _Hard:
    """Images that wait for the fine stage, what the coarse stage knows of them, and their places in the stream."""

    images: Tensor
    state: CoarseState
    index: Tensor

    def __getitem__(self, rows: slice) -> _Hard:
        return _Hard(self.images[rows], self.state[rows], self.index[rows])


class Predictor:
    """Classifies batches, running the fine stage only on the images that need it.

    Args:
        model: put into evaluation mode; its device and precision are used as they are.
        threshold: eta in [0, 1]; by default the model's calibrated one. Either is compared with the
            confidence that ``model.exit`` measures, the highest softmax probability unless the
            model was calibrated for another.
        compile: None for what suits the device (`acceleration.accelerate`), which costs no waiting; True for
            ``torch.compile`` of both stages (`acceleration.compiled`), for any number of images, on a GPU with
            CUDA graphs of small batches; False for the model as it is. The answers are the same up to rounding.

    Raises:
        CfvitError: a threshold outside [0, 1], or none given and none calibrated.
    """

    def __init__(self, model: CoarseToFineViT, threshold: float | None = None, *, compile: bool | None = None) -> None:
        eta = model.threshold if threshold is None else threshold
        if eta is None:
            raise CfvitError("the model has no calibrated threshold: give one between 0 and 1")
        if not 0 <= eta <= 1:
            raise CfvitError(f"threshold is {eta}: give a confidence between 0 (coarse only) and 1 (always fine)")
        self.threshold = float(eta)
        self._stages = Stages(model.eval(), compile)

    @property
    def model(self) -> CoarseToFineViT:
        """Whose answers are given; for another model make another predictor."""
        return self._stages.model

    def _goes_on(self, confidence: Tensor) -> Tensor:
        """Which images of a batch need the fine stage, ``[B] -> [B]`` of bool; the one place where that is decided."""
        return goes_on(confidence, self.threshold)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Prediction:
        """Classifies normalised images ``[B, 3, S, S]``, B >= 0, on any device.

        Raises:
            CfvitError: images of another shape.
        """
        images = self._placed(images, self.model.image_size)
        coarse, fine = self._stages.now()
        state, confidence = coarse(images)
        hard = self._goes_on(confidence).nonzero().flatten()
        if 0 < len(hard) == len(images):
            return Prediction(*fine(images, state), torch.full_like(hard, FINE))
        logits, stage = state.logits, torch.full_like(confidence, COARSE, dtype=torch.long)
        if len(hard):
            fine_logits, fine_confidence = fine(images[hard], state[hard])
            logits, confidence = (
                logits.index_copy(0, hard, fine_logits),
                confidence.index_copy(0, hard, fine_confidence),
            )
            stage[hard] = FINE
        return Prediction(logits, confidence, stage)

    def _placed(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        self.model.check_images(images, size)  # at once, and not only when one of them goes on
        return placed(images, next(self.model.parameters()))

    def stream(
        self,
        batches: Iterable[Tensor],
        *,
        fine_batch: int | None = None,
        patience: int | None = None,
        ordered: bool = False,
        whole: Callable[[list[int]], Tensor] | None = None,
    ) -> Iterator[StreamedPrediction]:
        """Classifies a stream of batches, gathering the hard images of many batches into full ones for the fine stage.

        Easy images are answered at once, hard ones when ``fine_batch`` of them have come together, or
        ``patience`` images have passed, or the stream ends; so it may be endless. Besides the batch in
        hand, fewer than ``fine_batch`` plus a batch of images are kept. If ``batches`` raises, or ``whole`` or the fine
        stage for some images, nothing more is read, all others that came before are answered, and then the first
        exception is raised, with a note of the images that were not answered.

        Args:
            batches: normalised images, ``[B, 3, S, S]`` each, of any number.
            fine_batch: images in a batch of the fine stage; by default `FINE_BATCH`.
            patience: images that may pass while a hard one waits; by default `PATIENCE` times ``fine_batch``. Where
                fewer than ``fine_batch`` of so many images are hard, fine batches are not full.
            ordered: give the answers in the order of the images, those behind a hard one waiting with it.
            whole: where ``batches`` are at half their sides (``model.coarse_size``): what gives the whole images
                ``[n, 3, S, S]`` of those that go on, by their places in the stream. Where it fills the same pinned
                memory again, that has to wait for the copy to a GPU.

        Yields:
            Each image's answer once, some at a time.

        Raises:
            CfvitError: images of another shape.
        """
        device = next(self.model.parameters()).device.type
        fine_batch = FINE_BATCH.get(device, FINE_BATCH["cuda"]) if fine_batch is None else fine_batch
        patience = PATIENCE * fine_batch if patience is None else patience
        for name, value in (("fine_batch", fine_batch), ("patience", patience)):
            if value < 1:
                raise CfvitError(f"{name} is {value}: give at least 1, or leave it out")
        answers = self._answers(batches, fine_batch, patience, whole)
        return _in_order(answers) if ordered else answers

    def _answers(
        self, batches: Iterable[Tensor], fine_batch: int, patience: int, whole: Callable[[list[int]], Tensor] | None
    ) -> Iterator[StreamedPrediction]:
        queue, failures = _Queue(), _Failures()
        size = self.model.image_size if whole is None else self.model.coarse_size
        seen, source = 0, iter(batches)
        while failures.first is None:
            try:
                images = next(source)
            except StopIteration:
                break
            except Exception as error:
                failures.note(error)
                break
            try:
                easy, hard = self._glance(images, seen, size)
            except Exception as error:
                error.add_note(f"in the batch that begins with image {seen} of the stream, counted from 0")
                failures.note(error)
                break
            seen += len(images)
            queue.put(hard)
            if len(easy.index):
                yield easy
            del images, easy, hard  # they would live until the next batch has come and been looked at
            while queue.count and (queue.count >= fine_batch or queue.waits_since(seen) > patience):
                yield from self._look_again(queue.take(fine_batch), whole, failures)
        while queue.count:
            yield from self._look_again(queue.take(fine_batch), whole, failures)
        failures.end()

    @torch.inference_mode()
    def _glance(self, images: Tensor, first: int, size: tuple[int, int]) -> tuple[StreamedPrediction, _Hard]:
        """The coarse stage: answers for easy images, and the others."""
        images = self._placed(images, size)
        coarse, _ = self._stages.now()
        state, confidence = coarse(images)
        on = self._goes_on(confidence).cpu()  # the only wait for the device
        places = [which.nonzero().flatten() for which in (~on, on)]
        easy, hard = (rows.to(images.device, non_blocking=True) for rows in places)
        stage = torch.full_like(easy, COARSE)
        answered = StreamedPrediction(state.logits[easy], confidence[easy], stage, first + places[0])
        return answered, _Hard(images[hard], state[hard], first + places[1])

    def _look_again(
        self, hard: _Hard, whole: Callable[[list[int]], Tensor] | None, failures: _Failures
    ) -> Iterator[StreamedPrediction]:
        """The fine stage: one answer for all or, where it fails, answers of the halves that it does not fail on."""
        try:
            answer = self._answer_finely(hard, whole)
        except Exception as error:
            answer = None
            traceback.clear_frames(error.__traceback__)  # of features that they would keep, for want of memory perhaps
            failures.note(error, *(hard.index.tolist() if len(hard.index) == 1 else ()))
        if answer is not None:
            yield answer
        elif (middle := len(hard.index) // 2) > 0:  # not within the except, which keeps what filled the memory
            for half in (hard[:middle], hard[middle:]):
                yield from self._look_again(half, whole, failures)

    @torch.inference_mode()
    def _answer_finely(self, hard: _Hard, whole: Callable[[list[int]], Tensor] | None) -> StreamedPrediction:
        images = hard.images if whole is None else self._placed(whole(hard.index.tolist()), self.model.image_size)
        if len(images) != len(hard.index):
            raise CfvitError(f"{len(images)} whole images for {len(hard.index)} places: give one for each, in order")
        _, fine = self._stages.now()
        logits, confidence = fine(images, hard.state)
        stage = torch.full((len(logits),), FINE, device=logits.device)
        return StreamedPrediction(logits, confidence, stage, hard.index)


class _Failures:
    """What went wrong in a stream."""

    def __init__(self) -> None:
        self.first: Exception | None = None
        self.unanswered: list[int] = []

    def note(self, error: Exception, *places: int) -> None:
        """Takes down an exception, and the places of images that get no answer for it."""
        if self.first is None:
            self.first = error
        self.unanswered += places

    def end(self) -> None:
        """Raises the first exception, if there was any."""
        if self.first is None:
            return
        if self.unanswered:
            self.first.add_note(f"images of the stream without an answer: {', '.join(map(str, self.unanswered))}")
        raise self.first


class _Queue:
    """Hard images in the order in which they came."""

    def __init__(self) -> None:
        self.parts: list[_Hard] = []
        self.count = 0

    def put(self, hard: _Hard) -> None:
        if len(hard.index):
            self.parts.append(hard)
            self.count += len(hard.index)

    def waits_since(self, seen: int) -> int:
        """How many images have come since the first one that waits."""
        return seen - int(self.parts[0].index[0]) if self.parts else 0

    def take(self, most: int) -> _Hard:
        """The first images, at most so many."""
        joined = self.parts[0] if len(self.parts) == 1 else _join(self.parts)
        rest = joined[most:]
        self.parts, self.count = [], 0
        self.put(_join([rest]) if len(rest.index) < most else rest)  # a view that stays would keep all of them
        return joined[:most]


def _join(parts: list[_Hard]) -> _Hard:
    state = CoarseState(*(torch.cat([getattr(p.state, f.name) for p in parts]) for f in fields(CoarseState)))
    return _Hard(torch.cat([p.images for p in parts]), state, torch.cat([p.index for p in parts]))


def _in_order(answers: Iterator[StreamedPrediction]) -> Iterator[StreamedPrediction]:
    """The same answers by rising index, as soon as none is missing; before an exception, all that there are."""
    waiting: list[StreamedPrediction] = []
    following, failure = 0, None
    while failure is None:
        try:
            answer = next(answers)
        except StopIteration:
            return
        except Exception as error:
            failure = error
        else:
            waiting.append(answer)
            if not (answer.index == following).any():
                continue
        if waiting:
            joined = _sorted(waiting)
            missing = joined.index != following + torch.arange(len(joined.index))  # a gap shifts all that come after it
            ready = len(missing) if failure is not None else int((~missing).sum())
            if ready:
                yield joined[:ready]
            waiting = [joined[ready:]]
            following += ready
    raise failure


def _sorted(answers: list[StreamedPrediction]) -> StreamedPrediction:
    """All together, by rising index."""
    parts = (torch.cat([getattr(answer, f.name) for answer in answers]) for f in fields(StreamedPrediction))
    joined = StreamedPrediction(*parts)
    return joined[joined.index.argsort()]
