"""Drawings of the paper's tables and figures with ours beside them, as PNGs. Needs matplotlib.

Every function writes one file as a whole and raises `CfvitError` where matplotlib is not installed or the file
cannot be written. ``caption`` says what was run; it stands below the drawing, in four lines at most.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cfvit.files import atomic_write
from cfvit.plots.explain import Explanation, veil
from cfvit.plots.style import COARSE, FINE, INK, LINE, QUIET, STYLE, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


@dataclass(frozen=True)
class Bar:
    """One row of a table in one of its columns.

    Attributes:
        name: of the row.
        paper: the printed value, None where the paper has none.
        ours: the mean over seeds, None where it was not run.
        spread: highest less lowest of our seeds.
    """

    name: str
    paper: float | None
    ours: float | None
    spread: float = 0.0


@dataclass(frozen=True)
class Curve:
    """Accuracy against cost.

    Attributes:
        name: in the legend.
        gmacs: cost of an image, in 1e9 multiply-accumulates.
        accuracy: top-1 in percent, one for each cost.
        joined: whether a line goes through the points.
    """

    name: str
    gmacs: Sequence[float]
    accuracy: Sequence[float]
    joined: bool = True


@dataclass(frozen=True, eq=False)
class AttentionPicture:
    """The class attention of one image at both patch sizes.

    Attributes:
        image: ``[S, S, 3]`` in [0, 1].
        coarse: ``[g, g]``.
        fine: ``[2g, 2g]``.
    """

    image: np.ndarray
    coarse: np.ndarray
    fine: np.ndarray


_SHEET_STYLE = STYLE | {
    "savefig.dpi": "figure",
    "figure.constrained_layout.h_pad": 0.07,
    "figure.constrained_layout.w_pad": 0.07,
    "text.parse_math": False,  # a dollar sign is a dollar sign
    "axes.titlesize": 9.5,
    "axes.titlecolor": INK,
}
_DPI = 130
_CAPTION_SIZE, _CAPTION_LINES = 7.5, 4


@contextmanager
def _sheet(path: Path, width: float, height: float, title: str, caption: str) -> Iterator[Figure]:
    """A figure to draw into inside the ``with``, which then writes it.

    Args:
        width, height: inches, without title and caption.
    """
    make = require_matplotlib()
    from matplotlib import style

    heading = _lines(title, width, 12, 2)
    small = _lines(caption, width, _CAPTION_SIZE, _CAPTION_LINES)
    height += 0.25 + 0.2 * len(heading) + 0.14 * len(small)
    with style.context(["default", _SHEET_STYLE]):  # whatever the user's own style is
        figure = make(figsize=(width, height), dpi=_DPI, layout="constrained")
        beginning = {"x": 0.08 / width, "ha": "left"}
        figure.suptitle("\n".join(heading), fontsize=12, fontweight="bold", **beginning)
        figure.supxlabel("\n".join(small), fontsize=_CAPTION_SIZE, color=QUIET, linespacing=1.3, **beginning)
        yield figure
        with atomic_write(path) as file:
            figure.savefig(file, format="png")


def _lines(text: str, width: float, size: float, most: int) -> list[str]:
    """Text in as many lines as ``width`` inches need at ``size`` points, cut after ``most``."""
    require_matplotlib()
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family="DejaVu Sans", size=size)
    whole, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    characters = int(0.93 * 72 * width * len(text) / max(whole, 1.0))  # of this text, on average and with some room
    return textwrap.wrap(text, max(4, characters), max_lines=most, placeholder=" …") or [""]


# Tables

_NAME_WIDTH, _PANEL_WIDTH, _VALUE_SIZE = 2.5, 1.75, 8.5


def draw_table(path: Path, title: str, columns: Mapping[str, Sequence[Bar]], caption: str) -> None:
    """For each column of a table two panels of dots with their values, the paper's and ours.

    Each panel has its own scale: what is compared is the order of the rows, and their distances.

    Args:
        columns: rows by what is measured; those of one name share a line.
    """
    names = list(dict.fromkeys(bar.name for bars in columns.values() for bar in bars))
    labels = [_lines(name, _NAME_WIDTH, 9, 3) for name in names]
    heads = [_lines(column, 1.8 * _PANEL_WIDTH, 9.5, 3) for column in columns]
    width = _NAME_WIDTH + 2 * _PANEL_WIDTH * len(columns)
    height = 0.8 + 0.16 * max(map(len, heads)) + sum(0.14 + 0.16 * len(lines) for lines in labels)
    with _sheet(path, max(width, 6.5), height, title, caption) as figure:
        gaps = [1, 1, 0.08] * len(columns)
        grid = figure.add_gridspec(1, len(gaps) - 1, width_ratios=gaps[:-1])
        first: Axes | None = None
        for index, (bars, head) in enumerate(zip(columns.values(), heads, strict=True)):
            paper = figure.add_subplot(grid[3 * index], sharey=first)
            first = first or paper
            ours = figure.add_subplot(grid[3 * index + 1], sharey=first)
            rows = [names.index(bar.name) for bar in bars]
            _draw_dots(paper, rows, [_Dot(bar.paper) for bar in bars], QUIET, "not printed")
            _draw_dots(ours, rows, [_Dot(bar.ours, bar.spread) for bar in bars], COARSE, "not run")
            spread = any(bar.spread for bar in bars)
            _head_pair(paper, ours, head, "ours (max − min)" if spread else "ours")
        assert first is not None
        first.tick_params(labelleft=True)
        first.set_yticks(range(len(names)), labels=["\n".join(lines) for lines in labels])
        first.set_ylim(len(names) - 0.5, -0.5)


@dataclass(frozen=True)
class _Dot:
    value: float | None
    spread: float = 0.0


def _head_pair(paper: Axes, ours: Axes, head: list[str], our_title: str) -> None:
    """The column's name above both panels, for which their own titles leave room."""
    room = "\n" * len(head)
    paper.set_title(f"{room}the paper", loc="left", color=QUIET)
    ours.set_title(f"{room}{our_title}", loc="left", color=COARSE)
    name = paper.annotate(
        "\n".join(head), (0, 1), (0, 20), xycoords="axes fraction", textcoords="offset points", fontweight="bold"
    )
    name.set_fontsize(9.5)
    name.set_in_layout(False)  # it may be as wide as both panels


