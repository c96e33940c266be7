"""From results to the rows and the picture of each study: what was measured here beside what the paper prints."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from cfvit.calibration.images import missing_classes
from cfvit.calibration.tradeoff import share_estimate
from cfvit.data import EvalImages, eval_loader, progress_bar
from cfvit.evaluation.metrics import Collected, SweepPoint
from cfvit.evaluation.timing import threshold_for_share, time_in_turn
from cfvit.inference.engines.packing import accelerate
from cfvit.inference.predictor import Predictor
from cfvit.paper.patches import attention_pictures, score_highest_lowest
from cfvit.paper.runs import Result, top1
from cfvit.paper.studies import DEFAULT, FAMILIES, LARGER_GRID, PLAIN, STUDIES, Published, Study, Variant
from cfvit.plots import figures as pictures
from cfvit.plots.explain import explain
from cfvit.plots.figures import Bar, Curve
from cfvit.processes import best_device
from cfvit.training.recipe import Recipe
from cfvit.training.setup import autocast

Draw = Callable[[Path, str], object]
"""Writes the picture into a file, with a caption."""

CURVE_ETAS = tuple(i / 50 for i in range(51))
COUNT_ETAS = tuple(i / 20 for i in range(21))
"""Etas of rows; those of two decimals are in the CSV file and in JSON alone."""
PARITY, NEAR_PARITY = "parity", "near parity"
BATCH_SIZES = (1, 8, 32)
"""In which methods are timed side by side."""
EXAMPLES = 6
ATTENTION_PICTURES = 4
FALLBACK_ETA = 0.5
SPEED_ROUNDS = 10


@dataclass(frozen=True)
class Cell:
    """One figure: the mean over seeds, highest less lowest of them, the paper's, and a 95% interval of ours."""

    ours: float | None
    spread: float = 0.0
    paper: float | None = None
    interval: tuple[float, float] | None = None
    sure: bool = True  # whether the machine was quiet enough, for a figure that was timed


@dataclass(frozen=True)
class Row:
    """A line of a table."""

    name: str  # what it is of
    cells: Mapping[str, Cell]  # by measure, see `HEADINGS`
    seeds: int = 0  # how many runs the means are of
    place: str = ""  # where the paper prints it
    missing: str | None = None  # why there are no figures of ours, or of fewer seeds
    shown: bool = True  # whether people read it; if not, it is in the CSV file and in JSON alone


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
    cells = {measure: Cell(None, 0.0, published.values.get(measure)) for measure in ("eta", "accuracy", "gmacs")}
    return Row(f"{name}, published", cells, 0, published.place)


# Studies


@dataclass(frozen=True)
class Sources:
    """What a study is made of."""

    results: Mapping[str, Sequence[Result]]  # by name of the run, its seeds
    missing: Mapping[str, str]  # by name of the run, why seeds of it are not there
    recipe: Recipe  # of all runs: backbone, batch size and precision of the scoring
    class_names: Sequence[str]  # of the validation data
    speed: bool = False  # whether images per second are measured
    plain: str = "A plain ViT"  # what stands for the plain ViT of Figure 1, to begin a title
    parts: Mapping[str, frozenset[int]] = field(default_factory=dict)  # of a comparison: class indices by name

    def of(self, run: str) -> Sequence[Result]:
        """The seeds of a run; none of a run that is not there."""
        return self.results.get(run, ())

    @property
    def family(self) -> str:
        """Whose rows of Tables 2 and 3 stand beside the backbone of ours."""
        return "LV-ViT-S" if self.recipe.backbone.startswith("lvvit") else "DeiT-S"


@dataclass(frozen=True)
class Made:
    """A study as it was made."""

    rows: list[Row]
    draw: Draw | None  # None if there is nothing to draw
    notes: tuple[str, ...] = ()  # what a reader has to know besides
    speeds: Mapping[str, float] = field(default_factory=dict)  # images per second by run, of its first seed


