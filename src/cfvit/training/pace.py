"""How fast a run is, and how much of what the machine could do."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from cfvit.evaluation.timing import MATRIX_SIDES, time_in_turn
from cfvit.inference.engines.packing import accelerate_training
from cfvit.modeling.cost import macs_of
from cfvit.modeling.model import CoarseToFineViT
from cfvit.processes import Process
from cfvit.training.recipe import Recipe
from cfvit.training.setup import dtype_of

PASSES = 3
"""A backward pass multiplies twice as often as the forward pass."""


class Pace:
    """Images per second of all processes, and the share of their matrix rate that the network's products reach.

    A teacher's products are not counted; the time that it takes is.

    Args:
        images_per_step: of one process.
        gradient_macs: of an image, forwards and backwards, by the share of cells that are split.
        matrix_rate: MACs per second of one process.
    """

    def __init__(
        self, images_per_step: int, world: int, gradient_macs: Callable[[float], int], matrix_rate: float
    ) -> None:
        self.images_per_step, self.world, self.gradient_macs = images_per_step, world, gradient_macs
        self.matrix_rate, self.ratio = matrix_rate, 1.0
        self.begun, self.steps = time.monotonic(), 0

    def start(self, ratio: float) -> None:
        """Counts anew, from now on with this share of cells split."""
        self.begun, self.steps, self.ratio = time.monotonic(), 0, ratio

    def advance(self) -> None:
        """One step further."""
        self.steps += 1

    def figures(self) -> dict[str, float]:
        """``images_per_second`` and ``matrix_share`` since the start."""
        own = self.steps * self.images_per_step / (time.monotonic() - self.begun)
        share = own * self.gradient_macs(self.ratio) / self.matrix_rate
        return {"images_per_second": round(own * self.world, 1), "matrix_share": float(f"{share:.3g}")}


def pace_of(recipe: Recipe, model: CoarseToFineViT, process: Process) -> Pace:
    """The pace of a run; measures the matrix rate first, which takes less than a second."""
    meta = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    macs: dict[float, int] = {}

    def gradient_macs(ratio: float) -> int:
        if ratio not in macs:
            macs[ratio] = PASSES * _forward_macs(recipe, meta, ratio)
        return macs[ratio]

    rate = matrix_rate(process.device, dtype_of(recipe, process.device))
    return Pace(recipe.batch_size * recipe.accumulate, process.world, gradient_macs, rate)


def _forward_macs(recipe: Recipe, meta: CoarseToFineViT, ratio: float) -> int:
    """Of one image through what is trained; ``meta`` holds no data."""
    images = torch.empty(1, 3, *meta.image_size, device="meta")
    runs: dict[str, Callable[[], Any]] = {
        "both": lambda: meta(images, informative_ratio=ratio),
        "coarse": lambda: meta.coarse(images),
        "backbone": lambda: meta.backbone(images),
    }
    return macs_of(runs[recipe.stages])


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
