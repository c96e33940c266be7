"""One HTML page on a model and a data set, which needs nothing but itself. Needs matplotlib."""

from __future__ import annotations

import base64
import io
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image, ImageDraw, ImageOps

import cfvit
from cfvit.calibration import Calibration, rank_images
from cfvit.calibration.images import missing_classes
from cfvit.calibration.tradeoff import NO_ANSWER
from cfvit.data import DataSource, EvalImages
from cfvit.evaluation.breakdown import (
    LEVEL,
    Answers,
    ClassScore,
    class_scores,
    judge,
    reliability_of,
    shown_confidence,
    surest,
)
from cfvit.evaluation.metrics import Collected
from cfvit.files import atomic_write, fill_template, require_writable
from cfvit.modeling.cost import StageMacs
from cfvit.modeling.model import CoarseToFineViT
from cfvit.plots.charts import draw_exit_shares, draw_reliability, draw_trade_off
from cfvit.plots.explain import Explanation, explain, veil
from cfvit.plots.style import require_matplotlib

SWEEP = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)

_MOST_CLASSES = 40
_FEW_CLASSES = 20
_GAINS = 10
_SHEET = 8
_THUMBNAIL = 224
_NAMED_FILES = 5


def require_report(path: Path) -> None:
    """Finds out before the model is run, which may take long, whether `write_report` can do its work, or raises."""
    require_matplotlib()
    require_writable(path)


def write_report(
    path: Path,
    *,
    model: CoarseToFineViT,
    collected: Collected,
    source: DataSource,
    macs: StageMacs,
    threshold: float,
    model_name: str,
    data_name: str,
    calibration: Calibration | None = None,
    day: date | None = None,
) -> None:
    """Writes a page with accuracy, cost, reliability, classes and example images, for screens and for paper.

    The same arguments give the same page. The model is run on the example images alone.

    Args:
        collected: logits of both stages, as `cfvit.evaluation.metrics.collect` gives them of ``source``.
        threshold: eta in [0, 1], for which exits, costs and classes are shown.
        calibration: the record of how ``threshold`` was chosen, if there is one.
        day: the date on the page, today's by default.

    Raises:
        CfvitError: matplotlib is not installed, or the file cannot be written; it is then as it was.
    """
    require_report(path)
    coarse, fine, exit = collected.logits["coarse"], collected.logits["fine"], model.exit
    trade = rank_images(coarse, fine, collected.labels, exit.measure, exit.coarse_temperature)
    answers = judge(collected, exit, threshold)
    scores = class_scores(answers, model.config.num_classes)
    chosen, gone_on = trade.operate(threshold, macs, LEVEL), int(answers.gone_on.sum())
    reliability = (reliability_of(answers.coarse), reliability_of(answers.fine))
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
        notes=_notes(model, collected, source, answers, calibration),
        curve=Markup(draw_trade_off(trade, macs, chosen, "curve")),
        sweep=[(eta, trade.operate(eta, macs, LEVEL)) for eta in sorted({*SWEEP, threshold})],
        reliability=reliability,
        reliability_bars=Markup(draw_reliability(reliability, "reliability")),
        costs=(
            ("coarse stage alone", macs.coarse, trade.images - gone_on, "coarse"),
            ("both stages", macs.both, gone_on, "fine"),
        ),
        **_classes(scores),
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
    if len(scores) > _MOST_CLASSES:
        exits = Markup(draw_exit_shares([score.exit_share for score in easiest], "exits"))
        tables = [
            (f"The {_FEW_CLASSES} easiest classes", easiest[:_FEW_CLASSES]),
            (f"The {_FEW_CLASSES} hardest classes, hardest first", easiest[: -_FEW_CLASSES - 1 : -1]),
        ]
    gaining = sorted((score for score in scores if score.gain > 0), key=lambda score: (-score.gain, -score.images))
    losing = sum(score.gain < 0 for score in scores)
    gains = {"gaining": gaining, "losing": losing, "most_gains": _GAINS}
    return {"scores": scores, "exits": exits, "class_tables": tables, **gains}


