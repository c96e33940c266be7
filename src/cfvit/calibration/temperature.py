"""Temperatures under which the probabilities of a stage are honest."""

from __future__ import annotations

import math

from torch import Tensor

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.1, 10.0
_HALVINGS = 16


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
