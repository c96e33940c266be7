"""One HTML page on a model and a data set, which needs nothing but itself. Needs matplotlib."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cached_property
from pathlib import Path
from string import Template

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

import cfvit
from cfvit.calibration import Calibration, Estimate, TradeOff, rank_images
from cfvit.calibration.calibrated import missing_classes
from cfvit.data import DataSource, EvalImages
from cfvit.evaluation.breakdown import (
    LEVEL,
    Answers,
    ClassScore,
    StageAnswers,
    accuracy_estimate,
    class_scores,
    judge,
    operate,
    reliability_of,
    shown_confidence,
    surest,
)
from cfvit.evaluation.metrics import Collected
from cfvit.files import atomic_write, require_writable
from cfvit.modeling.cost import StageMacs
from cfvit.modeling.model import CoarseToFineViT
from cfvit.plots.charts import draw_exit_shares, draw_reliability, draw_trade_off
from cfvit.plots.explain import Explanation, explain, veil
from cfvit.plots.style import require_matplotlib

TEMPLATE_FILE = "report.html"
SWEEP = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)

_MOST_CLASSES = 40
_FEW_CLASSES = 20
_GAINS = 10
_SHEET = 8
_THUMBNAIL = 224
_NAMED_FILES = 5


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
        path: of the HTML file.
        collected: logits of both stages, as `cfvit.evaluation.metrics.collect` gives them.
        source: where ``collected`` comes from, to read the example images again.
        macs: cost of each stage.
        threshold: eta in [0, 1], for which exits, costs and classes are told.
        model_name, data_name: as the user knows them.
        calibration: the record of how eta was chosen, if there is one.
        day: the date on the page, today's by default.

    Raises:
        CfvitError: matplotlib is not installed, or the file cannot be written; it is then as it was.
    """
    require_report(path)
    day = datetime.now(UTC).date() if day is None else day
    page = _Page(model, collected, source, macs, threshold, model_name, data_name, calibration, day).write()
    with atomic_write(path) as file:
        file.write_text(page, encoding="utf-8")


def require_report(path: Path) -> None:
    """Finds out before the model is run, which may take long, whether `write_report` can do its work.

    Raises:
        CfvitError: matplotlib is not installed, or a file cannot be written there.
    """
    require_matplotlib()
    require_writable(path)


class Markup(str):
    """Text that is HTML already; any other text is escaped where it enters the page."""


def escape(value: object) -> str:
    """Text as HTML, safe between tags and in quoted attributes."""
    return value if isinstance(value, Markup) else html.escape(str(value))


