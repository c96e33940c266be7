"""How sure a stage is of its answer, which images go on to the fine stage, and what those are answered."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cfvit.errors import CfvitError

Measure = Literal["max_probability", "margin", "entropy", "energy"]


def require_number(name: str, value: Any, holds: Callable[[float], bool], allowed: str) -> None:
    """Raises `CfvitError` unless ``value`` is a finite int or float, no bool, text or tensor, and ``holds(value)``."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not (number and holds(value)):
        raise CfvitError(f"{name} is {value!r}: give {allowed}")


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
    require_number("temperature", temperature, lambda t: t > 0, "a positive number, 1 for the logits as they are")
    if measure in ("margin", "entropy") and logits.shape[-1] < 2:
        raise CfvitError(f"measure {measure} of {logits.shape[-1]} class: give at least 2, or use max_probability")
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    match measure:
        case "max_probability":
            confidence = scaled.softmax(dim=-1).amax(dim=-1)
        case "margin":
            first, second = scaled.softmax(dim=-1).topk(2, dim=-1).values.unbind(dim=-1)
            confidence = first - second
        case "entropy":
            entropy = torch.special.entr(scaled.softmax(dim=-1)).sum(dim=-1)
            confidence = (1 - entropy / math.log(scaled.shape[-1])).clamp(0, 1)
        case "energy":
            energy = temperature * scaled.logsumexp(dim=-1)
            confidence = (1 + energy / (1 + energy.abs())) / 2
        case _:
            raise CfvitError(f"measure is {measure!r}: give one of {', '.join(get_args(Measure))}")
    return confidence.nan_to_num(nan=-1.0)


def goes_on(confidence: Tensor, eta: float) -> Tensor:
    """Which images need the fine stage: ``[B] -> [B]`` of bool. The one place where that is decided.

    Images with a confidence below eta go on. At eta = 1 every image does, even one whose softmax rounds
    to 1; at eta = 0 none does. In between, a confidence that is not a number goes on.
    """
    if eta >= 1:
        return torch.ones_like(confidence, dtype=torch.bool)
    if eta <= 0:
        return torch.zeros_like(confidence, dtype=torch.bool)
    return ~(confidence >= eta)


@dataclass(frozen=True)
class Exit:
    """All that a model knows of its exit: how confidence is measured, eta, and what an image that goes on is answered.

    The defaults are the paper's measure, no eta, and the fine stage's answer alone. The record of how eta was chosen
    is a `cfvit.calibration.Calibration`, which no model needs.

    Attributes:
        measure: of both stages, see `confidence_of`.
        coarse_temperature: coarse logits are divided by it.
        fine_temperature: fine logits are divided by it, which changes no decision.
        eta: the confidence at which the coarse answer is given, in [0, 1], or None.
        coarse_weight: weight of the coarse logits in the answer of an image that goes on, in [0, 1); see `answer`.

    Raises:
        CfvitError: an unknown measure, a temperature that is not positive, an eta or a weight out of range.
    """

    measure: Measure = "max_probability"
    coarse_temperature: float = 1.0
    fine_temperature: float = 1.0
    eta: float | None = None
    coarse_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.measure not in get_args(Measure):
            raise CfvitError(f"measure is {self.measure!r}: give one of {', '.join(get_args(Measure))}")
        for name in ("coarse_temperature", "fine_temperature"):
            allowed = "a positive number, 1 to leave logits alone"
            require_number(name, getattr(self, name), lambda value: value > 0, allowed)
        if self.eta is not None:
            require_number("threshold", self.eta, lambda eta: 0 <= eta <= 1, "a confidence between 0 and 1, or None")
        allowed = "at least 0, the paper's, and less than 1"
        require_number("coarse_weight", self.coarse_weight, lambda weight: 0 <= weight < 1, allowed)

    def coarse(self, logits: Tensor) -> Tensor:
        """Confidence of the coarse stage's answers, ``[B, classes] -> [B]``."""
        return confidence_of(logits, self.measure, self.coarse_temperature)

    def answer(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """What images are answered that both stages have seen: ``[B, classes]`` twice to ``[B, classes]``.

        The weighted mean of both stages' logits, which mixes their log-probabilities. A temperature for each stage
        would change nothing but that weight, and the confidence, which has ``fine_temperature``.
        """
        return fine.lerp(coarse, self.coarse_weight) if self.coarse_weight else fine

    def fine(self, logits: Tensor) -> Tensor:
        """Confidence of what `answer` gives, ``[B, classes] -> [B]``."""
        return confidence_of(logits, self.measure, self.fine_temperature)


class HasExit:
    """A network with an exit between its stages."""

    exit: Exit

    @property
    def threshold(self) -> float | None:
        """The calibrated eta, ``exit.eta``, or None. Setting it keeps the measure and the temperatures."""
        return self.exit.eta

    @threshold.setter
    def threshold(self, eta: float | None) -> None:
        self.exit = replace(self.exit, eta=eta)
