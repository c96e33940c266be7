"""Images per second of the plain ViT and of CF-ViT at several exit shares, prepared alike and timed in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from cfvit.evaluation.timing import threshold_for_share, time_in_turn
from cfvit.inference.acceleration import accelerate
from cfvit.inference.predictor import Predictor
from cfvit.modeling.model import CoarseToFineViT
from cfvit.processes import best_device
from cfvit.training.recipe import Recipe
from cfvit.training.setup import autocast

ROUNDS = 10


def images_per_second(
    plain: CoarseToFineViT,
    models: Mapping[str, tuple[CoarseToFineViT, float]],
    recipe: Recipe,
    rounds: int = ROUNDS,
) -> dict[str, float]:
    """Times random images through each model in turn, in batches that suit the device.

    Args:
        plain: its backbone is timed, as ``"plain"``.
        models: by name, a model and the share of images that go on to its fine stage.
        recipe: says in which precision.
    """
    device = best_device()
    batch = 256 if device.type == "cuda" else 32
    generator = torch.Generator().manual_seed(0)

    def call(model: CoarseToFineViT, share: float | None) -> Callable[[], object]:
        """What is timed: the predictor at this share of images that go on, or without one the backbone alone."""
        model = model.eval().to(device)
        images = torch.randn(batch, 3, *model.image_size, generator=generator).to(device)
        if share is None:
            backbone = _fast(model.backbone)
            return lambda: backbone(images)
        two_stages = _fast(model)
        eta = threshold_for_share(model.exit.coarse(two_stages.coarse(images).logits), share)
        predictor = Predictor(two_stages, eta, compile=False)
        return lambda: predictor(images)

    with torch.inference_mode(), autocast(recipe, device):
        calls = {"plain": call(plain, None), **{name: call(model, share) for name, (model, share) in models.items()}}
        timings = time_in_turn(calls, rounds, device)
    return {name: batch / timing.median for name, timing in timings.items()}


def _fast(network: Any) -> Any:
    """The network as `cfvit.Predictor` runs it, which is not for autocast on a CPU."""
    return network if torch.is_autocast_enabled("cpu") else accelerate(network)
