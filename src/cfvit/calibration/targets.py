"""What a user asks of the trade-off, one of seven targets, and the threshold that meets it.

Risk control: the loss of an image is 1 where the answer is wrong and the fine stage's is right. It
can only fall as eta rises, since an image that goes on gets the fine stage's answer, and its number
among n images is binomial. Both methods come to "at most so many of the n": the upper bound on every
threshold there is (Bates et al., "Distribution-Free, Risk-Controlling Prediction Sets", 2021), the
fixed sequence on a grid that does not depend on the images, with exact binomial p-values (Angelopoulos
et al., "Learn then Test", 2021). For early exits: Jazbec et al., "Fast yet Safe: Early-Exiting with
Risk Control", NeurIPS 2024.

Selective risk: the share of wrong answers among those that the coarse stage gives, which need not fall as eta rises.
Of the m images that exit at an eta the number of wrong answers is binomial, given m. Close to 1 too few images
exit to show anything, so the fixed sequence cannot begin there; and where enough do depends on the images. So there
is one sequence downwards from each of `STARTS`, and each may err with an equal part of the probability.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

import numpy as np
import scipy
from pydantic import Discriminator
from torch import Tensor

from cfvit.calibration.tradeoff import TradeOff, rank_images
from cfvit.errors import CfvitError
from cfvit.modeling.cost import StageMacs
from cfvit.modeling.exit import Measure, require_number

RiskMethod = Literal["upper_bound", "fixed_sequence"]

TESTED = np.unique(np.concatenate([np.linspace(0, 1, 1001), *(1 - np.arange(1, 10) / 10**j for j in range(4, 8))]))
"""The fixed sequence's thresholds: steps of 0.001, and finer ones close to 1."""

STARTS = (0.9, 0.7, 0.5, 0.3)
"""Where the sequences of a selective risk begin."""

_SLACK = 1e-9


def _require_positive(name: str, value: float, unit: str) -> None:
    require_number(name, value, lambda number: number > 0, f"{unit} above 0")


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
        named = [("coarse latency", self.coarse), ("both latency", self.both)]
        for name, time in (*named, *(("a latency in between", time) for time in self.between)):
            _require_positive(name, time, "milliseconds")
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


