"""Fusing inattentive patches: the plain network where all are kept, and what fusing computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cfvit import CoarseToFineViT
from cfvit.methods.base import create_method
from cfvit.methods.blocks import embed, places_of_reduction
from cfvit.methods.evit import fuse_inattentive, run_reorganising


@pytest.mark.parametrize("options", [{}, {"no_embed_class": True, "init_values": 0.1, "qk_norm": True}])  # DeiT-3
def test_if_all_are_kept_it_is_timms_network(
    options: dict[str, Any], make_model: Callable[..., CoarseToFineViT], make_images: Callable[..., Tensor]
) -> None:
    model = make_model(**options).requires_grad_(False)
    images = make_images(model, 5)
    method = create_method("evit", options={"keep_rate": 1.0})
    method.build(model.config)  # is not refused
    torch.testing.assert_close(method.forward(model.backbone, images), model.backbone(images))


def test_fusing_changes_the_answer_and_is_the_same_for_any_batch(
    make_model: Callable[..., CoarseToFineViT], make_images: Callable[..., Tensor]
) -> None:
    model = make_model().requires_grad_(False)
    images = make_images(model, 5)
    (fusing,) = create_method("evit", options={"keep_rate": 0.6}).points(model.backbone).values()
    answer = fusing(images)
    assert (answer - model.backbone(images)).abs().max() > 1e-3
    torch.testing.assert_close(torch.cat([fusing(image[None]) for image in images]), answer)


def test_the_least_attended_are_fused_by_their_attention() -> None:
    tokens = torch.tensor([[9.0], [1.0], [4.0], [6.0], [8.0]])[None]
    attention = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    assert fuse_inattentive(tokens, attention, 2).flatten().tolist() == pytest.approx([9, 4, 8, 0.1 * 1 + 0.2 * 6])
    assert fuse_inattentive(tokens, attention, 4) is tokens


def test_the_places_are_those_of_the_paper(make_model: Callable[..., CoarseToFineViT]) -> None:
    assert places_of_reduction(make_model(depth=12).backbone) == (3, 6, 9)


def test_the_share_that_is_kept_has_no_error_of_binary_fractions(
    make_model: Callable[..., CoarseToFineViT], make_images: Callable[..., Tensor]
) -> None:
    model = make_model(coarse_grid=5, depth=2).requires_grad_(False)
    tokens = embed(model.backbone, make_images(model, 1))
    assert run_reorganising(model.backbone, tokens, 0.55).shape[1] == 1 + 55 + 1
