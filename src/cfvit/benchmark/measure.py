"""Times contenders on a batch, in one process and in turn, and compares them with the plain backbone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from cfvit.benchmark import EngineName, Plan
from cfvit.benchmark.contenders import (
    BACKBONE,
    IN_TORCH,
    PREDICTOR,
    STREAM,
    Contender,
    Engines,
    own_contenders,
    prepare,
)
from cfvit.calibration import Estimate
from cfvit.evaluation.timing import (
    MATRIX_SIDES,
    STEADY,
    Call,
    Timing,
    is_sharp,
    paired_ratio,
    percentile,
    time_in_turn,
)
from cfvit.modeling.model import CoarseToFineViT

COMPUTING = "computing"
"""The scope of a call whose images are on the device, ready for the network."""
RANDOM, REAL = "random", "real"
AHEAD, BEHIND, CANNOT_BE_TOLD = "ahead", "behind", "cannot be told"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is timed as one row."""

    name: str  # of the contender
    engine: EngineName  # for which it was prepared
    images: str = RANDOM  # or `REAL`
    scope: str = COMPUTING  # what was timed, or more
    reference: str = COMPUTING  # the scope of the backbone and the predictor that it is compared with
    fine_share: float | None = None  # share of images that went on; None where all are treated alike
    macs: float  # mean cost of an image in multiply-accumulates
    images_per_round: int  # images that a round answered
    parts: Mapping[str, float]  # the timed calls of a round (`TimedBatch.seconds`) and their weights, which sum to 1

    def per_image(self, timings: Mapping[str, Timing]) -> Timing:
        """Seconds of an image in each round, by the timings of its calls."""
        totals = np.sum([weight * np.array(timings[name].totals) for name, weight in self.parts.items()], axis=0)
        return Timing(tuple((total,) for total in (totals / self.images_per_round).tolist()))


@dataclass(frozen=True, kw_only=True)
class Row(Entry):
    """A contender at a batch size."""

    batch_size: int  # images of a call
    gmacs: float  # mean cost of an image in 1e9 multiply-accumulates
    rounds: int  # number of rounds that were counted
    images_per_second: float  # by the median round
    mean_ms: float  # mean milliseconds of a call; of a stream, of a batch
    # milliseconds of a call; None with too few calls, and for a stream, where hard images wait for later batches
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    spread: float  # interquartile range of the rounds over their median
    ratio: Estimate  # how many times faster than the backbone in the same engine, from the same rounds
    eager_ratio: Estimate  # how many times faster than timm's model as it is
    # how many times faster than this contender the predictor is, from the same rounds: at the first share, in the same
    # engine, or in the predictor's first one if it was not timed in this; None without a predictor
    predictor_ratio: Estimate | None
    macs_ratio: float  # the backbone's MACs over these
    matrix_share: float  # share of the machine's own matrix rate that was reached
    # memory of tensors that a call adds at most, see `peak_bytes`; on a CPU None for exported engines and for calls in
    # which other threads prepare images
    peak_megabytes: float | None
    steady: bool  # whether the reference was as fast in the first half of the rounds as in the second

    @property
    def telling(self) -> bool:
        """Whether the machine was quiet enough for ``ratio`` to be used."""
        return self.steady and is_sharp(self.ratio)

    @property
    def eager_telling(self) -> bool:
        """Whether the machine was quiet enough for ``eager_ratio`` to be used."""
        return self.steady and is_sharp(self.eager_ratio)

    @property
    def predictor_is(self) -> str | None:
        """Whether the predictor is faster than this contender, by the interval of ``predictor_ratio``."""
        ratio = self.predictor_ratio
        if ratio is None:
            return None
        if not self.steady or ratio.low <= 1 <= ratio.high:
            return CANNOT_BE_TOLD
        return AHEAD if ratio.low > 1 else BEHIND

    @property
    def label(self) -> str:
        """The name, with the share of images that went on and a scope other than computing."""
        share = "" if self.fine_share is None else f", {self.fine_share:.0%} fine"
        return f"{self.name}{share}{'' if self.scope == COMPUTING else f', {self.scope}'}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the end of an interval without end is None."""
        verdicts = {"telling": self.telling, "eager_telling": self.eager_telling, "predictor_is": self.predictor_is}
        values = {**asdict(self), **verdicts}
        for name in ("ratio", "eager_ratio", "predictor_ratio"):
            if values[name] is not None:
                values[name] = {key: end if math.isfinite(end) else None for key, end in values[name].items()}
        return values


