"""Tiny models and images for all tests; nothing is downloaded."""

from __future__ import annotations

import copy
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from cfvit import CfvitError, CoarseToFineViT, Prediction, create_model, save
from cfvit.cli import main
from cfvit.data import EvalImages, open_data
from cfvit.evaluation import timing
from cfvit.inference.engines import packing
from cfvit.methods.base import Method
from cfvit.methods.multi_exit import MultiExit
from cfvit.modeling import cost
from cfvit.modeling import model as model_module
from cfvit.training import log
from cfvit.training.recipe import Recipe

pytest_plugins = ("calibrations",)  # fixtures of the tests of calibration

BACKBONE = "deit_tiny_patch16_224"
TINY = {"embed_dim": 48, "num_heads": 3, "depth": 5, "patch_size": 4, "num_classes": 7}


WIDE = {"embed_dim": 192, "num_heads": 3, "depth": 4}
"""Layers large enough to be packed, all but the head."""
packs = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN packs, and this torch lacks it")


@pytest.fixture
def packing_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing, whatever this processor would say of it."""
    monkeypatch.setattr(packing, "packing_pays", lambda: True)
    monkeypatch.setattr(packing, "convolving_pays", lambda: True)


def _give_class_attention_of_each_block() -> Iterator[None]:
    """So that networks of two blocks have a mean of it, which otherwise begins at the 4th: each block takes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "FIRST_ATTENTION_BLOCK", 0)
        yield


each_block_gives_its_class_attention = pytest.fixture(scope="module")(_give_class_attention_of_each_block)
each_block_gives_its_class_attention_here = pytest.fixture(_give_class_attention_of_each_block)


@pytest.fixture
def timed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round of calls takes a third of the time without the two in front that are not counted."""
    monkeypatch.setattr(timing, "WARM_UP", 0)


@pytest.fixture(autouse=True, scope="session")
def each_network_counted_once() -> Iterator[None]:
    """What an image costs follows from the layers and the settings: it is counted once for all tests, not in each.

    Tests that import `count_macs` or `gradient_macs` themselves have the real one.
    """

    def once(count: Callable[..., Any], key: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
        known = dict[str, Any]()

        def counted(*arguments: Any) -> Any:
            name = str(key(*arguments))
            if name not in known:
                known[name] = count(*arguments)
            return copy.copy(known[name])

        return counted

    def in_training(method: Method, network: Any, split: float) -> tuple[Any, ...]:
        config = getattr(network, "config", None)
        return type(method), method.options, network, config, network.image_size, split

    count = cost.count_macs
    count_once = once(count, lambda model: (type(model), model.config))
    exits_once = once(MultiExit.macs, lambda method, network: (network, network.exits, network.image_size))
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("cfvit") and getattr(module, "count_macs", None) is count:
                patch.setattr(module, "count_macs", count_once)
        patch.setattr(MultiExit, "macs", exits_once)
        patch.setattr(log, "gradient_macs", once(log.gradient_macs, in_training))
        yield


@torch.no_grad()
def _randomise(model: nn.Module, seed: int) -> None:
    """Weights as far from symmetry as trained ones: no zero biases, unit norms or flat attention."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            parameter.copy_(0.2 * noise)
        elif parameter.ndim == 1:  # of norms and layer scales
            parameter.add_(0.2 * noise)
        elif "pos_embed" in name or "token" in name:
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., CoarseToFineViT]:
    """``create_model`` of a tiny DeiT with 4-pixel patches, random weights and in evaluation mode.

    Keyword arguments of ``create_model`` override the tiny ones; weights of a
    ``pretrained_backbone`` are left as they are.
    """

    def make(*, backbone: str = BACKBONE, seed: int = 0, **overrides: Any) -> CoarseToFineViT:
        model = create_model(backbone, **{"coarse_grid": 4, **TINY, **overrides})
        if "pretrained_backbone" not in overrides:
            _randomise(model, seed)
        return model.eval()

    return make


@pytest.fixture
def make_timm_model() -> Callable[..., nn.Module]:
    """The same tiny DeiT as timm itself builds it, with random weights."""

    def make(*, img_size: int, seed: int = 0, **overrides: Any) -> nn.Module:
        model = timm.create_model(BACKBONE, img_size=img_size, **{**TINY, **overrides})
        _randomise(model, seed)
        return model.eval()

    return make


@pytest.fixture
def make_images() -> Callable[..., Tensor]:
    """``[count, 3, S, S]`` of normal noise, of the size that a model takes."""

    def make(model: CoarseToFineViT, count: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, 3, *model.image_size, generator=generator)

    return make


def highest_probability(logits: Tensor) -> Tensor:
    """The paper's confidence, ``[B, classes] -> [B]``."""
    return logits.float().softmax(dim=-1).amax(dim=-1)


