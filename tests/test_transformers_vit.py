"""Models of transformers made coarse-to-fine: the plain network computes what transformers' does."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

os.environ["USE_TF"] = os.environ["USE_FLAX"] = "0"

import transformers

from cfvit import CoarseToFineViT, create_model, load
from cfvit.checkpoints import load_transformers
from cfvit.methods.base import create_method
from cfvit.modeling.weights import read_weights
from cfvit.training.recipe import load_recipe

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "id2label": {0: "cat", 1: "dog", 2: "owl"},
    "label2id": {"cat": 0, "dog": 1, "owl": 2},
}
VIT = {**SIZES, "intermediate_size": 48}
PREPROCESSOR = {
    "do_resize": True,
    "size": {"height": 32, "width": 32},
    "resample": 2,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
}

KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTConfig", "ViTForImageClassification", VIT),
    "vit with another eps, activation and no bias": (
        "ViTConfig",
        "ViTForImageClassification",
        {**VIT, "layer_norm_eps": 0.1, "hidden_act": "gelu_new", "qkv_bias": False},
    ),
    "deit with one head": ("DeiTConfig", "DeiTForImageClassification", VIT),
    "deit with two": ("DeiTConfig", "DeiTForImageClassificationWithTeacher", VIT),
    "dinov2": ("Dinov2Config", "Dinov2Model", {**SIZES, "mlp_ratio": 2}),
    "dinov2 with gates": ("Dinov2Config", "Dinov2Model", {**SIZES, "use_swiglu_ffn": True}),
    "dinov2 with registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", SIZES),
}


@torch.no_grad()
def _theirs(kind: str, folder: Path, **overrides: Any) -> nn.Module:
    """A network of transformers with random weights, saved in a folder as transformers saves it."""
    config, network, values = KINDS[kind]
    torch.manual_seed(0)
    theirs: Any = getattr(transformers, network)(getattr(transformers, config)(**{**values, **overrides})).eval()
    for parameter in theirs.parameters():
        parameter.copy_(parameter + 0.1 * torch.randn(parameter.shape))
    theirs.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return theirs


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_network_computes_what_transformers_does(kind: str, images: Tensor, tmp_path: Path) -> None:
    theirs = _theirs(kind, tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours: Any = load_transformers(tmp_path)
    answer: Any = theirs(images)
    if "dinov2" in kind:
        assert any("no head for 3 classes: the head is untrained" in str(warning.message) for warning in said)
        ours_answer, answer = ours.backbone.forward_features(images)[:, 0], answer.last_hidden_state[:, 0]
    else:
        assert not said
        ours_answer, answer = ours.backbone(images), answer.logits
    assert answer.std() > 0.1
    torch.testing.assert_close(ours_answer, answer, rtol=0, atol=1e-6)
    assert ours.class_names == ["cat", "dog", "owl"]


@torch.no_grad()
def test_convert_writes_such_a_model_and_says_what_it_is(
    cfvit_main: Callable[..., Any], images: Tensor, tmp_path: Path
) -> None:
    theirs: Any = _theirs("vit", tmp_path / "theirs")
    outcome = cfvit_main("convert", tmp_path / "theirs", tmp_path / "ours")
    assert outcome.status == 0
    assert "begin with the plain ViT" in outcome.err[1]
    assert "only after training: cfvit train --recipe adapt" in outcome.err[2]
    model: Any = load(tmp_path / "ours")
    torch.testing.assert_close(model.backbone(images), theirs(images).logits, rtol=0, atol=1e-6)
    assert (model.config.coarse_grid, model.image_size) == (4, (32, 32))
    expected = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bilinear", "crop_mode": "squash"}
    assert expected.items() <= model.data_config.items()
    recipe = load_recipe("adapt", tmp_path / "ours" / "recipe.yaml")
    trained = create_method("cf_vit").build(recipe.model_config(3), recipe.initial_weights, model.class_names)
    teacher = create_method("plain").build(recipe.model_config(3), recipe.initial_weights, model.class_names)
    torch.testing.assert_close(teacher.eval()(images), theirs(images).logits, rtol=0, atol=1e-6)
    create_method("plain").save(teacher, tmp_path / "plain")
    plain = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
    torch.testing.assert_close(plain(images), theirs(images).logits, rtol=0, atol=1e-6)
    assert trained.data_config == teacher.data_config == model.data_config
    assert trained.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(value, model.state_dict()[name])
        for name, value in trained.state_dict().items()
        if "reuse" not in name
    )


def test_dinov2s_head_is_dropped_and_its_crop_decides_the_size(tmp_path: Path) -> None:
    theirs = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SIZES))
    theirs.save_pretrained(tmp_path)
    crop = {
        "size": {"shortest_edge": 64},
        "crop_size": {"height": 48, "width": 48},
        "do_center_crop": True,
        "resample": 3,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(crop))
    with pytest.warns(UserWarning, match=r"has head.weight of \[3, 64\] for 3 classes: the head is untrained"):
        model = load_transformers(tmp_path)
    assert model.image_size == (48, 48)
    assert (model.data_config["crop_pct"], model.data_config["interpolation"]) == (0.75, "bicubic")
    assert model.data_config["mean"] == (0.485, 0.456, 0.406), "transformers' default for DINOv2"


def test_what_is_guessed_is_told(tmp_path: Path) -> None:
    _theirs("vit", tmp_path, image_size=36)
    assert read_weights(tmp_path).preprocessing["mean"] == (0.5, 0.4, 0.3)
    (tmp_path / "preprocessor_config.json").unlink()
    assert read_weights(tmp_path).preprocessing == {}, "a run then takes timm's, and prints it"
    with pytest.warns(UserWarning) as said:
        model = load_transformers(tmp_path)
    texts = [str(warning.message) for warning in said]
    assert any("no preprocessor_config.json: images are normalised by the mean 0.5, 0.5, 0.5" in text for text in texts)
    assert any("32 x 32 pixels, not 36 x 36" in text for text in texts)
    assert model.data_config["mean"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "beit"},
            "a beit of transformers cannot be converted: give a vit, deit, dinov2, dinov2_with_registers$",
        ),
        ({"architecture": "vit_tiny"}, "a folder of timm's is not converted: cfvit train --initial-weights takes it"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish': give"),
        ({"intermediate_size": 64}, "does not fit transformers_vit"),
        ({"hidden_size": "wide"}, "cannot be read|timm cannot build"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_converted_is_refused_in_one_line(
    change: dict[str, Any], message: str, fails: Callable[..., Any], tmp_path: Path
) -> None:
    _theirs("vit", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with fails(message):
        load_transformers(tmp_path)


def test_a_saved_model_is_made_anew_by_its_configuration() -> None:
    arguments: dict[str, Any] = {"embed_dim": 16, "num_heads": 1, "depth": 4, "patch_size": 4}
    model: Any = create_model("transformers_vit", coarse_grid=2, num_classes=2, norm_eps=0.25, **arguments)
    assert isinstance(model, CoarseToFineViT)
    assert {norm.eps for norm in model.backbone.modules() if isinstance(norm, nn.LayerNorm)} == {0.25}
