"""The cascade: two plain networks, the larger one only for images that the smaller is not sure of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cfvit import CoarseToFineViT, Predictor
from cfvit.methods.base import create_method
from cfvit.methods.cascade import CascadeOfViTs
from cfvit.modeling.tokens import coarse_image


@pytest.fixture
def cascade(make_model: Callable[..., CoarseToFineViT]) -> CascadeOfViTs:
    torch.manual_seed(0)
    network: Any = create_method("cascade").build(make_model().config)
    for vit in (network.small, network.large):
        torch.nn.init.normal_(vit.head.weight)  # timm begins with zeros
    return network.eval().requires_grad_(False)


def _predict(cascade: CascadeOfViTs, images: Tensor, threshold: float) -> Tensor:
    engine = create_method("cascade").engine(cascade, False)
    assert engine is not None
    return Predictor(engine, threshold)(images).logits


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_its_parts_are_plain_networks(
    threshold: float, cascade: CascadeOfViTs, make_images: Callable[..., Tensor]
) -> None:
    images: Tensor = make_images(cascade, 5)
    expected = cascade.large(images) if threshold else cascade.small(coarse_image(images))
    torch.testing.assert_close(_predict(cascade, images, threshold), expected)


def test_images_exit_by_confidence(cascade: CascadeOfViTs, make_images: Callable[..., Tensor]) -> None:
    images: Tensor = make_images(cascade, 5)
    first = cascade.small(coarse_image(images))
    confidence = first.softmax(dim=-1).amax(dim=-1)
    eta = float(confidence.sort().values[2:4].mean())
    hard = confidence < eta
    assert hard.sum() == 3
    answer = _predict(cascade, images, eta)
    torch.testing.assert_close(answer, torch.where(hard[:, None], cascade.large(images), first))


def test_it_costs_both_networks(make_model: Callable[..., CoarseToFineViT]) -> None:
    costs = {}
    for name in ("cascade", "plain", "coarse_only"):
        method = create_method(name)
        costs[name] = method.macs(method.build(make_model().config))
    assert costs["cascade"]["fine"] - costs["cascade"]["coarse"] == costs["plain"]["plain"]
    assert costs["cascade"]["coarse"] == pytest.approx(costs["coarse_only"]["coarse"], rel=1e-3)
