"""Under what conditions figures were made: command, hardware, versions, commit, date."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

import cfvit
from cfvit.processes import best_device

REPORTED_PACKAGES = ("torch", "torchvision", "timm", "numpy")


@dataclass(frozen=True)
class Conditions:
    """What a reader needs in order to judge or repeat a figure."""

    command: str  # as it was given
    hardware: str  # the GPU, or the processor and the number of threads
    dtype: str  # precision of matrix products
    versions: str  # of Python, cfvit and the packages that compute
    commit: str  # of the source, with ``+changes`` where it was edited since; ``unknown`` outside a repository
    date: str  # UTC


def conditions_of(dtype: torch.dtype, command: str) -> Conditions:
    """The conditions here and now."""
    device = best_device()
    packages = [f"Python {platform.python_version()}", f"cfvit {cfvit.__version__}"]
    return Conditions(
        command=command,
        hardware=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        dtype=str(dtype).removeprefix("torch."),
        versions=", ".join(packages + [f"{name} {version(name)}" for name in REPORTED_PACKAGES]),
        commit=_commit(Path(cfvit.__file__)),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _processor() -> str:
    info, threads = Path("/proc/cpuinfo"), torch.get_num_threads()
    lines = info.read_text().splitlines() if info.exists() else []  # only on Linux
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(names, platform.processor() or platform.machine())
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def _commit(source: Path) -> str:
    """The commit of the repository that holds this very file, not of one that it was merely installed into."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
