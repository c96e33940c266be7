"""The container, the unit and the manifest that docs/deployment.md offers fit the server."""

from __future__ import annotations

import configparser
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "deployment.md").read_text()
MANIFEST = next(re.finditer(r"```yaml\n(.*?)```", PAGE, re.DOTALL))[1]
DEPLOYMENT, SERVICE = yaml.safe_load_all(MANIFEST)
POD: dict[str, Any] = DEPLOYMENT["spec"]["template"]["spec"]
CONTAINER: dict[str, Any] = POD["containers"][0]
UNIT = configparser.ConfigParser(interpolation=None)
UNIT.optionxform = str  # pyright: ignore[reportAttributeAccessIssue] - as its documentation says
UNIT.read_string(next(re.finditer(r"```ini\n(.*?)```", PAGE, re.DOTALL))[1])
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()


def _value(arguments: list[str], option: str) -> float:
    return float(arguments[arguments.index(option) + 1])


UNITS_COMMAND = shlex.split(UNIT["Service"]["ExecStart"])
COMMANDS = {
    "docker": re.findall(r'"([^"]+)"', next(re.finditer(r"^ENTRYPOINT \[(.*)\]$", DOCKERFILE, re.MULTILINE))[1]),
    "systemd": UNITS_COMMAND,
    "kubernetes": CONTAINER["args"],
}


@pytest.mark.parametrize("where", COMMANDS)
def test_the_server_has_each_option(where: str, cfvit_main: Callable[..., Any]) -> None:
    known = set(re.findall(r"--[a-z][a-z-]+", "\n".join(cfvit_main("serve", "--help").out)))
    given = {argument for argument in COMMANDS[where] if argument.startswith("--")}
    assert given
    assert given <= known


def test_the_server_may_end_in_peace() -> None:
    for arguments, patience in (
        (UNITS_COMMAND, float(UNIT["Service"]["TimeoutStopSec"])),
        (CONTAINER["args"], POD["terminationGracePeriodSeconds"]),
    ):
        assert patience > _value(arguments, "--notice") + _value(arguments, "--time-limit")


def test_probes_ask_what_the_server_answers() -> None:
    served = (ROOT / "src" / "cfvit" / "deploy" / "server.py").read_text()
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = CONTAINER[probe]["httpGet"]
        assert f'route("GET", "{asked["path"]}", service.' in served
        assert asked["port"] == CONTAINER["ports"][0]["name"] == SERVICE["spec"]["ports"][0]["targetPort"]
    assert SERVICE["spec"]["selector"].items() <= DEPLOYMENT["spec"]["template"]["metadata"]["labels"].items()


def test_what_the_image_copies_is_there() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    assert copied
    assert all((ROOT / name).exists() for line in copied for name in line.split())
