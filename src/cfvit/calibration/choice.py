"""From a target to the threshold that meets it.

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

import numpy as np
import scipy
from torch import Tensor

from cfvit.calibration.targets import (
    Accuracy,
    Drop,
    GmacsBudget,
    LatencyBudget,
    Risk,
    Saving,
    SelectiveRisk,
    StageLatency,
    Target,
)
from cfvit.calibration.tradeoff import TradeOff, rank_images
from cfvit.errors import CfvitError
from cfvit.modeling.cost import StageMacs
from cfvit.modeling.exit import Measure

Budget = GmacsBudget | Saving | LatencyBudget
"""Targets of a mean cost."""

_SLACK = 1e-9

TESTED = np.unique(np.concatenate([np.linspace(0, 1, 1001), *(1 - np.arange(1, 10) / 10**j for j in range(4, 8))]))
"""The fixed sequence's thresholds: steps of 0.001, and finer ones close to 1."""

STARTS = (0.9, 0.7, 0.5, 0.3)
"""Where the sequences of a selective risk begin."""


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
        CfvitError: out of reach, with the nearest value that is not; a latency asked for and none given.
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
        case Risk():  # a fixed sequence from eta = 1 downwards, until "too many get worse" cannot be rejected
            p_values = scipy.stats.binom.cdf(np.arange(images + 1), images, target.share)
            granted_eta = 1.0  # where nothing is to be shown
            for eta in TESTED[-2::-1].tolist():
                if p_values[trade.worse[trade.gone_on(eta)]] > 1 - target.confidence:
                    break
                granted_eta = eta
            return granted_eta
        case SelectiveRisk(share, confidence):
            granted_eta = 1.0  # where no image exits
            for start in STARTS:
                for eta in TESTED[start >= TESTED][::-1].tolist():
                    go_on = trade.gone_on(eta)
                    p_value = scipy.stats.binom.cdf(trade.wrong_exits[go_on], images - go_on, share)
                    if p_value > (1 - confidence) / len(STARTS):
                        break
                    granted_eta = min(granted_eta, eta)
            return granted_eta
    return trade.threshold(int(go_on))


def _fewest_without_drop(trade: TradeOff, points: float) -> int:
    """The fewest images to go on so that neither they nor any more lose that many points."""
    enough = trade.right[trade.reachable] >= trade.right[-1] - points / 100 * trade.images - _SLACK
    failing = np.flatnonzero(~enough)
    return int(trade.reachable[failing[-1] + 1 if len(failing) else 0])


def _down(value: float) -> str:
    """Two decimals, never above the value, so that what is named can be asked for."""
    return f"{math.floor(100 * value + _SLACK) / 100:.2f}"