def _notes(
    model: CoarseToFineViT,
    collected: Collected,
    source: DataSource,
    answers: Answers,
    calibration: Calibration | None,
) -> list[str]:
    """What a reader should know before relying on the figures."""
    names = [model.label_of(index) for index in range(model.config.num_classes)]
    missing = missing_classes(answers.labels.tolist(), names, len(answers.labels))
    notes = [f"{missing[0].upper()}{missing[1:]}, so nothing is known of them."] if missing else []
    unreadable = [source.name(index) for index in collected.unreadable]
    if unreadable:
        rest = len(unreadable) - _NAMED_FILES
        named = f"{', '.join(unreadable[:_NAMED_FILES])}{f' and {rest} more' if rest > 0 else ''}"
        verb = "is" if len(unreadable) == 1 else "are"
        notes.append(f"{_counted(len(unreadable), 'image')} could not be read and {verb} not counted: {named}.")
    wordless = int(((answers.coarse.answer == NO_ANSWER) | (answers.fine.answer == NO_ANSWER)).sum())
    if wordless:
        notes.append(
            f"The model's answer to {_counted(wordless, 'image')} is not a finite number, which counts as wrong."
        )
    if calibration is not None:
        notes.append(f"What was promised of this eta: {calibration.promise}.")
    return notes


def _sheets(
    model: CoarseToFineViT, collected: Collected, source: DataSource, answers: Answers, threshold: float
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Example images of three kinds, each kind with a title, as the template shows them."""
    coarse, fine = answers.coarse, answers.fine
    hard = surest(~coarse.right & fine.right, fine.confidence, _SHEET)
    sheets: list[tuple[str, list[dict[str, Any]]]] = []
    for title, places in (
        ("Easy: right at the coarse stage, and surest", surest(coarse.right, coarse.confidence, _SHEET)),
        ("Hard: wrong at the coarse stage, right at the fine one, and surest there", hard),
        ("Wrong at the fine stage, and surest there", surest(~fine.right, fine.confidence, _SHEET)),
    ):
        examples = []
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
            picture, jpeg = _thumbnail(seen), io.BytesIO()
            picture.save(jpeg, "JPEG", quality=82, optimize=True)
            examples.append(
                {
                    "label": model.label_of(int(answers.labels[place])),
                    "file": source.name(index),
                    "answers": shown,
                    "split": f"{int(seen.split.sum())} of {seen.split.size} cells split",
                    "jpeg": base64.b64encode(jpeg.getvalue()).decode("ascii"),
                    "width": picture.width,
                    "height": picture.height,
                }
            )
        sheets.append((title, examples))
    return sheets


def _thumbnail(seen: Explanation) -> Image.Image:
    """A small picture: cells that are not split are pale and grey, lines part the others and their children."""
    picture = Image.fromarray((255 * veil(seen.image, seen.split)).round().astype(np.uint8))
    picture = ImageOps.contain(picture, (_THUMBNAIL, _THUMBNAIL))
    draw = ImageDraw.Draw(picture)
    wide, tall = picture.width / seen.split.shape[1], picture.height / seen.split.shape[0]
    for row, column in np.argwhere(seen.split):
        x, y = column * wide, row * tall
        draw.rectangle((x, y, x + wide, y + tall), outline="white")
        draw.line((x + wide / 2, y, x + wide / 2, y + tall), fill="white")
        draw.line((x, y + tall / 2, x + wide, y + tall / 2), fill="white")
    return picture


def signed(value: float, digits: str = ".1f") -> str:
    """A number with a true minus sign, and none before a zero."""
    text = f"{value:{digits}}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−", 1)


def _counted(number: int, thing: str) -> str:
    plural = f"{thing}es" if thing.endswith("s") else f"{thing}s"
    return f"{number:,} {thing if number == 1 else plural}"
