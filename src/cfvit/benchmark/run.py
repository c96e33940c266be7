"""A whole benchmark: the model, all batch sizes on random images and on real ones, and what a reader has to know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch

from cfvit.benchmark.conditions import conditions_of
from cfvit.benchmark.contenders import own_contenders, peers_of
from cfvit.benchmark.engines import IN_TORCH, Engines
from cfvit.benchmark.measure import RANDOM, REAL, Batch, Plan, measure_batch, random_images
from cfvit.benchmark.real import measure_real
from cfvit.benchmark.report import Bench
from cfvit.data import DataSource
from cfvit.errors import CfvitError, first_line
from cfvit.evaluation.timing import lacks_memory
from cfvit.inference.engines.packing import accelerate
from cfvit.inference.engines.pytorch import COMPILATIONS
from cfvit.modeling.model import CoarseToFineViT


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
    watch: Callable[[Batch, Bench], None] = lambda batch, bench: None,
) -> Bench:
    """Measures at all batch sizes; one that does not fit into memory is left out and becomes a note.

    Args:
        model: on its device and in its precision.
        name, command: of the run, for the report.
        peers: time those as well, if the backbone is one that they are written for.
        source: real images, answered at the model's own eta; int8 is quantised by them.
        watch: called with what was found at each batch size, and with all that was found so far.

    Raises:
        CfvitError: data for a model without a threshold, images that cannot be read, no batch size that fits into
            memory, a network that torch compiles anew too often, an exported engine for a GPU or another precision.
    """
    if source is not None and model.threshold is None:
        raise CfvitError("real images are answered at the model's own eta and it has none: cfvit calibrate chooses it")
    model = model.eval().requires_grad_(False)
    weight = next(model.parameters())
    exported = [engine for engine in plan.engines if engine not in IN_TORCH]
    if exported and (weight.device.type, weight.dtype) != ("cpu", torch.float32):
        raise CfvitError(f"engine {exported[0]} runs in float32 on a CPU: give float32, and no GPU")
    engines = Engines(model, source)
    others, refusals = peers_of(model) if peers else ([], {})
    contenders = own_contenders(engines) + others
    notes = notes_of(model, plan, random_weights, quantised_by_noise=source is None)
    bench = Bench(
        conditions=conditions_of(weight.dtype, command),
        model=name,
        backbone=model.config.backbone,
        coarse_grid=model.grid,
        random_weights=random_weights,
        plan=plan,
        notes=(*notes, *(f"without {title}: {refusal}" for title, refusal in refusals.items())),
        batches=(),
    )
    for size in batch_sizes:
        for kind in (RANDOM,) if source is None else (RANDOM, REAL):
            try:
                with no_silent_eager() if "compiled" in plan.engines else nullcontext():
                    if kind == RANDOM or source is None:
                        batch = measure_batch(model, contenders, random_images(model, size), plan)
                        bench = replace(bench, batches=(*bench.batches, batch))
                    else:
                        batch = measure_real(engines, source, size, plan)
                        bench = replace(bench, real=(*bench.real, batch))
            except (RuntimeError, MemoryError) as error:
                if not lacks_memory(error):
                    raise
                note = f"{kind} images, batch size {size}: not measured, as it does not fit into memory"
                bench = replace(bench, notes=(*bench.notes, note))
            else:
                watch(batch, bench)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # after a lack of memory, of what the exception kept
    if not (bench.batches or bench.real):
        raise CfvitError(f"a batch of {min(batch_sizes)} images does not fit into memory: lower --batch-sizes")
    return bench


def notes_of(model: CoarseToFineViT, plan: Plan, random_weights: bool, quantised_by_noise: bool) -> list[str]:
    """What a reader of the figures has to know of the model and of how it is run."""
    weight = next(model.parameters())
    int8 = any(engine.endswith("int8") for engine in plan.engines)
    notes = {
        "the weights are random: speed does not depend on them, and shares of exits are forced": random_weights,
        "int8 is quantised by noise: its speed counts, its answers do not": int8 and quantised_by_noise,
        "acceleration changes nothing on this device and precision: torch is eager": "torch" in plan.engines
        and weight.device.type != "cuda"
        and accelerate(model.backbone) is model.backbone,
        f"float32 matrix products at precision {torch.get_float32_matmul_precision()!r}": weight.device.type != "cpu"
        and weight.dtype == torch.float32,
    }
    return [note for note, applies in notes.items() if applies]


@contextmanager
def no_silent_eager() -> Iterator[None]:
    """Within it, a function that is compiled anew more than `COMPILATIONS` times fails; torch would run it eagerly.

    Raises:
        CfvitError: torch cannot compile.
    """
    from torch._dynamo import config, exc  # some seconds to import

    exceptions = (getattr(exc, "FailOnRecompileLimitHit", exc.TorchDynamoException), exc.TorchDynamoException)
    wanted = {"recompile_limit": COMPILATIONS, "fail_on_recompile_limit_hit": True}
    known = {name: value for name, value in wanted.items() if hasattr(config, name)}
    try:
        with config.patch(known):
            yield
    except exceptions as error:
        if lacks_memory(error):
            raise
        raise CfvitError(f"cannot be timed compiled ({first_line(error)}): choose another --engine") from error