def check_prediction(prediction: Prediction, logits: Tensor, stage: Tensor) -> None:
    """Compares a prediction with the logits and stages that it should have."""
    torch.testing.assert_close(prediction.logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prediction.confidence, highest_probability(logits), atol=1e-5, rtol=1e-5)
    assert torch.equal(prediction.stage, stage)


COLOURS = {"blue": (60, 60, 170), "green": (60, 170, 60), "red": (170, 60, 60)}


def _write_colours(folder: Path, per_class: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = generator.normal(colour, 40, (20, 20, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


@pytest.fixture
def make_colours(tmp_path: Path) -> Callable[..., Path]:
    """A folder of noisy 20 x 20 images, one class for each of `COLOURS`."""

    def make(name: str = "colours", *, per_class: int = 4, seed: int = 0) -> Path:
        _write_colours(tmp_path / name, per_class, seed)
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy images of three classes that are easy to tell apart: 90 in ``train``, 33 in ``val``. Only to be read."""
    folder = tmp_path_factory.mktemp("colours")
    _write_colours(folder / "train", 30, seed=0)
    _write_colours(folder / "val", 11, seed=1)
    return folder


@pytest.fixture
def tiny_recipe(colours: Path) -> Recipe:
    """An epoch of a network of 16 x 16 pixels and two blocks on `colours`."""
    return Recipe(
        data=(str(colours),),
        holdout=0.2,
        backbone="test_vit",
        timm_kwargs={"patch_size": 4, "depth": 2},
        coarse_grid=2,
        epochs=1,
        batch_size=16,
        workers=0,
    )


@pytest.fixture
def fails() -> Callable[..., AbstractContextManager[None]]:
    """``with fails("what it says")``: expects a `CfvitError`, or the given kind of one, in a single line."""

    @contextmanager
    def expect(match: str, kind: type[CfvitError] = CfvitError) -> Iterator[None]:
        with pytest.raises(kind, match=match) as caught:
            yield
        assert "\n" not in str(caught.value)

    return expect


def _save_colour_model(model: CoarseToFineViT, colours: Path, place: Path) -> Path:
    """Saves an untrained model as one of the colours; at its eta some of ``val`` exit and some go on."""
    model.class_names = list(COLOURS)
    model.data_config["crop_pct"] = 1.0
    images = EvalImages(open_data(str(colours), "validation"), model.data_config)
    with torch.inference_mode():
        confidence = model.coarse(torch.stack([images[i][0] for i in range(len(images))])).confidence.sort().values
    third = len(images) // 3
    widest = third + int(confidence[third:-third].diff().argmax())
    model.threshold = float(confidence[widest : widest + 2].mean())
    save(model, place / "model")
    return place / "model"


@pytest.fixture(scope="session")
def colour_model(
    make_model: Callable[..., CoarseToFineViT], colours: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A saved, untrained model of the colours. Only to be read."""
    return _save_colour_model(make_model(num_classes=len(COLOURS)), colours, tmp_path_factory.mktemp("colour_model"))


@pytest.fixture(scope="session")
def shallow_colour_model(
    make_model: Callable[..., CoarseToFineViT], colours: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same of two blocks, for what takes long for each. Only to be read."""
    model = make_model(num_classes=len(COLOURS), depth=2)
    return _save_colour_model(model, colours, tmp_path_factory.mktemp("shallow_colour_model"))


@dataclass(frozen=True)
class Outcome:
    """What a command said on standard output and on standard error, by lines, and its exit status."""

    status: int
    out: list[str]
    err: list[str]


@pytest.fixture
def cfvit_main(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command line in this process: ``cfvit_main("predict", path, "--json")``."""

    def run(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert isinstance(exit_.value.code, int)
        return Outcome(exit_.value.code, said.out.splitlines(), said.err.splitlines())

    return run


@pytest.fixture(scope="session")
def authors_file(make_model: Callable[..., CoarseToFineViT], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint as the authors write theirs, of three classes. Only to be read."""
    model = make_model(num_classes=3, embed_dim=64, num_heads=1)
    names = {
        "coarse_pos_embed": "pos_embed_list.0",
        "backbone.pos_embed": "pos_embed_list.1",
        "feature_reuse.norm": "reuse_block.0",
        "feature_reuse.mlp": "reuse_block.1",
        "backbone.": "",
    }
    weights = {}
    for name, tensor in model.state_dict().items():
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        weights[names[prefix] + name.removeprefix(prefix)] = tensor
    path = tmp_path_factory.mktemp("authors") / "authors.pth"
    torch.save({"model": weights, "flop": [1.1, 4.0]}, path)
    return path
