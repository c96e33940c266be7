"""What a benchmark found: as sentences, tables, JSON and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cfvit.benchmark.conditions import Conditions
from cfvit.benchmark.contenders import BACKBONE, BOTH_STAGES, NEAR, OWN, PREDICTOR
from cfvit.benchmark.measure import CANNOT_BE_TOLD, Batch, Plan, Row
from cfvit.calibration import Estimate
from cfvit.evaluation.timing import FEWEST_ROUNDS, SHARP, STEADY
from cfvit.files import atomic_write
from cfvit.plots.speed import Bar, draw_speed

COLUMNS = (
    "what",
    "mode",
    "GMACs",
    "images/s",
    "mean ms",
    "p50 ms",
    "p95",
    "p99",
    "x backbone, same mode",
    "by MACs",
    "x timm eager",
    "matrix rate",
    "spread",
    "peak MB",
)
PEERS_TITLE = "The predictor beside its peers"
PEERS_COLUMNS = ("peer", "mode", "predictor", "its mode", "predictor, times faster", "predictor is")
PAPERS_BACKBONE, PAPERS_GRID = "deit_small_patch16_224", (7, 7)
PAPERS_SPEED = ((None, None, 2601), (0.5, 0.24, 4903), (0.75, 0.51, 3701), (1.0, 1.0, 2760))
"""Table 2 of the paper, DeiT-S on an A100 in batches of 1024: eta, share of hard images, images per second."""
PAPERS_COLUMNS = ("eta", "hard", "paper, images/s", "paper, x", "here, images/s", "here, x backbone, same mode")


@dataclass(frozen=True)
class Bench:
    """A whole run.

    Attributes:
        conditions: under which it was made.
        model: its name, as it was given.
        backbone, grid: the model's backbone and coarse grid.
        random_weights: whether the model was made for the run.
        plan: how it was measured.
        notes: what a reader has to know besides.
        batches: on random images, by batch size.
        real: on real images, by batch size; none without data.
    """

    conditions: Conditions
    model: str
    backbone: str
    grid: tuple[int, int]
    random_weights: bool
    plan: Plan
    notes: tuple[str, ...]
    batches: tuple[Batch, ...]
    real: tuple[Batch, ...] = ()

    @property
    def sentences(self) -> list[str]:
        """The notes, and where the machine was too noisy."""
        return [*self.notes, *(text for batch in (*self.batches, *self.real) for text in doubts_of(batch))]


def doubts_of(batch: Batch) -> list[str]:
    """Why figures of a batch size are not to be relied on, in sentences; none on a quiet machine."""
    at, rounds = batch.title, batch.rows[0].rounds
    if rounds < FEWEST_ROUNDS:
        return [f"{at}: {rounds} rounds are too few to tell any ratio, give at least {FEWEST_ROUNDS}"]
    if not batch.steady:
        slower = f"timm's backbone was {batch.drift - 1:.0%} slower in one half of the rounds than in the other"
        return [f"{at}: the machine was too noisy to tell any ratio: {slower} (allowed: {STEADY - 1:.0%})"]
    wide = sum(not row.telling for row in batch.rows)
    if not wide:
        return []
    which = f"{wide} of {len(batch.rows)} ratios"
    return [f"{at}: the machine was too noisy to tell {which}, marked ?: their ends differ by over {SHARP - 1:.0%}"]


def cells(row: Row) -> list[str]:
    """A row under `COLUMNS`."""
    times = (row.mean_ms, row.p50_ms, row.p95_ms, row.p99_ms)
    return [
        row.label,
        row.mode,
        f"{row.gmacs:.3f}",
        f"{row.images_per_second:.1f}",
        *("-" if value is None else f"{value:.2f}" for value in times),
        _ratio(row.ratio, row.telling),
        f"{row.macs_ratio:.2f}",
        _ratio(row.eager_ratio, row.eager_telling),
        f"{row.matrix_share:.0%}",
        f"{row.spread:.0%}",
        "-" if row.peak_megabytes is None else f"{row.peak_megabytes:.0f}",
    ]


def _ratio(ratio: Estimate, telling: bool) -> str:
    bounded = math.isfinite(ratio.high) and ratio.high > ratio.low
    interval = f" ({ratio.low:.2f} to {ratio.high:.2f})" if bounded else ""
    return f"{ratio.value:.2f}{interval}{'' if telling else ' ?'}"


def heading(batch: Batch) -> str:
    """The title of a batch size's table."""
    return f"{batch.title}; matrix rate {batch.matrix_gmacs_per_second:.0f} GMACs/s"


