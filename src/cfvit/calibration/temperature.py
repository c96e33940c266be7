"""Temperatures under which the probabilities of a stage are honest, and of both stages mixed."""

from __future__ import annotations

import math

import numpy as np
import scipy
import torch
import torch.nn.functional as F
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


def fit_mixture(coarse: Tensor, fine: Tensor, labels: Tensor) -> tuple[float, float]:
    """The mixture of both stages' answers with the least cross entropy, for images that both have seen.

    A product of experts with a temperature for each, ``softmax(a * coarse + b * fine)``: the loss is convex in the two.

    Args:
        coarse, fine: logits ``[n, classes]``, finite.
        labels: class indices ``[n]``.

    Returns:
        ``coarse_weight`` and ``fine_temperature`` of a `cfvit.modeling.exit.Exit`: ``a / (a + b)``, ``1 / (a + b)``.
    """
    logits = torch.stack([coarse, fine]).double()

    truth = logits.gather(2, labels.long().expand(2, -1)[..., None])[..., 0]

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        """The cross entropy and its gradient: what logits are expected under the mixture, less those of the labels."""
        mixed = torch.tensordot(torch.from_numpy(weights), logits, 1)
        expected = (mixed.softmax(dim=-1) * logits).sum(dim=-1)
        return F.cross_entropy(mixed, labels.long()).item(), (expected - truth).mean(dim=-1).numpy()

    bounds = [(0, 1 / LOWEST_TEMPERATURE), (1 / HIGHEST_TEMPERATURE, 1 / LOWEST_TEMPERATURE)]
    a, b = scipy.optimize.minimize(loss, np.array([0.0, 1.0]), jac=True, bounds=bounds).x.tolist()
    return a / (a + b), 1 / (a + b)
