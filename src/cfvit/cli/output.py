"""What all commands write: answers on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def say(text: str) -> None:
    """A line on standard error, which leaves standard output to the answers."""
    sys.stderr.write(text + "\n")


def print_line(text: str) -> None:
    """A line on standard output; characters that it cannot show, as in odd file names, are escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def print_json(**values: Any) -> None:
    """An object on a line of standard output."""
    print_line(json.dumps(values))


def show(table: Table) -> None:
    """A table at its full width, however narrow the terminal: a shortened name is of no use."""
    from rich.console import Console

    Console(width=1000).print(table)


@contextlib.contextmanager
def warnings_said() -> Iterator[None]:
    """Gives each warning a line on standard error at once, without the place in the code that Python adds."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"cfvit: {' '.join(str(message).split())}")
        yield


def report_unreadable(names: Sequence[str]) -> None:
    """A line on standard error for each image that was left out."""
    for name in names:
        say(f"cfvit: {name} cannot be read and is not counted")


def eta_text(value: float) -> str:
    """Three digits, or as many more as tell it from 1, which no image would pass."""
    digits = 3
    while value < 1 == float(f"{value:.{digits}g}"):
        digits += 1
    return f"{value:.{digits}g}"


def saving_text(spent: float, plain: float) -> str:
    """What is spent against the plain backbone's cost, in words."""
    return f"{1 - spent / plain:.0%} saved" if spent <= plain else f"{spent / plain - 1:.0%} more"
