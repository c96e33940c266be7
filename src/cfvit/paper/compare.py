"""Networks side by side: Tables 2 and 3, comparisons in pairs with the plain ViT on the same images, speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from cfvit.benchmark import EngineName, Plan
from cfvit.benchmark.contenders import BACKBONE, prepare
from cfvit.benchmark.measure import REAL, Entry, TimedBatch, measure
from cfvit.benchmark.report import noise_warnings
from cfvit.evaluation.timing import Call
from cfvit.paper.rows import (
    MEASURES,
    Cell,
    Row,
    Sources,
    StudyResult,
    mean_row,
    our_curve,
    published_curves,
    published_row,
    values_of,
)
from cfvit.paper.runs import Result, read_images, top1
from cfvit.paper.studies import LARGER_GRID, PLAIN, Published, Study
from cfvit.plots import figures as pictures
from cfvit.plots.figures import Curve
from cfvit.processes import best_device
from cfvit.training.recipe import Recipe
from cfvit.training.setup import autocast

PARITY, NEAR_PARITY = "parity", "near parity"
DROPS = (0.5, 1.0, 2.0)
CURVE_DROPS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)
"""Points of accuracy that early exits may lose on the images that eta is chosen on: for rows, and for curves."""

SCOPE = "answering"
IMAGES, MOST_CALLS, MOST_ROUNDS, SECONDS = 32, 8, 40, 120
"""Most images and calls of a round of a network, and most rounds and seconds of a batch size."""


@dataclass(frozen=True, eq=False)
class Setting:
    """A way of running a network, which a row or a point of a curve is about."""

    name: str  # of the row
    run: str
    result: Result
    stops: Tensor  # the number of the operating point that answers each validation image, ``[n]``
    etas: tuple[float, ...] = ()  # by which images exit; none where all are treated alike
    title: str = ""  # of the curve

    @cached_property
    def answers(self) -> Tensor:
        """Class indices ``[n]``."""
        argmax = torch.stack([logits.argmax(-1) for logits in self.result.validation.logits.values()], dim=1)
        return argmax.gather(1, self.stops[:, None])[:, 0]

    @cached_property
    def macs(self) -> Tensor:
        """The cost of each image in multiply-accumulates, ``[n]``."""
        costs = [self.result.macs[point] for point in self.result.validation.logits]
        return torch.tensor(costs, dtype=torch.float64)[self.stops]

    @property
    def parts(self) -> dict[str, float]:
        """The share of the images that each operating point answers, by the name of its timed call."""
        points = list(self.result.validation.logits)
        shares = (torch.bincount(self.stops, minlength=len(points)).double() / len(self.stops)).tolist()
        return {f"{self.run}/{point}": share for point, share in zip(points, shares, strict=True) if share}


def plain_setting(result: Result, name: str = "plain ViT") -> Setting:
    """The plain ViT, which settings are compared with."""
    return Setting(name, PLAIN, result, torch.zeros_like(result.validation.labels), title=name)


# Time


def measure_speed(settings: Sequence[Setting], recipe: Recipe, sizes: Sequence[int]) -> dict[int, TimedBatch]:
    """Times each setting beside the plain ViT in the same engine, in one run for each batch size, on real images.

    Of a network with exits each operating point is timed for whole batches, and a setting costs their mean by the
    share of images that each answers: images that go on wait for a full batch, as in a stream.

    Args:
        settings: the plain ViT first.

    Returns:
        By batch size; after a row of timm's model as it is, one for each setting, in their order.
    """
    plain, device = settings[0].result, best_device()
    runners: dict[str, tuple[Any, Tensor]] = {}
    found = {}
    with torch.inference_mode(), autocast(recipe, device):
        engine: EngineName = "eager" if torch.is_autocast_enabled("cpu") else "torch"  # packed layers know no autocast
        for run, result in {setting.run: setting.result for setting in settings}.items():
            network, images = result.open()
            readable = result.validation.indices
            places = np.linspace(0, len(readable) - 1, max(IMAGES, *sizes)).round().astype(int)
            pixels = read_images(images, readable[places].tolist())
            if result is plain:
                runners["timm"] = network, pixels
            for point in result.validation.logits:
                answer = partial(lambda method, point, fast: method.points(fast)[point], result.method, point)
                runners[f"{run}/{point}"] = prepare(network, engine, answer), pixels
        for size in sizes:
            calls: dict[str, Sequence[Call]] = {
                name: [partial(runner, batch) for batch in pixels.split(size)[:MOST_CALLS]]
                for name, (runner, pixels) in runners.items()
            }
            common: dict[str, Any] = {"images": REAL, "scope": SCOPE, "reference": SCOPE, "fine_share": None}
            common |= {"images_per_round": size * len(calls["timm"])}
            (macs,) = plain.macs.values()
            entries = [Entry(name=BACKBONE, engine="eager", macs=macs, parts={"timm": 1.0}, **common)]
            for setting in settings:
                name, mean = BACKBONE if setting.result is plain else setting.name, float(setting.macs.mean())
                entries.append(Entry(name=name, engine=engine, macs=mean, parts=setting.parts, **common))
            plan = Plan((engine,), (), MOST_ROUNDS, SECONDS)
            found[size] = measure(entries, calls, size, runners["timm"][0], plan)
    return found


# Pairs


def paired_rows(
    settings: Sequence[Setting], parts: Mapping[str, Tensor], listed: Tensor
) -> Iterator[tuple[Setting, Row]]:
    """Rows of figures that need the plain ViT's answers to the same images, for each part of them.

    Args:
        settings: the plain ViT first.
        parts: which images are of each, ``[n]`` of bool, by its name; all of them have none.
        listed: class indices of all parts that have a name.
    """
    plain, labels = settings[0], settings[0].result.validation.labels
    macs = float(plain.macs.mean())

    def mean(values: Tensor) -> Cell:
        percent = 100 * values.double().numpy()
        drawn = scipy.stats.bootstrap((percent,), np.mean, n_resamples=2000, method="percentile", rng=0)
        low, high = drawn.confidence_interval
        return Cell(float(percent.mean()), interval=(float(low), float(high)))

    for part, kept in parts.items():
        truth, base = labels[kept], plain.answers[kept]
        outside = ~torch.isin(truth, listed)
        for setting in settings:
            answers, cost = setting.answers[kept], float(setting.macs[kept].mean())
            cells = {"accuracy": mean(answers == truth), "gmacs": Cell(cost / 1e9)}
            if len(listed) and outside.any():
                cells["bias"] = Cell(100 * float(torch.isin(answers[outside], listed).double().mean()))
            if setting is not plain:
                cells["difference"] = mean((answers == truth).double() - (base == truth).double())
                cells["agreement"] = Cell(100 * float((answers == base).double().mean()))
                cells["saving"] = Cell(100 * (1 - cost / macs))
            if setting.etas:
                cells["exit_share"] = Cell(100 * float((setting.stops[kept] == 0).double().mean()))
            yield setting, Row(f"{setting.name}, {part}" if part else setting.name, cells, 1)


def parts_of(labels: Tensor, named: Mapping[str, frozenset[int]]) -> tuple[dict[str, Tensor], Tensor]:
    """Which images are of each part that has some, all of them first, and the class indices of all named parts."""
    listed = torch.tensor(sorted(frozenset().union(*named.values())), dtype=torch.long)
    parts = {"": torch.ones_like(labels, dtype=torch.bool)}
    parts |= {name: torch.isin(labels, torch.tensor(sorted(classes))) for name, classes in named.items()}
    if named:
        parts["other classes"] = ~torch.isin(labels, listed)
    return {name: kept for name, kept in parts.items() if kept.any()}, listed


def _notes_on_images(result: Result, parts: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What eta is chosen on, what is scored, and what intervals are."""
    assert result.holdout is not None
    return (
        f"eta is chosen on {len(result.holdout.labels):,} images, and the {len(result.validation.labels):,} test "
        "images are scored once. Brackets are 95% intervals by the bootstrap over images (percentiles of 2,000 "
        "samples); differences are of the same images.",
        *(f"{name}: {int(kept.sum()):,} images." for name, kept in parts.items() if name),
    )


