"""What all commands write: answers on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.table import Table


def say(text: str) -> None:
    """A line on standard error, which leaves standard output to the answers."""
    _write_line(text, sys.stderr)


def print_line(text: str) -> None:
    """A line on standard output."""
    _write_line(text, sys.stdout)


def _write_line(text: str, stream: TextIO) -> None:
    """A single line; control characters and those that the stream cannot show, as in odd file names, are escaped."""
    encoding = stream.encoding or "utf-8"
    text = re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def print_json(**values: Any) -> None:
    """An object on a line of standard output."""
    print_line(json.dumps(values))


def show(table: Table) -> None:
    """A table at its full width, however narrow the terminal: a shortened name is of no use."""
    from rich.console import Console

    Console(width=1000).print(table)


@contextlib.contextmanager
def warnings_said() -> Iterator[None]:
    """Gives each warning a line on standard error, once and at once, without the place in the code that Python adds."""
    said: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if (text := f"cfvit: {' '.join(str(message).split())}") not in said:
            said.add(text)
            say(text)

    with warnings.catch_warnings():
        warnings.showwarning = show
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