def make(study: Study, sources: Sources, how: Callable[[Study, Sources], Made] | None = None) -> Made:
    """Rows and picture of a study from what is there.

    Args:
        how: in place of the way that suits the study's kind.
    """
    of_images = study.kind in ("patches", "attention", "counts", "examples")
    if of_images and not all(map(sources.of, study.runs)):  # then there is nothing to draw
        runs = [(variant, len(sources.of(variant.run))) for variant in study.variants]
        made = Made([Row(v.label, {}, seeds, "", sources.missing.get(v.run)) for v, seeds in runs], None)
    else:
        made = (how or _KINDS[study.kind])(study, sources)
    others = [family for family in FAMILIES if family != sources.family]
    notes = [note for note in study.notes if sources.family in note or not any(other in note for other in others)]
    notes += made.notes
    scored = next((result.validation for run in study.runs for result in sources.of(run)), None)
    if scored is not None:  # the validation images are the same for all runs of a study
        if not of_images:
            notes.append(uncertainty(scored))
        if missing := missing_classes(scored.labels.tolist(), sources.class_names, len(scored.labels)):
            notes.append(f"Of the validation data, {missing}: nothing is known of them.")
    return replace(made, notes=tuple(notes))


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


# Tables


def _ablation(study: Study, sources: Sources) -> Made:
    rows = []
    for variant in study.variants:
        values = {name: [MEASURES[name](result) for result in sources.of(variant.run)] for name in study.measures}
        rows.append(mean_row(variant.label, values, variant.published, sources.missing.get(variant.run)))
    columns = {}
    for name in study.measures:
        cells = [(row.name, row.cells[name]) for row in rows]
        columns[HEADINGS[name][0]] = [Bar(row, cell.paper, cell.ours, cell.spread) for row, cell in cells]
    return Made(rows, partial(pictures.draw_table, title=study.title, columns=columns))


def _values(points: Sequence[SweepPoint]) -> dict[str, list[float]]:
    """Values of several seeds by measure."""
    return {
        "eta": [point.threshold for point in points],
        "accuracy": [point.accuracy for point in points],
        "exit_share": [100 * point.exit_share for point in points],
        "gmacs": [point.gmacs for point in points],
    }


@dataclass(frozen=True)
class OperatingPoint:
    """A way of running a model, which a row of Table 2 or 3 is about."""

    name: str
    run: str
    eta: float | str | None  # a number, "parity", "near parity" or None for a plain ViT
    published: Published | None = None

    def threshold(self, result: Result, plain: Result | None) -> float | None:
        """The eta of a result at this point; None where the plain ViT's accuracy is out of reach or not known."""
        if self.eta in (PARITY, NEAR_PARITY):
            return None if plain is None else result.parity(plain, 0.5 if self.eta == NEAR_PARITY else 0.0)
        return None if self.eta is None else float(self.eta)

    def row(self, results: Sequence[Result], plains: Mapping[int | None, Result], missing: str | None = None) -> Row:
        """The row of this point.

        Args:
            plains: the plain ViT by seed.
        """
        if self.eta is None:
            values = {name: [MEASURES[name](result) for result in results] for name in ("accuracy", "gmacs")}
            return mean_row(self.name, {"eta": (), "exit_share": (), **values}, self.published, missing)
        etas = [(result, self.threshold(result, plains.get(result.seed))) for result in results]
        reached = [point for result, eta in etas if eta is not None for point in result.at([eta])]
        unknown = sum(result.seed not in plains for result, eta in etas if eta is None)
        reasons = [missing] if missing else []
        for reason, count in (
            ("no eta reaches the plain ViT's accuracy on the hold-out", len(results) - len(reached) - unknown),
            ("the plain ViT is not there", unknown),
        ):
            if count:
                reasons.append(reason if count == len(results) else f"{reason} for {count} of {len(results)} seeds")
        return mean_row(self.name, _values(reached), self.published, "; ".join(reasons) or None)


