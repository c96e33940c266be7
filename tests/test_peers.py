"""That the rivals are what their papers say: the plain network where they spare nothing, and what they spare."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cfvit import CoarseToFineViT, Predictor, count_macs, create_model
from cfvit.benchmark.contenders import Contender, contenders_of, small_backbone
from cfvit.benchmark.peers import (
    Cascade,
    EViT,
    LiteralPort,
    ToMe,
    fuse_inattentive,
    merge_similar,
    why_no_peers,
)
from cfvit.modeling.exit import goes_on
from cfvit.modeling.tokens import coarse_image


@pytest.fixture(scope="module")
def model(make_model: Callable[..., CoarseToFineViT]) -> CoarseToFineViT:
    return make_model().requires_grad_(False)


@pytest.fixture
def images(model: CoarseToFineViT, make_images: Callable[..., Tensor]) -> Tensor:
    return make_images(model, 5)


@pytest.mark.parametrize("make", [lambda backbone: ToMe(backbone, 0), lambda backbone: EViT(backbone, 1.0)])
def test_what_merges_and_drops_nothing_is_timms_network(
    make: Callable[[Any], nn.Module], model: CoarseToFineViT, images: Tensor
) -> None:
    torch.testing.assert_close(make(model.backbone)(images), model.backbone(images))


def test_what_merges_or_drops_answers_otherwise_and_the_same_for_any_batch(
    model: CoarseToFineViT, images: Tensor
) -> None:
    plain = model.backbone(images)
    for peer in (ToMe(model.backbone, 5), EViT(model.backbone, 0.6)):
        answer = peer(images)
        assert (answer - plain).abs().max() > 1e-3
        torch.testing.assert_close(torch.cat([peer(image[None]) for image in images]), answer)


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
    torch.testing.assert_close(ToMe(backbone, 7)(images), backbone(images))


def test_the_least_attended_are_fused_by_their_attention() -> None:
    tokens = torch.tensor([[9.0], [1.0], [4.0], [6.0], [8.0]])[None]
    attention = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    assert fuse_inattentive(tokens, attention, 2).flatten().tolist() == pytest.approx([9, 4, 8, 0.1 * 1 + 0.2 * 6])
    assert fuse_inattentive(tokens, attention, 4) is tokens


def test_the_places_of_evit_are_those_of_its_paper() -> None:
    with torch.device("meta"):
        assert EViT(create_model("deit_tiny_patch16_224").backbone, 0.7).places == (3, 6, 9)


def _looks_first(small: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def look(images: Tensor) -> tuple[Tensor, Tensor]:
        logits = small(coarse_image(images))
        return logits, logits.softmax(dim=-1).amax(dim=-1)

    return look


@pytest.mark.parametrize(("threshold", "who"), [(0.0, "small"), (1.0, "large")])
def test_the_parts_of_a_cascade_are_plain_networks(
    threshold: float, who: str, model: CoarseToFineViT, images: Tensor
) -> None:
    small = small_backbone(model).requires_grad_(False)
    answer = Cascade(_looks_first(small), model.backbone, partial(goes_on, eta=threshold))(images)
    expected = small(coarse_image(images)) if who == "small" else model.backbone(images)
    torch.testing.assert_close(answer, expected)


def test_a_cascade_exits_by_confidence(model: CoarseToFineViT, images: Tensor) -> None:
    small = small_backbone(model).requires_grad_(False)
    first = small(coarse_image(images))
    confidence = first.softmax(dim=-1).amax(dim=-1)
    eta = float(confidence.sort().values[2:4].mean())
    answer = Cascade(_looks_first(small), model.backbone, partial(goes_on, eta=eta))(images)
    hard = confidence < eta
    assert hard.sum() == 3
    torch.testing.assert_close(answer, torch.where(hard[:, None], model.backbone(images), first))


@pytest.mark.parametrize("options", [{}, {"coarse_grid": 5, "informative_ratio": 0.3}, {"attention_momentum": 0.5}])
def test_the_literal_port_answers_as_the_predictor(
    options: dict[str, Any], make_model: Callable[..., CoarseToFineViT], make_images: Callable[..., Tensor]
) -> None:
    model = make_model(**options).requires_grad_(False)
    images = make_images(model, 6)
    confidence = model.coarse(images).confidence.sort().values
    for eta in (0.0, float(confidence[2:4].mean()), 1.0):
        port = LiteralPort(model, partial(goes_on, eta=eta))
        torch.testing.assert_close(
            port(images), Predictor(model, eta, compile=False)(images).logits, rtol=1e-4, atol=1e-4
        )


@pytest.fixture(scope="module")
def deit_small() -> dict[str, Contender]:
    with torch.device("meta"):
        model = create_model("deit_small_patch16_224").eval()
    return {method.name: method for method in contenders_of(model, peers=True)}


@pytest.mark.parametrize(
    ("name", "printed"),
    [("ToMe, r=13", "2.7"), ("ToMe, r=8", "3.4"), ("EViT, keep 0.7", "3.0"), ("backbone", "4.6")],
)
def test_costs_are_those_that_the_papers_print(name: str, printed: str, deit_small: dict[str, Contender]) -> None:
    assert f"{deit_small[name].macs / 1e9:.1f}" == printed


def test_the_literal_port_costs_what_the_papers_accounting_says(deit_small: dict[str, Contender]) -> None:
    port, predictor = deit_small["literal port"], deit_small["predictor"]
    with torch.device("meta"):
        macs = count_macs(create_model("deit_small_patch16_224"))
    assert port.macs + (port.fine_macs or 0) == pytest.approx(macs.both_in_paper, rel=1e-3)
    assert (predictor.macs, predictor.fine_macs) == (macs.coarse, macs.fine)


def test_a_cascade_costs_both_networks(deit_small: dict[str, Contender]) -> None:
    cascade, plain = deit_small["cascade of two ViTs"], deit_small["backbone"].macs
    assert cascade.fine_macs == plain
    assert cascade.macs == pytest.approx(deit_small["coarse stage"].macs, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"backbone": "deit_tiny_distilled_patch16_224"}, "VisionTransformerDistilled"),
        ({"backbone": "lvvit_tiny_patch16_224", "patch_size": 8}, "LVViT"),
        ({"reg_tokens": 2}, "no other token"),
        ({"class_token": True, "no_embed_class": True}, "absolute positions"),
        ({"dynamic_img_size": True}, "images of one size"),
        ({"selection": "random"}, "selection"),
        ({"feature_reuse": "none"}, "feature reuse"),
    ],
)
def test_other_networks_have_no_peers(
    options: dict[str, Any], reason: str, make_model: Callable[..., CoarseToFineViT]
) -> None:
    said = why_no_peers(make_model(**options))
    assert said is not None
    assert reason in said


def test_plain_networks_have_peers(model: CoarseToFineViT) -> None:
    assert why_no_peers(model) is None
    assert why_no_peers(copy.deepcopy(model).bfloat16()) is None