def _draw_dots(axis: Axes, rows: list[int], dots: list[_Dot], colour: str, absent: str) -> None:
    """One dot in each row, its value printed at its right, or why there is none."""
    known = [dot for dot in dots if dot.value is not None]
    places = decimals([dot.value for dot in known if dot.value is not None])
    longest = 0
    for row, dot in zip(rows, dots, strict=True):
        if dot.value is None:
            axis.text(0.06, row, absent, transform=axis.get_yaxis_transform(), va="center", style="italic", color=QUIET)
            continue
        text = f"{dot.value:.{places}f}" + (f" ({dot.spread:.{places}f})" if dot.spread else "")
        longest = max(longest, len(text))
        low, high = dot.value - dot.spread / 2, dot.value + dot.spread / 2
        axis.plot([low, high], [row, row], color=colour, lw=3, alpha=0.35)
        axis.plot([dot.value], [row], "o", color=colour, ms=6)
        axis.annotate(text, (high, row), (7, 0), textcoords="offset points", va="center", fontsize=_VALUE_SIZE)
    _scale_dots(axis, known, longest)
    for row, dot in zip(rows, dots, strict=True):
        if dot.value is not None:  # up to the dot alone: the value stands behind it
            axis.hlines(row, axis.get_xlim()[0], dot.value - dot.spread / 2, color=LINE, lw=0.8, zorder=0.5)
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="y", length=0, labelleft=False)


def _scale_dots(axis: Axes, known: list[_Dot], longest: int) -> None:
    """Limits that leave room at the right for the longest printed value."""
    if not known:
        axis.set_xlim(0, 1)
        axis.set_xticks([])
        return
    ends = [dot.value + side * dot.spread / 2 for dot in known if dot.value is not None for side in (-1, 1)]
    low, high = min(ends), max(ends)
    span = high - low or 0.05 * abs(high) or 1.0
    text = (7 + 0.66 * _VALUE_SIZE * longest) / 72 / _PANEL_WIDTH
    left = 0.08
    whole = span / max(1 - left - text, 0.2)
    axis.set_xlim(low - left * whole, low + (1 - left) * whole)
    axis.locator_params(axis="x", nbins=3)
    axis.tick_params(axis="x", labelsize=7.5)


def decimals(values: Sequence[float]) -> int:
    """Places that give the largest value four digits, less the zeros that all of them would end in; 4 at most."""
    largest = max(map(abs, values), default=0.0)
    if largest == 0:
        return 0
    most = min(4, max(0, 3 - math.floor(math.log10(largest))))
    enough = (n for n in range(most) if all(round(value, n) == round(value, most) for value in values))
    return next(enough, most)


# Curves

_COLOURS = (COARSE, FINE, "#2b7a4b", "#7a4fa3", "#a8790a", "#0f7f86", "#b0306a", "#5b6b1f", "#7b4b3a", "#3a3f9e")
_MARKERS = "os^Dv<>PX*hp"
_LEGEND_WIDTH = 4.2


