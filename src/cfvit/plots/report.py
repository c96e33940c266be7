"""One HTML page on a model and a data set, which needs nothing but itself. Needs matplotlib."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

import cfvit
from cfvit.calibration import Calibration, rank_images
from cfvit.calibration.checks import missing_classes
from cfvit.calibration.tradeoff import NO_ANSWER, Operation, TradeOff, answers_of, share_estimate
from cfvit.data import DataSource, EvalImages
from cfvit.evaluation.metrics import Collected, Evaluation
from cfvit.files import atomic_write, fill_template, require_writable
from cfvit.modeling.cost import StageMacs
from cfvit.modeling.exit import Exit, confidence_of, goes_on
from cfvit.modeling.model import CoarseToFineViT
from cfvit.plots.explain import Explanation, explain, grey_unsplit, shown_confidence
from cfvit.plots.style import COARSE, FINE, INK, LINE, QUIET, new_figure, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVEL = 0.95
"""Probability with which each interval holds."""

_VARIABLES = {INK: "ink", QUIET: "quiet", LINE: "line", COARSE: "coarse", FINE: "fine"}
_PAGE_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cfvit",
    "font.family": "DejaVu Sans",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "path.simplify": False,
}
_CURVE_POINTS, _BAND_POINTS = 256, 48
_WIDTH = 7.0


SWEEP = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)

_FEW_CLASSES = 20
_GAINS = 10
_SHEET = 8
_THUMBNAIL = 224
_NAMED_FILES = 5


@dataclass(frozen=True, eq=False)
class StageAnswers:
    """What one stage makes of n images."""

    answer: np.ndarray  # class indices ``[n]``, `NO_ANSWER` where the logits are not finite
    right: np.ndarray  # which of them are the label, ``[n]``
    confidence: np.ndarray  # by the model's `Exit`, ``[n]``
    probability: np.ndarray  # the highest softmax probability at the rule's temperature, ``[n]`` in [0, 1]


@dataclass(frozen=True, eq=False)
class Answers:
    """What both stages make of n images at one eta."""

    labels: np.ndarray  # class indices ``[n]``
    coarse: StageAnswers  # of all images, whether they need the stage or not
    fine: StageAnswers  # of all images, whether they need the stage or not
    gone_on: np.ndarray  # which images the fine stage answers, ``[n]``

    @property
    def right(self) -> np.ndarray:
        """Which images are answered rightly by the stage that answers, ``[n]``."""
        return np.where(self.gone_on, self.fine.right, self.coarse.right)


def answers_at(collected: Collected, exit: Exit, threshold: float) -> Answers:
    """Answers of both stages and who goes on at this eta, as `cfvit.Predictor` decides."""
    coarse, fine = collected.logits["coarse"], collected.logits["fine"]

    def answers(logits: Tensor, temperature: float) -> StageAnswers:
        answer = answers_of(logits)
        return StageAnswers(
            answer=answer.numpy(),
            right=(answer == collected.labels).numpy(),
            confidence=confidence_of(logits, exit.measure, temperature).numpy(),
            probability=confidence_of(logits, temperature=temperature).clamp(min=0).numpy(),
        )

    return Answers(
        labels=collected.labels.numpy(),
        coarse=answers(coarse, exit.coarse_temperature),
        fine=answers(fine, exit.fine_temperature),
        gone_on=goes_on(exit.coarse(coarse), threshold).numpy(),
    )


@dataclass(frozen=True)
class ClassScore:
    """One class."""

    index: int
    images: int
    exits: int  # of these, answered at the coarse stage
    right: int  # of these, answered rightly by the stage that answers
    coarse_right: int  # of these, answered rightly by each stage for all
    fine_right: int  # of these, answered rightly by each stage for all

    @property
    def exit_share(self) -> float:
        """Share of the images that exit at the coarse stage, in [0, 1]."""
        return self.exits / self.images

    @property
    def gain(self) -> float:
        """Percentage points by which the fine stage is better than the coarse one."""
        return 100 * (self.fine_right - self.coarse_right) / self.images


def class_scores(answers: Answers, classes: int) -> list[ClassScore]:
    """Scores of all classes that have images, by index."""
    everywhere = np.ones_like(answers.gone_on)
    counted = (everywhere, ~answers.gone_on, answers.right, answers.coarse.right, answers.fine.right)
    columns = [np.bincount(answers.labels[which], minlength=classes).tolist() for which in counted]
    return [ClassScore(index, *row) for index, row in enumerate(zip(*columns, strict=True)) if row[0]]


def most_confident(which: np.ndarray, confidence: np.ndarray, most: int) -> list[int]:
    """The images of highest confidence among some, at most this many.

    Args:
        which: those to choose from, ``[n]`` of bool.
        confidence: ``[n]``.
    """
    places = np.flatnonzero(which)
    return places[np.argsort(-confidence[places], kind="stable")][:most].tolist()


def require_report(path: Path) -> None:
    """Raises `CfvitError` if `write_report` could not draw or write. To be called before the model is run."""
    require_matplotlib()
    require_writable(path)


def write_report(
    path: Path,
    result: Evaluation,
    *,
    model: CoarseToFineViT,
    source: DataSource,
    model_name: str,
    data_name: str,
    calibration: Calibration | None = None,
    day: date | None = None,
) -> None:
    """Writes a page with accuracy, cost, reliability, classes and example images, for screens and for paper.

    The same arguments give the same page. The model is run on the example images alone.

    Args:
        result: what `cfvit.evaluation.metrics.evaluate_model` found of the model, which has an eta, on ``source``.
        calibration: the record of how eta was chosen, if there is one.
        day: the date on the page, today's by default.

    Raises:
        CfvitError: matplotlib is not installed, or the file cannot be written; it is then as it was.
    """
    collected, macs, threshold, exit = result.collected, result.macs, cast(float, result.calibrated), model.exit
    coarse, fine = collected.logits["coarse"], collected.logits["fine"]
    trade = rank_images(coarse, fine, collected.labels, exit.measure, exit.coarse_temperature)
    answers = answers_at(collected, exit, threshold)
    chosen, gone_on = trade.operate(threshold, macs, LEVEL), int(answers.gone_on.sum())
    reliability = [reliability_of(stage.probability, stage.right) for stage in (answers.coarse, answers.fine)]
    page = fill_template(
        "plots/report.html",
        {"signed": signed, "counted": _counted},
        model=model,
        model_name=model_name,
        data_name=data_name,
        eta=f"{threshold:g}",
        threshold=threshold,
        calibration=calibration,
        trade=trade,
        chosen=chosen,
        coarse_accuracy=trade.accuracy(0, LEVEL),
        fine_accuracy=trade.accuracy(trade.images, LEVEL),
        backbone_gmacs=f"{macs.backbone / 1e9:#.3g}",
        notes=_notes(model, result, answers, calibration),
        curve=Markup(draw_trade_off(trade, macs, chosen, "curve")),
        sweep=[(eta, trade.operate(eta, macs, LEVEL)) for eta in sorted({*SWEEP, threshold})],
        reliability=reliability,
        reliability_bars=Markup(draw_reliability(reliability, "reliability")),
        costs=(
            ("coarse stage alone", macs.coarse, trade.images - gone_on, "coarse"),
            ("both stages", macs.both, gone_on, "fine"),
        ),
        **_classes(class_scores(answers, model.config.num_classes)),
        sheets=_sheets(model, collected, source, answers, threshold),
        day=datetime.now(UTC).date() if day is None else day,
        version=cfvit.__version__,
        level=f"{100 * LEVEL:g}",
    )
    with atomic_write(path) as file:
        file.write_text(page, encoding="utf-8")


def _classes(scores: list[ClassScore]) -> dict[str, Any]:
    """Classes for the template: all of a few, the easiest and hardest of many, and what the fine stage gains.

    Of equal ones, those of most images come first: they tell most.
    """
    easiest = sorted(scores, key=lambda score: (-score.exit_share, -score.right / score.images, -score.images))
    tables, exits = [("Classes by the share of their images that is answered coarsely", easiest)], None
    if len(scores) > 2 * _FEW_CLASSES:
        exits = Markup(draw_exit_shares([score.exit_share for score in easiest], "exits"))
        hardest = sorted(scores, key=lambda score: (score.exit_share, score.right / score.images, -score.images))
        tables = [
            (f"The {_FEW_CLASSES} easiest classes", easiest[:_FEW_CLASSES]),
            (f"The {_FEW_CLASSES} hardest classes, hardest first", hardest[:_FEW_CLASSES]),
        ]
    gaining = sorted((score for score in scores if score.gain > 0), key=lambda score: (-score.gain, -score.images))
    losing = sum(score.gain < 0 for score in scores)
    gains = {"gaining": gaining, "losing": losing, "most_gains": _GAINS}
    return {"scores": scores, "exits": exits, "class_tables": tables, **gains}


def _notes(model: CoarseToFineViT, result: Evaluation, answers: Answers, calibration: Calibration | None) -> list[str]:
    """What a reader should know before relying on the figures."""
    names = [model.label_of(index) for index in range(model.config.num_classes)]
    missing = missing_classes(answers.labels.tolist(), names, len(answers.labels))
    notes = [f"{missing[0].upper()}{missing[1:]}, so nothing is known of them."] if missing else []
    if unreadable := result.unreadable:
        rest = len(unreadable) - _NAMED_FILES
        named = f"{', '.join(unreadable[:_NAMED_FILES])}{f' and {rest} more' if rest > 0 else ''}"
        verb = "is" if len(unreadable) == 1 else "are"
        notes.append(f"{_counted(len(unreadable), 'image')} could not be read and {verb} not counted: {named}.")
    if not_finite := int(((answers.coarse.answer == NO_ANSWER) | (answers.fine.answer == NO_ANSWER)).sum()):
        images = _counted(not_finite, "image")
        notes.append(f"The model's answer to {images} is not a finite number, which counts as wrong.")
    if calibration is not None:
        notes.append(f"What was promised of this eta: {calibration.promise}.")
    return notes


def _sheets(
    model: CoarseToFineViT, collected: Collected, source: DataSource, answers: Answers, threshold: float
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Example images of three kinds, each kind with a title, as the template shows them."""
    coarse, fine = answers.coarse, answers.fine
    sheets: list[tuple[str, list[dict[str, Any]]]] = []
    for title, which, confidence in (
        ("Easy: right at the coarse stage, and surest", coarse.right, coarse.confidence),
        (
            "Hard: wrong at the coarse stage, right at the fine one, and surest there",
            ~coarse.right & fine.right,
            fine.confidence,
        ),
        ("Wrong at the fine stage, and surest there", ~fine.right, fine.confidence),
    ):
        places, examples = most_confident(which, confidence, _SHEET), []
        indices = collected.indices[places].tolist()
        images = EvalImages(source, model.data_config, indices)
        batch = [images[i][0] for i in range(len(images))]
        explanations = explain(model, torch.stack(batch), threshold) if batch else []
        for place, index, seen in zip(places, indices, explanations, strict=True):
            shown, gone_on = [], bool(answers.gone_on[place])
            for name, stage, counts in (("coarse", coarse, not gone_on), ("fine", fine, gone_on)):
                answer, right = int(stage.answer[place]), bool(stage.right[place])
                label = "no number" if answer == NO_ANSWER else model.label_of(answer)
                sure = shown_confidence(max(float(stage.confidence[place]), 0), model.exit.measure)
                shown.append({"stage": name, "text": f"{label}, {sure}", "right": right, "counts": counts})
            example = {
                "label": model.label_of(int(answers.labels[place])),
                "file": source.name(index),
                "answers": shown,
                "split": f"{int(seen.split.sum())} of {seen.split.size} cells split",
            }
            examples.append({**example, **_thumbnail(seen)})
        sheets.append((title, examples))
    return sheets


