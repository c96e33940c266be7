"""Speed beside the plain backbone and beside other ways of saving, in one process and in turn.

This file is read without torch, for ``--help``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.types import NormFloat, PositiveFloat, PositiveInt

EngineName = Literal["eager", "torch", "compiled", "onnx", "onnx-int8", "openvino", "openvino-int8"]
"""torch as it is, with packed layers where these are faster, through ``torch.compile``; graphs of `cfvit.export`."""


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        engines: what runs the model; timm's model in torch always runs
        shares: shares of images that go on to the fine stage, forced
        rounds: at most this many timed rounds of each batch size
        seconds: about this long for each batch size
    """

    engines: Annotated[tuple[EngineName, ...], Parameter(name="engine")] = ("torch",)
    shares: Annotated[tuple[NormFloat, ...], Parameter(name="fine-share")] = (0.24, 0.51)
    rounds: PositiveInt = 100
    seconds: PositiveFloat = 20  # after the first `cfvit.evaluation.timing.FEWEST_ROUNDS` rounds, which are always made