@dataclass(frozen=True)
class GmacsBudget:
    """The most accurate threshold whose mean cost is at most ``gmacs``, in 1e9 multiply-accumulates an image."""

    gmacs: float
    kind: Literal["GmacsBudget"] = field(default="GmacsBudget", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        _require_positive("gmacs", self.gmacs, "a number of GMACs")


@dataclass(frozen=True)
class Saving:
    """The most accurate threshold that saves at least ``percent`` of the plain backbone's MACs."""

    percent: float
    kind: Literal["Saving"] = field(default="Saving", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        require_number("saving", self.percent, lambda value: 0 <= value < 100, "a percentage from 0 to below 100")


@dataclass(frozen=True)
class LatencyBudget:
    """The most accurate threshold whose mean latency is at most ``milliseconds`` an image."""

    milliseconds: float
    kind: Literal["LatencyBudget"] = field(default="LatencyBudget", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        _require_positive("latency", self.milliseconds, "milliseconds")


@dataclass(frozen=True)
class Accuracy:
    """The cheapest threshold with a top-1 accuracy of at least ``percent`` on the calibration images."""

    percent: float
    kind: Literal["Accuracy"] = field(default="Accuracy", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        require_number("accuracy", self.percent, lambda value: 0 <= value <= 100, "a percentage from 0 to 100")


@dataclass(frozen=True)
class Drop:
    """The lowest threshold from which upwards none loses more than ``points`` of accuracy against the fine stage."""

    points: float
    kind: Literal["Drop"] = field(default="Drop", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        require_number("drop", self.points, lambda value: 0 <= value <= 100, "percentage points from 0 to 100")


@dataclass(frozen=True)
class Promise:
    """A target that holds also for images yet unseen, if nothing else was chosen on the same images."""

    share: float  # of answers that may be wrong, in (0, 1)
    confidence: float = 0.95  # in (0, 1)

    def __post_init__(self) -> None:
        risk = "selective risk" if isinstance(self, SelectiveRisk) else "risk"
        for name, value in (("share", self.share), ("confidence", self.confidence)):
            require_number(
                f"{name} of the {risk}", value, lambda v: 0 < v < 1, "a share between 0 and 1, both excluded"
            )

    def promise(self, images: int) -> str:
        """What holds for images yet unseen, if eta was chosen on this many."""
        bounded, means = "of the coarse stage's answers are wrong", "fixed-sequence testing, exact binomial p-values"
        if isinstance(self, Risk):
            bounded = "of all answers are wrong where the fine stage is right"
            means = "Clopper-Pearson upper bound" if self.method == "upper_bound" else means
        return (
            f"with a probability of at least {100 * self.confidence:g}% over the choice of the {count_images(images)}, "
            f"at most {100 * self.share:g}% {bounded} ({means})"
        )


@dataclass(frozen=True)
class Risk(Promise):
    """The lowest threshold with a promise: few answers get worse, also on images yet unseen.

    With probability of at least ``confidence`` over the choice of the calibration images, at most
    ``share`` of all answers are wrong where the fine stage is right. It holds for any model and any
    data, if the images in use are drawn as the calibration images were, independently, and neither
    measure nor temperature nor target was chosen by looking at them.

    Attributes:
        method: ``upper_bound`` takes any threshold for which Clopper and Pearson's bound of the share
            is low enough, as the share can only fall as eta rises; ``fixed_sequence`` tests a fixed
            grid of thresholds from 1 downwards and stops at the first that fails.
    """

    method: RiskMethod = "upper_bound"
    kind: Literal["Risk"] = field(default="Risk", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in get_args(RiskMethod):
            raise CfvitError(f"method of the risk is {self.method!r}: give one of {', '.join(get_args(RiskMethod))}")


@dataclass(frozen=True)
class SelectiveRisk(Promise):
    """The lowest threshold found with a promise: few of the coarse stage's answers are wrong, also on images unseen.

    With probability of at least ``confidence`` over the choice of the calibration images, at most ``share`` of the
    answers that the coarse stage gives are wrong. It holds as a `Risk` does.
    """

    kind: Literal["SelectiveRisk"] = field(default="SelectiveRisk", kw_only=True, repr=False)


Budget = GmacsBudget | Saving | LatencyBudget
"""Targets of a mean cost."""

Target = Annotated[Budget | Accuracy | Drop | Risk | SelectiveRisk, Discriminator("kind")]
"""Any of the seven; a file tells them apart by their ``kind``."""


def count_images(count: int) -> str:
    """A number of images in words."""
    return "1 image" if count == 1 else f"{count} images"


def choose_threshold(
    coarse: Tensor,
    fine: Tensor,
    labels: Tensor,
    max_drop: float,
    measure: Measure = "max_probability",
    temperature: float = 1.0,
) -> float:
    """The lowest eta that loses at most ``max_drop`` points of accuracy against the fine stage; 1 if there is no other.

    From that eta upwards no higher one loses more either. Use images on which the model was not
    trained, and not those on which it will be scored.

    Args:
        coarse, fine: logits ``[n, classes]``.
        labels: class indices ``[n]``.
        measure, temperature: of the coarse stage's confidence, which eta is compared with.
    """
    trade = rank_images(coarse, fine, labels, measure, temperature)
    return trade.threshold(_fewest_without_drop(trade, max_drop))


def require_reachable(target: Target, macs: StageMacs, latency: StageLatency | None = None) -> None:
    """Refuses a budget that not even the coarse stage alone keeps to, which no image is needed to tell.

    Raises:
        CfvitError: out of reach, with the nearest value that is not; a latency asked for and none given.
    """
    if not isinstance(target, Budget):
        return
    costs, budget, unit = _costs(target, np.zeros(1), macs, latency)
    least = float(costs[0])
    if least <= budget + _SLACK * abs(budget):
        return
    if isinstance(target, Saving):
        asked, most = f"a saving of {target.percent:g}%", f"{_down(100 - least)}%"
        raise CfvitError(f"{asked} is out of reach: the most is {most} at eta 0; ask for at most that")
    raise CfvitError(
        f"{budget:g} {unit} is out of reach: the coarse stage alone takes {math.ceil(1000 * least - _SLACK) / 1000:g} "
        f"{unit} at eta 0; ask for at least that"
    )


def _costs(
    target: Budget, shares: np.ndarray, macs: StageMacs, latency: StageLatency | None
) -> tuple[np.ndarray, float, str]:
    """Mean cost of an image at each share that goes on, the most that the target allows, and the unit of both."""
    spent = macs.coarse + shares * macs.fine
    if isinstance(target, GmacsBudget):
        return spent / 1e9, target.gmacs, "GMACs"
    if isinstance(target, Saving):
        return 100 * spent / macs.backbone, 100 - target.percent, "% of the plain backbone's MACs"
    if latency is None:
        raise CfvitError("a latency is asked for and none is measured: pass latency=StageLatency(coarse, both)")
    return latency.expected_all(shares), target.milliseconds, "ms"


def choose_eta(target: Target, trade: TradeOff, macs: StageMacs, latency: StageLatency | None = None) -> float:
    """The eta that meets a target on these images.

    Raises:
        CfvitError: out of reach, with the nearest value that is not; a latency asked for and none given; no target.
    """
    require_reachable(target, macs, latency)
    reachable, images = trade.reachable, trade.images
    match target:
        case GmacsBudget() | Saving() | LatencyBudget():
            costs, budget, _ = _costs(target, reachable / images, macs, latency)
            affordable = reachable[costs <= budget + _SLACK * abs(budget)]
            go_on = affordable[trade.right[affordable].argmax()]  # the cheapest of equally accurate ones
        case Accuracy(percent):
            accuracy = 100 * trade.right[reachable] / images
            best = int(accuracy.argmax())
            if accuracy[best] < percent - _SLACK:
                eta = str(trade.threshold(int(reachable[best]))).removesuffix(".0")
                raise CfvitError(
                    f"an accuracy of {percent:g}% is out of reach: the best is {_down(accuracy[best])}% at eta {eta}; "
                    "ask for at most that"
                )
            go_on = reachable[(accuracy >= percent - _SLACK).argmax()]
        case Drop(points):
            go_on = _fewest_without_drop(trade, points)
        case Risk(method="upper_bound"):
            # the upper bound of k of n is at most the share where k or fewer of n are improbable at that share
            improbable = scipy.stats.binom.cdf(trade.worse[reachable], images, target.share)
            granted = improbable <= 1 - target.confidence
            granted[-1] = True  # if all go on, no answer is worse
            go_on = reachable[granted.argmax()]
        case Risk() | SelectiveRisk():  # sequences downwards, until "too many are wrong" cannot be rejected
            selective = isinstance(target, SelectiveRisk)
            gone_on = np.array([trade.gone_on(eta) for eta in TESTED.tolist()])
            wrong = (trade.wrong_exits if selective else trade.worse)[gone_on]
            p_values = scipy.stats.binom.cdf(wrong, images - gone_on if selective else images, target.share)
            starts = STARTS if selective else TESTED[-2:-1]
            rejected = p_values <= (1 - target.confidence) / len(starts)
            granted_etas = [1.0]  # where no image exits, or nothing is to be shown
            for start in starts:
                places = np.flatnonzero(start >= TESTED)[::-1]
                granted_etas += TESTED[places[np.logical_and.accumulate(rejected[places])]].tolist()
            return min(granted_etas)
        case _:
            kinds = ", ".join(kind.__name__ for kind in get_args(get_args(Target)[0]))
            raise CfvitError(f"target is {target!r}: give one of {kinds}")
    return trade.threshold(int(go_on))


def _fewest_without_drop(trade: TradeOff, points: float) -> int:
    """The fewest images to go on so that neither they nor any more lose that many points."""
    enough = trade.right[trade.reachable] >= trade.right[-1] - points / 100 * trade.images - _SLACK
    failing = np.flatnonzero(~enough)
    return int(trade.reachable[failing[-1] + 1 if len(failing) else 0])


def _down(value: float) -> str:
    """Two decimals, never above the value, so that what is named can be asked for."""
    return f"{math.floor(100 * value + _SLACK) / 100:.2f}"