def _thumbnail(seen: Explanation) -> dict[str, Any]:
    """A small JPEG: cells that are not split are pale and grey, lines part the others and their children."""
    picture = Image.fromarray((255 * grey_unsplit(seen.image, seen.split)).round().astype(np.uint8))
    picture = ImageOps.contain(picture, (_THUMBNAIL, _THUMBNAIL))
    draw = ImageDraw.Draw(picture)
    wide, tall = picture.width / seen.split.shape[1], picture.height / seen.split.shape[0]
    for row, column in np.argwhere(seen.split):
        x, y = column * wide, row * tall
        draw.rectangle((x, y, x + wide, y + tall), outline="white")
        draw.line((x + wide / 2, y, x + wide / 2, y + tall), fill="white")
        draw.line((x, y + tall / 2, x + wide, y + tall / 2), fill="white")
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=82, optimize=True)
    encoded = base64.b64encode(jpeg.getvalue()).decode("ascii")
    return {"jpeg": encoded, "width": picture.width, "height": picture.height}


def signed(value: float, digits: str = ".1f") -> str:
    """A number with a true minus sign, and none before a zero."""
    text = f"{value:{digits}}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−", 1)


def _counted(number: int, thing: str) -> str:
    plural = f"{thing}es" if thing.endswith("s") else f"{thing}s"
    return f"{number:,} {thing if number == 1 else plural}"


