"""What users see when something is wrong: a single line that says what was got and how to mend it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class CfvitError(ValueError):
    """Something about the input, the model or the machine that the user can mend.

    The message is one line: what was got, what is allowed, what to do. The command line prints
    it without a traceback and exits with status 1.
    """


class UsageError(CfvitError):
    """A wrong call: an unknown option or a value that is never allowed. Exit status 2."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def first_problem(errors: Sequence[Any]) -> str:
    """What pydantic finds wrong first, and where."""
    first = errors[0]
    where = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ").replace("Invalid JSON", "no JSON")
    return f"{where}: {message}" if where else message
