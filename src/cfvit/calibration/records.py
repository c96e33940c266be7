"""The record of a calibration on disk: ``calibration.json`` beside a model's weights, every key and type checked."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from cfvit.calibration.calibrated import Calibration
from cfvit.errors import CfvitError, first_line
from cfvit.files import atomic_write

CALIBRATION_FILE = "calibration.json"
_SHOWN = 40

Record = TypeVar("Record")


def parse_record(kind: type[Record], text: str, name: str) -> Record:
    """A dataclass from the JSON of its fields.

    Args:
        name: what to call it in an error.

    Raises:
        CfvitError: no JSON, a missing or unknown key, a value of another type or out of range.
    """
    try:
        return TypeAdapter(kind).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors()[0]
    cause = first.get("ctx", {}).get("error", "")
    where = ".".join(map(str, (name, *first["loc"])))
    match first["type"]:
        case "missing":
            problem = f"{where} is missing"
        case "unexpected_keyword_argument":
            problem = f"{where} is unknown"
        case "value_error":
            problem = f"{where}: {cause}"
        case "json_invalid":
            problem = f"{name} is no JSON ({cause})"
        case _:
            got = " ".join(repr(first["input"]).split())
            problem = f"{where} is {got if len(got) <= _SHOWN else f'{got[: _SHOWN - 3]}...'}: {first['msg']}"
    raise CfvitError(problem)


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Writes a calibration as JSON, for `read_calibration`.

    Raises:
        CfvitError: the file cannot be written; it is then as it was.
    """
    with atomic_write(path) as file:
        file.write_text(json.dumps(asdict(calibration), indent=2, allow_nan=False) + "\n")


def read_calibration(path: Path) -> Calibration:
    """A stored calibration, by its file or by the folder of a calibrated model.

    Raises:
        CfvitError: no such file, not JSON, or a key that is missing, unknown or of a wrong value.
    """
    path = path / CALIBRATION_FILE if path.is_dir() else path
    mend = "remove it and calibrate again" if path.name == CALIBRATION_FILE else "name a file of cfvit calibrate"
    try:
        return parse_record(Calibration, path.read_text(), "calibration")
    except FileNotFoundError as error:
        raise CfvitError(f"no calibration at {path}: make one with cfvit calibrate") from error
    except (OSError, ValueError) as error:
        raise CfvitError(f"{path} cannot be used ({first_line(error)}): {mend}") from error
