"""Times contenders on a batch, in one process and in turn, and relates them to the plain backbone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from cfvit.benchmark.contenders import BACKBONE, PREDICTOR, STREAM, Method, methods_of, prepare
from cfvit.benchmark.memory import peak_bytes
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
from cfvit.modeling.variants import Mode

COMPUTING = "computing"
"""What is timed of an answer if its images lie on the device, ready for the network."""
RANDOM, REAL = "random", "real"
AHEAD, BEHIND, CANNOT_BE_TOLD = "ahead", "behind", "cannot be told"


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
        images_per_round: that each of them answered.
        parts: of which timed calls (`Batch.seconds`) a round consists, and the weight of each.
        images_per_second: by the median round.
        mean_ms: milliseconds of a call in the mean, in a stream those of a batch.
        p50_ms, p95_ms, p99_ms: milliseconds of a call; None where there were too few calls to tell, and in a stream,
            where hard images wait for those of later batches.
        spread: interquartile range of the rounds over their median.
        ratio: how many times faster than the backbone in the same mode, from the same rounds.
        eager_ratio: the same beside timm's backbone in eager mode.
        predictor_ratio: how many times faster than this the predictor is, from the same rounds; that at the first share
            in the same mode, or in the first mode if it was not timed in this one. None where none was timed.
        macs_ratio: the backbone's MACs over these: what the arithmetic promises.
        matrix_share: of the machine's own matrix rate that was reached.
        peak_megabytes: of tensors, that a call holds at most on top of what lay there before, see `peak_bytes`; on
            a CPU None of what other threads prepare.
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
    images_per_round: int
    parts: Mapping[str, float]
    images_per_second: float
    mean_ms: float
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    spread: float
    ratio: Estimate
    eager_ratio: Estimate
    predictor_ratio: Estimate | None
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
    def predictor_is(self) -> str | None:
        """Whether the predictor is faster than this, as far as the interval of ``predictor_ratio`` tells."""
        ratio = self.predictor_ratio
        if ratio is None:
            return None
        if not self.steady or ratio.low <= 1 <= ratio.high:
            return CANNOT_BE_TOLD
        return AHEAD if ratio.low > 1 else BEHIND

    @property
    def label(self) -> str:
        """The name, with the share of images that went on."""
        return self.name if self.fine_share is None else f"{self.name}, {self.fine_share:.0%} fine"

    def to_dict(self) -> dict[str, Any]:
        """For JSON, in which an interval without end is null."""
        told = {"telling": self.telling, "eager_telling": self.eager_telling, "predictor_is": self.predictor_is}
        values = {**asdict(self), **told}
        for name in ("ratio", "eager_ratio", "predictor_ratio"):
            if values[name] is not None:
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
        seconds: by the name of what was called, for each round the seconds of each call.
        notes: what else a reader has to know.
    """

    batch_size: int
    rows: list[Row]
    matrix_gmacs_per_second: float
    drift: float
    seconds: Mapping[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

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
        beside: the scope of the backbone and the predictor that it is compared with, if not its own.
    """

    name: str
    mode: Mode
    images: str
    scope: str
    fine_share: float | None
    macs: float
    count: int
    parts: Mapping[str, float]
    beside: str | None = None


@dataclass(frozen=True)
class _Measured:
    """An entry and the seconds that an image took in each of its rounds."""

    entry: Entry
    series: Series

    @property
    def seconds(self) -> list[float]:
        return [total / self.entry.count for total in self.series.rounds.totals]


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
            ways: dict[tuple[int, ...], float]
            ways = {(0,): 1.0} if share is None else method.share_out(len(images), share)
            names = {f"{method.name}, {mode}, {' '.join(map(str, goings))} on": goings for goings in ways}
            calls |= {name: runner(images, goings) for name, goings in names.items() if name not in calls}
            count = len(images) * max(map(len, ways))
            met = None if share is None else sum(sum(goings) * weight for goings, weight in ways.items()) / count
            parts = {name: ways[goings] for name, goings in names.items()}
            entries.append(Entry(method.name, mode, RANDOM, COMPUTING, met, method.macs(met), count, parts))
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
    measured = [
        _Measured(entry, Series(tuple((timings[name], weight) for name, weight in entry.parts.items())))
        for entry in entries
    ]
    eager = [one for one in measured if (one.entry.name, one.entry.mode) == (BACKBONE, "eager")]
    drift = max(one.series.rounds.drift for one in eager)
    rows = []
    for one in measured:
        told = device.type == "cuda" or one.entry.scope == COMPUTING
        peak = _peak_megabytes([calls[name] for name in one.entry.parts], device) if told else None
        rows.append(_row(one, measured, batch_size, rate, peak, drift <= STEADY))
    seconds = {name: timing.rounds for name, timing in timings.items()}
    return Batch(batch_size, rows, rate / 1e9, drift, seconds)


def _rival(name: str, of: _Measured, measured: Sequence[_Measured], mode: Mode) -> _Measured | None:
    """The first contender of this name that stands beside another in a mode."""
    scope = of.entry.beside or of.entry.scope
    found = (one for one in measured if (one.entry.name, one.entry.scope, one.entry.mode) == (name, scope, mode))
    return next(found, None)


def _predictor_ratio(one: _Measured, measured: Sequence[_Measured]) -> Estimate | None:
    modes: list[Mode] = [one.entry.mode, *(other.entry.mode for other in measured if other.entry.name == PREDICTOR)]
    predictors = (_rival(PREDICTOR, one, measured, asked) for asked in modes)
    predictor = next((found for found in predictors if found is not None), None)
    return None if predictor is None else paired_ratio(one.seconds, predictor.seconds)


def _row(
    one: _Measured,
    measured: Sequence[_Measured],
    batch_size: int,
    matrix_rate: float,
    peak_megabytes: float | None,
    steady: bool,
) -> Row:
    entry, rounds = one.entry, one.series.rounds
    backbone, eager = _rival(BACKBONE, one, measured, entry.mode), _rival(BACKBONE, one, measured, "eager")
    assert backbone is not None
    assert eager is not None
    percentiles = [None if entry.name == STREAM else one.series.milliseconds(share) for share in (0.5, 0.95, 0.99)]
    images_per_second = entry.count / rounds.median
    return Row(
        name=entry.name,
        mode=entry.mode,
        images=entry.images,
        scope=entry.scope,
        batch_size=batch_size,
        fine_share=entry.fine_share,
        gmacs=entry.macs / 1e9,
        rounds=len(rounds.rounds),
        images_per_round=entry.count,
        parts=entry.parts,
        images_per_second=images_per_second,
        mean_ms=1e3 * batch_size * statistics.fmean(one.seconds),
        p50_ms=percentiles[0],
        p95_ms=percentiles[1],
        p99_ms=percentiles[2],
        spread=rounds.spread,
        ratio=paired_ratio(backbone.seconds, one.seconds),
        eager_ratio=paired_ratio(eager.seconds, one.seconds),
        predictor_ratio=_predictor_ratio(one, measured),
        macs_ratio=backbone.entry.macs / entry.macs,
        matrix_share=entry.macs * images_per_second / matrix_rate,
        peak_megabytes=peak_megabytes,
        steady=steady,
    )


def _matrix_product(side: int, mode: Mode, like: Tensor) -> Call:
    """A product of two square matrices, by the layer and in the mode that the networks multiply by."""
    layer = prepare(nn.Linear(side, side).to(like.device, like.dtype), mode)
    rows = torch.randn(side, side, device=like.device, dtype=like.dtype)
    return lambda: layer(rows)


def _peak_megabytes(calls: Sequence[Call | Sequence[Call]], device: torch.device) -> float:
    """The most that any of the calls takes, in 1e6 bytes."""
    each = chain.from_iterable([given] if callable(given) else given for given in calls)
    return max(peak_bytes(call, device) for call in each) / 1e6


@torch.inference_mode()
def random_images(model: CoarseToFineViT, count: int) -> Tensor:
    """Normal noise of the model's size, device and precision, the same in every run: ``[count, 3, S, S]``.

    Inference tensors, as what they become: torch.compile takes others for another case.
    """
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
