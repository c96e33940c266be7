"""A study on disk and on the screen: CSV, Markdown, JSON lines, and ``runs.csv`` of all runs."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cfvit.benchmark.conditions import Conditions
from cfvit.files import atomic_write
from cfvit.paper.paper import read_paper
from cfvit.paper.records import Finished, logged_pace
from cfvit.paper.rows import HEADINGS, Cell, Row, at, parity_threshold, top1
from cfvit.paper.studies import Study
from cfvit.training.recipe import Recipe


@dataclass(frozen=True)
class Account:
    """What was run, for the reader of a table.

    Attributes:
        data, images: what was trained and scored on, and how many images of each kind.
        recipe: the named recipe, and the fields that differ from it.
        epochs: of each training.
        seeds: of the runs.
        conditions: where and when the study was made.
        trained_on: hardware, precision, versions and commit of the trainings, where they differ from that.
    """

    data: str
    images: str
    recipe: str
    epochs: str
    seeds: str
    conditions: Conditions
    trained_on: str

    def lines(self) -> list[tuple[str, str]]:
        """Name and value of each, in the order of reading."""
        where = self.conditions
        lines = [
            ("command", f"`{where.command}`"),
            ("data", self.data),
            ("images", self.images),
            ("recipe", self.recipe),
            ("epochs", self.epochs),
            ("seeds", self.seeds),
            ("hardware", where.hardware),
            ("dtype", where.dtype),
            ("trained on", self.trained_on),
            ("versions", where.versions),
            ("commit", where.commit),
            ("date", where.date),
        ]
        return [(name, value) for name, value in lines if value]

    def caption(self) -> str:
        """The same in short, below a picture."""
        where = self.conditions
        return (
            f"Ours: {self.data}, {self.images}; recipe {self.recipe}; epochs {self.epochs}; seed {self.seeds}; "
            f"{where.hardware}, {where.dtype}. Paper: {read_paper().setting}."
        )


def describe_recipe(name: str, named: Recipe, used: Recipe) -> str:
    """The recipe's name and the fields in which the one that was used differs from it."""
    skipped = {"data", "val_data", "seed", "eval_interval", "workers", "log_interval", "checkpoint_interval"}
    theirs = asdict(named)
    changes = [
        f"{field} {value}" for field, value in asdict(used).items() if field not in skipped and value != theirs[field]
    ]
    return f"{name}, with {', '.join(changes)}" if changes else name


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Measures that some row has a figure of, in the order of `HEADINGS`."""
    return [name for name in HEADINGS if any(_has_figure(row.cells.get(name)) for row in rows)]


def _has_figure(cell: Cell | None) -> bool:
    return cell is not None and (cell.ours is not None or cell.paper is not None)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line for each row; of each measure ours, the spread over seeds, and the paper's."""
    measures = columns_of(rows)
    header = [
        "row",
        *(f"{m}{kind}" for m in measures for kind in ("", "_spread", "_paper")),
        "seeds",
        "place",
        "missing",
    ]
    lines = []
    for row in rows:
        cells = [row.cells.get(measure, Cell(None)) for measure in measures]
        figures = [_plain(value) for cell in cells for value in _figures(cell)]
        lines.append([row.name, *figures, row.seeds, row.place, row.missing or ""])
    _write_lines(path, header, lines)


