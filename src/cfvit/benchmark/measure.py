"""Times contenders on a batch, in one process and in turn, and relates them to the plain backbone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from cfvit.benchmark.contenders import BACKBONE, PREDICTOR, Method, methods_of, prepare, whole_images
from cfvit.calibration import Estimate
from cfvit.evaluation.timing import STEADY, Call, Timing, is_sharp, paired_ratio, percentile, time_in_turn
from cfvit.model import CoarseToFineViT
from cfvit.variants import Mode

MATRIX_SIDES = {"cpu": 1024, "cuda": 8192}
COMPUTING = "computing"
"""What is timed of an answer if its images lie on the device, ready for the network."""
RANDOM, REAL = "random", "real"


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        modes: in which contenders are prepared; the plain backbone is always timed in eager mode as well.
        shares: of images that go on, for contenders that let some exit.
        rounds: at most so many.
        seconds: for each batch size; at least `cfvit.evaluation.timing.FEWEST_ROUNDS` rounds are made.
    """

    modes: tuple[Mode, ...]
    shares: tuple[float, ...]
    rounds: int
    seconds: float


@dataclass(frozen=True)
class Row:
    """A contender at a batch size.

    Attributes:
        name: of the method.
        mode: in which it was prepared.
        images: `RANDOM` or `REAL`.
        scope: what was timed, `COMPUTING` or more.
        batch_size: images of a call.
        fine_share: of images that went on; None where all are treated alike.
        gmacs: mean cost of an image in 1e9 multiply-accumulates.
        rounds: that were counted.
        images_per_second: by the median round.
        p50_ms, p95_ms, p99_ms: milliseconds of a call; None where there were too few calls to tell.
        spread: interquartile range of the rounds over their median.
        ratio: how many times faster than the backbone in the same mode, from the same rounds.
        eager_ratio: the same beside timm's backbone in eager mode.
        macs_ratio: the backbone's MACs over these: what the arithmetic promises.
        matrix_share: of the machine's own matrix rate that was reached.
        peak_megabytes: memory that a call takes on top of what lay there before; None on a CPU.
        steady: whether the reference was as fast in the first half of the rounds as in the second.
    """

    name: str
    mode: Mode
    images: str
    scope: str
    batch_size: int
    fine_share: float | None
    gmacs: float
    rounds: int
    images_per_second: float
    p50_ms: float
    p95_ms: float | None
    p99_ms: float | None
    spread: float
    ratio: Estimate
    eager_ratio: Estimate
    macs_ratio: float
    matrix_share: float
    peak_megabytes: float | None
    steady: bool

    @property
    def telling(self) -> bool:
        """Whether the machine was quiet enough to tell ``ratio``."""
        return self.steady and is_sharp(self.ratio)

    @property
    def eager_telling(self) -> bool:
        """Whether it was quiet enough to tell ``eager_ratio``."""
        return self.steady and is_sharp(self.eager_ratio)

    @property
    def label(self) -> str:
        """The name, with the share of images that went on."""
        return self.name if self.fine_share is None else f"{self.name}, {self.fine_share:.0%} fine"

    def to_dict(self) -> dict[str, Any]:
        """For JSON, in which an interval without end is null."""
        values = {**asdict(self), "telling": self.telling, "eager_telling": self.eager_telling}
        for name in ("ratio", "eager_ratio"):
            values[name] = {key: end if math.isfinite(end) else None for key, end in values[name].items()}
        return values


@dataclass(frozen=True)
class Batch:
    """All contenders at a batch size.

    Attributes:
        batch_size: images of a call.
        rows: in the order of the contenders.
        matrix_gmacs_per_second: the machine's own rate, a large matrix product in the same precision and rounds.
        drift: how many times slower the slower half of the reference's rounds was.
    """

    batch_size: int
    rows: list[Row]
    matrix_gmacs_per_second: float
    drift: float

    @property
    def steady(self) -> bool:
        """Whether the reference was as fast in the first half of the rounds as in the second."""
        return self.drift <= STEADY

    @property
    def title(self) -> str:
        """What tells it from the others."""
        return f"{self.rows[0].images} images, batch size {self.batch_size}"