@dataclass(frozen=True)
class _Page:
    """What `write_report` was given, and the sections that follow from it, each as HTML."""

    model: CoarseToFineViT
    collected: Collected
    source: DataSource
    macs: StageMacs
    threshold: float
    model_name: str
    data_name: str
    calibration: Calibration | None
    day: date

    @cached_property
    def trade(self) -> TradeOff:
        (coarse, fine), rule = self.collected.logits, self.model.exit
        return rank_images(coarse, fine, self.collected.labels, rule.measure, rule.coarse_temperature)

    @cached_property
    def answers(self) -> Answers:
        return judge(self.collected, self.model.exit, self.threshold)

    @cached_property
    def scores(self) -> list[ClassScore]:
        return class_scores(self.answers, self.model.config.num_classes)

    @property
    def eta(self) -> str:
        return f"{self.threshold:g}"

    def write(self) -> str:
        """The page."""
        template = Template(Path(__file__).with_name(TEMPLATE_FILE).read_text(encoding="utf-8"))
        return template.substitute(
            title=escape(f"{self.model_name} on {self.data_name}"),
            model=escape(self.model_name),
            lead=f"This page shows how often the model is right on these images, what an image costs, and which images "
            f"need the fine stage, when the coarse answer is given from a confidence (eta) of {self.eta} upwards.",
            facts=self._facts(),
            tiles=self._tiles(),
            notes="".join(f'<p class="note">{escape(note)}</p>' for note in self._notes()),
            trade_off=self._trade_off(),
            sweep=self._sweep(),
            reliability_words=self._reliability_words(),
            reliability=self._reliability(),
            costs=self._costs(),
            classes=self._classes(),
            gains=self._gains(),
            examples_words=self._examples_words(),
            examples=self._examples(),
            version=escape(cfvit.__version__),
            level=f"{100 * LEVEL:g}",
        )

    def _facts(self) -> str:
        config, (rows, columns) = self.model.config, self.model.grid
        height, width = self.model.image_size
        facts = {
            "Model": self.model_name,
            "Backbone": config.backbone,
            "Images seen as": f"{height} x {width} pixels, {rows} x {columns} cells, "
            f"{100 * config.informative_ratio:g}% of them split by the fine stage",
            "Data": self.data_name,
            "Images": f"{_count(self.trade.images, 'image')} of {len(self.scores)} of {config.num_classes} classes",
            "Eta": f"{self.eta}{' (the calibrated one)' if self._calibrated else ''}",
            "Date": self.day.isoformat(),
            "cfvit": cfvit.__version__,
        }
        return _definitions("facts", {name: f"<dd>{escape(value)}</dd>" for name, value in facts.items()})

    @property
    def _calibrated(self) -> bool:
        return self.calibration is not None and self.calibration.threshold == self.threshold

    def _tiles(self) -> str:
        chosen = operate(self.trade, self.threshold, self.macs)
        coarse, fine = accuracy_estimate(self.trade, 0), accuracy_estimate(self.trade, self.trade.images)
        tiles = {
            f"right answers at eta {self.eta}": _tile(chosen.accuracy),
            "answered at the coarse stage": _tile(chosen.exit_share),
            "mean cost of an image": _tile(chosen.gmacs, " GMACs", ".3g"),
            "right answers, coarse stage for all": _tile(coarse),
            "right answers, fine stage for all": _tile(fine),
            f"saved of the plain backbone's {self.macs.backbone / 1e9:.3g} GMACs": _tile(chosen.saving),
        }
        return _definitions("tiles", tiles, group="div")

    def _notes(self) -> list[str]:
        """What a reader should know before relying on the figures."""
        present = {score.index for score in self.scores}
        names = [self.model.label_of(index) for index in range(self.model.config.num_classes)]
        missing = missing_classes(present, names, self.trade.images)
        notes = [f"{missing[0].upper()}{missing[1:]}, so nothing is known of them."] if missing else []
        unreadable = [self.source.name(index) for index in self.collected.unreadable]
        if unreadable:
            rest = len(unreadable) - _NAMED_FILES
            named = f"{', '.join(unreadable[:_NAMED_FILES])}{f' and {rest} more' if rest > 0 else ''}"
            verb = "is" if len(unreadable) == 1 else "are"
            notes.append(f"{_count(len(unreadable), 'image')} could not be read and {verb} not counted: {named}.")
        if self._calibrated and self.calibration is not None:
            notes.append(f"What was promised of this eta: {self.calibration.promise}.")
        return notes

    def _trade_off(self) -> str:
        chart = draw_trade_off(self.trade, self.macs, operate(self.trade, self.threshold, self.macs), "curve")
        return _figure(
            chart,
            f"Accuracy and mean cost over all values of eta. The band holds the accuracy at each single eta with a "
            f"probability of {100 * LEVEL:g}%. The plain backbone costs {self.macs.backbone / 1e9:.3g} GMACs; its "
            "accuracy is not known here.",
        )

    def _sweep(self) -> str:
        rows = []
        for eta in sorted({*SWEEP, self.threshold}):
            point = operate(self.trade, eta, self.macs)
            rows.append(
                (
                    f"{eta:g}{' (in use)' if eta == self.threshold else ''}",
                    _ranged(point.accuracy),
                    f"{point.exit_share.value:.1f}%",
                    f"{point.gmacs.value:.3g}",
                    f"{_signed(point.saving.value)}%",
                )
            )
        header = ("eta", f"right answers ({100 * LEVEL:g}% interval)", "answered coarsely", "GMACs", "MACs saved")
        chosen = [row[0].endswith("(in use)") for row in rows]
        return _table("The curve in numbers; MACs saved are those of the plain backbone", header, rows, chosen)

    def _reliability_words(self) -> str:
        rule = self.model.exit
        said = (
            "Where bars meet the dashed line, a stage is right as often as its highest probability says; bars below it "
            "are too sure of themselves. The expected calibration error (ECE) is the mean distance."
        )
        if rule.measure != "max_probability":
            said += f" Eta is compared with another measure, {rule.measure}, which estimates no such chance."
        if (rule.coarse_temperature, rule.fine_temperature) != (1, 1):
            said += (
                f" Logits are divided by the temperatures {rule.coarse_temperature:.3g} (coarse) "
                f"and {rule.fine_temperature:.3g} (fine)."
            )
        return escape(said)

    def _reliability(self) -> str:
        stages = (reliability_of(self.answers.coarse), reliability_of(self.answers.fine))
        return _figure(
            draw_reliability(stages, "reliability"),
            f"Reliability of both stages on all images, in {len(stages[0].counts)} bins, and how many images are in "
            f"each. ECE is {stages[0].error:.1f} points at the coarse stage and {stages[1].error:.1f} at the fine "
            f"one. Thin lines are {100 * LEVEL:g}% intervals.",
        )

    def _costs(self) -> str:
        gone_on = int(self.answers.gone_on.sum())
        rows = [
            (name, f"{cost / 1e9:.3g}", f"{count:,}", _bar(count / self.trade.images, colour))
            for name, cost, count, colour in (
                ("coarse stage alone", self.macs.coarse, self.trade.images - gone_on, "coarse"),
                ("both stages", self.macs.both, gone_on, "fine"),
            )
        ]
        return _table(f"What images cost at eta {self.eta}", ("image takes", "GMACs", "images", "share"), rows)

    def _classes(self) -> str:
        ranked = sorted(self.scores, key=lambda score: (-score.exit_share, -score.right / score.images))
        if len(ranked) <= _MOST_CLASSES:
            return self._class_table("Classes by the share of their images that is answered coarsely", ranked)
        chart = draw_exit_shares([score.exit_share for score in ranked], "exits")
        words = f"How many of the {len(ranked)} classes have which share of images answered at the coarse stage."
        return (
            _figure(chart, words)
            + self._class_table(f"The {_FEW_CLASSES} easiest classes", ranked[:_FEW_CLASSES])
            + self._class_table(f"The {_FEW_CLASSES} hardest classes, hardest first", ranked[: -_FEW_CLASSES - 1 : -1])
        )

    def _class_table(self, caption: str, scores: Sequence[ClassScore]) -> str:
        rows = [
            (
                self.model.label_of(score.index),
                f"{score.images:,}",
                f"{100 * score.right / score.images:.0f}%",
                _bar(score.exit_share, "coarse"),
            )
            for score in scores
        ]
        return _table(caption, ("class", "images", "right", "answered at the coarse stage"), rows)

    def _gains(self) -> str:
        gaining = [score for score in self.scores if score.gain > 0]
        losing = sum(score.gain < 0 for score in self.scores)
        same = len(self.scores) - len(gaining) - losing
        words = (
            f"If the fine stage answered all images instead of the coarse one, {_count(len(gaining), 'class')} would "
            f"be recognised better, {losing} worse and {same} as well."
        )
        best = sorted(gaining, key=lambda score: (-score.gain, -score.images))[:_GAINS]
        rows = [
            (
                self.model.label_of(score.index),
                f"{score.images:,}",
                f"{score.coarse_right:,}",
                f"{score.fine_right:,}",
                f"+{score.gain:.1f}",
            )
            for score in best
        ]
        header = ("class", "images", "right at the coarse stage", "right at the fine stage", "gain in points")
        table = _table("The classes that gain most from the fine stage", header, rows) if rows else ""
        return f"<p>{escape(words)}</p>{table}"

    def _examples_words(self) -> str:
        return (
            "Cells in colour are those that the fine stage splits, or would split if the image came to it; grey cells "
            "are read coarsely only. The answer that counts at this eta is set in bold; ✓ stands before right answers "
            "and ✗ before wrong ones."
        )

    def _examples(self) -> str:
        coarse, fine = self.answers.coarse, self.answers.fine
        sheets = (
            ("Easy: right at the coarse stage, and surest", surest(coarse.right, coarse.confidence, _SHEET)),
            (
                "Hard: wrong at the coarse stage, right at the fine one, and surest there",
                surest(~coarse.right & fine.right, fine.confidence, _SHEET),
            ),
            ("Wrong at the fine stage, and surest there", surest(~fine.right, fine.confidence, _SHEET)),
        )
        return "".join(f"<h3>{escape(title)}</h3>{self._sheet(places)}" for title, places in sheets)

    def _sheet(self, places: Sequence[int]) -> str:
        if not places:
            return '<p class="quiet">There is no such image.</p>'
        indices = self.collected.indices[list(places)].tolist()
        images = EvalImages(self.source, self.model.data_config, indices)
        batch = torch.stack([images[i][0] for i in range(len(images))])
        explanations = explain(self.model, batch, self.threshold)
        items = [self._example(place, seen) for place, seen in zip(places, explanations, strict=True)]
        return f'<ul class="sheet">{"".join(items)}</ul>'

    def _example(self, place: int, seen: Explanation) -> str:
        label = int(self.answers.labels[place])
        name, file = self.model.label_of(label), self.source.name(int(self.collected.indices[place]))
        coarse, fine = (self._answer(stage, place) for stage in (self.answers.coarse, self.answers.fine))
        split = f"{int(seen.split.sum())} of {seen.split.size} cells split"
        alt = f"{name} ({file}): coarse stage {coarse}, fine stage {fine}; {split}"
        lines = [
            _line(f"{stage}: {answer}", answers.right[place], counts)
            for stage, answer, answers, counts in (
                ("coarse", coarse, self.answers.coarse, not self.answers.gone_on[place]),
                ("fine", fine, self.answers.fine, self.answers.gone_on[place]),
            )
        ]
        picture, width, height = _thumbnail(seen)
        image = f'<img src="{picture}" width="{width}" height="{height}" alt="{escape(alt)}">'
        return f"<li>{image}<span>label: {escape(name)}</span>{''.join(lines)}</li>"

    def _answer(self, stage: StageAnswers, place: int) -> str:
        sure = shown_confidence(max(float(stage.confidence[place]), 0), self.model.exit.measure)
        return f"{self.model.label_of(int(stage.answer[place]))}, {sure}"


