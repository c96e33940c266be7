"""What a benchmark found: as sentences, tables, JSON and a picture."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfvit.benchmark.conditions import Conditions
from cfvit.benchmark.contenders import BACKBONE, BOTH_STAGES, NEAR, OWN, PREDICTOR
from cfvit.benchmark.measure import CANNOT_BE_TOLD, COMPUTING, Batch, Plan, Row
from cfvit.calibration import Estimate
from cfvit.evaluation.timing import FEWEST_ROUNDS, SHARP, STEADY
from cfvit.files import atomic_write
from cfvit.plots.explain import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
PAPERS_BACKBONE, PAPERS_GRID = "deit_small_patch16_224", (7, 7)
PAPERS_SPEED = ((None, None, 2601), (0.5, 0.24, 4903), (0.75, 0.51, 3701), (1.0, 1.0, 2760))
"""Table 2 of the paper, DeiT-S on an A100 in batches of 1024: eta, share of hard images, images per second."""


@dataclass(frozen=True)
class Bench:
    """A whole run.

    Attributes:
        conditions: under which it was made.
        model: its name, as it was given.
        backbone, grid: what it is made of.
        random_weights: whether it was made for the run.
        plan: how it was measured.
        notes: what else a reader has to know.
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
        """The notes, and where the machine was too noisy to tell."""
        said = [text for batch in (*self.batches, *self.real) for text in (*batch.notes, *doubts_of(batch))]
        return [*self.notes, *said]


def doubts_of(batch: Batch) -> list[str]:
    """Why figures of a batch size are not to be relied on, in sentences; none on a quiet machine."""
    at, rounds = batch.title, batch.rows[0].rounds
    if rounds < FEWEST_ROUNDS:
        return [f"{at}: {rounds} rounds are too few to tell any ratio, give at least {FEWEST_ROUNDS}"]
    if not batch.steady:
        slower = f"timm's backbone was {batch.drift - 1:.0%} slower in one half of the rounds than in the other"
        return [f"{at}: the machine was too noisy to tell any ratio: {slower} (allowed: {STEADY - 1:.0%})"]
    wide = [row for row in batch.rows if not row.telling]
    if not wide:
        return []
    which = f"{len(wide)} of {len(batch.rows)} ratios"
    return [f"{at}: the machine was too noisy to tell {which}, marked ?: their ends differ by over {SHARP - 1:.0%}"]


def cells(row: Row) -> list[str]:
    """A row under `COLUMNS`."""
    return [
        _name(row),
        row.mode,
        f"{row.gmacs:.3f}",
        f"{row.images_per_second:.1f}",
        _milliseconds(row.mean_ms),
        _milliseconds(row.p50_ms),
        _milliseconds(row.p95_ms),
        _milliseconds(row.p99_ms),
        _ratio(row.ratio, row.telling),
        f"{row.macs_ratio:.2f}",
        _ratio(row.eager_ratio, row.eager_telling),
        f"{row.matrix_share:.0%}",
        f"{row.spread:.0%}",
        "-" if row.peak_megabytes is None else f"{row.peak_megabytes:.0f}",
    ]


def _name(row: Row) -> str:
    return row.label if row.scope == COMPUTING else f"{row.label}, {row.scope}"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _ratio(ratio: Estimate, telling: bool) -> str:
    bounded = math.isfinite(ratio.high) and ratio.high > ratio.low
    interval = f" ({ratio.low:.2f} to {ratio.high:.2f})" if bounded else ""
    return f"{ratio.value:.2f}{interval}{'' if telling else ' ?'}"


def heading(batch: Batch) -> str:
    """What stands above a batch size's table."""
    return f"{batch.title}; matrix rate {batch.matrix_gmacs_per_second:.0f} GMACs/s"


