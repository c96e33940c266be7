"""A command line from its parts, so that a figure can say how to make it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any


def command_line(name: str, flags: Mapping[str, Any]) -> str:
    """``cfvit reproduce NAME`` with the flags that were given; None stands for one that was not."""
    words = ["cfvit", "reproduce", name]
    for flag, value in flags.items():
        words += _words_of(f"--{flag.replace('_', '-')}", value)
    return shlex.join(words)


def _words_of(flag: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, Mapping):
        return [word for key, inner in value.items() for word in (f"{flag}.{key.replace('_', '-')}", str(inner))]
    return [flag, *map(str, value)] if isinstance(value, tuple) else [flag, str(value)]
