"""Weights of the coarse stage's own: what they begin as, what they train, and what inference makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cfvit
from cfvit.checkpoints import initialise, split_stages
from cfvit.errors import CfvitError
from cfvit.methods.base import create_method
from cfvit.modeling.low_rank import LowRankLinear, summed
from cfvit.modeling.model import CoarseToFineViT

TINY: dict[str, Any] = {"embed_dim": 16, "depth": 4, "num_heads": 2}


@pytest.fixture
def plain() -> CoarseToFineViT:
    torch.manual_seed(0)
    return cfvit.create_model("deit_tiny_patch16_224", num_classes=5, coarse_grid=2, **TINY).eval()


def with_rank(plain: CoarseToFineViT, rank: int) -> CoarseToFineViT:
    """The same weights, with matrices of the coarse stage's own."""
    model = CoarseToFineViT(replace(plain.config, coarse_rank=rank), dict(plain.backbone.state_dict())).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    return model


def moved(model: CoarseToFineViT) -> CoarseToFineViT:
    """The coarse stage's own weights changed at random."""
    with torch.no_grad():
        for parameter in model.coarse_layers.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def images_for(model: CoarseToFineViT, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, *model.image_size, generator=torch.Generator().manual_seed(1))


def test_begins_with_the_answers_of_shared_weights(plain: CoarseToFineViT) -> None:
    images = images_for(plain)
    for ours, theirs in zip(with_rank(plain, 2)(images), plain(images), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_coarse_loss_leaves_shared_matrices_alone_and_the_fine_loss_trains_them(plain: CoarseToFineViT) -> None:
    model = moved(with_rank(plain, 2)).train()
    model.coarse(images_for(model)).logits.square().sum().backward()
    shared = dict(model.backbone.named_parameters())
    trained = {name for name, each in shared.items() if each.grad is not None}
    assert trained <= {"cls_token"}
    assert all(each.grad is not None for each in model.coarse_layers.parameters())
    model(images_for(model)).fine.square().sum().backward()
    assert all(each.grad is not None for each in shared.values())


def test_inference_computes_with_sums_at_the_same_cost(plain: CoarseToFineViT) -> None:
    model = moved(with_rank(plain, 3))
    images = images_for(model, 5)
    assert cfvit.count_macs(model) == cfvit.count_macs(plain)
    method = create_method("cf_vit")
    assert method.macs(model) == method.macs(plain)
    assert not any(isinstance(layer, LowRankLinear) for layer in summed(model).modules())
    with torch.no_grad():
        coarse, fine = model(images)
        torch.testing.assert_close(summed(model)(images), model(images))
        assert not torch.allclose(coarse, plain(images).coarse)
    for compile in (None, False):
        for eta, logits in ((0.0, coarse), (1.0, fine)):
            answer = cfvit.Predictor(model, eta, compile=compile)(images)
            torch.testing.assert_close(answer.logits, logits, atol=1e-5, rtol=1e-5)


def test_saved_and_loaded(plain: CoarseToFineViT, tmp_path: Path) -> None:
    model = moved(with_rank(plain, 2))
    cfvit.save(model, tmp_path)
    loaded = cfvit.load(tmp_path)
    images = images_for(model)
    torch.testing.assert_close(loaded(images), model(images))
    assert loaded.config.coarse_rank == 2
    initialise(same := with_rank(plain, 2), str(tmp_path))
    torch.testing.assert_close(same(images), model(images))
    with pytest.raises(CfvitError, match="coarse_rank 2, the run 0: give --coarse-rank 2"):
        initialise(plain, str(tmp_path))


@pytest.mark.parametrize(
    "backbone", ["lvvit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224"]
)
def test_other_backbones(backbone: str) -> None:
    kwargs: dict[str, Any] = {} if backbone.startswith("lvvit") else {"depth": 2}
    model = cfvit.create_model(backbone, num_classes=4, coarse_grid=2, coarse_rank=2, **kwargs).eval()
    shared = cfvit.create_model(backbone, num_classes=4, coarse_grid=2, **kwargs).eval()
    shared.load_state_dict({name: each for name, each in model.state_dict().items() if not name.startswith("coarse_l")})
    images = images_for(model, 2)
    with torch.no_grad():
        torch.testing.assert_close(model(images), shared(images), atol=1e-5, rtol=1e-5)
    assert cfvit.count_macs(model) == cfvit.count_macs(shared)


def test_stages_are_split(plain: CoarseToFineViT, tmp_path: Path, cfvit_main: Callable[..., Any]) -> None:
    trained = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, parameter in trained.backbone.named_parameters():
            if name.startswith(("cls_token", "patch_embed")):  # these are shared
                parameter.copy_(plain.backbone.get_parameter(name))
    weights = tmp_path / "plain.pth"
    torch.save(plain.backbone.state_dict(), weights)
    images = images_for(plain)
    whole = split_stages(trained, str(weights), 16)
    torch.testing.assert_close(whole.coarse(images).logits, trained.coarse(images).logits, atol=1e-4, rtol=1e-4)
    for name, parameter in whole.backbone.named_parameters():
        torch.testing.assert_close(parameter, plain.backbone.get_parameter(name))
    layer = "blocks.1.mlp.fc1"
    learned = trained.backbone.get_parameter(f"{layer}.weight")
    distances = []
    for rank in (1, 4, 16):
        own = split_stages(trained, str(weights), rank).coarse_layers.get_submodule(layer)
        distances.append((own.weight - learned).norm().item())
    assert distances[0] > distances[1] > distances[2]
    cfvit.save(trained, tmp_path / "trained")
    assert cfvit_main("convert", tmp_path / "trained", tmp_path / "out", "--fine-weights", weights).status == 0
    torch.testing.assert_close(cfvit.load(tmp_path / "out")(images), split_stages(trained, str(weights), 32)(images))
    with pytest.raises(CfvitError, match="apart already"):
        split_stages(whole, str(weights), 2)