def points_of(study: Study, family: str) -> list[OperatingPoint]:
    """The operating points of Tables 2 and 3, beside the paper's rows of a family."""
    points = []
    for variant in study.variants:
        if variant.run == PLAIN:
            points.append(OperatingPoint(variant.label, PLAIN, None, study.row(family, "plain")))
            continue
        for eta in study.etas:
            text = eta if isinstance(eta, str) else f"{eta:g}"
            label = {PARITY: "at parity", NEAR_PARITY: "for 0.5 points below parity"}.get(text, text)
            published = None if variant.run == LARGER_GRID else study.row(family, text)
            points.append(OperatingPoint(f"{variant.label}, eta {label}", variant.run, eta, published))
    return points


def _operating_points(study: Study, sources: Sources) -> Made:
    points = points_of(study, sources.family)
    plains = {result.seed: result for result in sources.of(PLAIN)}
    rows = [point.row(sources.of(point.run), plains, sources.missing.get(point.run)) for point in points]
    notes = [
        "eta at parity is the cheapest one whose accuracy on the hold-out is at least the plain ViT's there; the "
        "validation images are only scored."
    ]
    speeds = {}
    if study.name == "table2":
        if plains and sources.speed:
            speeds = _speeds(points, sources)
            notes.append(
                "Images per second are of the first seed, on random images, all rows prepared alike and timed in turn."
            )
        for place, point in enumerate(points):
            speed, printed = speeds.get(point.name), {} if point.published is None else point.published.values
            ratio = None if speed is None else speed / speeds[points[0].name]
            cells = {
                "images_per_second": Cell(speed, 0.0, printed.get("images_per_second")),
                "speedup": Cell(ratio, 0.0, printed.get("speedup")),
            }
            rows[place] = replace(rows[place], cells={**rows[place].cells, **cells})
    beside = [point.published for point in points]
    rows += [published_row(row) for row in study.published if row.family == sources.family and row not in beside]
    curves = [curve for variant in study.variants for curve in _our_curves(variant, sources)]
    published = _published_curves(study, sources.family)
    draw = partial(pictures.draw_curves, title=study.title, ours=curves, published=published)
    kept = {point.run: speeds[point.name] for point in points if point.name in speeds and point.eta in (None, PARITY)}
    return Made(rows, draw, tuple(notes), kept)


def _speeds(points: Sequence[OperatingPoint], sources: Sources) -> dict[str, float]:
    """Images per second of the first seed at each operating point, of which the first is the plain ViT's."""
    plains, models = {result.seed: result for result in sources.of(PLAIN)}, {}
    for point in points:
        for result in sources.of(point.run)[:1]:
            eta = point.threshold(result, plains.get(result.seed))
            if eta is not None:
                models[point.name] = (result.open()[0], 1 - result.at([eta])[0].exit_share)
    return images_per_second((points[0].name, sources.of(PLAIN)[0].open()[0]), models, sources.recipe, SPEED_ROUNDS)


def images_per_second(
    plain: tuple[str, Any], models: Mapping[str, tuple[Any, float]], recipe: Recipe, rounds: int
) -> dict[str, float]:
    """Times random images through the plain ViT and through each model in turn, in batches that suit the device.

    Args:
        plain: a name and timm's network.
        models: by name, a coarse-to-fine model and the share of images that go on to its fine stage.
    """
    device = best_device()
    batch = 256 if device.type == "cuda" else 32
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(), autocast(recipe, device):
        # as `cfvit.Predictor` runs a network, which is not for autocast on a CPU
        prepare: Callable[[Any], Any] = (lambda network: network) if torch.is_autocast_enabled("cpu") else accelerate
        name, network = plain
        images = torch.randn(batch, 3, *network.patch_embed.img_size, generator=generator).to(device)
        calls: dict[str, Callable[[], object]] = {name: partial(prepare(network.eval().to(device)), images)}
        for name, (model, share) in models.items():
            fast = prepare(model.eval().to(device))
            images = torch.randn(batch, 3, *model.image_size, generator=generator).to(device)
            eta = threshold_for_share(model.exit.coarse(fast.coarse(images).logits), share)
            calls[name] = partial(Predictor(fast, eta, compile=False), images)
        timings = time_in_turn(calls, rounds, device)
    return {name: batch / timing.median for name, timing in timings.items()}


