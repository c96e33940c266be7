"""Runs of any methods side by side: the same images, in pairs with the plain ViT, timed in turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfvit.benchmark.contenders import BACKBONE
from cfvit.benchmark.engines import prepare
from cfvit.benchmark.measure import REAL, Batch, Entry, Plan, measure
from cfvit.benchmark.names import EngineName
from cfvit.benchmark.report import doubts_of
from cfvit.evaluation.timing import Call
from cfvit.paper.given import Contestant
from cfvit.paper.rows import (
    BATCH_SIZES,
    Cell,
    Made,
    Row,
    Sources,
    notes_on_images,
    paired,
    parts_of,
    read_images,
    restricted,
)
from cfvit.paper.runs import Result, top1
from cfvit.paper.studies import PLAIN, Study
from cfvit.plots import figures as pictures
from cfvit.plots.figures import Curve
from cfvit.training.recipe import Recipe
from cfvit.training.setup import autocast

DROPS = (0.5, 1.0, 2.0)
CURVE_DROPS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)
"""Points of accuracy that early exits may lose on the images that eta is chosen on: for rows, and for curves."""

SCOPE = "answering"
IMAGES, MOST_CALLS, MOST_ROUNDS, SECONDS = 32, 8, 40, 120
"""A round of a network answers so many images in so many calls at most; rounds and seconds of a batch size."""


@dataclass(frozen=True, eq=False)
class Setting:
    """A way of running a network, which a row or a point of a curve is about."""

    name: str  # of the row
    title: str  # of the curve
    run: str
    etas: tuple[float, ...]  # by which images exit; none where all are treated alike
    points: tuple[str, ...]  # the operating points of the network
    stops: Tensor  # the number of the operating point that answers each image, ``[n]``
    answers: Tensor  # class indices ``[n]``
    costs: Tensor  # MACs of each operating point

    @property
    def parts(self) -> dict[str, float]:
        """The share of the images that each operating point answers, by the name of its timed call."""
        shares = torch.bincount(self.stops, minlength=len(self.points)).double() / len(self.stops)
        return {
            f"{self.run}/{point}": share for point, share in zip(self.points, shares.tolist(), strict=True) if share
        }


def settings_of(
    contestants: Mapping[str, Contestant], results: Mapping[str, Sequence[Result]], drops: Sequence[float]
) -> Iterator[Setting]:
    """All operating points, and exits at etas that may lose each of ``drops``, or nothing to the plain ViT."""
    (plain,) = results[PLAIN]
    assert plain.holdout is not None
    labels = {}
    for run, each in contestants.items():
        title = f"{each.method.title}{', untrained' * each.untrained}"
        options = (f"{name.replace('_', ' ')} {value:g}" for name, value in asdict(each.method.options).items())
        labels[run] = title, ", ".join([title, *options])
    twice = {label for label, count in Counter(label for _, label in labels.values()).items() if count > 1}
    for run, each in contestants.items():
        (result,), (title, label) = results[run], labels[run]
        label = f"{label} ({run})" if label in twice else label
        logits = result.validation.logits
        argmax = torch.stack([own.argmax(-1) for own in logits.values()], dim=1)
        rows = torch.arange(len(argmax))
        common = {"title": title, "run": run, "points": tuple(logits)}
        costs = torch.tensor([result.macs[point] for point in logits], dtype=torch.float64)
        for number, point in enumerate(logits):
            name = label if len(logits) == 1 else f"{label}, always {point}"
            stops = torch.full_like(rows, number)
            yield Setting(name, etas=(), stops=stops, answers=argmax[:, number], costs=costs, **common)
        assert result.holdout is not None
        parity = top1(result.holdout) - top1(plain.holdout)
        ways = [("at parity", parity)] * (parity >= 0) + [(f"for {drop:g} points", drop) for drop in drops]
        for words, drop in ways:
            chosen = each.method.choose_exit(each.network, result.holdout.logits, result.holdout.labels, drop)
            stops = each.method.exits(each.network, logits)
            if stops is not None:
                etas = tuple(reversed(chosen.values()))  # they are chosen from the last exit to the first
                name = f"{label}, {words}, eta {', '.join(f'{eta:.3g}' for eta in etas)}"
                yield Setting(name, etas=etas, stops=stops, answers=argmax[rows, stops], costs=costs, **common)


def measure_speed(
    contestants: Mapping[str, Contestant], results: Mapping[str, Sequence[Result]], recipe: Recipe
) -> dict[int, Batch]:
    """Times each setting beside the plain ViT in the same engine, in one run for each of `BATCH_SIZES`, on real images.

    Of a network with exits each operating point is timed for whole batches, and a setting costs their mean by the
    share of images that each answers: images that go on wait for a full batch, as in a stream.
    """
    (plain,) = results[PLAIN]
    network, images = plain.open()
    readable = plain.validation.indices
    places = np.unique(np.linspace(0, len(readable) - 1, min(IMAGES, len(readable))).round().astype(int))
    pixels = read_images(images, readable[places].tolist())
    settings = list(settings_of(contestants, results, DROPS))
    engines: tuple[EngineName, EngineName] = ("eager", "torch")
    runners: dict[str, Any] = {f"{BACKBONE}/{engine}": prepare(network, engine) for engine in engines}
    for run, each in contestants.items():
        for point in results[run][0].macs:
            answers = partial(lambda method, point, fast: method.points(fast)[point], each.method, point)
            runners[f"{run}/{point}"] = prepare(each.network, "torch", answers)
    found = {}
    with torch.inference_mode(), autocast(recipe, pixels.device):
        for size in BATCH_SIZES:
            batches = pixels.split(size)[:MOST_CALLS]
            calls: dict[str, Sequence[Call]] = {
                name: [partial(runner, batch) for batch in batches] for name, runner in runners.items()
            }
            common: dict[str, Any] = {"images": REAL, "scope": SCOPE, "reference": SCOPE, "fine_share": None}
            common |= {"images_per_round": sum(map(len, batches))}
            (macs,) = plain.macs.values()
            entries = [
                Entry(name=BACKBONE, engine=engine, macs=macs, parts={f"{BACKBONE}/{engine}": 1.0}, **common)
                for engine in engines
            ]
            for setting in settings:
                mean = float(setting.costs[setting.stops].mean())
                entries.append(Entry(name=setting.name, engine="torch", macs=mean, parts=setting.parts, **common))
            found[size] = measure(entries, calls, size, network, Plan(("torch",), (), MOST_ROUNDS, SECONDS))
    return found


def compare_methods(
    contestants: Mapping[str, Contestant], speeds: Mapping[int, Batch], study: Study, sources: Sources
) -> Made:
    """Table 3 and Figure 5 of runs of this machine.

    Args:
        speeds: from `measure_speed`; empty where nothing is timed.
    """
    (plain,) = sources.of(PLAIN)
    (macs,) = plain.macs.values()
    parts, listed = parts_of(plain.validation.labels, sources.parts)
    speed: dict[str, dict[str, Cell]] = {}  # of all images, by name
    for size, batch in speeds.items():
        for timed in batch.rows[1:]:  # without timm's model as it is
            ratio = Cell(timed.ratio.value, interval=(timed.ratio.low, timed.ratio.high), sure=timed.telling)
            ratios = {} if timed.name == BACKBONE else {f"speedup_{size}": ratio}
            cells = {f"images_per_second_{size}": Cell(timed.images_per_second), **ratios}
            speed.setdefault(timed.name, {}).update(cells)
    rows = []
    for part, kept in parts.items() if study.kind == "operating_points" else [("", parts[""])]:
        base, suffix, times = restricted(plain, kept), f", {part}" if part else "", {} if part else speed
        cells = {**paired(None, base, listed), "gmacs": Cell(macs / 1e9)}
        rows.append(Row(f"plain ViT{suffix}", {**cells, **times.get(BACKBONE, {})}, 1))
        for setting in settings_of(contestants, sources.results, DROPS):
            mean = float(setting.costs[setting.stops[kept]].mean())
            cells = {**paired(setting.answers[kept], base, listed), "gmacs": Cell(mean / 1e9)}
            cells["saving"] = Cell(100 * (1 - mean / macs))
            if setting.etas:
                cells["exit_share"] = Cell(100 * float((setting.stops[kept] == 0).double().mean()))
            rows.append(Row(f"{setting.name}{suffix}", {**cells, **times.get(setting.name, {})}, 1))

    def curves(costs: Mapping[str, float]) -> list[Curve]:
        """One for each method, over its runs and its etas, by the cost of each operating point."""
        drawn = {"plain ViT": [(costs[BACKBONE], top1(plain.validation))]}
        for setting in settings_of(contestants, sources.results, CURVE_DROPS):
            cost = sum(share * costs[call] for call, share in setting.parts.items())
            right = 100 * float((setting.answers == plain.validation.labels).double().mean())
            drawn.setdefault(setting.title, []).append((cost, right))
        return [
            Curve(name, [cost for cost, _ in sorted(points)], [right for _, right in sorted(points)], len(points) > 1)
            for name, points in drawn.items()
        ]

    by_macs = {f"{run}/{point}": cost / 1e9 for run in contestants for point, cost in sources.of(run)[0].macs.items()}
    by_time = {}
    for size, batch in speeds.items():
        seconds = {
            name: float(np.median([sum(calls) for calls in rounds])) / batch.rows[0].images_per_round
            for name, rounds in batch.seconds.items()
        }
        costs = {name: 1e3 * each for name, each in seconds.items()}
        axis = f"mean time of an image in batches of {size}, ms"
        by_time[axis] = curves({**costs, BACKBONE: costs[f"{BACKBONE}/torch"]})
    draw = partial(
        pictures.draw_curves, title=study.title, ours=curves({**by_macs, BACKBONE: macs / 1e9}), timed=by_time
    )
    notes = (
        "'for 0.5 points': the cheapest eta that loses no more than that to the network's own last answer on the "
        "images that eta is chosen on; 'at parity': that loses nothing to the plain ViT there. Networks without such "
        "a row have no exits, or their last answers are below the plain ViT's on those images.",
        *notes_on_images(plain, parts),
    )
    if speeds:
        counts = [str(batch.rows[0].images_per_round) for batch in speeds.values()]
        notes += (
            f"Speed is measured on test images ({', '.join(counts)} by batch size), all networks prepared alike and "
            "timed in turn; brackets are 95% intervals of the median ratio to the plain ViT. Images that go on to a "
            "later exit wait for a full batch.",
            *(f"{text[0].upper()}{text[1:]}." for batch in speeds.values() for text in doubts_of(batch)),
        )
    return Made(rows, draw, notes)