def draw_curves(path: Path, title: str, ours: Sequence[Curve], published: Sequence[Curve], caption: str) -> None:
    """Accuracy against cost, ours and the published figures side by side, or the one of the two that is there.

    A name has the same colour and mark in both.
    """
    panels = [(name, curves) for name, curves in (("ours", ours), ("published", published)) if curves]
    names = list(dict.fromkeys(curve.name for curve in (*ours, *published)))
    most = max((len(curves) for _, curves in panels), default=0)
    with _sheet(path, max(6.5, 4.8 * len(panels)), 3.7 + 0.19 * most, title, caption) as figure:
        for place, (name, curves) in enumerate(panels or [("ours", ours)], start=1):
            axis = figure.add_subplot(1, max(1, len(panels)), place)
            for curve in curves:
                _draw_curve(axis, curve, names.index(curve.name))
            axis.set_title(name, loc="left", fontweight="bold")
            axis.set_xlabel("mean cost of an image, GMACs")
            axis.set_ylabel("top-1 accuracy, %")
            axis.grid()
            axis.margins(0.07)
            if curves:
                axis.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.14), borderaxespad=0, fontsize=8)


def _draw_curve(axis: Axes, curve: Curve, number: int) -> None:
    axis.plot(
        curve.gmacs,
        curve.accuracy,
        marker=_MARKERS[number % len(_MARKERS)],
        color=_COLOURS[number % len(_COLOURS)],
        linestyle="-" if curve.joined else "",
        lw=1.6,
        ms=4 if curve.joined and len(curve.gmacs) > 12 else 6,
        label=_lines(curve.name, _LEGEND_WIDTH, 8, 1)[0],
    )


def draw_counts(
    path: Path, thresholds: Sequence[float], coarse: Sequence[int], fine: Sequence[int], caption: str
) -> None:
    """How many images are answered right at the coarse and at the fine stage, one upon the other, over eta (Fig. 8)."""
    with _sheet(path, 7.0, 3.8, "How many images each stage gets right", caption) as figure:
        axis = figure.subplots()
        both = np.add(coarse, fine)
        axis.fill_between(thresholds, 0, coarse, color=COARSE, alpha=0.3, lw=0)
        axis.fill_between(thresholds, coarse, both, color=FINE, alpha=0.3, lw=0)
        marks = {"ms": 4, "lw": 1.6} if len(thresholds) <= 30 else {"ms": 0, "lw": 1.6}
        axis.plot(thresholds, both, "s-", color=FINE, label="at the fine stage, on top", **marks)
        axis.plot(thresholds, coarse, "o-", color=COARSE, label="at the coarse stage", **marks)
        axis.set_xlabel("threshold eta")
        axis.set_ylabel("images answered right")
        axis.set_ylim(0, 1.06 * max(1, *both))
        axis.locator_params(axis="y", integer=True)
        axis.grid()
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


def draw_highest_lowest(
    path: Path,
    highest: Sequence[float],
    lowest: Sequence[float],
    whole: float,
    kept: int,
    patches: int,
    caption: str,
    network: str = "A plain ViT",
) -> None:
    """Accuracy on the patches of highest and of lowest class attention in each block, from block 1 (Fig. 1a).

    Args:
        highest, lowest: top-1 in percent, by block.
        whole: top-1 in percent on all patches.
        kept: how many of the ``patches`` were left.
        network: what was scored, to begin the title.
    """
    title = f"{network} on {kept} of its {patches} patches, by class attention"
    blocks = range(1, len(highest) + 1)
    with _sheet(path, max(7.0, 0.45 * len(blocks)), 3.8, title, caption) as figure:
        axis = figure.subplots()
        axis.axhline(whole, color=QUIET, ls=(0, (4, 3)), lw=1.2, label=f"all {patches} patches: {whole:.1f}%")
        for values, mark, colour, name in ((highest, "o-", COARSE, "highest"), (lowest, "s-", FINE, "lowest")):
            axis.plot(blocks, values, mark, color=colour, lw=1.6, ms=5, label=f"the {kept} {name}")
        for block, pair in zip(blocks, zip(highest, lowest, strict=True), strict=True):
            _print_values(axis, block, *pair)
        axis.set_xlabel("block whose class attention ranks the patches")
        axis.set_ylabel("top-1 accuracy, %")
        axis.set_xticks(blocks)
        axis.set_xlim(0.5, len(blocks) + 0.5)
        axis.margins(y=0.14)
        axis.grid()
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, columnspacing=1.4)


