"""Time for training: as people write it, how much of it is left, and what a run will take of it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cfvit.errors import UsageError

if TYPE_CHECKING:
    from cfvit.paper.records import RunRecord

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_budget(text: str) -> float:
    """``2h``, ``90m`` or ``300s`` in seconds.

    Raises:
        UsageError: anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip().lower())
    if found is None or float(found[1]) == 0:
        raise UsageError(f"budget is {text!r}: give a time such as 2h, 90m or 300s")
    return float(found[1]) * _SECONDS[found[2]]


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Budget:
    """The time until the last training has to end.

    Attributes:
        deadline: by `time.monotonic`; None for no end.
    """

    deadline: float | None = None

    @classmethod
    def of(cls, seconds: float | None) -> Budget:
        """A budget that begins now; None for no limit."""
        return cls(None if seconds is None else time.monotonic() + seconds)

    def is_over(self) -> bool:
        """Whether nothing is left."""
        return not self.fits(None)

    def fits(self, seconds: float | None) -> bool:
        """Whether so much is left; None for a time that is not known, which fits while anything is left."""
        return self.deadline is None or time.monotonic() + (seconds or 0.0) < self.deadline


class Clock:
    """Asked after each step of a training whether to stop, it times the steps.

    Attributes:
        steps: how many there were.
    """

    def __init__(self, stops: Callable[[], bool]) -> None:
        self.steps = 0
        self._stops, self._started = stops, time.monotonic()
        self._first = self._last = self._started

    def __call__(self) -> bool:
        self._last = time.monotonic()
        self._first = self._first if self.steps else self._last
        self.steps += 1
        return self._stops()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._started

    @property
    def pace(self) -> float | None:
        """Seconds of a step, the first one left out, which waits for data and compilers; None of a single one."""
        return (self._last - self._first) / (self.steps - 1) if self.steps > 1 else None


def time_left(record: RunRecord, others: Iterable[RunRecord]) -> float | None:
    """Seconds until a run is trained; None where nothing tells.

    By its own pace where it was begun, else by what an epoch took of runs of the same stages and grid, else of
    all; of several the dearest counts.
    """
    if record.done is not None and record.epoch_seconds is not None:
        return record.epoch_seconds * (record.epochs - record.done)
    known = [(other, pace) for other in others if (pace := _epoch_seconds(other)) is not None]
    alike = [pace for other, pace in known if (other.stages, other.grid) == (record.stages, record.grid)]
    dearest = max(alike or [pace for _, pace in known], default=None)
    if dearest is None:
        return None
    if record.done is not None:
        return dearest * (record.epochs - record.done)
    left = dearest * record.epochs - record.seconds
    return left if left > 0 else None  # a run that has used up what others took tells nothing


def _epoch_seconds(record: RunRecord) -> float | None:
    """What an epoch of a run took, scoring included; by its steps of one that was stopped."""
    epochs = record.epochs if record.done is None else record.done
    if record.finished and epochs:
        return record.seconds / epochs
    return record.epoch_seconds