def peers_comparison(batch: Batch) -> list[list[str]]:
    """The predictor beside each peer, those that let images exit at the predictor's first share.

    Returns:
        Rows under `PEERS_COLUMNS`; none if none was timed.
    """
    predictors = [row for row in batch.rows if row.name == PREDICTOR]
    if not predictors:
        return []
    first = predictors[0]
    return [
        [
            _name(row),
            row.mode,
            first.label,
            row.mode if any(one.mode == row.mode for one in predictors) else first.mode,
            "-" if row.predictor_ratio is None else _ratio(row.predictor_ratio, row.predictor_is != CANNOT_BE_TOLD),
            row.predictor_is or "-",
        ]
        for row in batch.rows
        if row.name not in OWN and row.fine_share in (None, first.fine_share)
    ]


PEERS_TITLE = "The predictor beside its peers"
PEERS_COLUMNS = ("peer", "mode", "predictor", "its mode", "predictor, times faster", "predictor is")


def largest(batches: Sequence[Batch]) -> Batch:
    """That of the largest batch size."""
    return max(batches, key=lambda batch: batch.batch_size)


def papers_comparison(bench: Bench) -> list[list[str]]:
    """Beside the paper's Table 2, at the largest batch size and in the mode in which the predictor was fastest.

    Returns:
        Rows of: eta, hard images, the paper's images per second and their ratio, these and theirs; none for another
        network.
    """
    if (bench.backbone, bench.grid) != (PAPERS_BACKBONE, PAPERS_GRID) or not bench.batches:
        return []
    batch = largest(bench.batches)
    predictors = [row for row in batch.rows if row.name == PREDICTOR]
    fastest = max(predictors, key=lambda row: row.images_per_second, default=batch.rows[-1])
    rows = [row for row in batch.rows if row.mode == fastest.mode]
    table = []
    for eta, share, speed in PAPERS_SPEED:
        found = [row for row in rows if _answers_papers(row, share)]
        here = [[f"{row.images_per_second:.0f}", _ratio(row.ratio, row.telling)] for row in found] or [["-", "-"]]
        setting = ["plain", "-"] if eta is None else [f"{eta}", f"{share:.0%}"]
        table.append([*setting, str(speed), f"{speed / PAPERS_SPEED[0][2]:.2f}", *here[0]])
    return table


PAPERS_COLUMNS = ("eta", "hard", "paper, images/s", "paper, x", "here, images/s", "here, x backbone, same mode")


def _answers_papers(row: Row, share: float | None) -> bool:
    if share is None:
        return row.name == BACKBONE
    if share == 1:
        return row.name == BOTH_STAGES
    return row.name == PREDICTOR and abs((row.fine_share or 0) - share) <= NEAR


def to_json(bench: Bench) -> dict[str, Any]:
    """All that was found, for a file."""
    return {
        **_head(bench),
        "batches": [_batch_to_json(batch) for batch in bench.batches],
        "real": [_batch_to_json(batch) for batch in bench.real],
    }


def summary(bench: Bench) -> dict[str, Any]:
    """What a reader of rows has to know of the run and of each batch size, without the rows."""
    batches = [
        {
            "images": batch.rows[0].images,
            "batch_size": batch.batch_size,
            "matrix_gmacs_per_second": batch.matrix_gmacs_per_second,
            "drift": batch.drift,
            "steady": batch.steady,
        }
        for batch in (*bench.batches, *bench.real)
    ]
    return {**_head(bench), "measured": batches}


def _head(bench: Bench) -> dict[str, Any]:
    return {
        "conditions": asdict(bench.conditions),
        "model": bench.model,
        "backbone": bench.backbone,
        "coarse_grid": bench.grid,
        "random_weights": bench.random_weights,
        "plan": asdict(bench.plan),
        "notes": bench.sentences,
    }


def _batch_to_json(batch: Batch) -> dict[str, Any]:
    """With the seconds of all calls, to a tenth of a microsecond, so that others can redo the statistics."""
    rows = [row.to_dict() for row in batch.rows]
    seconds = {name: [[round(call, 7) for call in calls] for calls in rounds] for name, rounds in batch.seconds.items()}
    return {**asdict(batch), "steady": batch.steady, "rows": rows, "seconds": seconds}


