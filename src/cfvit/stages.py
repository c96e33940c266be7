"""Both stages of a model as they run fastest: packed, compiled or plain, and always by the weights as they are."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import cast

import torch
from torch import Tensor, nn

from cfvit.acceleration import accelerate, compiled, is_copied
from cfvit.model import CoarseState, CoarseToFineViT

CoarseStage = Callable[[Tensor], tuple[CoarseState, Tensor]]
"""From images to what the coarse stage knows of them and its confidence."""
FineStage = Callable[[Tensor, CoarseState], tuple[Tensor, Tensor]]
"""From images and their states to logits and their confidence."""


class Stages:
    """Both stages of a model, made when they are first needed and anew when what they were made from has changed.

    That is the weights, where they were packed, and the modules of which compiled code knows.

    Args:
        model: whose weights are used, and whose exit rule measures the confidence.
        compile: as of `cfvit.Predictor`.
    """

    def __init__(self, model: CoarseToFineViT, compile: bool | None) -> None:
        self.model, self.compile, self.lock = model, compile, Lock()
        self.plain = self.made = self._on(model)
        self.made_from = None

    def now(self) -> tuple[CoarseStage, FineStage]:
        """Both, for the model as it is."""
        packs = self.compile is not False and self._can_be_packed()
        if not (packs or self.compile):
            return self.plain
        fingerprint = _fingerprint(self.model, packs)
        with self.lock:  # threads that share a predictor share one twin
            if fingerprint != self.made_from:
                self.made, self.made_from = self._on(accelerate(self.model) if packs else self.model), fingerprint
            return self.made

    def _can_be_packed(self) -> bool:
        """Not for autocast, nor with parameters made in inference mode, of which torch counts no changes."""
        counted = not next(self.model.parameters()).is_inference()
        return counted and is_copied(self.model) and not torch.is_autocast_enabled("cpu")

    def _on(self, network: CoarseToFineViT) -> tuple[CoarseStage, FineStage]:
        """Both, by the weights of a network and the model's own exit rule."""

        def coarse(images: Tensor) -> tuple[CoarseState, Tensor]:
            state = network.coarse(images)
            return state, self.model.exit_rule.coarse(state.logits)

        def fine(images: Tensor, state: CoarseState) -> tuple[Tensor, Tensor]:
            logits = network.fine(images, state)
            return logits, self.model.exit_rule.fine(logits)

        return (compiled(coarse), compiled(fine)) if self.compile else (coarse, fine)

    def __reduce__(self) -> tuple[type[Stages], tuple[CoarseToFineViT, bool | None]]:
        """Copied and pickled without what was packed or compiled, which would go on answering by the former weights."""
        return Stages, (self.model, self.compile)


def _fingerprint(model: CoarseToFineViT, packs: bool) -> tuple[object, ...]:
    """Changes whenever a module or parameter is replaced, moved or converted, or how answers are measured.

    This runs at each call, so it walks the modules itself, which takes a quarter of the time of ``model.modules()`` and
    ``model.parameters()``.

    Args:
        packs: then it also changes when a parameter is written to (but through ``.data``).
    """
    found: list[object] = [model.config, model.exit_rule, packs or model.training]
    versions, waiting = 0, [cast(nn.Module, model)]
    while waiting:
        module = waiting.pop()
        found.append(id(module))
        waiting.extend(child for child in module._modules.values() if child is not None)
        for parameter in module._parameters.values():
            if type(parameter) is not nn.Parameter:
                continue
            found.append(parameter.data_ptr())
            if packs and parameter.is_inference():
                found.append(object())  # changes are not counted: never the same again
            elif packs:
                versions += parameter._version
    return versions, *found
