"""Rows of what was measured here beside what the paper prints; the tables of ablations and the curves over eta."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from cfvit.benchmark.measure import TimedBatch
from cfvit.calibration.tradeoff import share_estimate
from cfvit.evaluation.metrics import Collected, SweepPoint
from cfvit.paper.runs import Result, top1
from cfvit.paper.studies import DEFAULT, PLAIN, STUDIES, Published, Study, Variant
from cfvit.plots import figures as pictures
from cfvit.plots.figures import Bar, Curve
from cfvit.training.recipe import Recipe

CURVE_ETAS = tuple(i / 50 for i in range(51))
COUNT_ETAS = tuple(i / 20 for i in range(21))
"""Etas of rows; those of two decimals are in the CSV file and in JSON alone."""
BATCH_SIZES = (1, 8, 32)
"""In which methods are timed side by side."""


@dataclass(frozen=True)
class Cell:
    """One figure: the mean over seeds, highest less lowest of them, the paper's, and a 95% interval of ours."""

    ours: float | None
    spread: float = 0.0
    paper: float | None = None
    interval: tuple[float, float] | None = None
    sure: bool = True  # whether the machine was quiet enough, for a figure that was timed

    @property
    def known(self) -> bool:
        """Whether there is a figure, ours or the paper's."""
        return self.ours is not None or self.paper is not None


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    name: str  # what it is of
    cells: Mapping[str, Cell]  # by measure, see `HEADINGS`
    seeds: int = 0  # how many runs the means are of
    place: str = ""  # where the paper prints it
    missing: str | None = None  # why there are no figures of ours, or of fewer seeds
    shown: bool = True  # whether people read it; if not, it is in the CSV file and in JSON alone

    def cell(self, measure: str) -> Cell:
        """The figure of a measure, an empty one if there is none."""
        return self.cells.get(measure, Cell(None))


HEADINGS: Mapping[str, tuple[str, int]] = {
    "eta": ("eta", 3),
    "accuracy": ("top-1 %", 2),
    "coarse": ("coarse top-1 %", 2),
    "fine": ("fine top-1 %", 2),
    "difference": ("points above the plain ViT", 2),
    "agreement": ("same answer as the plain ViT %", 1),
    "bias": ("answers with a class of a part %", 1),
    "exit_share": ("exit share %", 1),
    "gmacs": ("GMACs", 4),
    "saving": ("MACs saved %", 1),
    "gmacs_as_paper": ("GMACs as the paper counts", 4),
    "images_per_second": ("images/s", 1),
    "speedup": ("speed-up", 2),
    **{f"images_per_second_{size}": (f"images/s, batch {size}", 1) for size in BATCH_SIZES},
    **{f"speedup_{size}": (f"times the plain ViT's speed, batch {size}", 3) for size in BATCH_SIZES},
    "highest": ("highest, top-1 %", 2),
    "lowest": ("lowest, top-1 %", 2),
    "right_coarse": ("right at the coarse stage", 0),
    "right_fine": ("right at the fine stage", 0),
}
"""The text above the column of a measure, and its decimals."""

MEASURES: Mapping[str, Callable[[Result], float]] = {
    "accuracy": lambda result: top1(result.validation),
    "coarse": lambda result: top1(result.validation, "coarse"),
    "fine": lambda result: top1(result.validation, "fine"),
    "gmacs": lambda result: result.macs[list(result.validation.logits)[-1]] / 1e9,
    "gmacs_as_paper": lambda result: result.macs["fine_in_paper"] / 1e9,
}
"""Columns of an ablation."""


def mean_row(
    name: str, values: Mapping[str, Sequence[float]], published: Published | None = None, missing: str | None = None
) -> Row:
    """A row of means and spreads over the seeds' values of each measure, beside what the paper prints."""
    printed = {} if published is None else {**published.values, "gmacs_as_paper": published.values.get("gmacs")}
    cells = {}
    for measure, each in values.items():
        figures = (statistics.fmean(each), max(each) - min(each)) if each else (None, 0.0)
        cells[measure] = Cell(*figures, printed.get(measure))
    seeds = max(map(len, values.values()))
    return Row(name, cells, seeds, "" if published is None else published.place, missing)


def published_row(published: Published) -> Row:
    """A row of the paper's alone, with its accuracy and cost."""
    name = published.family if published.name == "plain" else published.name
    if "eta" in published.values:
        name = f"CF-ViT ({published.family}), eta {published.values['eta']:g}"
    return mean_row(f"{name}, published", {"eta": (), "accuracy": (), "gmacs": ()}, published)


# Studies


@dataclass(frozen=True)
class Sources:
    """What a study is made of."""

    results: Mapping[str, Sequence[Result]]  # by name of the run, its seeds
    missing: Mapping[str, str]  # by name of the run, why seeds of it are not there
    recipe: Recipe  # of all runs: backbone, batch size and precision of the scoring
    class_names: Sequence[str]  # of the validation data
    speed: bool = False  # whether Table 2 measures images per second
    plain: str = "A plain ViT"  # what stands for the plain ViT of Figure 1, to begin a title
    parts: Mapping[str, frozenset[int]] = field(default_factory=dict)  # of a comparison: class indices by name
    speeds: Mapping[int, TimedBatch] = field(default_factory=dict)  # of runs of any methods, by batch size

    def of(self, run: str) -> Sequence[Result]:
        """The seeds of a run; none of a run that is not there."""
        return self.results.get(run, ())

    @property
    def family(self) -> str:
        """Whose rows of Tables 2 and 3 stand beside the backbone of ours."""
        return "LV-ViT-S" if self.recipe.backbone.startswith("lvvit") else "DeiT-S"


