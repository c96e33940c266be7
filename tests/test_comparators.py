"""What methods from other papers have in common: they train, are scored, costed and saved by one protocol."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from cfvit import CoarseToFineViT, load
from cfvit.errors import UsageError
from cfvit.methods.base import Batch, create_method
from cfvit.modeling.config import ModelConfig

COMPARATORS = {
    "tome": ["r=13", "r=8"],
    "evit": ["keep 0.7"],
    "cascade": ["coarse", "fine"],
    "literal": ["coarse", "fine"],
}


@pytest.fixture
def config(make_model: Callable[..., CoarseToFineViT]) -> ModelConfig:
    return make_model().config


@pytest.mark.parametrize("name", COMPARATORS)
def test_a_step_of_training_reaches_every_weight(
    name: str, config: ModelConfig, make_images: Callable[..., Tensor]
) -> None:
    method = create_method(name)
    network = method.build(config).train()
    images = make_images(network, 4)
    losses = []
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(12):
        loss = method.loss(method.in_training(network), Batch(images, torch.arange(4)), 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("name", COMPARATORS)
def test_it_is_scored_and_costed_at_each_operating_point(
    name: str, config: ModelConfig, make_images: Callable[..., Tensor]
) -> None:
    method = create_method(name)
    network = method.build(config).eval()
    images = make_images(network, 3)
    answers, macs = method.answers(network, images), method.macs(network)
    assert list(answers) == list(macs) == list(method.points(network)) == COMPARATORS[name]
    assert all(answer.shape == (3, config.num_classes) for answer in answers.values())
    assert sorted(macs.values()) == list(macs.values()), "cheapest first"
    for point, answer in answers.items():
        torch.testing.assert_close(method.points(network)[point](images), answer)


@pytest.mark.parametrize("name", ["tome", "evit"])
def test_a_plain_network_is_saved_in_timms_format(
    name: str, config: ModelConfig, make_images: Callable[..., Tensor], tmp_path: Path
) -> None:
    method = create_method(name)
    network = method.build(config, class_names=list("abcdefg")).eval()
    method.save(network, tmp_path)
    read = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = make_images(network, 2)
    torch.testing.assert_close(read(images), network(images))


@pytest.mark.parametrize("name", COMPARATORS)
def test_a_saved_network_is_loaded_with_its_exit(
    name: str, config: ModelConfig, make_images: Callable[..., Tensor], tmp_path: Path
) -> None:
    method = create_method(name)
    network = method.build(config, class_names=list("abcdefg")).eval()
    chosen = method.choose_exit(network, method.answers(network, make_images(network, 4)), torch.arange(4), 100.0)
    method.save(network, tmp_path)
    read = method.load(method.build(config), tmp_path)
    images = make_images(network, 2)
    for answer, expected in zip(
        method.answers(read, images).values(), method.answers(network, images).values(), strict=True
    ):
        torch.testing.assert_close(answer, expected)
    assert chosen == ({"threshold": read.threshold} if method.engine(read) else {})


def test_both_networks_of_a_cascade_are_saved_in_timms_format(config: ModelConfig, tmp_path: Path) -> None:
    method = create_method("cascade")
    network = method.build(config, class_names=list("abcdefg")).eval()
    method.save(network, tmp_path)
    for name in ("small", "large"):
        read = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
        images = torch.randn(2, 3, *getattr(network, name).image_size)
        torch.testing.assert_close(read(images), getattr(network, name)(images))


def test_the_literal_port_is_saved_as_the_model_that_it_is(
    config: ModelConfig, make_images: Callable[..., Tensor], tmp_path: Path
) -> None:
    method = create_method("literal")
    network = method.build(config).eval()
    method.save(network, tmp_path)
    images = make_images(network, 2)
    torch.testing.assert_close(load(tmp_path).eval()(images).fine, network(images).fine, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["tome", "evit", "literal"])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"backbone": "deit_tiny_distilled_patch16_224"}, "VisionTransformerDistilled"),
        ({"backbone": "lvvit_tiny_patch16_224", "patch_size": 8}, "LVViT"),
        ({"reg_tokens": 2}, "no other token"),
        ({"class_token": True, "no_embed_class": True}, "absolute positions"),
        ({"dynamic_img_size": True}, "images of one size"),
    ],
)
def test_other_backbones_are_refused(
    name: str, options: dict[str, Any], reason: str, make_model: Callable[..., CoarseToFineViT]
) -> None:
    with pytest.raises(UsageError, match=reason):
        create_method(name).build(make_model(**options).config)


@pytest.mark.parametrize("options", [{"selection": "random"}, {"feature_reuse": "none"}])
def test_the_literal_port_has_no_variants(options: dict[str, Any], make_model: Callable[..., CoarseToFineViT]) -> None:
    with pytest.raises(UsageError, match="selection and feature reuse"):
        create_method("literal").build(make_model(**options).config)


@pytest.mark.parametrize(
    ("name", "point", "printed"),
    [("tome", "r=13", "2.7"), ("tome", "r=8", "3.4"), ("evit", "keep 0.7", "3.0"), ("plain", "plain", "4.6")],
)
def test_costs_are_those_that_the_papers_print(name: str, point: str, printed: str) -> None:
    method = create_method(name)
    with torch.device("meta"):
        network = method.build(ModelConfig(backbone="deit_small_patch16_224"))
    assert f"{method.macs(network)[point] / 1e9:.1f}" == printed