# Charts, as SVG to stand inside the page, which gives them its colours. `name`, unique on the page, begins their names


@dataclass(frozen=True, eq=False)
class Reliability:
    """Whether answers are right as often as their probability says, by bins of equal width."""

    counts: np.ndarray  # images in each bin, ``[bins]``
    hits: np.ndarray  # of them, the right answers
    # expected calibration error in percentage points, the mean distance between accuracy and mean probability of a bin,
    # weighted by images (Naeini et al., AAAI 2015)
    error: float


def reliability_of(probability: np.ndarray, right: np.ndarray, bins: int = 15) -> Reliability:
    """Counts right answers by bins of the highest softmax probability, both ``[n]``."""
    places = np.minimum((probability * bins).astype(int), bins - 1)
    counts = np.bincount(places, minlength=bins)
    hits = np.bincount(places, weights=right, minlength=bins)
    sums = np.bincount(places, weights=probability.astype(np.float64), minlength=bins)
    return Reliability(counts, hits.astype(int), float(100 * np.abs(hits - sums).sum() / len(places)))


def draw_trade_off(trade: TradeOff, macs: StageMacs, chosen: Operation, name: str) -> str:
    """Accuracy against mean cost over eta, with its interval, both ends, the plain backbone and the eta in use."""
    # numbers of images that can go on, both ends among them
    places = (np.linspace(0, len(trade.reachable) - 1, most).astype(int) for most in (_CURVE_POINTS, _BAND_POINTS))
    curve, band = (trade.reachable[np.unique(each)].tolist() for each in places)
    intervals = [trade.accuracy(go_on, LEVEL) for go_on in band]
    low, high = [estimate.low for estimate in intervals], [estimate.high for estimate in intervals]
    costs, band_costs = ([macs.expected(go_on / trade.images) / 1e9 for go_on in each] for each in (curve, band))
    accuracy = 100 * trade.right / trade.images
    with new_figure(_WIDTH, 3.9, _PAGE_SETTINGS) as figure:
        axis = figure.subplots()
        axis.fill_between(band_costs, low, high, color=COARSE, alpha=0.16, lw=0, label="95% interval")
        axis.plot(costs, accuracy[curve], color=COARSE, lw=1.8, label="over eta")
        ends = {"color": INK, "ls": "", "ms": 7, "mfc": "none", "mew": 1.4}
        axis.plot(macs.coarse / 1e9, accuracy[0], "s", label="always coarse", **ends)
        axis.plot(macs.both / 1e9, accuracy[-1], "^", label="always fine", **ends)
        axis.plot(chosen.gmacs.value, chosen.accuracy.value, "o", color=FINE, ms=7, ls="", label="eta in use")
        axis.axvline(macs.backbone / 1e9, color=QUIET, ls=(0, (4, 3)), lw=1.2, label="plain backbone's cost")
        axis.set(xlabel="mean cost of an image, GMACs", ylabel="top-1 accuracy, %")
        axis.set_xlim(0, 1.06 * max(macs.both, macs.backbone) / 1e9)
        figure.legend(loc="outside upper left", ncols=3)
        return _svg(figure, name, "Accuracy against mean cost of an image; the table below has its numbers")


