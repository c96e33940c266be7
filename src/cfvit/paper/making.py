"""How each kind of study is made: its rows, and its picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfvit.data import EvalImages, eval_loader, progress_bar
from cfvit.modeling.exit import goes_on
from cfvit.modeling.model import CoarseToFineViT
from cfvit.paper import figures, patches
from cfvit.paper.notes import (
    classes_without_images,
    family_of,
    notes_of_family,
    seed_of_picture,
    uncertainty,
)
from cfvit.paper.paper import PaperTable, Published, read_paper
from cfvit.paper.records import Finished, write_record
from cfvit.paper.rows import (
    COUNT_THRESHOLDS,
    HEADINGS,
    MEASURES,
    PARITY,
    Cell,
    OperatingPoint,
    Results,
    Row,
    ablation_rows,
    at,
    count_right,
    mean_curve,
    operating_row,
    summarise,
)
from cfvit.paper.speed import images_per_second
from cfvit.paper.studies import DEFAULT, LARGER_GRID, PLAIN, Study, Variant
from cfvit.plots.explain import Explanation, explain
from cfvit.processes import best_device

Draw = Callable[[Path, str], object]
Network = tuple[CoarseToFineViT, EvalImages]

_OF_ACCURACIES = ("ablation", "operating_points", "curves")
EXAMPLES = 6
ATTENTION_PICTURES = 4
FALLBACK_ETA = 0.5


@dataclass(frozen=True)
class Sources:
    """What a study is made of.

    Attributes:
        results: finished runs.
        missing: by name of a run, why seeds of it are not there.
        network: the model of a finished run and its validation images.
        backbone: of the runs, by timm's name.
        class_names: of the validation data.
        speed: whether images per second are measured.
        plain: what stands for the plain ViT of Figure 1, to begin a title.
    """

    results: Results
    missing: Mapping[str, str]
    network: Callable[[Finished], Network]
    backbone: str
    class_names: Sequence[str]
    speed: bool
    plain: str = "A plain ViT"

    @property
    def family(self) -> str:
        """Whose rows of Tables 2 and 3 stand beside ours, ``DeiT-S`` or ``LV-ViT-S``."""
        return family_of(self.backbone)

    def first(self, run: str) -> Finished | None:
        """The first seed of a run, if there is one."""
        return next(iter(self.results.get(run, ())), None)


@dataclass(frozen=True)
class Made:
    """A study's rows, how it is drawn (None if there is nothing to draw), and what has to be said besides."""

    rows: list[Row]
    draw: Draw | None
    notes: tuple[str, ...] = ()


def make(study: Study, sources: Sources) -> Made:
    """Rows and picture of a study from what is there."""
    paper = read_paper().tables[study.name]
    made = _KINDS[study.kind](study, sources, paper)
    notes = (*notes_of_family(paper.notes, sources.family), *made.notes, *_notes_on_images(study, sources))
    return dataclasses.replace(made, notes=notes)


def _notes_on_images(study: Study, sources: Sources) -> list[str]:
    """What has to be said of the validation images, which are the same for all runs of a study."""
    scored = next((run.validation for name in study.runs for run in sources.results.get(name, ())), None)
    if scored is None:
        return []
    sure = [uncertainty(scored)] if study.kind in _OF_ACCURACIES else []
    return [*sure, *classes_without_images(scored, sources.class_names)]


def _ablation(study: Study, sources: Sources, paper: PaperTable) -> Made:
    rows = ablation_rows(study, sources.results, sources.missing, paper)
    columns = {
        HEADINGS[name].text: [figures.Bar(row.name, _cell(row, name).paper, *_ours(row, name)) for row in rows]
        for name in study.measures
    }
    return Made(rows, partial(_draw_table, study, columns))


def _draw_table(study: Study, columns: Mapping[str, Sequence[figures.Bar]], path: Path, caption: str) -> None:
    figures.draw_table(path, study.title, columns, caption)


def _cell(row: Row, measure: str) -> Cell:
    return row.cells.get(measure, Cell(None))


def _ours(row: Row, measure: str) -> tuple[float | None, float]:
    return _cell(row, measure).ours, _cell(row, measure).spread


