"""From finished runs to the rows of a table: what was measured here beside what the paper prints."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cfvit.calibration import Accuracy, rank_images
from cfvit.calibration.choice import choose_eta
from cfvit.errors import CfvitError
from cfvit.evaluation.metrics import SweepPoint, sweep, top_k_accuracy
from cfvit.modeling.exit import goes_on
from cfvit.paper.paper import PaperTable, Published
from cfvit.paper.records import Finished, Scored
from cfvit.paper.studies import Study

Results = Mapping[str, Sequence[Finished]]
"""By name of the run, its seeds; a run that is not there has none."""

CURVE_THRESHOLDS = tuple(i / 50 for i in range(51))
COUNT_THRESHOLDS = tuple(i / 20 for i in range(21))
PARITY = "parity"


@dataclass(frozen=True)
class Cell:
    """One figure: the mean over seeds, highest less lowest of them, and the paper's; None where there is none."""

    ours: float | None
    spread: float = 0.0
    paper: float | None = None

    @property
    def measured(self) -> float:
        """Ours, of a cell that is known to have it."""
        assert self.ours is not None
        return self.ours


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        name: what it is of.
        cells: by measure, see `HEADINGS`.
        seeds: how many runs the means are of.
        place: where the paper prints it, or empty.
        missing: why there are no figures of ours, or of fewer seeds, or None.
        shown: whether it is in the table that people read, or in the CSV file and in JSON alone.
    """

    name: str
    cells: Mapping[str, Cell]
    seeds: int = 0
    place: str = ""
    missing: str | None = None
    shown: bool = True


@dataclass(frozen=True)
class Heading:
    """How a measure is headed and printed."""

    text: str
    digits: int


HEADINGS: Mapping[str, Heading] = {
    "eta": Heading("eta", 3),
    "accuracy": Heading("top-1 %", 2),
    "coarse": Heading("coarse top-1 %", 2),
    "fine": Heading("fine top-1 %", 2),
    "exit_share": Heading("exit share %", 1),
    "gmacs": Heading("GMACs", 4),
    "gmacs_as_paper": Heading("GMACs as the paper counts", 4),
    "images_per_second": Heading("images/s", 1),
    "speedup": Heading("speed-up", 2),
    "highest": Heading("highest, top-1 %", 2),
    "lowest": Heading("lowest, top-1 %", 2),
    "right_coarse": Heading("right at the coarse stage", 0),
    "right_fine": Heading("right at the fine stage", 0),
}


def top1(scored: Scored, stage: int) -> float:
    """Top-1 of a stage in percent; -1 is the last that was trained."""
    return top_k_accuracy(scored.logits[stage], scored.labels, 1)


def _gmacs(run: Finished) -> float:
    """The cost of what was trained: of the only stage, or of both."""
    costs = {"backbone": run.macs.backbone, "coarse": run.macs.coarse, "both": run.macs.both}
    return costs[run.recipe.stages] / 1e9


MEASURES: Mapping[str, Callable[[Finished], float]] = {
    "accuracy": lambda run: top1(run.validation, -1),
    "coarse": lambda run: top1(run.validation, 0),
    "fine": lambda run: top1(run.validation, 1),
    "gmacs": _gmacs,
    "gmacs_as_paper": lambda run: run.macs.both_in_paper / 1e9,
}
"""Columns of an ablation."""

_PAPERS_NAMES = {"gmacs_as_paper": "gmacs"}


def summarise(values: Sequence[float], paper: float | None = None) -> Cell:
    """Mean and spread over seeds."""
    if not values:
        return Cell(None, 0.0, paper)
    return Cell(statistics.fmean(values), max(values) - min(values), paper)


def papers_value(published: Published | None, measure: str) -> float | None:
    """What the paper prints for a measure, None where it prints nothing."""
    return None if published is None else published.values.get(_PAPERS_NAMES.get(measure, measure))


def ablation_rows(study: Study, results: Results, missing: Mapping[str, str], paper: PaperTable) -> list[Row]:
    """A row for each variant.

    Args:
        missing: by name of the run, why seeds of it are not there.
    """
    rows = []
    for variant in study.variants:
        runs, published = results.get(variant.run, ()), paper.row(variant.published)
        cells = {
            name: summarise([MEASURES[name](run) for run in runs], papers_value(published, name))
            for name in study.measures
        }
        place = "" if published is None else published.place
        rows.append(Row(variant.label, cells, len(runs), place, missing.get(variant.run)))
    return rows


def parity_threshold(run: Finished, plain: Finished) -> float | None:
    """The cheapest eta whose accuracy on the hold-out is at least the plain ViT's there; None if none is."""
    coarse, fine = run.holdout.logits
    trade = rank_images(coarse, fine, run.holdout.labels)
    try:
        return choose_eta(Accuracy(top1(plain.holdout, -1)), trade, run.macs)
    except CfvitError:  # out of reach
        return None


