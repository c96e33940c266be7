"""The command line as a whole: its name, its help, and how it ends."""

from __future__ import annotations

import os
import sys
import typing
from collections.abc import Sequence

from cyclopts import App, CycloptsError

import cfvit
from cfvit.cli.output import say, warnings_said
from cfvit.errors import CfvitError, UsageError

app = App(
    name="cfvit",
    help="Coarse-to-fine vision transformers: easy images at a glance, hard ones re-read where it matters.\n\n"
    "Any command takes --debug, which shows the traceback of an error.",
    version=cfvit.__version__,
    print_error=False,
    exit_on_error=False,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 1 failed on the data or the model, 2 wrong usage."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        with warnings_said():
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