def _figures(cell: Cell) -> tuple[float | None, float | None, float | None]:
    return cell.ours, None if cell.ours is None else cell.spread, cell.paper


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _write_lines(path: Path, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(lines)


def table_of(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and words of a table: ours with the spread over several seeds, beside the paper's."""
    rows = [row for row in rows if row.shown]
    measures = columns_of(rows)
    printed = {m: any(_paper_of(row, m) is not None for row in rows) for m in measures}
    headings = [""]
    for measure in measures:
        headings += [HEADINGS[measure].text, *(["paper"] if printed[measure] else [])]
    lines = []
    for row in rows:
        line = [row.name]
        for measure in measures:
            cell = row.cells.get(measure, Cell(None))
            line += [_said(cell, row.seeds, measure), *([_number(cell.paper)] if printed[measure] else [])]
        lines.append([*line, row.place, row.missing or ""])
    headings += ["place in the paper", "missing"]
    return _without_empty_columns(headings, lines)


def _without_empty_columns(headings: list[str], lines: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    kept = [i for i in range(len(headings)) if i == 0 or any(line[i] for line in lines)]
    return [headings[i] for i in kept], [[line[i] for i in kept] for line in lines]


def _paper_of(row: Row, measure: str) -> float | None:
    return row.cells.get(measure, Cell(None)).paper


def _said(cell: Cell, seeds: int, measure: str) -> str:
    if cell.ours is None:
        return "-"
    digits = HEADINGS[measure].digits
    spread = f" (spread {cell.spread:.{digits}f})" if seeds > 1 else ""
    return f"{cell.ours:.{digits}f}{spread}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def write_markdown(
    path: Path, study: Study, rows: Sequence[Row], notes: Sequence[str], account: Account, has_picture: bool
) -> None:
    """The table beside the paper's figures, and what was run."""
    headings, lines = table_of(rows)
    parts = [f"# {study.title}", ""]
    parts += [f"![{study.title}]({study.name}.png)", ""] if has_picture else []
    parts += [_markdown_line(headings), _markdown_line(["---"] * len(headings)), *map(_markdown_line, lines), ""]
    paper = read_paper()
    parts += [f"Columns headed *paper* and places are of {paper.title} ({paper.setting}).", ""]
    parts += [f"- {note}" for note in notes] + ([""] if notes else [])
    parts += ["## What was run", "", *(f"- {name}: {value}" for name, value in account.lines()), ""]
    with atomic_write(path) as file:
        file.write_text("\n".join(parts), encoding="utf-8")


def _markdown_line(words: Sequence[str]) -> str:
    return f"| {' | '.join(word.replace('|', chr(92) + '|') for word in words)} |"


def print_table(study: Study, rows: Sequence[Row], notes: Sequence[str]) -> None:
    """The table on standard output at its full width, however narrow the terminal, and its notes."""
    headings, lines = table_of(rows)
    table = Table(*headings, box=None)
    for line in lines:
        table.add_row(*map(escape, line))
    console = Console(width=1000, highlight=False)
    console.print(study.title, style="bold", markup=False)
    console.print(table)
    for note in notes:
        console.print(f"- {note}", markup=False)
    console.print()


def as_json(study: Study, row: Row) -> dict[str, Any]:
    """A row as one JSON object."""
    measures = {name: asdict(cell) for name, cell in row.cells.items() if _has_figure(cell)}
    return {
        "study": study.name,
        "row": row.name,
        "seeds": row.seeds,
        "measures": measures,
        "place": row.place or None,
        "missing": row.missing,
    }


RUN_COLUMNS = (
    "run",
    "model",
    "grid",
    "seed",
    "epochs",
    "coarse",
    "fine",
    "accuracy",
    "exit_share",
    "gmacs",
    "eta",
    "images_per_second",
    "seconds",
    "training_images_per_second",
    "training_matrix_share",
    "hardware",
    "dtype",
    "versions",
    "commit",
    "command",
)
"""Accuracy, exit share in percent, GMACs, eta and images/s are at parity with the plain ViT, or of that itself.

What begins with ``training`` is the median of the training's log.
"""


def write_runs(path: Path, runs: Sequence[Finished]) -> None:
    """One line for each finished run."""
    plains = {run.recipe.seed: run for run in runs if run.recipe.stages == "backbone"}
    _write_lines(path, RUN_COLUMNS, [_run_line(run, plains) for run in runs])


def _run_line(run: Finished, plains: Mapping[int, Finished]) -> list[Any]:
    record = run.record
    figures = _figures_of_run(run, plains.get(record.seed))
    where = record.conditions
    values: dict[str, Any] = {
        "run": record.name,
        "model": f"{run.recipe.backbone}, stages {record.stages}",
        "grid": record.grid,
        "seed": record.seed,
        "epochs": run.recipe.epochs,
        "images_per_second": _plain(record.images_per_second),
        "seconds": f"{record.seconds:.0f}",
        **{name: _plain(value) for name, value in figures.items()},
        **{f"training_{name}": _plain(value) for name, value in logged_pace(run.folder).items()},
        **{name: where[name] for name in ("hardware", "dtype", "versions", "commit", "command")},
    }
    return [values.get(column, "") for column in RUN_COLUMNS]


def _figures_of_run(run: Finished, plain: Finished | None) -> dict[str, float]:
    if run.recipe.stages != "both":
        cost = run.macs.backbone if run.recipe.stages == "backbone" else run.macs.coarse
        return {"accuracy": top1(run.validation, 0), "gmacs": cost / 1e9}
    figures = {"coarse": top1(run.validation, 0), "fine": top1(run.validation, 1)}
    eta = None if plain is None else parity_threshold(run, plain)
    if eta is None:
        return figures
    point = at(run, eta)
    return {
        **figures,
        "accuracy": point.accuracy,
        "exit_share": 100 * point.exit_share,
        "gmacs": point.gmacs,
        "eta": eta,
    }