@dataclass(frozen=True)
class TimedBatch:
    """All contenders at a batch size."""

    batch_size: int  # images of a call
    rows: list[Row]  # in the order of the contenders
    matrix_gmacs_per_second: float  # the machine's own rate, of a large matrix product in the same precision and rounds
    drift: float  # how many times slower the slower half of the reference's rounds was
    # by the name of a timed call, for each round the seconds of each of its calls
    seconds: Mapping[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)

    @property
    def steady(self) -> bool:
        """Whether the reference was as fast in the first half of the rounds as in the second."""
        return self.drift <= STEADY

    @property
    def title(self) -> str:
        """Distinguishes it from the others."""
        return f"{self.rows[0].images} images, batch size {self.batch_size}"


@torch.inference_mode()
def measure_batch(model: CoarseToFineViT, contenders: Sequence[Contender], images: Tensor, plan: Plan) -> TimedBatch:
    """Times contenders on normalised images ``[B, 3, S, S]`` of the model's device and precision.

    Args:
        contenders: the plain backbone first.
    """
    calls: dict[str, Sequence[Call]] = {}
    entries: list[Entry] = []
    reference: tuple[Contender, EngineName] = (contenders[0], "eager")
    pairs = [
        reference,
        *((each, engine) for engine in plan.engines for each in contenders if engine in (each.engines or (engine,))),
        *((each, each.engines[0]) for each in contenders if each.engines and not {*each.engines} & {*plan.engines}),
    ]
    for contender, engine in dict.fromkeys(pairs):
        runner = contender.build(engine)
        for share in plan.shares if contender.fine_macs is not None else (None,):
            ways = {(0,): 1.0} if share is None else contender.counts_of(images, share)
            names = {f"{contender.name}, {engine}, {' '.join(map(str, counts))} on": counts for counts in ways}
            calls |= {name: [runner(images, counts)] for name, counts in names.items() if name not in calls}
            count = len(images) * max(map(len, ways))
            exact = None if share is None else sum(sum(counts) * weight for counts, weight in ways.items()) / count
            cost = contender.macs + (exact or 0) * (contender.fine_macs or 0)
            parts = {name: ways[counts] for name, counts in names.items()}
            own: dict[str, Any] = {"fine_share": exact, "macs": cost, "images_per_round": count, "parts": parts}
            entries.append(Entry(name=contender.name, engine=engine, **own))
    return measure(entries, calls, len(images), model, plan)