def _operating_points(study: Study, sources: Sources, paper: PaperTable) -> Made:
    points = _points_of(study, sources.family, paper)
    plains = {run.recipe.seed: run for run in sources.results.get(PLAIN, ())}
    rows = [
        operating_row(point, sources.results.get(point.run, ()), plains, sources.missing.get(point.run))
        for point in points
    ]
    notes: tuple[str, ...] = (
        "eta at parity is the cheapest one whose accuracy on the hold-out is at least the plain ViT's there; the "
        "validation images are only scored.",
    )
    if study.name == "table2":
        rows = _with_speed(points, rows, plains, sources)
        if any(_cell(row, "images_per_second").ours is not None for row in rows):
            notes += (
                "Images per second are of the first seed, on random images, all rows prepared alike and timed in turn.",
            )
    taken = {None if point.published is None else point.published.name for point in points}
    others = [row for row in paper.rows if row.name.startswith(sources.family) and row.name not in taken]
    rows += [_published_row(row, sources.family) for row in others]
    ours = [curve for variant in study.variants for curve in _our_curves(variant, sources)]
    draw = partial(_draw_curves, study, ours, _published_curves(paper, sources.family))
    return Made(rows, draw, notes)


def _points_of(study: Study, family: str, paper: PaperTable) -> list[OperatingPoint]:
    etas: tuple[float | str, ...] = (PARITY, 0.75, 1.0) if study.name == "table2" else (PARITY, 0.75)
    points = []
    for variant in study.variants:
        if variant.run == PLAIN:
            points.append(OperatingPoint(variant.label, PLAIN, None, paper.row(f"{family} plain")))
            continue
        for eta in etas:
            spelled = eta if isinstance(eta, str) else f"{eta:g}"
            label = "eta at parity" if eta == PARITY else f"eta {spelled}"
            published = None if variant.run == LARGER_GRID else paper.row(f"{family} {spelled}")
            points.append(OperatingPoint(f"{variant.label}, {label}", variant.run, eta, published))
    return points


def _published_row(published: Published, family: str) -> Row:
    """A row of the paper's alone, of its accuracy and cost."""
    name = _method(published, family)
    if "eta" in published.values:
        name = f"CF-ViT ({family}), eta {published.values['eta']:g}"
    cells = {measure: Cell(None, 0.0, published.values.get(measure)) for measure in ("eta", "accuracy", "gmacs")}
    return Row(f"{name}, published", cells, 0, published.place)


def _with_speed(
    points: Sequence[OperatingPoint], rows: Sequence[Row], plains: Mapping[int, Finished], sources: Sources
) -> list[Row]:
    """The rows with images per second, which are the paper's alone where ours are not measured."""
    measured = _measure_speed(points, plains, sources) if sources.speed else {}
    completed = []
    for point, row in zip(points, rows, strict=True):
        speed, base = measured.get(point.name), measured.get("plain")
        ratio = None if speed is None or base is None else speed / base
        published = {} if point.published is None else point.published.values
        cells = {
            "images_per_second": Cell(speed, 0.0, published.get("images_per_second")),
            "speedup": Cell(ratio, 0.0, published.get("speedup")),
        }
        completed.append(dataclasses.replace(row, cells={**row.cells, **cells}))
    return completed


def _measure_speed(
    points: Sequence[OperatingPoint], plains: Mapping[int, Finished], sources: Sources
) -> dict[str, float]:
    """Images per second by name of the point, kept in the records of the runs for `runs.csv`."""
    plain = sources.first(PLAIN)
    if plain is None:
        return {}
    models: dict[str, tuple[CoarseToFineViT, float]] = {}
    for point in points:
        run = sources.first(point.run)
        eta = None if run is None else point.threshold(run, plains.get(run.recipe.seed))
        if run is not None and eta is not None:
            models[point.name] = (sources.network(run)[0], 1 - at(run, eta).exit_share)
    measured = images_per_second(sources.network(plain)[0], models, plain.recipe)
    _keep_speed(plain, measured["plain"])
    for point in points:
        run = sources.first(point.run)
        if run is not None and point.eta == PARITY and point.name in measured:
            _keep_speed(run, measured[point.name])
    return {**measured, points[0].name: measured["plain"]}


def _keep_speed(run: Finished, value: float) -> None:
    write_record(dataclasses.replace(run.record, images_per_second=value), run.folder)


def _our_curves(variant: Variant, sources: Sources) -> list[figures.Curve]:
    """A run's curve over eta, or the point of a plain ViT; nothing where the run is not there."""
    runs = sources.results.get(variant.run, ())
    if not runs:
        return []
    if variant.run == PLAIN:
        means = [summarise(values).measured for values in zip(*map(_plain_point, runs), strict=True)]
        return [figures.Curve(variant.label, [means[0]], [means[1]], joined=False)]
    cells = mean_curve(runs)
    return [figures.Curve(variant.label, [c["gmacs"].measured for c in cells], [c["accuracy"].measured for c in cells])]


def _plain_point(run: Finished) -> tuple[float, float]:
    return MEASURES["gmacs"](run), MEASURES["accuracy"](run)