def draw_reliability(stages: Sequence[Reliability], name: str) -> str:
    """For the coarse and the fine stage: accuracy by probability, above a histogram of the probability."""
    with new_figure(_WIDTH, 4.6, _PAGE_SETTINGS) as figure:
        axes = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(3, 1.2))
        for column, (stage, reliability, colour) in enumerate(
            zip(("coarse stage", "fine stage"), stages, (COARSE, FINE), strict=True)
        ):
            above, below = axes[:, column]
            bins = len(reliability.counts)
            centres, width = (np.arange(bins) + 0.5) / bins, 0.92 / bins
            filled = np.flatnonzero(reliability.counts)
            counted = zip(reliability.hits[filled].tolist(), reliability.counts[filled].tolist(), strict=True)
            right = [share_estimate(hits, count, LEVEL) for hits, count in counted]
            above.bar(
                centres[filled], [100 * each.value for each in right], width=width, color=colour, alpha=0.45, lw=0
            )
            lows, highs = [100 * each.low for each in right], [100 * each.high for each in right]
            above.vlines(centres[filled], lows, highs, color=colour, lw=1.3)
            above.plot([0, 1], [0, 100], color=QUIET, ls=(0, (4, 3)), lw=1.2)
            above.set(xlim=(0, 1), ylim=(0, 100))
            above.set_title(f"{stage}, ECE {reliability.error:.1f} points", fontsize=10)
            below.bar(centres, 100 * reliability.counts / reliability.counts.sum(), width=width, color=colour)
            below.set_xlabel("highest probability")
        axes[0, 0].set_ylabel("right answers, %")
        axes[1, 0].set_ylabel("images, %")
        errors = " and ".join(f"{reliability.error:.1f}" for reliability in stages)
        return _svg(figure, name, f"Reliability of both stages; the calibration errors are {errors} points")