def to_markdown(bench: Bench) -> str:
    """A page: conditions, doubts, a table for each batch size, and the paper's figures if they are of this network."""
    made = bench.conditions
    lines = [
        f"# Speed of {bench.model}",
        "",
        f"`{made.command}`",
        "",
        f"{made.hardware}; {made.dtype}; {made.versions}; commit {made.commit}; {made.date}.",
        "",
        *(f"- {_capitalised(text)}." for text in bench.sentences),
    ]
    for batch in (*bench.batches, *bench.real):
        lines += ["", f"## {_capitalised(heading(batch))}", "", *_markdown_table(COLUMNS, map(cells, batch.rows))]
        if beside := peers_comparison(batch):
            lines += ["", f"### {PEERS_TITLE}", "", *_markdown_table(PEERS_COLUMNS, beside)]
    paper = papers_comparison(bench)
    if paper:
        lines += ["", f"## Beside the paper's A100, batch size {largest(bench.batches).batch_size} here", ""]
        lines += _markdown_table(PAPERS_COLUMNS, paper)
    return "\n".join(lines) + "\n"


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def _markdown_table(columns: Sequence[str], rows: Any) -> list[str]:
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
    draw(bench, folder / "bench.png")


TELLING, DOUBTFUL, PROMISED = "#1a62b3", "#a9c4e4", "#b3500f"
_ROW_INCHES, _PANEL_INCHES, _PANELS_ABREAST = 0.27, 4.6, 3


def draw(bench: Bench, path: Path) -> None:
    """A PNG: for each batch size how many times faster than the backbone in the same mode, beside the MACs' promise.

    Raises:
        CfvitError: matplotlib is not installed, or the file cannot be written.
    """
    panels = [*bench.batches, *bench.real]
    abreast = min(len(panels), _PANELS_ABREAST)
    down = math.ceil(len(panels) / abreast)
    most = max(len(_drawn(batch)) for batch in panels)
    size = (_PANEL_INCHES * abreast + 1.2, (_ROW_INCHES * most + 0.9) * down + 0.7)
    figure = require_matplotlib()(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(down, abreast, squeeze=False).flatten()
    for axis, batch in zip(axes, panels, strict=False):
        _draw_panel(axis, batch)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(f"{bench.model}, {bench.conditions.dtype}, {bench.conditions.hardware}", fontsize=10)
    columns = min(4, 2 * abreast)  # more would not fit below a single panel
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _drawn(batch: Batch) -> list[Row]:
    return [row for row in batch.rows if row.name != BACKBONE]


def _draw_panel(axis: Axes, batch: Batch) -> None:
    rows = _drawn(batch)
    places = range(len(rows))
    colours = [TELLING if row.telling else DOUBTFUL for row in rows]
    axis.barh(
        places,
        [row.ratio.value for row in rows],
        color=colours,
        height=0.62,
        label="by the clock, same mode (pale: too noisy to tell)",
    )
    known = [place for place in places if math.isfinite(rows[place].ratio.high)]
    if known:
        ratios = [rows[place].ratio for place in known]
        axis.hlines(
            known, [r.low for r in ratios], [r.high for r in ratios], color="black", lw=1.2, label="95% interval"
        )
    promised = [row.macs_ratio for row in rows]
    axis.plot(promised, places, "d", color=PROMISED, ms=5, ls="", label="promised by the MACs")
    axis.axvline(1, color="black", lw=0.8)
    if any(row.mode != "eager" for row in rows):
        label = "beside timm's backbone in eager mode"
        axis.plot(
            [row.eager_ratio.value for row in rows], places, "o", color="black", mfc="none", ms=5, ls="", label=label
        )
    usual = Counter(row.mode for row in rows).most_common(1)[0][0]
    axis.set_yticks(places, [_tick(row, usual) for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel("times faster than the backbone in the same mode", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_title(f"{batch.title}, {usual} unless marked", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def _tick(row: Row, usual_mode: str) -> str:
    name = _name(row)
    return name if row.mode == usual_mode else f"{name} ({row.mode})"
