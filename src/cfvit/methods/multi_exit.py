"""What networks with any number of exits have in common: each stage goes on from what the one before saw."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cfvit.calibration import choose_threshold
from cfvit.methods.base import Batch, Method, count_points
from cfvit.modeling.exit import confidence_of, goes_on


class StageOutput(NamedTuple):
    """Logits of a stage, and what the next stage takes over."""

    logits: Tensor  # ``[B, classes]``
    features: Any  # whatever the next stage needs


class MultiExitNetwork(nn.Module):
    """A network of stages with an exit after each.

    Args:
        exits: their names, cheapest first.
    """

    etas: Tensor

    def __init__(self, exits: list[str]) -> None:
        super().__init__()
        self.exits = exits
        self.register_buffer("etas", torch.ones(len(exits) - 1))  # of all exits but the last; at 1 all images go on

    @abstractmethod
    def stage(self, index: int, images: Tensor, previous: StageOutput | None) -> StageOutput:
        """A stage, on images ``[B, 3, S, S]`` and what the stage before saw of them; None for the first."""

    def forward(self, images: Tensor, stages: int | None = None) -> dict[str, Tensor]:
        """Logits ``[B, classes]`` at all exits, or at the first ``stages``."""
        answers, output = {}, None
        for index, name in enumerate(self.exits[:stages]):
            output = self.stage(index, images, output)
            answers[name] = output.logits
        return answers


class MultiExit(Method):
    """All exits learn side by side; the operating points are the exits, each at the cost of all stages up to it."""

    def loss(self, module: Any, batch: Batch, split: float) -> Tensor:
        return torch.stack([self.answer_loss(logits, batch) for logits in module(batch.images).values()]).sum()

    def points(self, network: Any) -> dict[str, Callable[[Tensor], Tensor]]:
        def answer(stages: int, name: str, images: Tensor) -> Tensor:
            return network(images, stages)[name]

        return {name: partial(answer, stages, name) for stages, name in enumerate(network.exits, start=1)}

    def answers(self, network: Any, images: Tensor) -> dict[str, Tensor]:
        return network(images)  # all in one pass

    def macs(self, network: Any) -> dict[str, int]:
        """Counts each stage once; an exit costs all stages up to it."""
        output = None

        def run(meta: Any, index: int, image: Tensor) -> None:
            nonlocal output
            output = meta.stage(index, image, output)

        costs = count_points(network, lambda meta: {n: partial(run, meta, i) for i, n in enumerate(network.exits)})
        return dict(zip(costs, accumulate(costs.values()), strict=True))

    def exits(self, network: Any, logits: dict[str, Tensor]) -> Tensor:
        *earlier, last = logits.values()
        stages = torch.zeros(len(last), dtype=torch.long, device=last.device)
        for index, (own, eta) in enumerate(zip(earlier, network.etas.tolist(), strict=True)):
            stages += (stages == index) & goes_on(confidence_of(own), eta)
        return stages

    def choose_exit(self, network: Any, logits: dict[str, Tensor], labels: Tensor, max_drop: float) -> dict[str, float]:
        """From the last exit to the first, each eta may lose its part of ``max_drop`` against what would go on."""
        *earlier, (_, answer) = logits.items()
        chosen: dict[str, float] = {}
        for stage, (name, own) in reversed(list(enumerate(earlier))):
            eta = choose_threshold(own, answer, labels, max_drop / len(earlier))
            network.etas[stage] = chosen[f"eta_{name}"] = eta
            answer = torch.where(goes_on(confidence_of(own), eta)[:, None], answer, own)
        return chosen