def draw_exit_shares(shares: list[float], name: str) -> str:
    """How many classes have which exit share; ``shares`` are of each class, in [0, 1]."""
    with new_figure(_WIDTH, 2.4, _PAGE_SETTINGS) as figure:
        axis = figure.subplots()
        axis.hist([100 * share for share in shares], bins=20, range=(0, 100), color=COARSE, rwidth=0.92)
        axis.set(xlabel="images of a class that are answered at the coarse stage, %", ylabel="classes", xlim=(0, 100))
        median = 100 * float(np.median(shares))
        return _svg(figure, name, f"Exit shares of {len(shares)} classes; the median is {median:.0f}%")


def _svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an SVG element without size, addresses or colours of its own, and with its own names."""
    written = io.StringIO()
    unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(written, format="svg", transparent=True, metadata=unsaid)
    drawing = written.getvalue()
    view = re.search(r'viewBox="[^"]*"', drawing)
    assert view is not None
    inside = drawing[drawing.index(">", view.end()) + 1 : drawing.rindex("</svg>")]
    inside = re.sub(r"<(style|metadata)\b.*?</\1>|<!--.*?-->", "", inside, flags=re.DOTALL)
    inside = inside.replace("xlink:href", "href")
    inside = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", inside)
    for colour, variable in _VARIABLES.items():
        inside = inside.replace(colour, f"var(--{variable})")
    return f'<svg role="img" aria-label="{html.escape(description)}" {view[0]}>{inside}</svg>'
