"""A whole benchmark: the model, all batch sizes on random images and on real ones, and what a reader has to know."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cfvit.acceleration import accelerate
from cfvit.benchmark.contenders import methods_of
from cfvit.benchmark.measure import Batch, Plan, measure_batch, random_images
from cfvit.benchmark.peers import why_no_peers
from cfvit.benchmark.real import measure_real
from cfvit.benchmark.report import Bench
from cfvit.conditions import conditions_of
from cfvit.data import DataSource
from cfvit.errors import CfvitError
from cfvit.model import CoarseToFineViT


def run_bench(
    model: CoarseToFineViT,
    batch_sizes: Sequence[int],
    plan: Plan,
    *,
    name: str,
    command: str,
    random_weights: bool,
    peers: bool,
    source: DataSource | None = None,
    watch: Callable[[Batch], None] = lambda batch: None,
) -> Bench:
    """Measures at all batch sizes.

    Args:
        model: on its device and in its precision.
        name, command: what is told of the run.
        random_weights: whether the model was made for the run.
        peers: time those as well, if the backbone is one that they are written for.
        source: real images, answered at the model's own eta.
        watch: called with what was found at each batch size.

    Raises:
        CfvitError: data for a model without a threshold, images that cannot be read.
    """
    if source is not None and model.threshold is None:
        raise CfvitError("real images are answered at the model's own eta and it has none: cfvit calibrate chooses it")
    model = model.eval().requires_grad_(False)
    refusal = why_no_peers(model) if peers else None
    methods = methods_of(model, peers and refusal is None)
    random, real = [], []
    for size in batch_sizes:
        random.append(measure_batch(model, methods, random_images(model, size), plan))
        watch(random[-1])
        if source is not None:
            real.append(measure_real(model, source, size, plan))
            watch(real[-1])
    return Bench(
        conditions=conditions_of(next(model.parameters()).dtype, command),
        model=name,
        backbone=model.config.backbone,
        grid=model.grid,
        random_weights=random_weights,
        plan=plan,
        notes=tuple(_notes(model, plan, random_weights, refusal)),
        batches=tuple(random),
        real=tuple(real),
    )


def _notes(model: CoarseToFineViT, plan: Plan, random_weights: bool, refusal: str | None) -> list[str]:
    parameter = next(model.parameters())
    notes = []
    if random_weights:
        notes.append("the weights are random: speed does not depend on them, and shares of exits are forced")
    if refusal is not None:
        notes.append(f"without peers: {refusal}")
    if "accelerated" in plan.modes and accelerate(model.backbone) is model.backbone:
        notes.append("acceleration changes nothing on this device and precision: accelerated is eager")
    if parameter.device.type == "cpu":
        notes.append("memory was not measured: on a CPU its peak is known of a process, not of a contender")
    elif parameter.dtype == torch.float32:
        notes.append(f"float32 matrix products at precision {torch.get_float32_matmul_precision()!r}")
    return notes