@dataclass(frozen=True)
class StudyResult:
    """What came of a study."""

    rows: list[Row]
    draw: Callable[[Path, str], object] | None  # writes the picture, with a caption; None if there is nothing to draw
    notes: tuple[str, ...] = ()  # what a reader has to know besides
    speeds: Mapping[str, float] = field(default_factory=dict)  # images per second by run, of its first seed


def uncertainty(scored: Collected) -> str:
    """By how much an accuracy of one run may differ by the choice of the validation images."""
    count, accuracy = len(scored.labels), top1(scored)
    interval = share_estimate(round(accuracy / 100 * count), count, 0.95)
    half = 50 * (interval.high - interval.low)
    return (
        f"An accuracy of {accuracy:.1f}% on {count:,} images is sure to {half:.2g} points either way (half of Clopper "
        "and Pearson's 95% interval): of one run each, smaller differences between rows may be chance."
    )


def seed_of_picture(*runs: Sequence[Result]) -> Iterator[str]:
    """A note where only the first of several seeds is drawn of some run."""
    drawn = dict.fromkeys(str(seeds[0].seed) for seeds in runs)
    if len(drawn) > 1 or any(len(seeds) > 1 for seeds in runs):
        yield f"The picture is of seed {' and '.join(drawn)}."


def ablation(study: Study, sources: Sources) -> StudyResult:
    """Measures of several runs side by side."""
    rows = []
    for variant in study.variants:
        values = {name: [MEASURES[name](result) for result in sources.of(variant.run)] for name in study.measures}
        rows.append(mean_row(variant.label, values, variant.published, sources.missing.get(variant.run)))
    columns = {}
    for name in study.measures:
        cells = [(row.name, row.cells[name]) for row in rows]
        columns[HEADINGS[name][0]] = [Bar(row, cell.paper, cell.ours, cell.spread) for row, cell in cells]
    return StudyResult(rows, partial(pictures.draw_table, title=study.title, columns=columns))


# Curves and counts


def values_of(points: Sequence[SweepPoint]) -> dict[str, list[float]]:
    """Values of several seeds by measure."""
    return {
        "eta": [point.threshold for point in points],
        "accuracy": [point.accuracy for point in points],
        "exit_share": [100 * point.exit_share for point in points],
        "gmacs": [point.gmacs for point in points],
    }


def _over_etas(results: Sequence[Result], etas: Sequence[float]) -> list[dict[str, list[float]]]:
    """At each eta, the seeds' values by measure."""
    return [values_of(points) for points in zip(*(result.at(etas) for result in results), strict=True)]


def our_curve(variant: Variant, results: Sequence[Result], etas: Sequence[float] = CURVE_ETAS) -> Curve:
    """A run's means over seeds at each eta, or the point of a plain ViT."""
    if variant.run == PLAIN:
        values = [{name: [MEASURES[name](result) for result in results] for name in ("gmacs", "accuracy")}]
    else:
        values = _over_etas(results, etas)
    costs, accuracies = ([statistics.fmean(point[name]) for point in values] for name in ("gmacs", "accuracy"))
    return Curve(variant.label, costs, accuracies, len(values) > 1)


def published_curves(study: Study, family: str) -> list[Curve]:
    """CF-ViT's rows joined, each other method a point."""
    rows = [row for row in study.published if row.family == family]
    ours = [row.values for row in rows if "eta" in row.values]
    costs, accuracies = ([values[name] for values in ours] for name in ("gmacs", "accuracy"))
    curves = [Curve(f"CF-ViT ({family})", costs, accuracies, like="CF-ViT")]
    for row in rows:
        if "eta" not in row.values:
            name, like = (family, "plain ViT") if row.name == "plain" else (row.name, "")
            curves.append(Curve(name, [row.values["gmacs"]], [row.values["accuracy"]], False, like))
    return curves


def curves(study: Study, sources: Sources) -> StudyResult:
    """Accuracy against cost over eta, beside the points of Table 2."""
    table2, family = STUDIES["table2"], "LV-ViT-S" if study.name == "fig6" else "DeiT-S"
    rows, drawn = [], []
    for variant in study.variants:
        results, missing = sources.of(variant.run), sources.missing.get(variant.run)
        if not results:
            rows.append(Row(variant.label, {}, missing=missing))
            continue
        drawn.append(our_curve(variant, results))
        for eta, values in zip(COUNT_ETAS, _over_etas(results, COUNT_ETAS), strict=True):
            row = mean_row(f"{variant.label}, eta {eta:g}", values, missing=missing)
            rows.append(replace(row, shown=eta == round(eta, 1)))
    if study.name == "fig7" and (results := sources.of(DEFAULT)):
        always = Variant("without early exit", DEFAULT)
        rows.append(mean_row(always.label, _over_etas(results, (1.0,))[0]))
        drawn.append(our_curve(always, results, (1.0,)))
    rows += [published_row(row) for row in table2.published if row.family == family]
    published = published_curves(table2, family)
    draw = partial(pictures.draw_curves, title=study.title, ours=drawn, published=published)
    return StudyResult(rows, draw, (f"Ours is built on {sources.recipe.backbone}, the published CF-ViT on {family}.",))
