"""The engine that runs torch: packed for a processor, recorded on a GPU, compiled, or the model as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cfvit.errors import CfvitError
from cfvit.inference.engines.compiling import compiled
from cfvit.inference.engines.packing import accelerate, frozen
from cfvit.inference.engines.recording import recorded
from cfvit.modeling.model import CoarseState, CoarseToFineViT

Stages = tuple[Callable[[Tensor], tuple[CoarseState, Tensor]], Callable[[Tensor, CoarseState], tuple[Tensor, Tensor]]]


class TorchEngine:
    """Both stages of a model in torch, with the weights, modules and exit rule that it has now.

    Args:
        model: is left as it is. What becomes of it later is not followed: make a new engine.
        compile: as of `cfvit.Predictor`.

    Raises:
        CfvitError: another value of ``compile``.
    """

    def __init__(self, model: CoarseToFineViT, compile: bool | None = None) -> None:
        if compile not in (None, True, False):
            raise CfvitError(f"compile is {compile!r}: give True, False, or None for what suits the device")
        self.model, self.compile = frozen(model), compile
        self._plain = self._stages_of(self.model)
        self._packed = self._plain if compile is False else self._stages_of(accelerate(self.model))

    def _stages_of(self, network: CoarseToFineViT) -> Stages:
        rule = self.model.exit

        def coarse(images: Tensor) -> tuple[CoarseState, Tensor]:
            state = network.coarse(images)
            return state, rule.coarse(state.logits)

        def fine(images: Tensor, state: CoarseState) -> tuple[Tensor, Tensor]:
            logits = network.fine(images, state)
            return logits, rule.fine(logits)

        faster = compiled if self.compile else recorded if self.compile is None else lambda run: run
        return faster(coarse), faster(fine)

    def _stages(self) -> Stages:
        return self._plain if torch.is_autocast_enabled("cpu") else self._packed  # oneDNN's layers are in float32

    @property
    def weight(self) -> Tensor:
        """Any weight: images are computed on its device and in its precision."""
        return next(self.model.parameters())

    def coarse(self, images: Tensor) -> tuple[CoarseState, Tensor]:
        """The coarse stage and its confidence, see `cfvit.inference.engines.Engine`."""
        return self._stages()[0](images)

    def fine(self, images: Tensor, state: CoarseState) -> tuple[Tensor, Tensor]:
        """The fine stage and its confidence, see `cfvit.inference.engines.Engine`."""
        return self._stages()[1](images, state)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled without what was packed or compiled, which is made anew from the weights."""
        return TorchEngine, (self.model, self.compile)