def _published_curves(paper: PaperTable, family: str) -> list[figures.Curve]:
    """CF-ViT's rows joined, each other method a point."""
    rows = [row for row in paper.rows if row.name.startswith(family)]
    ours = [row for row in rows if "eta" in row.values]
    others = [row for row in rows if "eta" not in row.values]
    joined = figures.Curve(f"CF-ViT ({family})", *_costs_and_accuracies(ours))
    return [
        joined,
        *(figures.Curve(_method(row, family), *_costs_and_accuracies([row]), joined=False) for row in others),
    ]


def _method(row: Published, family: str) -> str:
    name = row.name.removeprefix(f"{family} ")
    return family if name == "plain" else name


def _costs_and_accuracies(rows: Sequence[Published]) -> tuple[list[float], list[float]]:
    return [row.values["gmacs"] for row in rows], [row.values["accuracy"] for row in rows]


def _draw_curves(
    study: Study, ours: Sequence[figures.Curve], published: Sequence[figures.Curve], path: Path, caption: str
) -> None:
    figures.draw_curves(path, study.title, ours, published, caption)


def _curves(study: Study, sources: Sources, paper: PaperTable) -> Made:
    table2 = read_paper().tables["table2"]
    family = "LV-ViT-S" if study.name == "fig6" else "DeiT-S"
    rows = [row for variant in study.variants for row in _curve_rows(variant, sources)]
    ours = [curve for variant in study.variants for curve in _our_curves(variant, sources)]
    default = sources.results.get(DEFAULT, ())
    if study.name == "fig7" and default:
        (end,) = mean_curve(default, (1.0,))
        rows.append(Row("without early exit", end, len(default)))
        cost, accuracy = end["gmacs"].measured, end["accuracy"].measured
        ours.append(figures.Curve("without early exit", [cost], [accuracy], joined=False))
    rows += [_published_row(row, family) for row in table2.rows if row.name.startswith(family)]
    draw = partial(_draw_curves, study, ours, _published_curves(table2, family))
    return Made(rows, draw, (f"Ours is built on {sources.backbone}, the published CF-ViT on {family}.",))


def _curve_rows(variant: Variant, sources: Sources) -> list[Row]:
    runs, missing = sources.results.get(variant.run, ()), sources.missing.get(variant.run)
    if not runs:
        return [Row(variant.label, {}, 0, "", missing)]
    return [
        Row(f"{variant.label}, eta {eta:g}", cells, len(runs), "", missing, shown=_is_round(eta))
        for eta, cells in zip(COUNT_THRESHOLDS, mean_curve(runs, COUNT_THRESHOLDS), strict=True)
    ]


def _is_round(eta: float) -> bool:
    """Whether an eta has a single decimal: the others are left to the CSV file."""
    return eta == round(eta, 1)


def _counts(study: Study, sources: Sources, paper: PaperTable) -> Made:
    runs = sources.results.get(DEFAULT, ())
    if not runs:
        return _nothing(study, sources)
    counts = [[count_right(run, eta) for eta in COUNT_THRESHOLDS] for run in runs]
    rows = []
    for eta, pairs in zip(COUNT_THRESHOLDS, zip(*counts, strict=True), strict=True):
        coarse, fine = (summarise([pair[stage] for pair in pairs]) for stage in (0, 1))
        cells = {"right_coarse": coarse, "right_fine": fine}
        rows.append(Row(f"eta {eta:g}", cells, len(runs), "", sources.missing.get(DEFAULT), _is_round(eta)))
    coarse, fine = zip(*counts[0], strict=True)
    return Made(rows, partial(_draw_counts, coarse, fine), tuple(seed_of_picture(runs)))


def _draw_counts(coarse: Sequence[int], fine: Sequence[int], path: Path, caption: str) -> None:
    figures.draw_counts(path, COUNT_THRESHOLDS, coarse, fine, caption)


def _nothing(study: Study, sources: Sources) -> Made:
    """Rows that say which runs are missing, and how many seeds there are of the others."""
    rows = []
    for variant in study.variants:
        runs, missing = sources.results.get(variant.run, ()), sources.missing.get(variant.run)
        rows.append(Row(variant.label, {}, len(runs), "", missing))
    return Made(rows, None)