def _print_values(axis: Axes, block: int, highest: float, lowest: float) -> None:
    """Both values of a block beside their marks, on the sides that face away from each other."""
    signs = (1, -1) if highest >= lowest else (-1, 1)
    for value, sign, colour in zip((highest, lowest), signs, (COARSE, FINE), strict=True):
        place: dict[str, Any] = {"ha": "center", "va": "bottom" if sign > 0 else "top"}
        place["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.4}
        axis.annotate(
            f"{value:.1f}", (block, value), (0, 6 * sign), textcoords="offset points", color=colour, fontsize=7, **place
        )


# Images

_MANY = 4
"""More attention pictures than this stand two to a line."""


def draw_attention(path: Path, pictures: Sequence[AttentionPicture], caption: str) -> None:
    """Lines of an image and its class attention on coarse and on fine patches (Fig. 1b)."""
    groups = 2 if len(pictures) > _MANY else 1
    lines = math.ceil(len(pictures) / groups)
    title = "Class attention in the last block"
    with _sheet(path, 6.2 * groups + 0.6, 2.0 * lines + 0.3, title, caption) as figure:
        ratios = [1, 1, 1, 0.1] * groups
        grid = figure.add_gridspec(lines, len(ratios) - 1, width_ratios=ratios[:-1])
        axes: list[Axes] = []
        heat: Any = None
        for index, picture in enumerate(pictures):
            line, group = index % lines, index // lines
            axes += (panels := [figure.add_subplot(grid[line, 4 * group + place]) for place in range(3)])
            heat = _draw_attention(panels, picture)
            if line == 0:
                titles = "image", _grid_title("coarse", picture.coarse), _grid_title("fine", picture.fine)
                for axis, text in zip(panels, titles, strict=True):
                    axis.set_title(text)
        if heat is not None:
            bar = figure.colorbar(heat, ax=axes, shrink=min(1.0, 1.6 / lines), aspect=14, pad=0.01)
            bar.set_ticks([0, 1], labels=["low", "high"])


def _grid_title(patches: str, attention: np.ndarray) -> str:
    return f"{patches} patches, {attention.shape[0]} × {attention.shape[1]}"


def _draw_attention(panels: list[Axes], picture: AttentionPicture) -> Any:
    """The image, and each map on a scale of its own from its lowest value to its highest."""
    height, width = picture.image.shape[:2]
    heat = None
    for axis in panels:
        axis.imshow(picture.image, extent=(0, width, height, 0))
        _hide_ticks(axis)
    for axis, attention in zip(panels[1:], (picture.coarse, picture.fine), strict=True):
        span = np.ptp(attention) or 1.0
        shown = (attention - attention.min()) / span
        options: dict[str, Any] = {"cmap": "inferno", "alpha": 0.65, "interpolation": "nearest", "vmin": 0, "vmax": 1}
        heat = axis.imshow(shown, extent=(0, width, height, 0), **options)
    return heat


def _hide_ticks(axis: Axes) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


_EXAMPLES_IN_LINE, _EXAMPLE_SIDE = 6, 1.55


def draw_examples(path: Path, coarse: Sequence[Explanation], fine: Sequence[Explanation], caption: str) -> None:
    """Images right at the coarse stage, and right at the fine one with what it did not split greyed (Fig. 9).

    Below each stand the answer of that stage and its confidence.
    """
    across = min(_EXAMPLES_IN_LINE, max(4, len(coarse), len(fine)))
    sections = [
        ("Right at the coarse stage", COARSE, [(each.image, each.answers[0]) for each in coarse]),
        (
            "Right at the fine stage, cells that are not split in grey",
            FINE,
            [(veil(each.image, each.split), each.answers[1]) for each in fine],
        ),
    ]
    lines = [math.ceil(len(examples) / across) for _, _, examples in sections]
    heights = [0.4 + n * (_EXAMPLE_SIDE + 0.6) for n in lines]
    width = max(6.5, across * (_EXAMPLE_SIDE + 0.15))
    with _sheet(path, width, sum(heights), "Images that each stage gets right", caption) as figure:
        parts: Any = figure.subfigures(2, 1, height_ratios=heights)
        for part, (title, colour, examples), rows in zip(parts, sections, lines, strict=True):
            heading = title if examples else f"{title}: none"
            part.suptitle(heading, x=0.08 / width, ha="left", fontsize=10, color=colour)
            _draw_examples(part, examples, rows, across)


def _draw_examples(
    part: SubFigure, examples: list[tuple[np.ndarray, tuple[str, float]]], rows: int, across: int
) -> None:
    for place, (image, (label, confidence)) in enumerate(examples, start=1):
        axis = part.add_subplot(rows, across, place)
        axis.imshow(image)
        axis.set_anchor("N")
        _hide_ticks(axis)
        lines = [*_lines(label, _EXAMPLE_SIDE, 8, 2), f"{confidence:.0%}"]
        axis.set_xlabel("\n".join(lines), fontsize=8)
