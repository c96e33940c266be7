"""Both stages of a model as they run fastest: packed, compiled or plain, and always by the weights as they are."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor, nn

from cfvit.errors import CfvitError
from cfvit.inference.acceleration import accelerate, compiled, is_copied
from cfvit.modeling.model import CoarseState, CoarseToFineViT

CoarseStage = Callable[[Tensor], tuple[CoarseState, Tensor]]
"""From images to what the coarse stage knows of them and its confidence."""
FineStage = Callable[[Tensor, CoarseState], tuple[Tensor, Tensor]]
"""From images and their states to logits and their confidence."""

Both = tuple[CoarseStage, FineStage]


class Stages:
    """Both stages of a model, made when they are first needed and anew when what they were made from has changed.

    That is the weights, where they were packed, and the modules of which compiled code knows.

    Args:
        model: whose weights are used, and whose exit rule measures the confidence.
        compile: as of `cfvit.Predictor`.

    Raises:
        CfvitError: another value of ``compile``.
    """

    def __init__(self, model: CoarseToFineViT, compile: bool | None) -> None:
        if compile not in (None, True, False):
            raise CfvitError(f"compile is {compile!r}: give True, False, or None for what suits the device")
        self.model, self.compile, self.lock = model, compile, Lock()
        self.plain = _stages_on(model, model)
        self.made: dict[bool, tuple[object, Both]] = {}
        """By whether weights are packed, what they were made from and the stages."""

    def now(self) -> Both:
        """Both, for the model as it is."""
        packs = self.compile is not False and is_copied(self.model) and not torch.is_autocast_enabled("cpu")
        if not (packs or self.compile):
            return self.plain
        parts, versions = _parts_of(self.model)
        packs = packs and versions is not None
        if not (packs or self.compile):
            return self.plain
        made_from = (parts, versions if packs else self.model.training)
        with self.lock:  # threads that share a predictor share one twin
            if packs not in self.made or self.made[packs][0] != made_from:
                self.made[packs] = made_from, self._make(packs)
            return self.made[packs][1]

    def _make(self, packs: bool) -> Both:
        coarse, fine = _stages_on(accelerate(self.model) if packs else self.model, self.model)
        return (compiled(coarse), compiled(fine)) if self.compile else (coarse, fine)

    def __reduce__(self) -> tuple[type[Stages], tuple[CoarseToFineViT, bool | None]]:
        """Copied and pickled without what was packed or compiled, which would go on answering by the former weights."""
        return Stages, (self.model, self.compile)


def _stages_on(network: CoarseToFineViT, model: CoarseToFineViT) -> Both:
    """Both, by the weights of a network and the model's own exit rule."""

    def coarse(images: Tensor) -> tuple[CoarseState, Tensor]:
        state = network.coarse(images)
        return state, model.exit.coarse(state.logits)

    def fine(images: Tensor, state: CoarseState) -> tuple[Tensor, Tensor]:
        logits = network.fine(images, state)
        return logits, model.exit.fine(logits)

    return coarse, fine


def _parts_of(model: CoarseToFineViT) -> tuple[list[object], int | None]:
    """What a model is made of and how it measures; how often its parameters were written to (but through ``.data``).

    The modules themselves: as long as they are kept none of another can be taken for one of them. The number is None if
    some parameters were made in inference mode, where torch counts nothing. This runs at each call, so it walks the
    modules itself, which takes a quarter of the time of ``model.modules()`` and ``model.parameters()``.
    """
    parts: list[object] = [model.config, model.exit]
    waiting: list[nn.Module] = [model]
    versions, counted = 0, True
    while waiting:
        module = waiting.pop()
        parts.append(module)
        waiting.extend(child for child in module._modules.values() if child is not None)
        for parameter in module._parameters.values():
            if type(parameter) is nn.Parameter:
                parts.append(parameter.data_ptr())
                counted = counted and not parameter.is_inference()
                versions += parameter._version if counted else 0
    return parts, versions if counted else None
