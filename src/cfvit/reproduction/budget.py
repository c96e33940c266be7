"""Time spans as people write them."""

from __future__ import annotations

import re

from cfvit.errors import UsageError

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_budget(text: str) -> float:
    """``2h``, ``90m`` or ``300s`` in seconds.

    Raises:
        UsageError: anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip().lower())
    if found is None or float(found[1]) == 0:
        raise UsageError(f"budget is {text!r}: give a time such as 2h, 90m or 300s")
    return float(found[1]) * _SECONDS[found[2]]


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