def measure(
    entries: Sequence[Entry],
    calls: Mapping[str, Sequence[Call]],
    batch_size: int,
    model: nn.Module,
    plan: Plan,
) -> TimedBatch:
    """Times calls in turn and makes rows of them, each compared with the backbone of the same scope.

    Args:
        entries: the backbone first; for each scope it is among them in eager torch and in all other engines.
        calls: of a round, by the names in the entries' parts.
    """
    parameter = next(model.parameters())
    device, side = parameter.device, MATRIX_SIDES.get(parameter.device.type, 1024)
    matrix, products = torch.randn(side, side).to(device, parameter.dtype), dict[str, Sequence[Call]]()
    in_torch: list[EngineName] = ["eager", *(engine for engine in plan.engines if engine in IN_TORCH)]
    for engine in in_torch:
        products[f"matrix product, {engine}"] = [partial(prepare(nn.Linear(side, side).to(matrix), engine), matrix)]
    timings = time_in_turn({**calls, **products}, plan.rounds, device, plan.seconds)
    matrix_rate = side**3 / min(timings[name].median for name in products)
    compared: dict[tuple[str, str, str], Timing] = {}  # each contender at the first share
    for entry in entries:
        compared.setdefault((entry.name, entry.engine, entry.scope), entry.per_image(timings))
    drift = max(timing.drift for key, timing in compared.items() if key[:2] == (BACKBONE, "eager"))
    rows = []
    for entry in entries:
        timing, scope = entry.per_image(timings), entry.reference
        predictors = [rival for (name, _, where), rival in compared.items() if (name, where) == (PREDICTOR, scope)]
        predictor = compared.get((PREDICTOR, entry.engine, scope), next(iter(predictors), None))
        weighted = [(1e3 * each, weight) for name, weight in entry.parts.items() for each in timings[name].calls]
        calls_ms, weights = zip(*weighted, strict=True)
        percents = () if entry.name == STREAM else (50, 95, 99)
        found: dict[str, Any] = {f"p{each}_ms": percentile(calls_ms, each / 100, weights) for each in percents}
        timed = (call for name in entry.parts for call in calls[name])
        seen = device.type == "cuda" or (entry.scope == COMPUTING and entry.engine in IN_TORCH)
        rows.append(
            Row(
                **vars(entry),
                batch_size=batch_size,
                gmacs=entry.macs / 1e9,
                rounds=len(timing.rounds),
                images_per_second=1 / timing.median,
                mean_ms=1e3 * batch_size * float(np.mean(timing.totals)),
                **found,
                spread=timing.spread,
                ratio=paired_ratio(compared[BACKBONE, entry.engine, scope].totals, timing.totals),
                eager_ratio=paired_ratio(compared[BACKBONE, "eager", scope].totals, timing.totals),
                predictor_ratio=None if predictor is None else paired_ratio(timing.totals, predictor.totals),
                macs_ratio=entries[0].macs / entry.macs,
                matrix_share=entry.macs / timing.median / matrix_rate,
                peak_megabytes=max(peak_bytes(call, device) for call in timed) / 1e6 if seen else None,
                steady=drift <= STEADY,
            )
        )
    return TimedBatch(batch_size, rows, matrix_rate / 1e9, drift, {name: each.rounds for name, each in timings.items()})


@torch.inference_mode()
def random_images(model: CoarseToFineViT, count: int) -> Tensor:
    """Normal noise of the model's size, device and precision, the same in every run: ``[count, 3, S, S]``.

    They are inference tensors, like those that the stages give: torch.compile takes others for another case.
    """
    parameter = next(model.parameters())
    images = torch.randn(count, 3, *model.image_size, generator=torch.Generator().manual_seed(0))
    return images.to(parameter.device, parameter.dtype)


def compare_with_backbone(model: CoarseToFineViT, batch_size: int, fine_share: float, rounds: int = 10) -> list[Row]:
    """The plain backbone and the predictor alone, both with packed layers, on random images.

    Args:
        fine_share: of images that go on.
    """
    contenders = [each for each in own_contenders(Engines(model.eval())) if each.name in (BACKBONE, PREDICTOR)]
    plan = Plan(("torch",), (fine_share,), rounds, math.inf)
    batch = measure_batch(model, contenders, random_images(model, batch_size), plan)
    return [row for row in batch.rows if row.engine == "torch"]


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that a call holds at a time, on top of what lay there before.

    On a GPU by the counters of torch's allocator, which leave out the memory that CUDA graphs keep; on a CPU by what
    torch's profiler notes of each allocation, which leaves out what libraries take by themselves.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "100")  # else the profiler reports its start and missing GPUs
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    notes = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    return max(accumulate((event["args"]["Bytes"] for event in notes), initial=0))
