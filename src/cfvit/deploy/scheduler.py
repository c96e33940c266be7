"""Many callers, one engine: a queue for each stage, so that hard images of many requests are computed together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cfvit.deploy import Queues
from cfvit.errors import CfvitError
from cfvit.inference.engines import Engine
from cfvit.inference.stream import COARSE, FINE, placed
from cfvit.modeling.batches import check_images
from cfvit.modeling.exit import goes_on

DEFAULTS = {"cpu": ((8, 0.0), (4, 0.0)), "cuda": ((64, 5.0), (64, 20.0))}
"""Images and milliseconds of the coarse and of the fine stage, by device; elsewhere as on a GPU. On a CPU large batches
gain little, and others wait."""

FOLLOWING = 0.005
"""By how much eta falls for an image more than expected that goes on, where it follows a budget."""


class RefusedError(CfvitError):
    """No place for more images.

    Attributes:
        retry_after: seconds after which there may be one.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, eq=False)
class Answer:
    """The answer for one image."""

    logits: Tensor  # ``[classes]``, of the stage that answered
    confidence: float  # by the model's `Exit`; -1 where it is not a number
    stage: int  # 0 where the coarse stage answered and 1 where the fine one did
    eta: float  # what the confidence of the coarse stage was compared with
    # what the batches of both stages took in which the image was, 0 for a stage that did not run
    seconds: tuple[float, float]
    waited: float  # seconds that it was here besides, in the queues
    state: Any  # of the coarse stage, with one row, where both stages were asked for
    coarse_confidence: float  # of the coarse stage


@dataclass(eq=False)
class _Place:
    """An image that waits, and what is known of it so far."""

    image: Tensor
    both: bool
    since: float
    future: Future[Answer] = field(default_factory=Future)
    began: float = field(default_factory=time.monotonic)
    state: Any = None
    confidence: float = 0.0
    eta: float = 0.0
    seconds: float = 0.0