def _patches(study: Study, sources: Sources, paper: PaperTable) -> Made:
    runs = sources.results.get(PLAIN, ())
    if not runs:
        return _nothing(study, sources)
    scores, kept, count = [], 0, 0
    for run in runs:
        model, images = sources.network(run)
        count = 4 * model.grid[0] * model.grid[1]
        kept = max(1, round(100 / 196 * count))
        scores.append(_highest_lowest(model, images, run, kept))
    rows = []
    for block in range(len(scores[0].highest)):
        cells = {name: summarise([getattr(s, name)[block] for s in scores]) for name in ("highest", "lowest")}
        rows.append(Row(f"block {block + 1}", cells, len(runs), "", sources.missing.get(PLAIN)))
    whole = summarise([s.whole for s in scores])
    rows.append(Row("all patches", {"highest": whole, "lowest": whole}, len(runs)))
    highest, lowest = ([row.cells[name].measured for row in rows[:-1]] for name in ("highest", "lowest"))

    def draw(path: Path, caption: str) -> None:
        figures.draw_highest_lowest(path, highest, lowest, whole.measured, kept, count, caption, sources.plain)

    return Made(rows, draw, (f"{kept} of {count} patches are kept, as 100 of 196 in the paper.",))


def _highest_lowest(model: CoarseToFineViT, images: EvalImages, run: Finished, kept: int) -> patches.HighestLowest:
    device = best_device()
    loader = eval_loader(images, run.recipe.eval_batch_size, run.recipe.workers, device)
    backbone: Any = model.eval().to(device).backbone
    with progress_bar(len(images)) as advance:
        return patches.score_highest_lowest(backbone, loader, device, kept, advance)


def _attention(study: Study, sources: Sources, paper: PaperTable) -> Made:
    coarse, fine = (sources.first(variant.run) for variant in study.variants)
    if coarse is None or fine is None:
        return _nothing(study, sources)
    (reader, images), (plain, _) = sources.network(coarse), sources.network(fine)
    readable = fine.validation.indices
    places = np.linspace(0, len(readable) - 1, min(ATTENTION_PICTURES, len(readable))).round().astype(int)
    chosen = readable[np.unique(places)].tolist()
    pictures = patches.attention_pictures(reader, plain.backbone, _batch(images, chosen))
    rows = [Row(images.source.name(index), {}, 1) for index in chosen]
    draw = partial(_draw_attention, pictures)
    return Made(rows, draw, tuple(seed_of_picture(*(sources.results[run] for run in study.runs))))


def _draw_attention(pictures: Sequence[figures.AttentionPicture], path: Path, caption: str) -> None:
    figures.draw_attention(path, pictures, caption)


def _batch(images: EvalImages, indices: Sequence[int]) -> Tensor:
    """Images by their numbers in the data set."""
    place = {index: item for item, index in enumerate(images.indices)}
    return torch.stack([images[place[index]][0] for index in indices]).to(best_device())


def _examples(study: Study, sources: Sources, paper: PaperTable) -> Made:
    run = sources.first(DEFAULT)
    if run is None:
        return _nothing(study, sources)
    model, images = sources.network(run)
    eta = FALLBACK_ETA if model.threshold is None else model.threshold
    chosen = {stage: _right_at(run, eta, stage == "fine") for stage in ("coarse", "fine")}
    rows, sheets = [], []
    for stage, indices in chosen.items():
        sheets.append(explain(model, _batch(images, indices), eta) if indices else [])
        rows += [Row(f"right at the {stage} stage: {images.source.name(index)}", {}, 1) for index in indices]
    draw = partial(_draw_examples, *sheets) if rows else None
    told = f"eta is {eta:g}; shown are the first images of each class that were answered right."
    return Made(rows, draw, (told, *seed_of_picture(sources.results[DEFAULT])))


def _draw_examples(coarse: Sequence[Explanation], fine: Sequence[Explanation], path: Path, caption: str) -> None:
    figures.draw_examples(path, coarse, fine, caption)


def _right_at(run: Finished, eta: float, fine: bool) -> list[int]:
    """Numbers of images that a stage answers, and rightly: of as many classes as there are places."""
    scored = run.validation
    hard = goes_on(run.rule.coarse(scored.logits[0]), eta)
    right = (scored.logits[int(fine)].argmax(-1) == scored.labels) & (hard if fine else ~hard)
    seen: dict[int, int] = {}
    repeated = []
    for label, index in zip(scored.labels[right].tolist(), scored.indices[right].tolist(), strict=True):
        if label in seen:
            repeated.append(index)
        seen.setdefault(label, index)
    return [*seen.values(), *repeated][:EXAMPLES]


_KINDS: Mapping[str, Callable[[Study, Sources, PaperTable], Made]] = {
    "ablation": _ablation,
    "operating_points": _operating_points,
    "curves": _curves,
    "counts": _counts,
    "patches": _patches,
    "attention": _attention,
    "examples": _examples,
}