# Tables 2 and 3


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

    def setting(self, result: Result, plain: Result | None) -> Setting | None:
        """A result at this point; None where it has no eta."""
        if self.eta is None:
            return plain_setting(result, self.name)
        eta = self.threshold(result, plain)
        return None if eta is None else Setting(self.name, self.run, result, result.goes_on(eta).long(), (eta,))

    def row(
        self,
        results: Sequence[Result],
        plains: Mapping[int | None, Result],
        missing: str | None = None,
        timed: Mapping[str, Sequence[float]] | None = None,
    ) -> Row:
        """The row of this point.

        Args:
            plains: the plain ViT by seed.
            timed: values of other measures.
        """
        timed = timed or {}
        if self.eta is None:
            values = {name: [MEASURES[name](result) for result in results] for name in ("accuracy", "gmacs")}
            return mean_row(self.name, {"eta": (), "exit_share": (), **values, **timed}, self.published, missing)
        etas = [(result, self.threshold(result, plains.get(result.seed))) for result in results]
        reached = [point for result, eta in etas if eta is not None for point in result.at([eta])]
        unknown = sum(result.seed not in plains for result, eta in etas if eta is None)
        reasons = [missing] if missing else []
        for reason, count in (
            (
                "no eta reaches the plain ViT's accuracy on the images to choose it on",
                len(results) - len(reached) - unknown,
            ),
            ("the plain ViT is not there", unknown),
        ):
            if count:
                reasons.append(reason if count == len(results) else f"{reason} for {count} of {len(results)} seeds")
        return mean_row(self.name, {**values_of(reached), **timed}, self.published, "; ".join(reasons) or None)


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