def _line(text: str, right: bool, counts: bool) -> str:
    mark = "✓" if right else "✗"
    classes = [name for name, holds in (("answers", counts), ("wrong", not right)) if holds]
    return f'<span class="{" ".join(classes)}">{mark} {escape(text)}</span>'


def _thumbnail(seen: Explanation) -> tuple[str, int, int]:
    """A JPEG as an address that holds its own data, its width and its height: cells not split are pale and grey."""
    picture = Image.fromarray((255 * veil(seen.image, seen.split)).round().astype(np.uint8))
    picture = ImageOps.contain(picture, (_THUMBNAIL, _THUMBNAIL))
    _outline(picture, seen.split)
    written = io.BytesIO()
    picture.save(written, "JPEG", quality=82, optimize=True)
    data = base64.b64encode(written.getvalue()).decode("ascii")
    return f"data:image/jpeg;base64,{data}", picture.width, picture.height


def _outline(picture: Image.Image, split: np.ndarray) -> None:
    """Draws lines around the cells that are split, and between their children."""
    draw = ImageDraw.Draw(picture)
    wide, tall = picture.width / split.shape[1], picture.height / split.shape[0]
    for row, column in np.argwhere(split):
        x, y = column * wide, row * tall
        draw.rectangle((x, y, x + wide, y + tall), outline="white")
        draw.line((x + wide / 2, y, x + wide / 2, y + tall), fill="white")
        draw.line((x, y + tall / 2, x + wide, y + tall / 2), fill="white")