@dataclass(frozen=True)
class Series:
    """The times of one row, perhaps of several kinds of calls that count differently.

    Attributes:
        parts: timings and the weight of each; weights sum to 1.
    """

    parts: tuple[tuple[Timing, float], ...]

    @property
    def rounds(self) -> Timing:
        """The mean call of each round."""
        totals = [[weight * seconds for seconds in timing.totals] for timing, weight in self.parts]
        return Timing(tuple((sum(column),) for column in zip(*totals, strict=True)))

    def milliseconds(self, share: float) -> float | None:
        """The time that this share of calls does not exceed; None if there are too few to tell."""
        seconds = list(chain.from_iterable(timing.calls for timing, _ in self.parts))
        weights = list(chain.from_iterable([weight] * len(timing.calls) for timing, weight in self.parts))
        found = percentile(seconds, share, weights)
        return None if found is None else 1e3 * found


@dataclass(frozen=True)
class Entry:
    """What a row is made of.

    Attributes:
        name, mode, images, scope, fine_share: as of `Row`.
        macs: mean cost of an image.
        count: images of a round.
        parts: names of timed calls, and the weight of each.
    """

    name: str
    mode: Mode
    images: str
    scope: str
    fine_share: float | None
    macs: float
    count: int
    parts: Mapping[str, float]


@torch.inference_mode()
def measure_batch(model: CoarseToFineViT, methods: Sequence[Method], images: Tensor, plan: Plan) -> Batch:
    """Times contenders on normalised images ``[B, 3, S, S]`` of the model's device and precision.

    Args:
        methods: the plain backbone first.
    """
    calls: dict[str, Call] = {}
    entries: list[Entry] = []
    for method, mode in _in_modes(methods, plan.modes):
        runner = method.build(mode)
        for share in plan.shares if method.more_macs is not None else (None,):
            weights = {0: 1.0} if share is None else whole_images(len(images), share)
            names = {f"{method.name}, {mode}, {going} on": (going, weight) for going, weight in weights.items()}
            calls |= {name: runner(images, going) for name, (going, _) in names.items() if name not in calls}
            met = None if share is None else sum(going * weight for going, weight in names.values()) / len(images)
            parts = {name: weight for name, (_, weight) in names.items()}
            entries.append(Entry(method.name, mode, RANDOM, COMPUTING, met, method.macs(met), len(images), parts))
    return relate(entries, calls, len(images), model, plan)


def _in_modes(methods: Sequence[Method], modes: Sequence[Mode]) -> list[tuple[Method, Mode]]:
    """Each method in its modes; the backbone in eager mode before all."""
    pairs: list[tuple[Method, Mode]] = [(methods[0], "eager")]
    for mode in dict.fromkeys(modes):
        for method in methods:
            if method.modes is None and (method, mode) != pairs[0]:
                pairs.append((method, mode))
    for method in methods:
        for mode in method.modes or ():
            pairs.append((method, mode))
    return pairs