class Scheduler:
    """Answers images of many callers with one engine, on a thread of its own.

    All methods may be called from any thread.

    Args:
        engine: runs the stages.
        eta: the confidence at which the coarse answer is given.
        queues: how images wait. Once they wait ``target_wait`` for the coarse stage, eta falls in a straight line, and
            is at ``least_eta`` when they wait twice as long.
        fine_share: a budget: eta follows the images, between ``least_eta`` (or 0) and ``eta``, so that this share of
            them goes on. Whatever the images are, n of them that do not drive eta to a bound miss the share by at most
            ``1 / (FOLLOWING * n)``, as eta is the sum of all misses. None: it does not follow.

    Attributes:
        eta: as above. It may be set at any time, and holds for all images that the coarse stage has not seen.
        eta_now: the eta of the last coarse batch, which under load is lower than ``eta``.
        waiting: images without an answer.
        watch: called after each batch with the stage, the number of images and the seconds that it took.
    """

    watch: Callable[[int, int, float], None] | None = None

    def __init__(
        self, engine: Engine, eta: float, queues: Queues | None = None, fine_share: float | None = None
    ) -> None:
        queues, usual = queues or Queues(), DEFAULTS.get(engine.weight.device.type, DEFAULTS["cuda"])
        given = (queues.coarse_batch, queues.coarse_wait), (queues.fine_batch, queues.fine_wait)
        self.engine = engine
        self.eta = self.eta_now = eta
        self.options = [  # images and seconds of each stage
            (batch or usual_batch, (usual_wait if wait is None else wait) / 1e3)
            for (batch, wait), (usual_batch, usual_wait) in zip(given, usual, strict=True)
        ]
        self.max_waiting, self.least_eta = queues.max_waiting, queues.least_eta
        self.target_wait = (queues.target_wait or 500) / 1e3
        self.fine_share, self._led = fine_share, eta
        self.waiting, self.draining = 0, False
        self._queues: tuple[dict[_Place, None], dict[_Place, None]] = ({}, {})  # in order, and quick to leave
        self._busy, self._answered = 0.0, 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="cfvit-scheduler", daemon=True)
        self._thread.start()

    def submit(self, images: Sequence[Tensor] | Tensor, both: bool = False) -> list[Future[Answer]]:
        """Queues normalised images ``[3, H, W]``, all of them or none.

        Cancelling a future gives its place back at once. One whose image is being computed is not computed further.

        Args:
            both: run both stages, whatever the coarse one answers.

        Raises:
            CfvitError: images of another shape.
            RefusedError: too many are waiting, or the scheduler is ending.
        """
        for image in images:
            check_images(image[None], self.engine.model.image_size)
        with self._changed:
            if self.draining:
                raise RefusedError("the server is ending: ask another one", 1.0)
            if self.waiting + len(images) > self.max_waiting:
                raise RefusedError(
                    f"{self.waiting} images are waiting, of {self.max_waiting} at most", self.retry_after()
                )
            now = time.monotonic()
            places = [_Place(image, both, now) for image in images]
            self.waiting += len(places)
            self._queues[COARSE].update(dict.fromkeys(places))
            self._changed.notify()
        for place in places:
            place.future.add_done_callback(lambda _, place=place: self._leave(place))
        return [place.future for place in places]

    def retry_after(self) -> float:
        """Seconds that the images which wait will take, by what images have taken so far."""
        return max(1.0, self.waiting * self._busy / max(self._answered, 1))

    @property
    def lengths(self) -> list[int]:
        """Images that wait for each stage."""
        return list(map(len, self._queues))

    def drain(self, timeout: float | None = None) -> bool:
        """Refuses new images, answers all that wait, and ends. Returns whether it has, within so many seconds."""
        with self._changed:
            self.draining = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _leave(self, place: _Place) -> None:
        with self._changed:
            self.waiting -= 1
            for queue in self._queues:
                queue.pop(place, None)

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            stage, places = batch
            start = time.monotonic()
            try:
                with torch.inference_mode():
                    (self._run_coarse if stage == COARSE else self._run_fine)(places, start)
            except Exception as error:  # its callers are told, and the others still get their answers
                for place in places:
                    if not place.future.done() and place.future.set_running_or_notify_cancel():
                        place.future.set_exception(error)
            seconds = time.monotonic() - start
            self._busy += seconds
            if self.watch is not None:
                self.watch(stage, len(places), seconds)

    def _next_batch(self) -> tuple[int, list[_Place]] | None:
        """Waits for a batch that is full or has waited long enough, the fine stage's first; None at the end."""
        with self._changed:
            while True:
                now, soonest = time.monotonic(), float("inf")
                for stage in (FINE, COARSE):
                    queue, (batch, wait) = self._queues[stage], self.options[stage]
                    if not queue:
                        continue
                    due = next(iter(queue)).since + wait
                    if len(queue) >= batch or now >= due or self.draining:
                        places = list(queue)[:batch]
                        for place in places:
                            del queue[place]
                        return stage, places
                    soonest = min(soonest, due)
                if self.draining and not any(self._queues):
                    return None
                self._changed.wait(None if soonest == float("inf") else soonest - now)

    def _run_coarse(self, places: list[_Place], now: float) -> None:
        eta = self.eta if self.fine_share is None else min(self.eta, self._led)
        late = min((now - places[0].since) / self.target_wait - 1, 1.0)
        if self.least_eta is not None and late > 0:
            eta = min(eta, self.least_eta + (eta - self.least_eta) * (1 - late))
        self.eta_now = eta
        state, confidence = self.engine.coarse(self._stacked(places))
        hard = goes_on(confidence, eta).tolist()
        if self.fine_share is not None:
            led = self._led + FOLLOWING * (self.fine_share * len(hard) - sum(hard))
            self._led = min(max(led, self.least_eta or 0.0), self.eta)
        logits, seconds = state.logits.cpu(), time.monotonic() - now
        for i, (place, goes) in enumerate(zip(places, hard, strict=True)):
            place.eta, place.seconds, place.confidence = eta, seconds, float(confidence[i])
            if goes or place.both:
                place.state, place.since = state[torch.tensor([i])], time.monotonic()  # copied, without the others
                with self._changed:
                    if not place.future.cancelled():
                        self._queues[FINE][place] = None
            else:
                self._give(place, logits[i], place.confidence, COARSE, (seconds, 0.0))

    def _run_fine(self, places: list[_Place], now: float) -> None:
        state = type(places[0].state).join([place.state for place in places])
        logits, confidence = self.engine.fine(self._stacked(places), state)
        logits, sure, seconds = logits.cpu(), confidence.tolist(), time.monotonic() - now
        for i, place in enumerate(places):
            self._give(place, logits[i], sure[i], FINE, (place.seconds, seconds))

    def _stacked(self, places: list[_Place]) -> Tensor:
        return placed(torch.stack([place.image for place in places]), self.engine.weight)

    def _give(self, place: _Place, logits: Tensor, confidence: float, stage: int, seconds: tuple[float, float]) -> None:
        self._answered += 1
        if place.future.set_running_or_notify_cancel():
            state, waited = place.state if place.both else None, max(0.0, time.monotonic() - place.began - sum(seconds))
            place.future.set_result(
                Answer(logits, confidence, stage, place.eta, seconds, waited, state, place.confidence)
            )
