"""A whole benchmark: all batch sizes on random images and, from pixels on the device to encoded files, on real ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from cfvit.benchmark import EngineName, Plan
from cfvit.benchmark.conditions import conditions_of
from cfvit.benchmark.contenders import BACKBONE, IN_TORCH, PREDICTOR, STREAM, Engines, own_contenders, peers_of
from cfvit.benchmark.measure import (
    COMPUTING,
    RANDOM,
    REAL,
    Entry,
    TimedBatch,
    measure,
    measure_batch,
    random_images,
)
from cfvit.benchmark.report import Bench
from cfvit.data import DataSource
from cfvit.data.images import ImageError, eval_transform, open_image
from cfvit.errors import CfvitError, first_line
from cfvit.evaluation.timing import Call, lacks_memory
from cfvit.inference.engines.packing import accelerate
from cfvit.inference.engines.pytorch import COMPILATIONS
from cfvit.inference.files import READERS, classify_files
from cfvit.inference.predictor import Predictor
from cfvit.inference.stream import FINE, placed, prefetched
from cfvit.modeling.cost import count_macs
from cfvit.modeling.model import CoarseToFineViT

COPYING, RESIZING, DECODING = "with host copies", "with resizing", "with decoding"
SCOPES = (COMPUTING, COPYING, RESIZING, DECODING)
"""Each includes the one before it: pixels on the device, pixels in host memory, decoded images, encoded files."""
FILES, SCALED = "from files", "from files, scaled decoding"
"""All that `cfvit.inference.files.classify_files` does, without and with ``scaled_decode``."""
FEWEST_IMAGES, FEWEST_BATCHES = 16, 2
"""A round answers at least so many images, in at least so many batches: a stream of one batch would be none."""

Inputs = Sequence[Callable[[], Tensor]]
"""For each batch a function that returns its normalised images, made from what a scope begins with."""


def read_files(source: DataSource, batch_size: int) -> list[list[bytes]]:
    """Images as they are stored, in batches, from all over the data; some more than once if there are too few.

    Raises:
        CfvitError: no image can be read from its stored form.
    """
    wanted = max(FEWEST_BATCHES, math.ceil(FEWEST_IMAGES / batch_size)) * batch_size
    files: list[bytes] = []
    for place in range(min(wanted, len(source))):
        try:
            with source.stored(place * len(source) // min(wanted, len(source))) as file:
                content = file.read()
            open_image(content)
        except ImageError:
            continue
        files.append(content)
    if not files:
        raise CfvitError("none of the images can be read as a file: give a folder or tar of images")
    files = [files[place % len(files)] for place in range(wanted)]
    return [files[start : start + batch_size] for start in range(0, wanted, batch_size)]


def inputs_of(files: Sequence[Sequence[bytes]], model: CoarseToFineViT, pool: ThreadPoolExecutor) -> dict[str, Inputs]:
    """The batches of each of `SCOPES`; images are decoded and resized in the pool."""
    transform, weight = eval_transform(model.data_config), next(model.parameters())

    def decode(content: bytes) -> Any:
        return transform(open_image(content))

    decoded = [[open_image(content) for content in batch] for batch in files]
    pixels = [torch.stack([transform(image) for image in batch]) for batch in decoded]
    if weight.device.type == "cuda":
        pixels = [batch.pin_memory() for batch in pixels]
    resident = [batch.to(weight.device, weight.dtype) for batch in pixels]
    return {
        COMPUTING: [lambda batch=batch: batch for batch in resident],
        COPYING: [lambda batch=batch: batch for batch in pixels],
        RESIZING: [lambda batch=batch: torch.stack([*pool.map(transform, batch)]) for batch in decoded],
        DECODING: [lambda batch=batch: torch.stack([*pool.map(decode, batch)]) for batch in files],
    }


@torch.inference_mode()
def measure_real(engines: Engines, source: DataSource, batch_size: int, plan: Plan) -> TimedBatch:
    """Times backbone, predictor and stream on real images in all `SCOPES`, and the stream from files as well.

    A round answers all images, in calls of one batch or by one stream. Images that cannot be read and a model without
    a calibrated threshold raise `CfvitError`.
    """
    model, macs, weight = engines.model, count_macs(engines.model), next(engines.model.parameters())
    files = read_files(source, batch_size)
    count = sum(map(len, files))
    calls: dict[str, Sequence[Call]] = {}
    entries: list[Entry] = []

    def add(name: str, engine: EngineName, scope: str, round: Sequence[Call], share: float | None) -> None:
        """A row, timed by the calls that make up a round."""
        key = f"{name}, {engine}, {scope}"
        calls[key] = round
        about = {"images": REAL, "scope": scope, "reference": scope if scope in SCOPES else DECODING}
        cost = macs.backbone if share is None else macs.expected(share)
        own: dict[str, Any] = {"fine_share": share, "macs": cost, "images_per_round": count, "parts": {key: 1.0}}
        entries.append(Entry(name=name, engine=engine, **about, **own))

    with ThreadPoolExecutor(READERS) as pool, TemporaryDirectory() as folder:
        inputs = inputs_of(files, model, pool)
        paths = [Path(folder, str(place)) for place in range(count)]
        for path, content in zip(paths, chain.from_iterable(files), strict=True):
            path.write_bytes(content)
        for engine in dict.fromkeys(("eager", *plan.engines)):
            for scope, batches in inputs.items():
                add(BACKBONE, engine, scope, batch_calls(engines.plain(engine), scope, batches, weight), None)
            if engine in plan.engines:
                stages = engines.stages(engine)
                predictor = Predictor(stages, stages.model.threshold)
                stage_of = [predictor(give()).stage for give in inputs[COMPUTING]]
                share = float((torch.cat(stage_of) == FINE).float().mean())

                def answer(pixels: Tensor, predictor: Predictor = predictor) -> Tensor:
                    return predictor(pixels).logits

                for scope, batches in inputs.items():
                    add(PREDICTOR, engine, scope, batch_calls(answer, scope, batches, weight), share)
                for scope, batches in inputs.items():
                    add(STREAM, engine, scope, [stream_call(predictor, scope, batches, weight)], share)
                for scope, scaled in ((FILES, False), (SCALED, True))[: 1 + (engine in IN_TORCH)]:
                    read = partial(classify_files, paths, predictor, batch_size, scaled_decode=scaled)
                    add(STREAM, engine, scope, [partial(lambda answers: list(answers()), read)], share)
        return measure(entries, calls, batch_size, model, plan)


def batch_calls(network: Callable[[Tensor], Tensor], scope: str, batches: Inputs, weight: Tensor) -> Sequence[Call]:
    """The calls of a round, one for each batch; where pixels begin on the host, classes are brought there."""
    if scope == COMPUTING:
        return [lambda give=give: network(give()) for give in batches]
    return [lambda give=give: network(placed(give(), weight)).argmax(dim=-1).tolist() for give in batches]


def stream_call(predictor: Predictor, scope: str, batches: Inputs, weight: Tensor) -> Call:
    """A call that answers all batches of a round as one stream."""

    def answer() -> list[Tensor]:
        copied = prefetched((give() for give in batches), weight)
        return [each.logits for each in predictor.stream(copied, ordered=True)]

    return answer if scope == COMPUTING else lambda: [each.argmax(dim=-1).tolist() for each in answer()]


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
) -> Iterator[tuple[Bench, TimedBatch | None]]:
    """Measures at all batch sizes.

    Args:
        model: on its device and in its precision.
        name, command: of the run, for the report.
        peers: time those as well, if the backbone is one that they are written for.
        source: real images, answered at the model's own eta; int8 is quantised by them.

    Yields:
        After each batch size all that was found so far, and what was found at this one; None where it did not fit into
        memory, of which the first has a note.

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
    notes += [f"without {title}: {refusal}" for title, refusal in refusals.items()]
    made = conditions_of(weight.dtype, command)
    about = made, name, model.config.backbone, model.grid, random_weights, plan, tuple(notes)
    bench = Bench(*about, batches=())
    ways = [(RANDOM, "batches", lambda size: measure_batch(model, contenders, random_images(model, size), plan))]
    if source is not None:
        ways.append((REAL, "real", lambda size: measure_real(engines, source, size, plan)))
    for size, (kind, field, measured) in product(batch_sizes, ways):
        try:
            with no_silent_eager() if "compiled" in plan.engines else nullcontext():
                batch = measured(size)
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            note, batch = f"{kind} images, batch size {size}: not measured, as it does not fit into memory", None
            bench = replace(bench, notes=(*bench.notes, note))
        else:
            bench = replace(bench, **{field: (*getattr(bench, field), batch)})
        yield bench, batch
        torch.cuda.empty_cache()  # after a lack of memory, of what the exception kept
    if not (bench.batches or bench.real):
        raise CfvitError(f"a batch of {min(batch_sizes)} images does not fit into memory: lower --batch-sizes")


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
    """Within it, a function that is recompiled more than `COMPILATIONS` times fails; torch alone would run it eagerly.

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