def relate(
    entries: Sequence[Entry],
    calls: Mapping[str, Call | Sequence[Call]],
    batch_size: int,
    model: CoarseToFineViT,
    plan: Plan,
) -> Batch:
    """Times calls in turn and makes rows of them, each beside the backbone's of the same scope.

    Args:
        entries: among them, for each scope and mode, one named `BACKBONE`.
        calls: by the names in ``entries``.
    """
    parameter = next(model.parameters())
    device, side = parameter.device, MATRIX_SIDES.get(parameter.device.type, 1024)
    products = {f"matrix product, {mode}": _matrix_product(side, mode, parameter) for mode in ("eager", *plan.modes)}
    timings = time_in_turn({**calls, **products}, plan.rounds, device, plan.seconds)
    rate = side**3 / min(timings[name].median for name in products)
    series = [Series(tuple((timings[name], weight) for name, weight in entry.parts.items())) for entry in entries]
    backbones = {
        (entry.scope, entry.mode): (one.rounds, entry.macs)
        for entry, one in zip(entries, series, strict=True)
        if entry.name == BACKBONE
    }
    drift = max(rounds.drift for (_, mode), (rounds, _) in backbones.items() if mode == "eager")
    rows = []
    for entry, one in zip(entries, series, strict=True):
        peak = _peak_megabytes([calls[name] for name in entry.parts], device)
        references = backbones[entry.scope, entry.mode], backbones[entry.scope, "eager"]
        rows.append(_row(entry, one, references, batch_size, rate, peak, drift <= STEADY))
    return Batch(batch_size, rows, rate / 1e9, drift)


def _row(
    entry: Entry,
    series: Series,
    references: tuple[tuple[Timing, float], tuple[Timing, float]],
    batch_size: int,
    matrix_rate: float,
    peak_megabytes: float | None,
    steady: bool,
) -> Row:
    """Beside the backbone in the same mode, and in eager mode: of each its rounds and MACs."""
    rounds = series.rounds
    (beside, macs), (eager, _) = references
    median = series.milliseconds(0.5)
    assert median is not None
    return Row(
        name=entry.name,
        mode=entry.mode,
        images=entry.images,
        scope=entry.scope,
        batch_size=batch_size,
        fine_share=entry.fine_share,
        gmacs=entry.macs / 1e9,
        rounds=len(rounds.rounds),
        images_per_second=entry.count / rounds.median,
        p50_ms=median,
        p95_ms=series.milliseconds(0.95),
        p99_ms=series.milliseconds(0.99),
        spread=rounds.spread,
        ratio=paired_ratio(beside.totals, rounds.totals),
        eager_ratio=paired_ratio(eager.totals, rounds.totals),
        macs_ratio=macs / entry.macs,
        matrix_share=entry.macs * entry.count / rounds.median / matrix_rate,
        peak_megabytes=peak_megabytes,
        steady=steady,
    )


def _matrix_product(side: int, mode: Mode, like: Tensor) -> Call:
    """A product of two square matrices, by the layer and in the mode that the networks multiply by."""
    layer = prepare(nn.Linear(side, side).to(like.device, like.dtype), mode)
    rows = torch.randn(side, side, device=like.device, dtype=like.dtype)
    return lambda: layer(rows)


def _peak_megabytes(calls: Sequence[Call | Sequence[Call]], device: torch.device) -> float | None:
    """The most that any of the calls allocates on top of what lies there, in 1e6 bytes."""
    if device.type != "cuda":
        return None
    peaks = []
    for call in chain.from_iterable([given] if callable(given) else given for given in calls):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    return max(peaks) / 1e6


def random_images(model: CoarseToFineViT, count: int) -> Tensor:
    """Normal noise of the model's size, device and precision, the same in every run: ``[count, 3, S, S]``."""
    parameter = next(model.parameters())
    images = torch.randn(count, 3, *model.image_size, generator=torch.Generator().manual_seed(0))
    return images.to(parameter.device, parameter.dtype)


def compare_with_backbone(model: CoarseToFineViT, batch_size: int, fine_share: float, rounds: int = 10) -> list[Row]:
    """The plain backbone and the predictor alone, both accelerated, on random images.

    Args:
        fine_share: of images that go on.
    """
    methods = [method for method in methods_of(model.eval(), peers=False) if method.name in (BACKBONE, PREDICTOR)]
    plan = Plan(("accelerated",), (fine_share,), rounds, math.inf)
    batch = measure_batch(model, methods, random_images(model, batch_size), plan)
    return [row for row in batch.rows if row.mode == "accelerated"]
