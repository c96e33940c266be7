"""What a benchmark found: as sentences, tables, JSON and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cfvit.benchmark import Plan
from cfvit.benchmark.conditions import Conditions
from cfvit.benchmark.contenders import BACKBONE, BOTH_STAGES, NEAR, OWN, PREDICTOR
from cfvit.benchmark.measure import CANNOT_BE_TOLD, Row, TimedBatch
from cfvit.calibration import Estimate
from cfvit.evaluation.timing import FEWEST_ROUNDS, SHARP, STEADY
from cfvit.files import atomic_write, markdown_table
from cfvit.plots.figures import SpeedBar, draw_speed

PEERS_TITLE = "The predictor beside its peers"
PEERS_COLUMNS = ("peer", "engine", "predictor", "its engine", "predictor, times faster", "predictor is")
PAPERS_BACKBONE, PAPERS_GRID = "deit_small_patch16_224", (7, 7)
PAPERS_SPEED = ((None, None, 2601), (0.5, 0.24, 4903), (0.75, 0.51, 3701), (1.0, 1.0, 2760))
"""Table 2 of the paper, DeiT-S on an A100 in batches of 1024: eta, share of hard images, images per second."""
PAPERS_COLUMNS = ("eta", "hard", "paper, images/s", "paper, x", "here, images/s", "here, x backbone, same engine")


KINDS = ("batches", "real")
"""The images of a `Bench`: random, and real."""


@dataclass(frozen=True)
class Bench:
    """A whole run."""

    conditions: Conditions  # under which it was made
    model: str  # its name, as it was given
    backbone: str  # of the model
    coarse_grid: tuple[int, int]
    random_weights: bool  # whether the model was made for the run
    plan: Plan  # how it was measured
    notes: tuple[str, ...]  # what a reader has to know besides
    batches: tuple[TimedBatch, ...]  # on random images, by batch size
    real: tuple[TimedBatch, ...] = ()  # on real images, by batch size; none without data

    @property
    def measured(self) -> tuple[TimedBatch, ...]:
        """All batch sizes, on random and then on real images."""
        return (*self.batches, *self.real)

    @property
    def largest(self) -> TimedBatch:
        """The random images of the largest batch size."""
        return max(self.batches, key=lambda batch: batch.batch_size)

    @property
    def sentences(self) -> list[str]:
        """The notes, where the machine was too noisy, and which engine is fastest."""
        return [
            *self.notes,
            *best_engines(self),
            *(text for batch in self.measured for text in noise_warnings(batch)),
        ]


def noise_warnings(batch: TimedBatch) -> list[str]:
    """Sentences on why the figures of a batch size are not reliable; none on a quiet machine."""
    at, rounds = batch.title, batch.rows[0].rounds
    if rounds < FEWEST_ROUNDS:
        return [f"{at}: {rounds} rounds are too few to tell any ratio, give at least {FEWEST_ROUNDS}"]
    if not batch.steady:
        slower = f"timm's backbone was {batch.drift - 1:.0%} slower in one half of the rounds than in the other"
        return [f"{at}: the machine was too noisy to tell any ratio: {slower} (allowed: {STEADY - 1:.0%})"]
    wide = sum(not row.telling for row in batch.rows)
    which = f"{wide} of {len(batch.rows)} ratios, marked ?: their ends differ by over {SHARP - 1:.0%}"
    return [f"{at}: the machine was too noisy to tell {which}"] if wide else []


COLUMNS: dict[str, Callable[[Row], str]] = {
    "what": lambda row: row.label,
    "engine": lambda row: row.engine,
    "GMACs": lambda row: f"{row.gmacs:.3f}",
    "images/s": lambda row: f"{row.images_per_second:.1f}",
    "mean ms": lambda row: f"{row.mean_ms:.2f}",
    "p50 ms": lambda row: _or_dash(row.p50_ms, ".2f"),
    "p95": lambda row: _or_dash(row.p95_ms, ".2f"),
    "p99": lambda row: _or_dash(row.p99_ms, ".2f"),
    "x backbone, same engine": lambda row: _ratio(row.ratio, row.telling),
    "by MACs": lambda row: f"{row.macs_ratio:.2f}",
    "x timm in torch": lambda row: _ratio(row.eager_ratio, row.eager_telling),
    "matrix rate": lambda row: f"{row.matrix_share:.0%}",
    "spread": lambda row: f"{row.spread:.0%}",
    "peak MB": lambda row: _or_dash(row.peak_megabytes, ".0f"),
}


def cells(row: Row) -> list[str]:
    """A row under `COLUMNS`."""
    return [text(row) for text in COLUMNS.values()]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _ratio(ratio: Estimate, telling: bool) -> str:
    bounded = math.isfinite(ratio.high) and ratio.high > ratio.low
    interval = f" ({ratio.low:.2f} to {ratio.high:.2f})" if bounded else ""
    return f"{ratio.value:.2f}{interval}{'' if telling else ' ?'}"


def best_engines(bench: Bench) -> list[str]:
    """How much faster than timm's model the predictor is in each engine at the first share, and the best default."""
    sentences, behind = [], dict[str, float]()
    for batch in bench.batches:
        first = next((row.fine_share for row in batch.rows if row.name == PREDICTOR), None)
        rows = [row for row in batch.rows if row.name == PREDICTOR and row.fine_share == first]
        rows.sort(key=lambda row: row.images_per_second, reverse=True)
        if len(rows) < 2:
            return []
        ratios = ", ".join(f"{row.engine} {_ratio(row.eager_ratio, row.eager_telling)}" for row in rows)
        sentences.append(f"{batch.title}, {rows[0].label}, times timm's model in torch: {ratios}")
        exact = [row for row in rows if not row.engine.endswith("int8")]
        for row in exact:
            lost = math.log(exact[0].images_per_second / row.images_per_second)
            behind[row.engine] = behind.get(row.engine, 0.0) + lost
    if not behind:
        return sentences
    best = min(behind, key=lambda engine: behind[engine])
    return [*sentences, f"the best default here is {best}, over these batch sizes; int8 gives other answers"]


