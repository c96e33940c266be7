"""Frozen dataclasses to JSON and back, with every key and type checked."""

from __future__ import annotations

import sys
import types
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from cfvit.errors import CfvitError

Record = TypeVar("Record")

_KIND = "kind"
_LARGEST = sys.float_info.max


def to_json(record: Any) -> dict[str, Any]:
    """What ``json.dumps`` takes. A field of several dataclasses also says which: ``{"kind": "Drop", ...}``."""
    values = asdict(record)
    hints = get_type_hints(type(record))
    for field in fields(record):
        value = getattr(record, field.name)
        if is_dataclass(value) and len(_dataclasses(hints[field.name])) > 1:
            values[field.name] = {_KIND: type(value).__name__, **values[field.name]}
        elif isinstance(value, tuple):
            values[field.name] = list(value)
        elif is_dataclass(value):
            values[field.name] = to_json(value)
    return values


def from_json(kind: type[Record], data: object, name: str) -> Record:
    """A dataclass from what `to_json` gave, now or before a field with a default was added.

    Args:
        name: what to call the data in an error.

    Raises:
        CfvitError: a missing or unknown key, a value of another type or not finite.
    """
    if not isinstance(data, dict):
        raise CfvitError(f"{name} is {_shown(data)}: give what to_dict returned, with its keys")
    hints = get_type_hints(kind)
    needed = [field.name for field in fields(kind) if field.default is MISSING]  # type: ignore[arg-type]
    missing, unknown = [key for key in needed if key not in data], [str(key) for key in data if key not in hints]
    if missing or unknown:
        problem = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(unknown)}"
        raise CfvitError(f"{name} {problem}: give what to_dict returned, or calibrate again")
    return kind(**{key: _value(hint, data[key], f"{name}.{key}") for key, hint in hints.items() if key in data})


def _value(hint: Any, data: object, name: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return None if data is None and type(None) in arguments else _record(_dataclasses(hint), data, name)
    if is_dataclass(hint):
        return _record([hint], data, name)
    if origin is tuple and isinstance(data, (list, tuple)):
        return tuple(_value(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(data))
    if origin is Literal and data in arguments:
        return data
    if hint is float and _is_number(data):
        return float(data)  # type: ignore[arg-type]
    if hint in (int, str) and type(data) is hint:
        return data
    wanted = " or ".join(map(str, arguments)) if origin is Literal else getattr(hint, "__name__", str(hint))
    raise CfvitError(f"{name} is {_shown(data)}: give a {wanted}, or calibrate again")


def _record(kinds: list[Any], data: object, name: str) -> Any:
    if len(kinds) == 1:
        return from_json(kinds[0], data, name)
    kind = data.get(_KIND) if isinstance(data, dict) else None
    for candidate in kinds:
        if candidate.__name__ == kind and isinstance(data, dict):
            return from_json(candidate, {key: value for key, value in data.items() if key != _KIND}, name)
    allowed = ", ".join(candidate.__name__ for candidate in kinds)
    raise CfvitError(f"{name} is of kind {_shown(kind)}: give one of {allowed}")


def _dataclasses(hint: Any) -> list[Any]:
    return [kind for kind in get_args(hint) or (hint,) if is_dataclass(kind)]


def _is_number(data: object) -> bool:
    return type(data) in (int, float) and abs(data) <= _LARGEST  # type: ignore[operator]


def _shown(data: object) -> str:
    """A value in at most a few words, on one line."""
    text = " ".join(repr(data).split())
    return text if len(text) <= 40 else f"{text[:37]}..."