def peers_comparison(batch: Batch) -> list[list[str]]:
    """The predictor beside each peer, at the first share; rows under `PEERS_COLUMNS`, none if none was timed."""
    predictors = {row.mode: row for row in reversed(batch.rows) if row.name == PREDICTOR}
    rows = []
    for row in batch.rows:
        if row.predictor_ratio is None or row.name in OWN:
            continue
        first = next(each for each in batch.rows if each.name == PREDICTOR)
        if row.fine_share in (None, first.fine_share):
            ratio = _ratio(row.predictor_ratio, row.predictor_is != CANNOT_BE_TOLD)
            mode = row.mode if row.mode in predictors else first.mode
            rows.append([row.label, row.mode, first.label, mode, ratio, row.predictor_is or "-"])
    return rows


def papers_comparison(bench: Bench) -> list[list[str]]:
    """Beside the paper's Table 2, at the largest batch size and in the mode in which the predictor was fastest.

    Returns:
        Rows under `PAPERS_COLUMNS`; none for another network.
    """
    if (bench.backbone, bench.grid) != (PAPERS_BACKBONE, PAPERS_GRID) or not bench.batches:
        return []
    batch = _largest(bench)
    predictors = [row for row in batch.rows if row.name == PREDICTOR]
    fastest = max(predictors, key=lambda row: row.images_per_second, default=batch.rows[-1])
    table = []
    for eta, share, speed in PAPERS_SPEED:
        name = {None: BACKBONE, 1.0: BOTH_STAGES}.get(share, PREDICTOR)
        here = ["-", "-"]
        for row in batch.rows:
            near = row.fine_share is None or abs(row.fine_share - (share or 0)) <= NEAR
            if (row.name, row.mode) == (name, fastest.mode) and near:
                here = [f"{row.images_per_second:.0f}", _ratio(row.ratio, row.telling)]
                break
        setting = ["plain", "-"] if eta is None else [f"{eta}", f"{share:.0%}"]
        table.append([*setting, str(speed), f"{speed / PAPERS_SPEED[0][2]:.2f}", *here])
    return table


def _largest(bench: Bench) -> Batch:
    return max(bench.batches, key=lambda batch: batch.batch_size)


def summary(bench: Bench) -> dict[str, Any]:
    """What a reader of rows has to know of the run and of each batch size, without the rows."""
    return {
        "conditions": asdict(bench.conditions),
        "model": bench.model,
        "backbone": bench.backbone,
        "coarse_grid": bench.grid,
        "random_weights": bench.random_weights,
        "plan": asdict(bench.plan),
        "notes": bench.sentences,
        "measured": [
            {
                "images": batch.rows[0].images,
                "batch_size": batch.batch_size,
                "matrix_gmacs_per_second": batch.matrix_gmacs_per_second,
                "drift": batch.drift,
                "steady": batch.steady,
            }
            for batch in (*bench.batches, *bench.real)
        ],
    }


def to_json(bench: Bench) -> dict[str, Any]:
    """All that was found, for a file: the seconds of all calls as well, so that others can redo the statistics."""

    def batch_to_json(batch: Batch) -> dict[str, Any]:
        seconds = {
            key: [[round(call, 7) for call in calls] for calls in rounds] for key, rounds in batch.seconds.items()
        }
        rows = [row.to_dict() for row in batch.rows]
        return {**asdict(batch), "steady": batch.steady, "rows": rows, "seconds": seconds}

    kinds = {"batches": bench.batches, "real": bench.real}
    return {**summary(bench), **{kind: [batch_to_json(batch) for batch in found] for kind, found in kinds.items()}}


def to_markdown(bench: Bench) -> str:
    """A page: conditions, doubts, a table for each batch size, and the paper's figures if they are of this network."""
    made = bench.conditions
    conditions = f"{made.hardware}; {made.dtype}; {made.versions}; commit {made.commit}; {made.date}."
    lines = [f"# Speed of {bench.model}", "", f"`{made.command}`", "", conditions, ""]
    lines += [f"- {text[0].upper()}{text[1:]}." for text in bench.sentences]
    for batch in (*bench.batches, *bench.real):
        title = heading(batch)
        lines += ["", f"## {title[0].upper()}{title[1:]}", "", *_markdown_table(COLUMNS, map(cells, batch.rows))]
        if beside := peers_comparison(batch):
            lines += ["", f"### {PEERS_TITLE}", "", *_markdown_table(PEERS_COLUMNS, beside)]
    if paper := papers_comparison(bench):
        lines += ["", f"## Beside the paper's A100, batch size {_largest(bench).batch_size} here", ""]
        lines += _markdown_table(PAPERS_COLUMNS, paper)
    return "\n".join(lines) + "\n"


def _markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


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
            Bar(row.label, row.mode, row.ratio, row.eager_ratio.value, row.macs_ratio, row.telling)
            for row in batch.rows
            if row.name != BACKBONE
        ]
        for batch in (*bench.batches, *bench.real)
    }
    title = f"{bench.model}, {bench.conditions.dtype}, {bench.conditions.hardware}"
    draw_speed(panels, title, folder / "bench.png")
