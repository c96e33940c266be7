"""What all pictures of this package share: colours, one style of matplotlib, and one way to need it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfvit.errors import CfvitError
from cfvit.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, QUIET, LINE, COARSE, FINE = "#1c2127", "#59636e", "#d3d9e0", "#1a62b3", "#b3500f"

STYLE: dict[Any, Any] = {  # matplotlib's names for its settings are a type of their own
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign is a dollar sign
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}


def require_matplotlib() -> type[Figure]:
    """Matplotlib's figure, which draws without a display. Raises `CfvitError` if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CfvitError("pictures need matplotlib: install cfvit[plots]") from error
    return Figure


@contextmanager
def new_figure(width: float, height: float, settings: Mapping[Any, Any] | None = None) -> Iterator[Figure]:
    """A figure in the common style, to be drawn and written inside the ``with``; sides in inches.

    Args:
        settings: of matplotlib, besides `STYLE`.
    """
    make = require_matplotlib()
    from matplotlib import style

    with style.context(["default", {**STYLE, **(settings or {})}]):  # whatever the user's own style is
        yield make(figsize=(width, height), layout="constrained")


@contextmanager
def png(
    path: Path, width: float, height: float, dpi: int = 120, settings: Mapping[Any, Any] | None = None
) -> Iterator[Figure]:
    """A figure as `new_figure` makes it, written to a PNG file at the end, or not at all: then `CfvitError`."""
    with new_figure(width, height, settings) as figure:
        yield figure
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=dpi)
