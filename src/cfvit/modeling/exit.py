"""How sure a stage is of its answer: four measures, the rule that a model exits by, and honest temperatures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from cfvit.errors import CfvitError

Measure = Literal["max_probability", "margin", "entropy", "energy"]

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.1, 10.0
_HALVINGS = 16


def confidence_of(logits: Tensor, measure: Measure = "max_probability", temperature: float = 1.0) -> Tensor:
    """How sure the answers are, ``[n, classes] -> [n]`` in float32; -1 where it is not a number.

    All measures lie in [0, 1] and are higher for surer answers, and an image exits at a confidence
    of at least eta, so eta = 0 lets all exit and eta = 1 none, whatever the measure. Only the
    maximum probability is the paper's: an eta that was chosen for one measure or temperature means
    nothing for another, and no other one estimates the chance of a right answer.

    - ``max_probability``: the highest softmax probability.
    - ``margin``: its distance to the second highest.
    - ``entropy``: ``1 - H / log(classes)``, 0 for a uniform softmax and 1 for a single class.
    - ``energy``: ``E = temperature * logsumexp(logits / temperature)``, mapped to (0, 1) by
      ``(1 + E / (1 + |E|)) / 2`` (Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS
      2020). It depends on the level of the logits, which the loss leaves free.

    Raises:
        CfvitError: an unknown measure, a temperature out of range, fewer than two classes for a margin or an entropy.
    """
    _require_measure(measure)
    if not 0 < temperature < math.inf:
        raise CfvitError(f"temperature is {temperature}: give a positive number, 1 for the logits as they are")
    if measure in ("margin", "entropy") and logits.shape[-1] < 2:
        raise CfvitError(f"measure {measure} of {logits.shape[-1]} class: give at least 2, or use max_probability")
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    return _MEASURES[measure](scaled, temperature).nan_to_num(nan=-1.0)


def _max_probability(scaled: Tensor, temperature: float) -> Tensor:
    return scaled.softmax(dim=-1).amax(dim=-1)


def _margin(scaled: Tensor, temperature: float) -> Tensor:
    first, second = scaled.softmax(dim=-1).topk(2, dim=-1).values.unbind(dim=-1)
    return first - second


def _entropy(scaled: Tensor, temperature: float) -> Tensor:
    entropy = torch.special.entr(scaled.softmax(dim=-1)).sum(dim=-1)
    return (1 - entropy / math.log(scaled.shape[-1])).clamp(0, 1)


def _energy(scaled: Tensor, temperature: float) -> Tensor:
    energy = temperature * scaled.logsumexp(dim=-1)
    return (1 + energy / (1 + energy.abs())) / 2


_MEASURES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "max_probability": _max_probability,
    "margin": _margin,
    "entropy": _entropy,
    "energy": _energy,
}


def _require_measure(measure: object) -> None:
    if measure not in get_args(Measure):
        raise CfvitError(f"measure is {measure!r}: give one of {', '.join(get_args(Measure))}")


@dataclass(frozen=True)
class ExitRule:
    """How the confidence is measured that eta is compared with; by default as in the paper.

    Attributes:
        measure: of both stages, see `confidence_of`.
        coarse_temperature: coarse logits are divided by it.
        fine_temperature: fine logits are; it changes no decision.

    Raises:
        CfvitError: an unknown measure, a temperature that is not positive.
    """

    measure: Measure = "max_probability"
    coarse_temperature: float = 1.0
    fine_temperature: float = 1.0

    def __post_init__(self) -> None:
        _require_measure(self.measure)
        for stage, temperature in (("coarse", self.coarse_temperature), ("fine", self.fine_temperature)):
            if not 0 < temperature < math.inf:
                raise CfvitError(
                    f"{stage}_temperature is {temperature}: give a positive number, 1 to leave logits alone"
                )

    def coarse(self, logits: Tensor) -> Tensor:
        """Confidence of the coarse stage's answers, ``[B, classes] -> [B]``."""
        return confidence_of(logits, self.measure, self.coarse_temperature)

    def fine(self, logits: Tensor) -> Tensor:
        """Confidence of the fine stage's answers, ``[B, classes] -> [B]``."""
        return confidence_of(logits, self.measure, self.fine_temperature)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature at which the softmax of ``logits / temperature`` has the least cross entropy.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. The loss is convex in the
    inverse temperature, so its slope is bisected. Answers that are all right have no least: the
    result stays within [0.1, 10]. For a promise of `Risk`, fit it on other images than those that
    the threshold is chosen on.

    Args:
        logits: ``[n, classes]``, finite.
        labels: class indices ``[n]``.
    """
    logits = logits.float()
    truth = logits.gather(1, labels[:, None].long()).double().mean()
    low, high = math.log(LOWEST_TEMPERATURE), math.log(HIGHEST_TEMPERATURE)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        expected = ((logits / math.exp(middle)).softmax(dim=-1) * logits).sum(dim=-1).double().mean()
        # too sharp a softmax expects higher logits than the labels have
        low, high = (middle, high) if expected > truth else (low, middle)
    return math.exp((low + high) / 2)