def operating_points(study: Study, sources: Sources) -> StudyResult:
    """Tables 2 and 3: CF-ViT at some etas, beside its plain ViT and the paper's rows."""
    points = points_of(study, sources.family)
    plains = {result.seed: result for result in sources.of(PLAIN)}
    notes = [
        "eta at parity is the cheapest one whose accuracy is at least the plain ViT's on the images that eta is chosen "
        "on; others are scored."
    ]
    speeds: dict[str, float] = {}
    if study.name == "table2" and plains and sources.speed:
        settings, size = _first_settings(points, sources), 256 if best_device().type == "cuda" else 32
        _, *measured = measure_speed(settings, sources.recipe, (size,))[size].rows
        speeds = {each.name: row.images_per_second for each, row in zip(settings, measured, strict=True)}
        notes.append(
            f"Images per second are of the first seed, on validation images in batches of {size}, all rows prepared "
            "alike and timed in turn; images that go on wait for a full batch."
        )
    rows = []
    for point in points:
        speed = [speeds[point.name]] if point.name in speeds else []
        timed = {"images_per_second": speed, "speedup": [each / speeds[points[0].name] for each in speed]}
        rows.append(point.row(sources.of(point.run), plains, sources.missing.get(point.run), timed))
    beside = [point.published for point in points]
    rows += [published_row(row) for row in study.published if row.family == sources.family and row not in beside]
    curves = [our_curve(each, sources.of(each.run)) for each in study.variants if sources.of(each.run)]
    published = published_curves(study, sources.family)
    draw = partial(pictures.draw_curves, title=study.title, ours=curves, published=published)
    kept = {point.run: speeds[point.name] for point in points if point.name in speeds and point.eta in (None, PARITY)}
    return StudyResult(rows, draw, tuple(notes), kept)


def _first_settings(points: Sequence[OperatingPoint], sources: Sources) -> list[Setting]:
    """The first seed of each run at its operating points, where it has them; the plain ViT first."""
    plains = {result.seed: result for result in sources.of(PLAIN)}
    first = [(point, result) for point in points for result in sources.of(point.run)[:1]]
    return [each for point, result in first if (each := point.setting(result, plains.get(result.seed)))]


def comparison(study: Study, sources: Sources) -> StudyResult:
    """Table 2 of a given model, in pairs with its plain ViT on all images and on parts of them."""
    made, points = operating_points(study, sources), points_of(study, sources.family)
    settings = _first_settings(points, sources)
    parts, listed = parts_of(settings[0].result.validation.labels, sources.parts)
    rows, beside = made.rows[: len(points)], made.rows[len(points) :]
    names = [row.name for row in rows]
    for setting, row in paired_rows(settings, parts, listed):
        if row.name in names:
            known = rows[names.index(row.name)]
            cells = {name: replace(cell, paper=known.cells.get(name, cell).paper) for name, cell in row.cells.items()}
            rows[names.index(row.name)] = replace(known, cells={**known.cells, **cells})
        else:
            eta = {"eta": Cell(setting.etas[0])} if setting.etas else {}
            rows.append(replace(row, cells={**eta, **row.cells}))
    return replace(made, rows=rows + beside, notes=made.notes + _notes_on_images(settings[0].result, parts))


# Runs of any methods