def at(run: Finished, eta: float) -> SweepPoint:
    """A run's accuracy and cost on the validation images at an eta."""
    return curve(run, (eta,))[0]


def curve(run: Finished, thresholds: Sequence[float] = CURVE_THRESHOLDS) -> list[SweepPoint]:
    """A run's accuracy and cost on the validation images over eta."""
    coarse, fine = run.validation.logits
    return sweep(coarse, fine, run.validation.labels, run.macs, thresholds, run.rule)


def mean_curve(runs: Sequence[Finished], thresholds: Sequence[float] = CURVE_THRESHOLDS) -> list[dict[str, Cell]]:
    """At each eta: eta, accuracy, exit share and GMACs, over seeds."""
    curves = [curve(run, thresholds) for run in runs]
    columns = [_columns(points) for points in zip(*curves, strict=True)]
    return [{name: summarise(values) for name, values in column.items()} for column in columns]


@dataclass(frozen=True)
class OperatingPoint:
    """A way of running a model that a row of table 2 or 3 is about.

    Attributes:
        name: the row's.
        run: name of the run.
        eta: a number, ``"parity"``, or None for a plain ViT.
        published: the paper's row, or None.
    """

    name: str
    run: str
    eta: float | str | None
    published: Published | None = None

    def threshold(self, run: Finished, plain: Finished | None) -> float | None:
        """The eta of a run at this point; None where the plain ViT's accuracy is out of reach or not known."""
        if self.eta == PARITY:
            return None if plain is None else parity_threshold(run, plain)
        return None if self.eta is None else float(self.eta)


OPERATING_MEASURES = ("eta", "accuracy", "exit_share", "gmacs")


def operating_row(
    point: OperatingPoint, runs: Sequence[Finished], plains: Mapping[int, Finished], missing: str | None
) -> Row:
    """The row of an operating point.

    Args:
        plains: the plain ViT by seed.
    """
    if point.eta is None:
        values = {name: [MEASURES[name](run) for run in runs] for name in ("accuracy", "gmacs")}
        return _filled(point, values, len(runs), missing)
    pairs = [(run, point.threshold(run, plains.get(run.recipe.seed))) for run in runs]
    reached = [at(run, eta) for run, eta in pairs if eta is not None]
    unknown = sum(run.recipe.seed not in plains for run, eta in pairs if eta is None)
    short = len(runs) - len(reached) - unknown
    reasons = [
        missing or "",
        _of_seeds("no eta reaches the plain ViT's accuracy on the hold-out", short, len(runs)),
        _of_seeds("the plain ViT is not there", unknown, len(runs)),
    ]
    return _filled(point, _columns(reached), len(reached), "; ".join(filter(None, reasons)) or None)


def _of_seeds(reason: str, count: int, seeds: int) -> str:
    """Why a figure is missing and for how many seeds; empty if for none."""
    if count == 0:
        return ""
    return reason if count == seeds else f"{reason} for {count} of {seeds} seeds"


def _columns(points: Sequence[SweepPoint]) -> dict[str, list[float]]:
    return {
        "eta": [point.threshold for point in points],
        "accuracy": [point.accuracy for point in points],
        "exit_share": [100 * point.exit_share for point in points],
        "gmacs": [point.gmacs for point in points],
    }


def _filled(point: OperatingPoint, values: Mapping[str, Sequence[float]], seeds: int, missing: str | None) -> Row:
    published = point.published
    cells = {name: summarise(values.get(name, ()), papers_value(published, name)) for name in OPERATING_MEASURES}
    return Row(point.name, cells, seeds, "" if published is None else published.place, missing)


def count_right(run: Finished, eta: float) -> tuple[int, int]:
    """How many validation images are answered right at the coarse and at the fine stage at an eta (Fig. 8)."""
    coarse, fine = run.validation.logits
    hard = goes_on(run.rule.coarse(coarse), eta)
    right_coarse, right_fine = (logits.argmax(-1) == run.validation.labels for logits in (coarse, fine))
    return int((right_coarse & ~hard).sum()), int((right_fine & hard).sum())
