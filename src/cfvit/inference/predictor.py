"""Adaptive inference: the coarse answer where it is confident, the fine stage for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfvit.errors import CfvitError
from cfvit.inference.engines import Engine
from cfvit.inference.engines.exported import ExportedEngine, ExportedModel
from cfvit.inference.engines.pytorch import TorchEngine
from cfvit.inference.stream import Prediction, Stream, StreamedPrediction, in_order, placed
from cfvit.modeling.batches import check_images
from cfvit.modeling.cost import StageMacs, count_macs
from cfvit.modeling.exit import goes_on
from cfvit.modeling.model import CoarseToFineViT

FINE_BATCH = {"cpu": 32, "cuda": 256}
"""Images of a stream that the fine stage takes together, by device; elsewhere as on a GPU."""

PATIENCE = 256
"""A hard image of a stream waits while at most this many times ``fine_batch`` images pass."""


class Predictor:
    """Classifies batches, running the fine stage only on the images that need it.

    A predictor takes the model as it is when the predictor is made: weights, modules, device, precision, exit rule, and
    evaluation mode, whatever the mode of the model. After a change of the model (training, loading weights, moving it)
    make a new predictor: the old one may answer by old weights, new ones or some of both.

    Args:
        model: the model, which is left as it is; or the folder of an exported one; or an `Engine` that runs one.
        threshold: eta in [0, 1]; by default the model's calibrated one. Either is compared with the
            confidence that ``model.exit`` measures, the highest softmax probability unless the
            model was calibrated for another.
        compile: None for what suits the device and costs no waiting: packed layers on a CPU, CUDA graphs of small
            batches on a GPU (`cfvit.inference.engines.packing`, `cfvit.inference.engines.pytorch.recorded`); True for
            ``torch.compile`` of both stages, for any number of images (`cfvit.inference.engines.pytorch.compiled`);
            False for the model as it is. The answers are the same up to rounding.

    Attributes:
        model: what was taken of the model, in evaluation mode; shares the memory of its weights.
        engine: what runs it.
        threshold: eta.

    Raises:
        CfvitError: a threshold that is no number in [0, 1], none given and none calibrated, one above 0 where the fine
            stage was not trained; another ``compile``; a folder without an exported model, or what is none of these.
    """

    def __init__(
        self,
        model: CoarseToFineViT | str | Path | Engine,
        threshold: float | None = None,
        *,
        compile: bool | None = None,
    ) -> None:
        if isinstance(model, CoarseToFineViT):
            self.engine: Engine = TorchEngine(model, compile)
        elif compile is not None:
            raise CfvitError(f"compile is {compile!r}: leave it out, it is for models in torch alone")
        else:
            self.engine = ExportedEngine(model) if isinstance(model, (str, Path)) else model
        if not isinstance(self.engine, Engine):  # such as a model that is wrapped, or its weights
            raise CfvitError(
                f"the model is a {type(model).__name__}: give one as cfvit.load gives it, a folder of cfvit export, or "
                "an Engine"
            )
        self.model: Any = self.engine.model
        eta = self.model.threshold if threshold is None else threshold
        if eta is None:
            raise CfvitError(
                "the model has no calibrated threshold: give one between 0 and 1 (--threshold), "
                "or let cfvit calibrate choose one"
            )
        if isinstance(eta, Tensor) and eta.ndim == 0:
            eta = eta.item()
        if isinstance(eta, bool) or not isinstance(eta, Real) or not 0 <= float(eta) <= 1:
            raise CfvitError(f"threshold is {eta!r}: give a number between 0 (coarse only) and 1 (always fine)")
        self.threshold = float(eta)
        if self.threshold and isinstance(self.model, CoarseToFineViT):
            self.model.require_trained()

    @cached_property
    def macs(self) -> StageMacs:
        """What an image costs."""
        return self.model.macs if isinstance(self.model, ExportedModel) else count_macs(self.model)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Prediction:
        """Classifies normalised images ``[B, 3, S, S]``, B >= 0, on any device.

        Raises:
            CfvitError: images of another shape.
        """
        check_images(images, self.model.image_size)  # also where no image goes on
        images = placed(images, self.engine.weight)
        state, confidence = self.engine.coarse(images)
        on = goes_on(confidence, self.threshold)
        hard, stage = on.nonzero().flatten(), on.long()  # COARSE is 0, FINE is 1
        if 0 < len(hard) == len(images):
            return Prediction(*self.engine.fine(images, state), stage)
        logits = state.logits
        if len(hard):
            fine_logits, fine_confidence = self.engine.fine(images[hard], state[hard])
            logits = logits.index_copy(0, hard, fine_logits)
            confidence = confidence.index_copy(0, hard, fine_confidence)
        return Prediction(logits, confidence, stage)

    def stream(
        self,
        batches: Iterable[Tensor],
        *,
        fine_batch: int | None = None,
        patience: int | None = None,
        ordered: bool = False,
        whole: Callable[[list[int]], Tensor] | None = None,
        on_error: Callable[[list[int], Exception], None] | None = None,
    ) -> Iterator[StreamedPrediction]:
        """Classifies a stream of batches, gathering the hard images of many batches into full ones for the fine stage.

        Easy images are answered at once. Hard ones are answered when ``fine_batch`` of them have come together, when
        ``patience`` images have passed, or when the stream ends; so it may be endless. Besides the batch in
        hand, fewer than ``fine_batch`` plus a batch of images are kept. If ``batches`` raises, all images that came
        before are answered, and then the exception is raised.

        Args:
            batches: normalised images, ``[B, 3, S, S]`` each, of any number.
            fine_batch: images in a batch of the fine stage; by default `FINE_BATCH`.
            patience: images that may pass while a hard one waits; by default `PATIENCE` times ``fine_batch``. Where
                fewer than ``fine_batch`` of so many images are hard, fine batches are not full.
            ordered: give the answers in the order of the images, those behind a hard one waiting with it.
            whole: where ``batches`` are at half their sides (``model.coarse_size``): gives the whole images
                ``[n, 3, S, S]`` of those that go on, by their places in the stream. If it fills the same pinned
                memory again, it must wait for the copy to a GPU.
            on_error: called when a batch of either stage fails, with the places of its images in the stream and the
                exception. The stream then goes on, and these images are given with stage -1. By default a stream
                that fails ends: what waits is answered if the coarse stage failed, and the exception is raised.

        Yields:
            Each image's answer once, some at a time.

        Raises:
            CfvitError: images of another shape.
        """
        device = self.engine.weight.device.type
        fine_batch = FINE_BATCH.get(device, FINE_BATCH["cuda"]) if fine_batch is None else fine_batch
        patience = PATIENCE * fine_batch if patience is None else patience
        for name, value in (("fine_batch", fine_batch), ("patience", patience)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CfvitError(f"{name} is {value!r}: give a whole number of at least 1, or leave it out")
        answers = Stream(self.engine, self.threshold, fine_batch, patience, whole, on_error).answers(batches)
        return in_order(answers) if ordered else answers