def _comparison(study: Study, sources: Sources) -> Made:
    """Operating points of one model in pairs with its plain ViT, on all images and on parts of them."""
    made = _operating_points(study, sources)
    result, plain = sources.of(DEFAULT)[0], sources.of(PLAIN)[0]
    points = points_of(study, sources.family)
    labels = result.validation.labels
    parts, listed = parts_of(labels, sources.parts)
    rows = []
    for name, kept in parts.items():
        ours, base = restricted(result, kept), restricted(plain, kept)
        for point, row in zip(points, made.rows, strict=False):
            shown = base if point.eta is None else ours
            if name:
                row = replace(point, name=f"{point.name}, {name}", published=None).row([shown], {None: plain})
            eta = point.threshold(result, plain)
            if eta is not None:
                logits = shown.validation.logits
                answers = torch.where(shown.goes_on(eta), logits["fine"].argmax(-1), logits["coarse"].argmax(-1))
                saving = 100 * (1 - shown.at([eta])[0].gmacs / MEASURES["gmacs"](plain))
                row = replace(row, cells={**row.cells, **paired(answers, base, listed), "saving": Cell(saving)})
            elif point.eta is None:
                row = replace(row, cells={**row.cells, **paired(None, base, listed)})
            rows.append(row)
    return replace(made, rows=rows + made.rows[len(points) :], notes=made.notes + notes_on_images(result, parts))


def parts_of(labels: Tensor, named: Mapping[str, frozenset[int]]) -> tuple[dict[str, Tensor], Tensor]:
    """Which images are of each part that has some, all of them first, and the class indices of all named parts."""
    listed = torch.tensor(sorted(frozenset().union(*named.values())), dtype=torch.long)
    parts = {"": torch.ones_like(labels, dtype=torch.bool)}
    parts |= {name: torch.isin(labels, torch.tensor(sorted(classes))) for name, classes in named.items()}
    if named:
        parts["other classes"] = ~torch.isin(labels, listed)
    return {name: kept for name, kept in parts.items() if kept.any()}, listed


