"""The server on a Ray cluster, by Ray Serve: the coarse and the fine stage are deployments that scale apart.

``serve run cfvit.deploy.ray_serve:build model=deit_tiny_imagenet`` starts it; see ``docs/deployment.md``.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveInt
from torch import Tensor

from cfvit.checkpoints import load
from cfvit.deploy import Settings
from cfvit.deploy.scheduler import Answer
from cfvit.deploy.server import create_app
from cfvit.inference.engines.exported import is_exported
from cfvit.inference.predictor import Predictor
from cfvit.inference.stream import COARSE, FINE, placed
from cfvit.modeling.batches import check_images
from cfvit.modeling.exit import goes_on
from cfvit.processes import best_device

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read by Ray when it is imported
from ray import serve

batched: Any = serve.batch  # its types know no methods of two arguments


class Arguments(BaseModel):
    """What `build` takes: ``NAME=VALUE`` of ``serve run``, or ``args`` of a Serve configuration file."""

    model_config = ConfigDict(extra="forbid")
    model: str = "deit_tiny_imagenet"  # as of ``cfvit serve``; each machine must have it
    threshold: float | None = None  # eta; by default the model's
    coarse_batch: PositiveInt = 8  # images in a batch, at most
    fine_batch: PositiveInt = 4  # images in a batch, at most
    coarse_wait: NonNegativeFloat = 0.0  # seconds that an image waits for others, at most
    fine_wait: NonNegativeFloat = 0.0  # seconds that an image waits for others, at most
    max_replicas: PositiveInt = 8  # of each deployment; there is one at least
    gpus: NonNegativeFloat = 0.0  # of a replica of either stage, such as 0.5
    max_waiting: PositiveInt = 128  # see `Scheduler`; of each replica that takes requests

    def predictor(self) -> Predictor:
        """Loads the model."""
        given = self.model if is_exported(self.model) else load(self.model).to(best_device())
        return Predictor(given, self.threshold)


class Coarse:
    """A replica of the coarse stage, for images from everywhere."""

    def __init__(self, given: Arguments) -> None:
        self.engine = given.predictor().engine
        self.answer.set_max_batch_size(given.coarse_batch)
        self.answer.set_batch_wait_timeout_s(given.coarse_wait)

    @batched
    async def answer(self, images: list[np.ndarray], etas: list[float]) -> list[tuple[Tensor, float, Any, float]]:
        """Logits and confidence of images ``[3, H, W]``, the state of those that go on, and the batch's seconds."""
        start = time.monotonic()
        with torch.inference_mode():
            state, confidence = self.engine.coarse(placed(torch.from_numpy(np.stack(images)), self.engine.weight))
            hard = [bool(goes_on(confidence[i : i + 1], eta)) for i, eta in enumerate(etas)]
            states = [state[torch.tensor([i])] if on else None for i, on in enumerate(hard)]
            answered = zip(state.logits.cpu(), confidence.tolist(), states, strict=True)
        return [(*row, time.monotonic() - start) for row in answered]


class Fine:
    """A replica of the fine stage, for hard images from everywhere."""

    def __init__(self, given: Arguments) -> None:
        self.engine = given.predictor().engine
        self.answer.set_max_batch_size(given.fine_batch)
        self.answer.set_batch_wait_timeout_s(given.fine_wait)

    @batched
    async def answer(self, images: list[np.ndarray], states: list[Any]) -> list[tuple[Tensor, float, float]]:
        """Logits and confidence of images with their coarse states, and the batch's seconds."""
        start = time.monotonic()
        with torch.inference_mode():
            stacked = placed(torch.from_numpy(np.stack(images)), self.engine.weight)
            logits, confidence = self.engine.fine(stacked, type(states[0]).join(states))
            answered = zip(logits.cpu(), confidence.tolist(), strict=True)
        return [(*row, time.monotonic() - start) for row in answered]


class Stages:
    """Takes the place of a `Scheduler` in a `Service`: asks the deployments of both stages.

    Attributes:
        eta, eta_now: the confidence at which the coarse answer is given.
        lengths: images of this replica that are with each stage.
    """

    def __init__(self, coarse: Any, fine: Any, predictor: Predictor, max_waiting: int) -> None:
        self.coarse, self.fine = coarse, fine
        self.eta = self.eta_now = predictor.threshold
        self.image_size, self.lengths, self.max_waiting = predictor.model.image_size, [0, 0], max_waiting

    @property
    def waiting(self) -> int:
        """Images of this replica without an answer."""
        return sum(self.lengths)

    def retry_after(self) -> float:
        """Seconds after which to try again."""
        return 1.0

    def drain(self) -> None:
        """Nothing: Ray Serve waits for the requests in a replica before it ends one."""

    def submit(self, images: Sequence[Tensor], both: bool = False) -> list[Future[Answer]]:
        """As of `Scheduler`; to be called in the event loop."""
        for image in images:
            check_images(image[None], self.image_size)
        loop = asyncio.get_running_loop()
        return [asyncio.run_coroutine_threadsafe(self._answer(image.numpy(), both), loop) for image in images]

    async def _answer(self, image: np.ndarray, both: bool) -> Answer:
        eta, start = self.eta, time.monotonic()
        logits, sure, state, seconds = await self._ask(COARSE, self.coarse, image, 1.0 if both else eta)
        stage, answered, fine_seconds = COARSE, sure, 0.0
        if state is not None:
            logits, answered, fine_seconds = await self._ask(FINE, self.fine, image, state)
            stage = FINE
        waited = max(0.0, time.monotonic() - start - seconds - fine_seconds)  # on the way between processes as well
        return Answer(logits, answered, stage, eta, (seconds, fine_seconds), waited, state if both else None, sure)

    async def _ask(self, stage: int, deployment: Any, *given: Any) -> Any:
        self.lengths[stage] += 1
        try:
            return await deployment.answer.remote(*given)
        finally:
            self.lengths[stage] -= 1


@serve.ingress()
class Door:
    """A replica that takes requests and decodes images; its interface is that of ``cfvit serve``."""

    def __init__(self, coarse: Any, fine: Any, given: Arguments) -> None:
        self.coarse, self.fine, self.given = coarse, fine, given

    def __serve_build_asgi_app__(self) -> Any:
        predictor = self.given.predictor()
        settings = Settings(name=Path(self.given.model).name, api_key=os.environ.get("CFVIT_API_KEY"))
        return create_app(predictor, settings, Stages(self.coarse, self.fine, predictor, self.given.max_waiting))


def build(given: Arguments) -> serve.Application:
    """The application for ``serve run`` and ``serve deploy``."""

    def deployed(kind: Any, requests: int, gpus: float = 0.0) -> Any:
        scale = {"min_replicas": 1, "max_replicas": given.max_replicas, "target_ongoing_requests": requests}
        return serve.deployment(
            kind,
            max_ongoing_requests=4 * requests,
            autoscaling_config=scale,
            ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        )

    coarse = deployed(Coarse, 2 * given.coarse_batch, given.gpus).bind(given)
    fine = deployed(Fine, 2 * given.fine_batch, given.gpus).bind(given)
    return deployed(Door, max(1, given.max_waiting // 2)).bind(coarse, fine, given)
