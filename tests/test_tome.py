"""Token merging: the plain network where nothing is merged, and what merging computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cfvit import CoarseToFineViT
from cfvit.methods.base import create_method
from cfvit.methods.blocks import classify, embed
from cfvit.modeling.tokens import merge_similar


def merging_in(backbone: Any, merged: int) -> Callable[[Tensor], Tensor]:
    (point,) = create_method("tome", options={"merged": merged}).points(backbone).values()
    return point


def test_without_merging_it_is_timms_network(
    make_model: Callable[..., CoarseToFineViT], make_images: Callable[..., Tensor]
) -> None:
    model = make_model().requires_grad_(False)
    images = make_images(model, 5)
    torch.testing.assert_close(merging_in(model.backbone, 0)(images), model.backbone(images))


def test_merging_changes_the_answer_and_is_the_same_for_any_batch(
    make_model: Callable[..., CoarseToFineViT], make_images: Callable[..., Tensor]
) -> None:
    model = make_model().requires_grad_(False)
    images, merging = make_images(model, 5), merging_in(model.backbone, 5)
    answer = merging(images)
    assert (answer - model.backbone(images)).abs().max() > 1e-3
    torch.testing.assert_close(torch.cat([merging(image[None]) for image in images]), answer)


def test_merging_joins_the_most_similar_and_weighs_by_size() -> None:
    tokens = torch.tensor([[9.0], [1.0], [4.0], [6.0], [8.0]])[None]
    keys = torch.tensor([[1.0, 1], [0, 1], [1, 0.1], [1, 0], [0.3, 1]])[None]  # 3rd and 2nd patch are most alike
    sizes = torch.tensor([[1.0, 1, 3, 1, 2]])
    merged, counts = merge_similar(tokens, keys, sizes, 1)
    assert counts is not None
    assert merged.flatten().tolist() == [9, 1, (3 * 4 + 6) / 4, 8]
    assert counts.flatten().tolist() == [1, 1, 4, 2]


def test_merging_into_one_token_from_several_sides_keeps_the_mean_of_all_patches() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, keys = torch.randn(3, 12, 8, generator=generator), torch.randn(3, 12, 4, generator=generator)
    merged, sizes = merge_similar(tokens, keys, None, 99)
    assert sizes is not None
    assert merged.shape == (3, 12 - 5, 8), "at most half of the patches go"
    assert sizes[:, 1:].sum(dim=1).tolist() == [11] * 3
    torch.testing.assert_close((merged * sizes[..., None])[:, 1:].sum(dim=1), tokens[:, 1:].sum(dim=1))


def test_attention_is_in_proportion_to_size(make_model: Callable[..., CoarseToFineViT]) -> None:
    """Merging patches that are equal changes nothing, as each counts for all that it stands for."""
    flat = make_model()
    backbone: Any = flat.backbone.requires_grad_(False)
    backbone.pos_embed[:, 1:] = 0
    images = torch.full((1, 3, *flat.image_size), 0.7)
    torch.testing.assert_close(merging_in(backbone, 7)(images), backbone(images))


def test_patches_are_compared_by_the_mean_of_their_keys(
    make_model: Callable[..., CoarseToFineViT], make_images: Callable[..., Tensor]
) -> None:
    model = make_model(depth=1, global_pool="avg").requires_grad_(False)  # so that the answer depends on all tokens
    backbone: Any = model.backbone
    block, images = backbone.blocks[0], make_images(model, 2)
    tokens = embed(backbone, images)
    _, keys, _ = block.attn.qkv(block.norm1(tokens)).chunk(3, dim=-1)
    tokens, _ = merge_similar(
        tokens + block.attn(block.norm1(tokens)), keys.unflatten(-1, (3, -1)).mean(dim=2), None, 9
    )
    expected = classify(backbone, tokens + block.mlp(block.norm2(tokens)))
    torch.testing.assert_close(merging_in(backbone, 9)(images), expected)