def _definitions(kind: str, items: Mapping[str, str], group: str = "") -> str:
    opens, closes = (f"<{group}>", f"</{group}>") if group else ("", "")
    inside = "".join(f"{opens}<dt>{escape(name)}</dt>{value}{closes}" for name, value in items.items())
    return f'<dl class="{kind}">{inside}</dl>'


def _tile(estimate: Estimate, unit: str = "%", digits: str = ".1f") -> str:
    value = f"{_signed(estimate.value, digits)}{unit}"
    return f'<dd class="value">{value}</dd><dd class="range">{_interval(estimate, digits)}</dd>'


def _ranged(percentage: Estimate) -> Markup:
    return Markup(f'{_signed(percentage.value)}% <span class="range">({_interval(percentage, ".1f")})</span>')


def _interval(estimate: Estimate, digits: str) -> str:
    return f"{_signed(estimate.low, digits)} to {_signed(estimate.high, digits)}"


def _signed(value: float, digits: str = ".1f") -> str:
    """A number with a true minus sign, and none before a zero."""
    text = f"{value:{digits}}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−", 1)


def _figure(drawing: str, caption: str) -> str:
    return f'<figure><div class="scroll">{drawing}</div><figcaption>{escape(caption)}</figcaption></figure>'


def _bar(share: float, colour: str) -> Markup:
    track = f'<span class="track"><span class="{colour}" style="width: {100 * share:.1f}%"></span></span>'
    return Markup(f"{track}{100 * share:.0f}%")


def _table(
    caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], chosen: Sequence[bool] | None = None
) -> str:
    """A table of at least one row, whose first column names the rows; ``chosen`` rows stand out."""
    bars = [_is_bar(value) for value in rows[0]]
    heads = "".join(
        f'<th scope="col"{_BAR if bar else ""}>{escape(name)}</th>' for name, bar in zip(header, bars, strict=True)
    )
    body = []
    for row, stands_out in zip(rows, chosen or [False] * len(rows), strict=True):
        cells = "".join(_cell(value) for value in row[1:])
        kind = ' class="chosen"' if stands_out else ""
        body.append(f'<tr{kind}><th scope="row">{escape(row[0])}</th>{cells}</tr>')
    inside = f"<thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="scroll"><table><caption>{escape(caption)}</caption>{inside}</table></div>'


def _cell(value: str) -> str:
    return f"<td{_BAR if _is_bar(value) else ''}>{escape(value)}</td>"


_BAR = ' class="bar"'


def _is_bar(value: str) -> bool:
    return isinstance(value, Markup) and value.startswith('<span class="track">')


def _count(number: int, thing: str) -> str:
    plural = f"{thing}es" if thing.endswith("s") else f"{thing}s"
    return f"{number:,} {thing if number == 1 else plural}"
