"""One HTML page on a model and a data set, which needs nothing but itself. Needs matplotlib."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

import cfvit
from cfvit.calibration import Calibration, rank_images
from cfvit.calibration.checks import missing_classes
from cfvit.calibration.tradeoff import NO_ANSWER, answers_of
from cfvit.data import DataSource, EvalImages
from cfvit.evaluation.metrics import Collected, Evaluation
from cfvit.files import atomic_write, fill_template, require_writable
from cfvit.modeling.exit import Exit, confidence_of, goes_on
from cfvit.modeling.model import CoarseToFineViT
from cfvit.plots.charts import LEVEL, draw_exit_shares, draw_reliability, draw_trade_off, reliability_of
from cfvit.plots.explain import Explanation, explain, shown_confidence, veil
from cfvit.plots.style import require_matplotlib

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


def judge(collected: Collected, exit: Exit, threshold: float) -> Answers:
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


def surest(which: np.ndarray, confidence: np.ndarray, most: int) -> list[int]:
    """The images of highest confidence among some, at most this many.

    Args:
        which: those to choose from, ``[n]`` of bool.
        confidence: ``[n]``.
    """
    places = np.flatnonzero(which)
    return places[np.argsort(-confidence[places], kind="stable")][:most].tolist()


def require_report(path: Path) -> None:
    """Finds out before the model is run, which may take long, whether `write_report` can do its work, or raises."""
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
    answers = judge(collected, exit, threshold)
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
        backbone_gmacs=f"{macs.backbone / 1e9:.3g}",
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
    """Classes for the template: all of a few, the easiest and hardest of many, and what the fine stage gains."""
    easiest = sorted(scores, key=lambda score: (-score.exit_share, -score.right / score.images))
    tables, exits = [("Classes by the share of their images that is answered coarsely", easiest)], None
    if len(scores) > 2 * _FEW_CLASSES:
        exits = Markup(draw_exit_shares([score.exit_share for score in easiest], "exits"))
        tables = [
            (f"The {_FEW_CLASSES} easiest classes", easiest[:_FEW_CLASSES]),
            (f"The {_FEW_CLASSES} hardest classes, hardest first", easiest[: -_FEW_CLASSES - 1 : -1]),
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
    if wordless := int(((answers.coarse.answer == NO_ANSWER) | (answers.fine.answer == NO_ANSWER)).sum()):
        images = _counted(wordless, "image")
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
        places, examples = surest(which, confidence, _SHEET), []
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
    picture = Image.fromarray((255 * veil(seen.image, seen.split)).round().astype(np.uint8))
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
