"""How fast a run is, and how much of what the machine could do."""

from __future__ import annotations

import copy
import time
from functools import cache
from typing import Any

import torch
from torch import nn

from cfvit.evaluation.timing import MATRIX_SIDES, time_in_turn
from cfvit.inference.engines.packing import accelerate_training
from cfvit.methods.base import Batch, Method
from cfvit.modeling.cost import macs_of
from cfvit.processes import Process
from cfvit.training.recipe import Recipe
from cfvit.training.setup import Trained, dtype_of

PASSES = 3
"""A backward pass multiplies twice as often as the forward pass."""


class Pace:
    """Images per second of all processes, and the share of their matrix rate that the network's products reach.

    The matrix rate is measured when the pace is made, which takes less than a second. A teacher's products are not
    counted; the time that it takes is.
    """

    def __init__(self, recipe: Recipe, trained: Trained, process: Process) -> None:
        self.images_per_step, self.world = recipe.batch_size * recipe.accumulate, process.world
        self.trained, self.macs = trained, dict[float, int]()
        self.matrix_rate = matrix_rate(process.device, dtype_of(recipe, process.device))

    def start(self, split: float) -> None:
        """Counts anew, from now on with this share of cells split."""
        self.begun, self.steps, self.split = time.monotonic(), 0, split

    def advance(self) -> None:
        """One step further."""
        self.steps += 1

    def figures(self) -> dict[str, float]:
        """``images_per_second`` and ``matrix_share`` since the start, without the time that the first count takes."""
        now = time.monotonic()
        own = self.steps * self.images_per_step / (now - self.begun)
        if self.split not in self.macs:
            self.macs[self.split] = gradient_macs(self.trained.method, self.trained.model, self.split)
            self.begun += time.monotonic() - now
        share = own * self.macs[self.split] / self.matrix_rate
        return {"images_per_second": round(own * self.world, 1), "matrix_share": float(f"{share:.3g}")}


def gradient_macs(method: Method, model: Any, split: float) -> int:
    """MACs of an image in a training step, forwards and backwards; counted on a copy without data."""
    meta = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    images = torch.empty(1, 3, *meta.image_size, device="meta", dtype=next(meta.parameters()).dtype)
    teacher = torch.empty(1, len(model.class_names), device="meta")
    batch = Batch(images, torch.zeros(1, dtype=torch.long, device="meta"), teacher)
    return PASSES * macs_of(lambda: method.loss(method.in_training(meta), batch, split))


@cache
@torch.no_grad()
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """MACs per second of a large matrix product, by the layer that training multiplies by."""
    side = MATRIX_SIDES.get(device.type, MATRIX_SIDES["cuda"])
    generator = torch.Generator(device).manual_seed(0)  # of its own: a run's random choices follow from its seed
    layer = nn.Linear(side, side, bias=False, device="meta", dtype=dtype).to_empty(device=device)
    layer.weight.normal_(generator=generator)
    rows = torch.randn(side, side, device=device, dtype=dtype, generator=generator)
    layer = accelerate_training(layer)
    (timing,) = time_in_turn({"product": lambda: layer(rows)}, 4, device).values()
    return side**3 / min(timing.totals)
