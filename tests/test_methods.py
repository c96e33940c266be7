"""The seam of methods: what the harness knows is what the protocol says, so that a new method is one class."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cfvit.errors import UsageError
from cfvit.methods.base import METHODS, Batch, Method, create_method, known_methods, register
from cfvit.methods.blocks import classify, embed
from cfvit.methods.plain import PlainBlocks
from cfvit.modeling.config import ModelConfig, Objective, field_help
from cfvit.modeling.cost import count_macs
from cfvit.modeling.losses import classification_loss
from cfvit.training.loop import train
from cfvit.training.recipe import Recipe

OWN = ("cf_vit", "plain", "coarse_only")


class MeanColour(nn.Module):
    """A linear classifier of an image's mean colour."""

    def __init__(self, classes: int, side: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, classes)
        self.image_size, self.class_names = (side, side), None
        self.data_config = {"input_size": (3, side, side), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.mean((2, 3)))


@pytest.fixture
def dummy() -> Iterator[str]:
    """A method that this test alone knows, as somebody would add one."""

    @register("mean_colour")
    class MeanColourMethod(Method):
        def build(
            self, config: ModelConfig, weights: str | None = None, class_names: list[str] | None = None
        ) -> MeanColour:
            return MeanColour(config.num_classes, 16)

        def loss(self, module: nn.Module, batch: Batch, split: float) -> Tensor:
            assert batch.target is not None
            return classification_loss(module(batch.images), batch.target)

        def points(self, network: MeanColour) -> dict[str, Callable[[Tensor], Tensor]]:
            return {"colour": network}

        def save(self, network: MeanColour, folder: Path) -> None:
            save_file(network.state_dict(), folder / "model.safetensors")

    yield "mean_colour"
    del METHODS["mean_colour"]


def test_a_new_method_is_one_class(dummy: str, colours: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        data=(str(colours),),
        method=dummy,
        holdout=0.1,
        epochs=8,
        batch_size=16,
        lr_base=0.3,
        lr_base_size=16,
        warmup_epochs=0.0,
        auto_augment="none",
        color_jitter=0.0,
        random_erasing=0.0,
        mixup=0.0,
        cutmix=0.0,
        ema_decay=0.0,
        repeated_augmentation=1,
        workers=0,
        log_interval=1,
    )
    figures = train(recipe, tmp_path / "run")
    assert figures["validation_colour_top1"] > 90
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(line["images_per_second"] > 0 for line in lines if line["event"] == "train")
    method = create_method(dummy)
    network = method.build(recipe.model_config(3))
    assert method.macs(network) == {"colour": 9}
    loaded = method.load(network, tmp_path / "run")
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())


def test_running_a_vit_in_another_way_takes_one_function() -> None:
    class Shallow(PlainBlocks):
        name = "shallow"

        def forward(self, network: Any, images: Tensor) -> Tensor:
            return classify(network, embed(network, images))

    kwargs = {"patch_size": 4, "dynamic_img_size": False}
    method = Shallow(Objective())
    network = method.build(ModelConfig(backbone="test_vit", num_classes=3, coarse_grid=2, timm_kwargs=kwargs)).eval()
    assert method.answers(network, torch.zeros(1, 3, *network.image_size))["shallow"].shape == (1, 3)


def test_unknown_methods_are_refused_and_the_help_names_all(fails: Callable[..., Any]) -> None:
    assert set(known_methods()) <= set(re.findall(r"\w+", field_help(Recipe)["method"]))
    with fails("there is no method 'cfvit': choose among .*cf_vit.*plain", UsageError):
        create_method("cfvit")


@pytest.mark.parametrize("name", OWN)
def test_what_is_answered_is_charged_and_survives_a_folder(name: str, tmp_path: Path) -> None:
    config = ModelConfig(backbone="test_vit", num_classes=3, coarse_grid=2, timm_kwargs={"patch_size": 4})
    torch.manual_seed(0)
    method = create_method(name)
    network = method.build(config, class_names=["a", "b", "c"]).eval()
    images = torch.randn(2, 3, *network.image_size)
    with torch.no_grad():
        answers = method.answers(network, images)
        method.save(network, tmp_path / "saved")
        again = method.answers(method.load(method.build(config), tmp_path / "saved"), images)
    costs = method.macs(network)
    assert list(costs) == list(answers)
    assert list(costs.values()) == sorted(costs.values())
    for point, logits in answers.items():
        assert torch.equal(logits, again[point])


def test_all_methods_start_from_the_same_weights() -> None:
    config = ModelConfig(backbone="test_vit", num_classes=3, coarse_grid=2, timm_kwargs={"patch_size": 4})

    def built(name: str) -> Any:
        torch.manual_seed(0)
        return create_method(name).build(config)

    plain = built("plain").state_dict()
    for name in ("cf_vit", "coarse_only"):
        own = built(name).backbone.state_dict()
        assert all(torch.equal(tensor, own[key]) for key, tensor in plain.items())


def test_the_methods_cost_what_the_model_does() -> None:
    config = ModelConfig(backbone="test_vit", num_classes=3, coarse_grid=2, timm_kwargs={"patch_size": 4})
    model = create_method("cf_vit").build(config)
    macs = count_macs(model)
    assert create_method("cf_vit").macs(model) == {"coarse": macs.coarse, "fine": macs.both}
    assert create_method("coarse_only").macs(model) == {"coarse": macs.coarse}
    assert create_method("plain").macs(create_method("plain").build(config)) == {"plain": macs.backbone}


def test_token_labels_are_for_both_stages(fails: Callable[..., Any]) -> None:
    anything: Any = object()
    batch = Batch(torch.zeros(1, 3, 16, 16), torch.zeros(1, dtype=torch.long), token_labels=anything)
    with fails("token labels train both stages: choose --method cf_vit, not plain", UsageError):
        create_method("plain").loss(lambda images: images.new_zeros(1, 3), batch, 1.0)
