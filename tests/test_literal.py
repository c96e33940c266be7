"""The literal port answers as the package does, and costs what the paper's accounting says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cfvit import CoarseToFineViT, Predictor, count_macs, create_model
from cfvit.methods.base import create_method


@pytest.mark.parametrize("options", [{}, {"coarse_grid": 5, "informative_ratio": 0.3}, {"no_embed_class": True}])
def test_it_answers_as_the_predictor(
    options: dict[str, Any], make_model: Callable[..., CoarseToFineViT], make_images: Callable[..., Tensor]
) -> None:
    model = make_model(**options).requires_grad_(False)
    method = create_method("literal")
    port = method.build(model.config)
    port.load_state_dict(model.state_dict())
    images = make_images(model, 6)
    confidence = model.coarse(images).confidence.sort().values
    for eta in (0.0, float(confidence[2:4].mean()), 1.0):
        answer = Predictor(method.engine(port, False), eta)(images).logits
        expected = Predictor(model, eta, compile=False)(images).logits
        torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


def test_it_costs_what_the_papers_accounting_says() -> None:
    with torch.device("meta"):
        model = create_model("deit_small_patch16_224")
        method = create_method("literal")
        macs = method.macs(method.build(model.config))
        assert macs["fine"] == pytest.approx(count_macs(model).both_in_paper, rel=1e-3)