def settings_of(results: Mapping[str, Sequence[Result]], drops: Sequence[float]) -> Iterator[Setting]:
    """The plain ViT; then of each run its operating points, and exits at etas that may lose each of ``drops``.

    Where that is possible, also at an eta that loses nothing to the plain ViT.
    """
    (plain,) = results[PLAIN]
    reference = plain_setting(plain)
    yield reference
    rivals = {run: result for run, (result,) in results.items() if run != PLAIN}
    labels = {}
    for run, result in rivals.items():
        title = f"{result.method.title}{', untrained' * result.untrained}"
        options = (f"{name.replace('_', ' ')} {value:g}" for name, value in asdict(result.method.options).items())
        labels[run] = title, ", ".join([title, *options])
    uses = Counter([reference.name, *(label for _, label in labels.values())])
    for run, result in rivals.items():
        title, label = labels[run]
        label = f"{label} ({run})" if uses[label] > 1 else label
        network, logits = result.open()[0], result.validation.logits
        title = label if len(logits) > 1 else title  # a curve over the etas of one network, or over networks
        for number, point in enumerate(logits):
            name = label if len(logits) == 1 else f"{label}, always {point}"
            yield Setting(name, run, result, torch.full_like(result.validation.labels, number), title=title)
        assert result.holdout is not None and plain.holdout is not None
        parity = top1(result.holdout) - top1(plain.holdout)
        ways = [(f"for {drop:g} point{'s' * (drop != 1)}", drop) for drop in drops]
        for words, drop in [("at parity", parity)] * (parity >= 0) + ways:
            chosen = result.method.choose_exit(network, result.holdout.logits, result.holdout.labels, drop)
            stops = result.method.exits(network, logits)
            if stops is not None:
                etas = tuple(reversed(chosen.values()))  # they are chosen from the last exit to the first
                name = f"{label}, {words}, eta {', '.join(f'{eta:.3g}' for eta in etas)}"
                yield Setting(name, run, result, stops, etas, title)


def _curves_by(settings: Sequence[Setting], costs: Mapping[str, float]) -> list[Curve]:
    """One for each method, over its runs and its etas, by the cost of each timed call."""
    drawn: dict[str, list[tuple[float, float]]] = {}
    for setting in settings:
        cost = sum(share * costs[call] for call, share in setting.parts.items())
        right = 100 * float((setting.answers == setting.result.validation.labels).double().mean())
        drawn.setdefault(setting.title, []).append((cost, right))
    return [
        Curve(name, [cost for cost, _ in sorted(points)], [right for _, right in sorted(points)], len(points) > 1)
        for name, points in drawn.items()
    ]


def methods(study: Study, sources: Sources) -> StudyResult:
    """Table 3 and Figure 5 of trained runs of any methods."""
    settings, finer = (list(settings_of(sources.results, drops)) for drops in (DROPS, CURVE_DROPS))
    plain = settings[0].result
    parts, listed = parts_of(plain.validation.labels, sources.parts)
    shown = parts if study.name == "table3" else {"": parts[""]}
    rows = {row.name: row for _, row in paired_rows(settings, shown, listed)}
    by_macs = {
        f"{run}/{point}": result.macs[point] / 1e9
        for run, (result,) in sources.results.items()
        for point in result.validation.logits
    }
    by_time, notes = {}, _notes_on_images(plain, parts)
    for size, batch in sources.speeds.items():
        for setting, timed in zip(settings, batch.rows[1:], strict=True):  # without timm's model as it is
            cells = {f"images_per_second_{size}": Cell(timed.images_per_second)}
            if setting.result is not plain:
                interval = timed.ratio.low, timed.ratio.high
                cells[f"speedup_{size}"] = Cell(timed.ratio.value, interval=interval, sure=timed.telling)
            rows[setting.name] = replace(rows[setting.name], cells={**rows[setting.name].cells, **cells})
        milliseconds = {
            name: 1e3 * float(np.median([sum(calls) for calls in rounds])) / batch.rows[0].images_per_round
            for name, rounds in batch.seconds.items()
        }
        by_time[f"mean time of an image in batches of {size}, ms"] = _curves_by(finer, milliseconds)
    draw = partial(pictures.draw_curves, title=study.title, ours=_curves_by(finer, by_macs), timed=by_time)
    notes = (
        "'for 0.5 points': the lowest eta from which on none loses more than that to the network's own last answer on "
        "the images that eta is chosen on; 'at parity': from which on none loses anything to the plain ViT there. "
        "Networks without such a row have no exits, or their last answers are below the plain ViT's on those images.",
        *notes,
    )
    if sources.speeds:
        counts = [str(batch.rows[0].images_per_round) for batch in sources.speeds.values()]
        notes += (
            f"Speed is measured on test images ({', '.join(counts)} by batch size), all networks prepared alike and "
            "timed in turn; brackets are 95% intervals of the median ratio to the plain ViT. Images that go on to a "
            "later exit wait for a full batch.",
            *(f"{text[0].upper()}{text[1:]}." for batch in sources.speeds.values() for text in noise_warnings(batch)),
        )
    return StudyResult(list(rows.values()), draw, notes)
