"""A picture of a benchmark: how many times faster than the plain ViT, by the clock and by the MACs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cfvit.calibration import Estimate
from cfvit.plots.style import COARSE, FINE, INK, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Bar:
    """A contender beside the backbone."""

    label: str  # its name
    engine: str  # for which it was prepared
    ratio: Estimate  # how many times faster than the backbone in the same engine
    eager_ratio: float  # how many times faster than timm's model
    macs_ratio: float  # the same by the MACs
    telling: bool  # whether the machine was quiet enough for ``ratio`` to be used


def draw_speed(panels: Mapping[str, Sequence[Bar]], title: str, path: Path) -> None:
    """A PNG with a panel of bars for each batch size. Raises `CfvitError` if it cannot be drawn or written."""
    abreast = min(len(panels), 3)
    down = math.ceil(len(panels) / abreast)
    size = (4.6 * abreast + 1.2, (0.27 * max(map(len, panels.values())) + 0.9) * down + 0.7)
    with png(path, *size) as figure:
        axes = figure.subplots(down, abreast, squeeze=False).flatten()
        for axis, (name, bars) in zip(axes, panels.items(), strict=False):
            _draw_panel(axis, name, bars)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        figure.suptitle(title, fontsize=10)
        columns = min(4, 2 * abreast)  # more would not fit below a single panel
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=columns, fontsize=8)


def _draw_panel(axis: Axes, title: str, bars: Sequence[Bar]) -> None:
    places, ratios = range(len(bars)), [bar.ratio for bar in bars]
    usual = Counter(bar.engine for bar in bars).most_common(1)[0][0]
    label = "by the clock, same engine (pale: too noisy to tell)"
    contained = axis.barh(places, [ratio.value for ratio in ratios], color=COARSE, height=0.62, label=label)
    for patch, bar in zip(contained, bars, strict=True):
        patch.set_alpha(1.0 if bar.telling else 0.4)
    ends = [(ratio.low, ratio.high) if math.isfinite(ratio.high) else (math.nan, math.nan) for ratio in ratios]
    axis.hlines(places, [low for low, _ in ends], [high for _, high in ends], color=INK, lw=1.2, label="95% interval")
    promised = [bar.macs_ratio for bar in bars]
    axis.plot(promised, places, "d", color=FINE, ms=5, ls="", label="promised by the MACs")
    eager, label = [bar.eager_ratio for bar in bars], "beside timm's model"
    axis.plot(eager, places, "o", color=INK, mfc="none", ms=5, ls="", label=label)
    axis.axvline(1, color=INK, lw=0.8)
    ticks = [bar.label if bar.engine == usual else f"{bar.label} ({bar.engine})" for bar in bars]
    axis.set_yticks(places, ticks, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel("times faster than the backbone in the same engine", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_title(f"{title}, {usual} unless marked", fontsize=9)