def notes_on_images(result: Result, parts: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What eta is chosen on, what is scored, and what intervals are."""
    assert result.holdout is not None
    return (
        f"eta is chosen on {len(result.holdout.labels):,} images, and the {len(result.validation.labels):,} test "
        "images are scored once. Brackets are 95% intervals by the bootstrap over images (percentiles of 2,000 "
        "samples); differences are of the same images.",
        *(f"{name}: {int(kept.sum()):,} images." for name, kept in parts.items() if name),
    )


def restricted(result: Result, kept: Tensor) -> Result:
    """The same with a part of the validation images."""
    scored = result.validation
    logits = {point: values[kept] for point, values in scored.logits.items()}
    return replace(result, validation=Collected(logits, scored.labels[kept], scored.indices[kept], []))


def paired(answers: Tensor | None, plain: Result, listed: Tensor) -> dict[str, Cell]:
    """Figures of answers that need the plain ViT's to the same images.

    Args:
        answers: class indices ``[n]``; None for those of the plain ViT itself.
        listed: class indices of all parts that have a name.
    """
    labels, base = plain.validation.labels, plain.validation.logits["plain"].argmax(-1)
    given = base if answers is None else answers

    def mean(values: Tensor) -> Cell:
        percent = 100 * values.double().numpy()
        drawn = stats.bootstrap((percent,), np.mean, n_resamples=2000, method="percentile", rng=0)
        low, high = drawn.confidence_interval
        return Cell(float(percent.mean()), interval=(float(low), float(high)))

    cells = {"accuracy": mean(given == labels)}
    outside = ~torch.isin(labels, listed)
    if len(listed) and outside.any():
        cells["bias"] = Cell(100 * float(torch.isin(given[outside], listed).double().mean()))
    if answers is not None:
        cells["difference"] = mean((answers == labels).double() - (base == labels).double())
        cells["agreement"] = Cell(100 * float((answers == base).double().mean()))
    return cells


# Curves and counts


def _mean_curve(results: Sequence[Result], etas: Sequence[float]) -> list[dict[str, list[float]]]:
    """At each eta, the seeds' values by measure."""
    return [_values(points) for points in zip(*(result.at(etas) for result in results), strict=True)]


def _mean_of(values: Sequence[Mapping[str, Sequence[float]]], label: str, joined: bool) -> Curve:
    """Means over seeds of cost and accuracy, as a curve."""
    costs, accuracies = ([statistics.fmean(point[name]) for point in values] for name in ("gmacs", "accuracy"))
    return Curve(label, costs, accuracies, joined)


def _our_curves(variant: Variant, sources: Sources) -> list[Curve]:
    """A run's curve over eta, or the point of a plain ViT; nothing where the run is not there."""
    results = sources.of(variant.run)
    if not results:
        return []
    if variant.run == PLAIN:
        values = {name: [MEASURES[name](result) for result in results] for name in ("gmacs", "accuracy")}
        return [_mean_of([values], variant.label, joined=False)]
    return [_mean_of(_mean_curve(results, CURVE_ETAS), variant.label, joined=True)]


def _published_curves(study: Study, family: str) -> list[Curve]:
    """CF-ViT's rows joined, each other method a point."""
    rows = [row for row in study.published if row.family == family]
    ours = [row.values for row in rows if "eta" in row.values]
    curves = [Curve(f"CF-ViT ({family})", [v["gmacs"] for v in ours], [v["accuracy"] for v in ours])]
    for row in rows:
        if "eta" not in row.values:
            name = family if row.name == "plain" else row.name
            curves.append(Curve(name, [row.values["gmacs"]], [row.values["accuracy"]], joined=False))
    return curves


def _curves(study: Study, sources: Sources) -> Made:
    table2, family = STUDIES["table2"], "LV-ViT-S" if study.name == "fig6" else "DeiT-S"
    rows, curves = [], []
    for variant in study.variants:
        results, missing = sources.of(variant.run), sources.missing.get(variant.run)
        curves += _our_curves(variant, sources)
        if not results:
            rows.append(Row(variant.label, {}, missing=missing))
            continue
        for eta, values in zip(COUNT_ETAS, _mean_curve(results, COUNT_ETAS), strict=True):
            row = mean_row(f"{variant.label}, eta {eta:g}", values, missing=missing)
            rows.append(replace(row, shown=eta == round(eta, 1)))
    if study.name == "fig7" and sources.of(DEFAULT):
        always = _mean_curve(sources.of(DEFAULT), (1.0,))
        rows.append(mean_row("without early exit", always[0]))
        curves.append(_mean_of(always, "without early exit", joined=False))
    rows += [published_row(row) for row in table2.published if row.family == family]
    published = _published_curves(table2, family)
    draw = partial(pictures.draw_curves, title=study.title, ours=curves, published=published)
    return Made(rows, draw, (f"Ours is built on {sources.recipe.backbone}, the published CF-ViT on {family}.",))


def count_right(result: Result, eta: float) -> tuple[int, int]:
    """How many validation images are answered right at the coarse and at the fine stage at an eta (Fig. 8)."""
    logits, labels, hard = result.validation.logits, result.validation.labels, result.goes_on(eta)
    coarse, fine = (logits[stage].argmax(-1) == labels for stage in ("coarse", "fine"))
    return int((coarse & ~hard).sum()), int((fine & hard).sum())


def _counts(study: Study, sources: Sources) -> Made:
    results, missing = sources.of(DEFAULT), sources.missing.get(DEFAULT)
    counts = np.array([[count_right(result, eta) for eta in COUNT_ETAS] for result in results])  # [seeds, etas, 2]
    rows = []
    for eta, (coarse, fine) in zip(COUNT_ETAS, counts.transpose(1, 2, 0).tolist(), strict=True):
        row = mean_row(f"eta {eta:g}", {"right_coarse": coarse, "right_fine": fine}, missing=missing)
        rows.append(replace(row, shown=eta == round(eta, 1)))
    coarse, fine = counts[0].T.tolist()
    draw = partial(pictures.draw_counts, thresholds=COUNT_ETAS, coarse=coarse, fine=fine)
    return Made(rows, draw, tuple(seed_of_picture(results)))


# Images


def _patches(study: Study, sources: Sources) -> Made:
    recipe, device = sources.recipe, best_device()
    scores, count, kept = [], 0, 0
    for result in sources.of(PLAIN):
        network, images = result.open()
        count = network.patch_embed.num_patches
        kept = max(1, round(100 / 196 * count))
        loader = eval_loader(images, recipe.eval_batch_size, recipe.workers, device)
        with progress_bar(len(images)) as advance:
            scores.append(score_highest_lowest(network, loader, device, kept, advance))
    rows = []
    for block in range(len(scores[0].highest)):
        values = {name: [getattr(score, name)[block] for score in scores] for name in ("highest", "lowest")}
        rows.append(mean_row(f"block {block + 1}", values, missing=sources.missing.get(PLAIN)))
    whole = [score.whole for score in scores]
    rows.append(mean_row("all patches", {"highest": whole, "lowest": whole}))
    highest, lowest = ([row.cells[name].ours or 0.0 for row in rows] for name in ("highest", "lowest"))
    draw = partial(
        pictures.draw_highest_lowest,
        title=f"{sources.plain} on {kept} of its {count} patches, by class attention",
        highest=highest[:-1],
        lowest=lowest[:-1],
        whole=highest[-1],
        kept=kept,
        patches=count,
    )
    return Made(rows, draw, (f"{kept} of {count} patches are kept, as 100 of 196 in the paper.",))


def _attention(study: Study, sources: Sources) -> Made:
    coarse, fine = (sources.of(variant.run)[0] for variant in study.variants)
    (reader, images), (plain, _) = coarse.open(), fine.open()
    readable = fine.validation.indices
    places = np.linspace(0, len(readable) - 1, min(ATTENTION_PICTURES, len(readable))).round().astype(int)
    chosen = readable[np.unique(places)].tolist()
    drawn = attention_pictures(reader, plain, read_images(images, chosen))
    rows = [Row(images.source.name(index), {}, 1) for index in chosen]
    notes = seed_of_picture(*(sources.of(run) for run in study.runs))
    return Made(rows, partial(pictures.draw_attention, pictures=drawn), tuple(notes))


def read_images(images: EvalImages, indices: Sequence[int]) -> Tensor:
    """Images by their numbers in the data set."""
    place = {index: item for item, index in enumerate(images.indices)}
    return torch.stack([images[place[index]][0] for index in indices]).to(best_device())


def _examples(study: Study, sources: Sources) -> Made:
    result = sources.of(DEFAULT)[0]
    model, images = result.open()
    scored, eta = result.validation, FALLBACK_ETA if model.threshold is None else model.threshold
    hard = result.goes_on(eta)
    rows, sheets = [], {}
    for stage, answered in (("coarse", ~hard), ("fine", hard)):
        right = (scored.logits[stage].argmax(-1) == scored.labels) & answered
        labels, indices = scored.labels[right].tolist(), scored.indices[right].tolist()
        first = set(dict(zip(labels[::-1], indices[::-1], strict=True)).values())  # of each class: before others
        chosen = sorted(indices, key=lambda index: index not in first)[:EXAMPLES]
        sheets[stage] = explain(model, read_images(images, chosen), eta) if chosen else []
        rows += [Row(f"right at the {stage} stage: {images.source.name(index)}", {}, 1) for index in chosen]
    note = f"eta is {eta:g}; shown are the first images of each class that were answered right."
    draw = partial(pictures.draw_examples, **sheets) if rows else None
    return Made(rows, draw, (note, *seed_of_picture(sources.of(DEFAULT))))


_KINDS: Mapping[str, Callable[[Study, Sources], Made]] = {
    "ablation": _ablation,
    "operating_points": _operating_points,
    "comparison": _comparison,
    "curves": _curves,
    "counts": _counts,
    "patches": _patches,
    "attention": _attention,
    "examples": _examples,
}
