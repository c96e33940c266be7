"""Charts of a report, as SVG to stand inside a page, which gives them its colours.

``name`` is unique on the page; names of the drawing's parts begin with it. Without matplotlib each raises `CfvitError`.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cfvit.calibration.tradeoff import Operation, TradeOff, share_estimate
from cfvit.modeling.cost import StageMacs
from cfvit.plots.style import COARSE, FINE, INK, LINE, QUIET, new_figure

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
