"""Pictures of the paper's tables and figures with ours beside them, and of benchmarks, as PNGs. Needs matplotlib.

Every function writes one file whole and raises `CfvitError` if matplotlib is not installed or the file cannot be
written. ``caption`` says what was run; it stands below the picture, in four lines at most.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cfvit.calibration import Estimate
from cfvit.plots.explain import Explanation, grey_unsplit, shown_confidence
from cfvit.plots.style import COARSE, FINE, INK, LINE, QUIET, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Bar:
    """One row of a table in one of its columns."""

    name: str  # of the row
    paper: float | None  # the printed value, None if the paper has none
    ours: float | None  # the mean over seeds, None if it was not run
    spread: float = 0.0  # highest less lowest of our seeds


@dataclass(frozen=True)
class Curve:
    """Accuracy against cost."""

    name: str  # in the legend
    cost: Sequence[float]  # of an image, in 1e9 multiply-accumulates unless the axis says otherwise
    accuracy: Sequence[float]  # top-1 in percent, one for each cost
    joined: bool = True  # whether a line goes through the points
    like: str = ""  # the name of the curve whose colour and mark it has; by default its own


@dataclass(frozen=True, eq=False)
class AttentionPicture:
    """The class attention of one image at both patch sizes."""

    image: np.ndarray  # ``[S, S, 3]`` in [0, 1]
    coarse: np.ndarray  # ``[g, g]``
    fine: np.ndarray  # ``[2g, 2g]``


@dataclass(frozen=True)
class SpeedBar:
    """A contender beside the backbone."""

    label: str  # its name
    engine: str  # for which it was prepared
    ratio: Estimate  # how many times faster than the backbone in the same engine
    eager_ratio: float  # how many times faster than timm's model
    macs_ratio: float  # the same by the MACs
    telling: bool  # whether the machine was quiet enough for ``ratio`` to be used


_SETTINGS = {
    "figure.constrained_layout.h_pad": 0.07,
    "figure.constrained_layout.w_pad": 0.07,
    "axes.titlesize": 9.5,
    "axes.titlecolor": INK,
}
_COLOURS = (COARSE, FINE, "#2b7a4b", "#7a4fa3", "#a8790a", "#0f7f86", "#b0306a", "#5b6b1f", "#7b4b3a", "#3a3f9e")
_MARKERS = "os^Dv<>PX*hp"


def _lines(text: str, inches: float, size: float, most: int) -> list[str]:
    """Text wrapped to a width at a font size in points, cut after ``most`` lines."""
    characters = max(4, int(72 * inches / (0.56 * size)))  # of DejaVu Sans in ordinary text, with some room
    return textwrap.wrap(text, characters, max_lines=most, placeholder=" …") or [""]


@contextmanager
def _titled_figure(path: Path, width: float, height: float, title: str, caption: str) -> Iterator[Figure]:
    """A figure to draw into inside the ``with``, which then writes it.

    Args:
        width, height: inches, without title and caption.
    """
    heading, small = _lines(title, width, 13, 2), _lines(caption, width, 7.5, 4)
    height += 0.25 + 0.2 * len(heading) + 0.14 * len(small)
    with png(path, width, height, dpi=130, settings=_SETTINGS) as figure:
        left: dict[str, Any] = {"x": 0.08 / width, "ha": "left"}
        figure.suptitle("\n".join(heading), fontsize=12, fontweight="bold", **left)
        figure.supxlabel("\n".join(small), fontsize=7.5, color=QUIET, linespacing=1.3, **left)
        yield figure


# Tables and curves


def draw_table(path: Path, caption: str, *, title: str, columns: Mapping[str, Sequence[Bar]]) -> None:
    """For each column of a table, by what it measures, two panels of dots with their values: the paper's and ours.

    Each panel has its own scale: what is compared is the order of the rows, and their distances.
    """
    names = list(dict.fromkeys(bar.name for bars in columns.values() for bar in bars))
    labels = [_lines(name, 2.5, 9, 3) for name in names]
    heads = [_lines(column, 3.2, 9.5, 2) for column in columns]
    height = 1.0 + 0.16 * max(map(len, heads)) + sum(0.14 + 0.16 * len(lines) for lines in labels)
    with _titled_figure(path, max(6.5, 2.5 + 3.5 * len(columns)), height, title, caption) as figure:
        axes = figure.subplots(1, 2 * len(columns), sharey=True, squeeze=False)[0]
        for bars, head, paper, ours in zip(columns.values(), heads, axes[0::2], axes[1::2], strict=True):
            rows = [names.index(bar.name) for bar in bars]
            _draw_dots(paper, rows, [(bar.paper, 0.0) for bar in bars], QUIET, "not printed")
            _draw_dots(ours, rows, [(bar.ours, bar.spread) for bar in bars], COARSE, "not run")
            paper.set_title("\n".join([*head, "the paper"]), loc="left", color=QUIET)
            spread = any(bar.spread for bar in bars)
            ours.set_title("ours (max − min)" if spread else "ours", loc="left", color=COARSE)
        axes[0].set_yticks(range(len(names)), labels=["\n".join(lines) for lines in labels])
        axes[0].set_ylim(len(names) - 0.5, -0.5)


def _draw_dots(
    axis: Axes, rows: Sequence[int], dots: Sequence[tuple[float | None, float]], colour: str, absent: str
) -> None:
    """One dot in each row for a value and its spread, printed at its right, or why there is none.

    All have the decimals of the value that needs the most of them for four digits.
    """
    ends = [value + side * spread / 2 for value, spread in dots if value is not None for side in (-1, 1)]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    shortest = (
        np.format_float_positional(value, 4, fractional=False, trim="-") for value, _ in dots if value is not None
    )
    decimals = max((len(text.partition(".")[2]) for text in shortest), default=0)
    span = high - low or 0.05 * abs(high) or 1.0
    axis.set_xlim(low - 0.15 * span, low + 2.2 * span)  # room for the values
    for row, (value, spread) in zip(rows, dots, strict=True):
        if value is None:
            axis.text(0.06, row, absent, transform=axis.get_yaxis_transform(), va="center", style="italic", color=QUIET)
            continue
        text = f"{value:.{decimals}f}" + (f" ({spread:.{decimals}f})" if spread else "")
        axis.hlines(row, axis.get_xlim()[0], value - spread / 2, color=LINE, lw=0.8, zorder=0.5)
        axis.plot([value - spread / 2, value + spread / 2], [row, row], color=colour, lw=3, alpha=0.35)
        axis.plot([value], [row], "o", color=colour, ms=6)
        place = (value + spread / 2, row)
        axis.annotate(text, place, (7, 0), textcoords="offset points", va="center", fontsize=8.5)
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=7.5)
    if ends:
        axis.locator_params(axis="x", nbins=3)
    else:
        axis.set_xticks([])


def draw_curves(
    path: Path,
    caption: str,
    *,
    title: str,
    ours: Sequence[Curve],
    published: Sequence[Curve] = (),
    timed: Mapping[str, Sequence[Curve]] | None = None,
) -> None:
    """Accuracy against cost, in panels side by side: ours, ours by measured time, the published figures.

    A name has the same colour and mark in all, and so has what is like it. Panels without curves are left out.

    Args:
        timed: by the text of the axis that takes the place of the cost's.
    """
    gmacs = "mean cost of an image, GMACs"
    given = [("ours", gmacs, ours), *(("ours, by time", axis, curves) for axis, curves in (timed or {}).items())]
    panels = [panel for panel in (*given, ("published", gmacs, published)) if panel[2]]
    names = list(dict.fromkeys(curve.like or curve.name for _, _, curves in panels for curve in curves))
    most = max((len(curves) for _, _, curves in panels), default=0)
    with _titled_figure(path, max(6.5, 4.8 * len(panels)), 3.7 + 0.19 * most, title, caption) as figure:
        axes = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
        for axis, (name, label, curves) in zip(axes, panels or given[:1], strict=True):
            for curve in curves:
                number = names.index(curve.like or curve.name)
                axis.plot(
                    curve.cost,
                    curve.accuracy,
                    marker=_MARKERS[number % len(_MARKERS)],
                    color=_COLOURS[number % len(_COLOURS)],
                    linestyle="-" if curve.joined else "",
                    lw=1.6,
                    ms=4 if curve.joined and len(curve.cost) > 12 else 6,
                    label=_lines(curve.name, 4.2, 8, 1)[0],
                    zorder=2 if curve.joined else 3,  # a point that lies on a line is seen
                )
            axis.set_title(name, loc="left", fontweight="bold")
            axis.set(xlabel=label, ylabel="top-1 accuracy, %")
            axis.grid()
            axis.margins(0.07)
            if curves:
                axis.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.14), borderaxespad=0, fontsize=8)


def draw_counts(
    path: Path, caption: str, *, thresholds: Sequence[float], coarse: Sequence[int], fine: Sequence[int]
) -> None:
    """How many images are answered right at the coarse and at the fine stage, stacked, over eta (Fig. 8)."""
    with _titled_figure(path, 7.0, 3.8, "How many images each stage gets right", caption) as figure:
        axis = figure.subplots()
        both = np.add(coarse, fine)
        axis.fill_between(thresholds, 0, coarse, color=COARSE, alpha=0.3, lw=0)
        axis.fill_between(thresholds, coarse, both, color=FINE, alpha=0.3, lw=0)
        axis.plot(thresholds, both, "s-", color=FINE, label="at the fine stage, on top", ms=4, lw=1.6)
        axis.plot(thresholds, coarse, "o-", color=COARSE, label="at the coarse stage", ms=4, lw=1.6)
        axis.set(xlabel="threshold eta", ylabel="images answered right", ylim=(0, 1.06 * max(1, *both)))
        axis.locator_params(axis="y", integer=True)
        axis.grid()
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


def draw_highest_lowest(
    path: Path,
    caption: str,
    *,
    title: str,
    highest: Sequence[float],
    lowest: Sequence[float],
    whole: float,
    kept: int,
    patches: int,
) -> None:
    """Top-1 on the ``kept`` patches of highest and lowest class attention in each block, and on all, in percent."""
    blocks = range(1, len(highest) + 1)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.4}
    written: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "ha": "center", "bbox": box}
    with _titled_figure(path, max(7.0, 0.45 * len(blocks)), 3.8, title, caption) as figure:
        axis = figure.subplots()
        axis.axhline(whole, color=QUIET, ls=(0, (4, 3)), lw=1.2, label=f"all {patches} patches: {whole:.1f}%")
        for values, others, mark, colour, name in (
            (highest, lowest, "o-", COARSE, "highest"),
            (lowest, highest, "s-", FINE, "lowest"),
        ):
            axis.plot(blocks, values, mark, color=colour, lw=1.6, ms=5, label=f"the {kept} {name}")
            for block, value, other in zip(blocks, values, others, strict=True):
                above = value > other or (value == other and values is highest)
                shift, side = (6, "bottom") if above else (-6, "top")  # away from the other line
                text, place = f"{value:.1f}", (block, value)
                axis.annotate(text, place, (0, shift), va=side, color=colour, **written)
        axis.set(xlabel="block whose class attention ranks the patches", ylabel="top-1 accuracy, %")
        axis.set(xticks=blocks, xlim=(0.5, len(blocks) + 0.5))
        axis.margins(y=0.14)
        axis.grid()
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, columnspacing=1.4)


# Images


def draw_attention(path: Path, caption: str, *, pictures: Sequence[AttentionPicture]) -> None:
    """Lines of an image and its class attention on coarse and on fine patches (Fig. 1b)."""
    with _titled_figure(path, 6.8, 2.0 * len(pictures) + 0.3, "Class attention in the last block", caption) as figure:
        axes = figure.subplots(len(pictures), 3, squeeze=False)
        heat: Any = None
        for panels, picture in zip(axes, pictures, strict=True):
            height, width = picture.image.shape[:2]
            extent = (0, width, height, 0)
            for axis in panels:
                axis.imshow(picture.image, extent=extent)
                _hide_ticks(axis)
            for axis, attention in zip(panels[1:], (picture.coarse, picture.fine), strict=True):
                shown = (attention - attention.min()) / (np.ptp(attention) or 1.0)  # each map on a scale of its own
                colours: dict[str, Any] = {"cmap": "inferno", "alpha": 0.65, "vmin": 0, "vmax": 1}
                heat = axis.imshow(shown, extent=extent, interpolation="nearest", **colours)
        sides = pictures[0].coarse.shape[0], pictures[0].fine.shape[0]
        titles = ("image", *(f"{name} patches, {n} × {n}" for name, n in zip(("coarse", "fine"), sides, strict=True)))
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set_title(title)
        bar = figure.colorbar(heat, ax=axes, shrink=min(1.0, 1.6 / len(pictures)), aspect=14, pad=0.01)
        bar.set_ticks([0, 1], labels=["low", "high"])


def _hide_ticks(axis: Axes) -> None:
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def draw_examples(path: Path, caption: str, *, coarse: Sequence[Explanation], fine: Sequence[Explanation]) -> None:
    """Images right at the coarse stage, and right at the fine one with what it did not split greyed (Fig. 9).

    Below each stand the answer of that stage and its confidence.
    """
    across, side = min(6, max(4, len(coarse), len(fine))), 1.55
    sections = (
        ("Right at the coarse stage", COARSE, [(each.image, each, 0) for each in coarse]),
        (
            "Right at the fine stage, cells that are not split in grey",
            FINE,
            [(grey_unsplit(each.image, each.split), each, 1) for each in fine],
        ),
    )
    rows = [math.ceil(len(examples) / across) for _, _, examples in sections]
    heights = [0.4 + count * (side + 0.6) for count in rows]
    width = max(6.5, across * (side + 0.15))
    with _titled_figure(path, width, sum(heights), "Images that each stage gets right", caption) as figure:
        parts: Any = figure.subfigures(2, 1, height_ratios=heights)
        for part, (title, colour, examples), count in zip(parts, sections, rows, strict=True):
            heading = title if examples else f"{title}: none"
            part.suptitle(heading, x=0.08 / width, ha="left", fontsize=10, color=colour)
            for place, (image, example, stage) in enumerate(examples, start=1):
                axis = part.add_subplot(count, across, place)
                axis.imshow(image)
                axis.set_anchor("N")
                _hide_ticks(axis)
                label, confidence = example.answers[stage]
                lines = [*_lines(label, side, 8, 2), shown_confidence(confidence, example.measure)]
                axis.set_xlabel("\n".join(lines), fontsize=8)


# Speed


def draw_speed(panels: Mapping[str, Sequence[SpeedBar]], title: str, path: Path) -> None:
    """A panel of bars for each batch size: how many times faster than the plain ViT, by the clock and by the MACs."""
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    size = (4.6 * columns + 1.2, (0.27 * max(map(len, panels.values())) + 0.9) * rows + 0.7)
    with png(path, *size) as figure:
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, (name, bars) in zip(axes, panels.items(), strict=False):
            places, ratios = range(len(bars)), [bar.ratio for bar in bars]
            usual = Counter(bar.engine for bar in bars).most_common(1)[0][0]
            label = "by the clock, same engine (pale: too noisy to tell)"
            contained = axis.barh(places, [ratio.value for ratio in ratios], color=COARSE, height=0.62, label=label)
            for patch, bar in zip(contained, bars, strict=True):
                patch.set_alpha(1.0 if bar.telling else 0.4)
            ends = np.array([(ratio.low, ratio.high) for ratio in ratios])
            ends[np.isinf(ends[:, 1])] = np.nan  # an interval without an end is not drawn
            axis.hlines(places, *ends.T, color=INK, lw=1.2, label="95% interval")
            promised, eager = [bar.macs_ratio for bar in bars], [bar.eager_ratio for bar in bars]
            axis.plot(promised, places, "d", color=FINE, ms=5, ls="", label="promised by the MACs")
            axis.plot(eager, places, "o", color=INK, mfc="none", ms=5, ls="", label="beside timm's model")
            axis.axvline(1, color=INK, lw=0.8)
            ticks = [bar.label if bar.engine == usual else f"{bar.label} ({bar.engine})" for bar in bars]
            axis.set_yticks(places, ticks, fontsize=8)
            axis.invert_yaxis()
            axis.set_xlim(left=0)
            axis.set_xlabel("times faster than the backbone in the same engine", fontsize=8)
            axis.tick_params(axis="x", labelsize=8)
            axis.set_title(f"{name}, {usual} unless marked", fontsize=9)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        figure.suptitle(title, fontsize=10)
        handles = axes[0].get_legend_handles_labels()
        across = min(4, 2 * columns)  # more would not fit below a single panel
        figure.legend(*handles, loc="outside lower center", ncols=across, fontsize=8)