def heading(batch: TimedBatch) -> str:
    """The title of a batch size's table."""
    return f"{batch.title}; matrix rate {batch.matrix_gmacs_per_second:.0f} GMACs/s"


def peers_comparison(batch: TimedBatch) -> list[list[str]]:
    """The predictor beside each peer, at the first share; rows under `PEERS_COLUMNS`, none if none was timed."""
    predictors = {row.engine: row for row in reversed(batch.rows) if row.name == PREDICTOR}
    rows = []
    for row in batch.rows:
        if row.predictor_ratio is None or row.name in OWN:
            continue
        first = next(each for each in batch.rows if each.name == PREDICTOR)
        if row.fine_share in (None, first.fine_share):
            ratio = _ratio(row.predictor_ratio, row.predictor_is != CANNOT_BE_TOLD)
            engine = row.engine if row.engine in predictors else first.engine
            rows.append([row.label, row.engine, first.label, engine, ratio, row.predictor_is or "-"])
    return rows


def papers_comparison(bench: Bench) -> list[list[str]]:
    """Beside the paper's Table 2, at the largest batch size and in the engine in which the predictor was fastest.

    Returns:
        Rows under `PAPERS_COLUMNS`; none for another network.
    """
    if (bench.backbone, bench.coarse_grid) != (PAPERS_BACKBONE, PAPERS_GRID) or not bench.batches:
        return []
    batch = bench.largest
    predictors = [row for row in batch.rows if row.name == PREDICTOR]
    engine = max(predictors, key=lambda row: row.images_per_second, default=batch.rows[-1]).engine
    table = []
    for eta, share, speed in PAPERS_SPEED:
        name = {None: BACKBONE, 1.0: BOTH_STAGES}.get(share, PREDICTOR)
        alike = [row for row in batch.rows if (row.name, row.engine) == (name, engine)]
        near = [row for row in alike if row.fine_share is None or abs(row.fine_share - (share or 0)) <= NEAR]
        here = [[f"{row.images_per_second:.0f}", _ratio(row.ratio, row.telling)] for row in near]
        setting = ["plain", "-"] if eta is None else [f"{eta}", f"{share:.0%}"]
        table.append([*setting, str(speed), f"{speed / PAPERS_SPEED[0][2]:.2f}", *(here or [["-", "-"]])[0]])
    return table


def summary(bench: Bench) -> dict[str, Any]:
    """What a reader of rows has to know of the run and of each batch size, without the rows."""
    run = {name: value for name, value in asdict(replace(bench, batches=(), real=())).items() if name not in KINDS}
    about = ("batch_size", "matrix_gmacs_per_second", "drift", "steady")
    measured = [
        {"images": batch.rows[0].images, **{name: getattr(batch, name) for name in about}} for batch in bench.measured
    ]
    return {**run, "notes": bench.sentences, "measured": measured}


def to_json(bench: Bench) -> dict[str, Any]:
    """All that was found, for a file: the seconds of all calls as well, so that others can redo the statistics."""

    def batch_to_json(batch: TimedBatch) -> dict[str, Any]:
        seconds = {key: [[round(each, 7) for each in calls] for calls in all] for key, all in batch.seconds.items()}
        rows = [row.to_dict() for row in batch.rows]
        return {**asdict(batch), "steady": batch.steady, "rows": rows, "seconds": seconds}

    return {**summary(bench), **{kind: [batch_to_json(batch) for batch in getattr(bench, kind)] for kind in KINDS}}


def to_markdown(bench: Bench) -> str:
    """A page: conditions, doubts, a table for each batch size, and the paper's figures if they are of this network."""
    made = bench.conditions
    conditions = f"{made.hardware}; {made.dtype}; {made.versions}; commit {made.commit}; {made.date}."
    lines = [f"# Speed of {bench.model}", "", f"`{made.command}`", "", conditions, ""]
    lines += [f"- {text[0].upper()}{text[1:]}." for text in bench.sentences]
    for batch in bench.measured:
        title = heading(batch)
        lines += ["", f"## {title[0].upper()}{title[1:]}", "", *markdown_table(COLUMNS, map(cells, batch.rows))]
        if beside := peers_comparison(batch):
            lines += ["", f"### {PEERS_TITLE}", "", *markdown_table(PEERS_COLUMNS, beside)]
    if paper := papers_comparison(bench):
        lines += ["", f"## Beside the paper's A100, batch size {bench.largest.batch_size} here", ""]
        lines += markdown_table(PAPERS_COLUMNS, paper)
    return "\n".join(lines) + "\n"


def write_report(bench: Bench, folder: Path) -> None:
    """Writes ``bench.json``, ``bench.md`` and ``bench.png``.

    Raises:
        CfvitError: matplotlib is not installed, or the folder cannot be written.
    """
    with atomic_write(folder / "bench.json") as file:
        file.write_text(json.dumps(to_json(bench), separators=(",", ":"), allow_nan=False) + "\n")
    with atomic_write(folder / "bench.md") as file:
        file.write_text(to_markdown(bench))
    panels = {
        batch.title: [
            SpeedBar(row.label, row.engine, row.ratio, row.eager_ratio.value, row.macs_ratio, row.telling)
            for row in batch.rows
            if row.name != BACKBONE
        ]
        for batch in bench.measured
    }
    title = f"{bench.model}, {bench.conditions.dtype}, {bench.conditions.hardware}"
    draw_speed(panels, title, folder / "bench.png")
