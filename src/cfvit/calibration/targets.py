"""What a user asks of the trade-off: one of seven targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

import numpy as np
import scipy
from pydantic import Discriminator

from cfvit.errors import CfvitError
from cfvit.modeling.exit import is_number

RiskMethod = Literal["upper_bound", "fixed_sequence"]


def _require(name: str, value: float, holds: Callable[[float], bool], allowed: str) -> None:
    if not (is_number(value) and holds(value)):
        raise CfvitError(f"{name} is {value!r}: give {allowed}")


@dataclass(frozen=True)
class StageLatency:
    """Measured time of one image in milliseconds.

    Attributes:
        coarse: of an image of a batch that exits as a whole.
        both: of an image of a batch that goes on as a whole.
        between: mean over a batch of which 1, 2, ... and all images but one go on. A few hard images
            seldom fill the machine, so these lie above a straight line. Empty for batches of one
            image, or to take the straight line.

    Raises:
        CfvitError: a time that is not positive, or less time for more work.
    """

    coarse: float
    both: float
    between: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _require("coarse latency", self.coarse, _positive, "milliseconds above 0")
        _require("both latency", self.both, _positive, "milliseconds above 0")
        for time in self.between:
            _require("a latency in between", time, _positive, "milliseconds above 0")
        if self.both < self.coarse:
            raise CfvitError(f"both stages take {self.both} ms and the coarse one {self.coarse} ms: measure them again")
        if list(self._times) != sorted(self._times):
            raise CfvitError("fewer images of a batch that go on take longer than more: measure them again")

    @property
    def _times(self) -> tuple[float, ...]:
        return (self.coarse, *self.between, self.both)

    def expected(self, fine_share: float) -> float:
        """Mean time of an image in milliseconds if each goes on with this probability, by itself."""
        return float(self.expected_all(np.array([fine_share]))[0])

    def expected_all(self, fine_shares: np.ndarray) -> np.ndarray:
        """`expected` at each of many shares, ``[m] -> [m]``."""
        batch = len(self.between) + 1
        return np.array(self._times) @ scipy.stats.binom.pmf(np.arange(batch + 1)[:, None], batch, fine_shares)


def _positive(value: float) -> bool:
    return value > 0


@dataclass(frozen=True)
class GmacsBudget:
    """The most accurate threshold whose mean cost is at most ``gmacs``, in 1e9 multiply-accumulates an image."""

    gmacs: float
    kind: Literal["GmacsBudget"] = field(default="GmacsBudget", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        _require("gmacs", self.gmacs, _positive, "a number of GMACs above 0")


@dataclass(frozen=True)
class Saving:
    """The most accurate threshold that saves at least ``percent`` of the plain backbone's MACs."""

    percent: float
    kind: Literal["Saving"] = field(default="Saving", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        _require("saving", self.percent, lambda value: 0 <= value < 100, "a percentage from 0 to below 100")


@dataclass(frozen=True)
class LatencyBudget:
    """The most accurate threshold whose mean latency is at most ``milliseconds`` an image."""

    milliseconds: float
    kind: Literal["LatencyBudget"] = field(default="LatencyBudget", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        _require("latency", self.milliseconds, _positive, "milliseconds above 0")


@dataclass(frozen=True)
class Accuracy:
    """The cheapest threshold with a top-1 accuracy of at least ``percent`` on the calibration images."""

    percent: float
    kind: Literal["Accuracy"] = field(default="Accuracy", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        _require("accuracy", self.percent, lambda value: 0 <= value <= 100, "a percentage from 0 to 100")


@dataclass(frozen=True)
class Drop:
    """The lowest threshold from which upwards none loses more than ``points`` of accuracy against the fine stage."""

    points: float
    kind: Literal["Drop"] = field(default="Drop", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        _require("drop", self.points, lambda value: 0 <= value <= 100, "percentage points from 0 to 100")


@dataclass(frozen=True)
class Risk:
    """The lowest threshold with a promise: few answers get worse, also on images yet unseen.

    With probability of at least ``confidence`` over the choice of the calibration images, at most
    ``share`` of all answers are wrong where the fine stage is right. It holds for any model and any
    data, if the images in use are drawn as the calibration images were, independently, and neither
    measure nor temperature nor target was chosen by looking at them.

    Attributes:
        share: of all answers, in (0, 1).
        confidence: in (0, 1).
        method: ``upper_bound`` takes any threshold for which Clopper and Pearson's bound of the share
            is low enough, as the share can only fall as eta rises; ``fixed_sequence`` tests a fixed
            grid of thresholds from 1 downwards and stops at the first that fails. See `cfvit.calibration.choice`.
    """

    share: float
    confidence: float = 0.95
    method: RiskMethod = "upper_bound"
    kind: Literal["Risk"] = field(default="Risk", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        for name, value in (("share", self.share), ("confidence", self.confidence)):
            _require(f"{name} of the risk", value, lambda v: 0 < v < 1, "a share between 0 and 1, both excluded")
        if self.method not in get_args(RiskMethod):
            raise CfvitError(f"method of the risk is {self.method!r}: give one of {', '.join(get_args(RiskMethod))}")

    def promise(self, images: int) -> str:
        """What holds for images yet unseen, if eta was chosen on this many."""
        means = {
            "upper_bound": "Clopper-Pearson upper bound",
            "fixed_sequence": "fixed-sequence testing, exact binomial p-values",
        }[self.method]
        return (
            f"with a probability of at least {100 * self.confidence:g}% over the choice of the {count_images(images)}, "
            f"at most {100 * self.share:g}% of all answers are wrong where the fine stage is right ({means})"
        )


@dataclass(frozen=True)
class SelectiveRisk:
    """The lowest threshold found with a promise: few of the coarse stage's answers are wrong, also on images unseen.

    With probability of at least ``confidence`` over the choice of the calibration images, at most ``share`` of the
    answers that the coarse stage gives are wrong. It holds as a `Risk` does. See `cfvit.calibration.choice`.
    """

    share: float  # of the answers given at the coarse stage, in (0, 1)
    confidence: float = 0.95  # in (0, 1)
    kind: Literal["SelectiveRisk"] = field(default="SelectiveRisk", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        for name, value in (("share", self.share), ("confidence", self.confidence)):
            _require(
                f"{name} of the selective risk", value, lambda v: 0 < v < 1, "a share between 0 and 1, both excluded"
            )

    def promise(self, images: int) -> str:
        """What holds for images yet unseen, if eta was chosen on this many."""
        return (
            f"with a probability of at least {100 * self.confidence:g}% over the choice of the {count_images(images)}, "
            f"at most {100 * self.share:g}% of the coarse stage's answers are wrong (fixed-sequence testing, exact "
            "binomial p-values)"
        )


Promise = Risk | SelectiveRisk
"""Targets that hold for images unseen, if nothing else was chosen on the same images."""


def count_images(count: int) -> str:
    """A number of images in words."""
    return "1 image" if count == 1 else f"{count} images"


Target = Annotated[GmacsBudget | Saving | LatencyBudget | Accuracy | Drop | Risk | SelectiveRisk, Discriminator("kind")]
"""Any of the seven; a file tells them apart by their ``kind``."""
