"""The command line as a whole: its name, its help, how it ends, and how commands write.

Answers go to standard output, everything else to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import typing
import warnings
from collections.abc import Iterable, Iterator, Sequence

from cyclopts import App, CycloptsError, Parameter

import cfvit
from cfvit.errors import CfvitError, UsageError

app = App(
    name="cfvit",
    help="Coarse-to-fine vision transformers: easy images at a glance, hard ones re-read where it matters.\n\n"
    "Any command takes --debug, which shows the traceback of an error.",
    version=cfvit.__version__,
    default_parameter=Parameter(consume_multiple=True, negative_iterable=""),
    print_error=False,
    exit_on_error=False,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 1 failed on the data or the model, 2 wrong usage."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        with _warnings_as_lines():
            status = app([word for word in words if word != "--debug"], result_action="return_value")
        sys.stdout.flush()
    except (CycloptsError, UsageError) as error:
        _fail(error, 2, debug)
    except BrokenPipeError:  # whoever read the output has seen enough, as in `cfvit predict ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (CfvitError, OSError) as error:
        _fail(error, 1, debug)
    except Exception as error:
        _fail(CfvitError(f"unexpected {type(error).__name__}: {error}; add --debug to see where"), 1, debug, error)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(error: Exception, status: int, debug: bool, cause: Exception | None = None) -> typing.NoReturn:
    if debug:
        raise cause or error
    say(f"cfvit: {' '.join(str(error).split())}")
    sys.exit(status)


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Gives each warning a line on standard error, once and at once, without the place in the code that Python adds."""
    shown: set[str] = set()

    def show(message: Warning | str, *_: typing.Any, **__: typing.Any) -> None:
        if (text := f"cfvit: {' '.join(str(message).split())}") not in shown:
            shown.add(text)
            say(text)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def say(text: str) -> None:
    """A line on standard error, which leaves standard output to the answers."""
    _write_line(text, sys.stderr)


def print_line(text: str) -> None:
    """A line on standard output."""
    _write_line(text, sys.stdout)


def _write_line(text: str, stream: typing.TextIO) -> None:
    """A single line; control characters and those that the stream cannot show, as in odd file names, are escaped."""
    encoding = stream.encoding or "utf-8"
    text = re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()  # also into a file or a pipe, which somebody may be watching


def print_json(**values: object) -> None:
    """An object on a line of standard output."""
    print_line(json.dumps(values))


def print_table(columns: Iterable[str], rows: Iterable[Iterable[str]], title: str | None = None) -> None:
    """A table at its full width, however narrow the terminal: a shortened name is of no use."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, title=title, box=None, title_justify="left")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=1000).print(table)


def report_unreadable(names: Sequence[str]) -> None:
    """A line on standard error for each image that was left out."""
    for name in names:
        say(f"cfvit: {name} cannot be read and is not counted")


def eta_text(value: float) -> str:
    """eta with three digits, or with as many more as it takes to tell it from 1, at which every image goes on."""
    digits = 3
    while value < 1 == float(f"{value:.{digits}g}"):
        digits += 1
    return f"{value:.{digits}g}"


def saving_text(spent: float, plain: float) -> str:
    """What is spent against the plain backbone's cost, in words."""
    return f"{1 - spent / plain:.0%} saved" if spent <= plain else f"{spent / plain - 1:.0%} more"
