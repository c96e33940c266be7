"""Models on disk: nothing is lost, nothing is executed, and what is wrong is said in one line."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from reference import Reference
from safetensors.torch import load_file
from torch import Tensor, nn

from cfvit import CoarseToFineViT, load, save
from cfvit.checkpoints import bundled_models, initialise, load_authors_checkpoint
from cfvit.evaluation.metrics import labelled_images
from cfvit.files import atomic_write
from cfvit.modeling.config import Reuse
from cfvit.modeling.exit import Exit
from cfvit.modeling.weights import read_weights

Make = Callable[..., CoarseToFineViT]


@pytest.fixture(scope="module")
def model(make_model: Make) -> CoarseToFineViT:
    """Only to be read."""
    model = make_model()
    model.class_names = [f"class {i}" for i in range(7)]
    model.threshold = 0.625
    model.data_config["crop_pct"] = 0.9
    return model


@pytest.fixture(scope="module")
def saved(model: CoarseToFineViT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "saved"
    save(model, folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A saved model that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "saved"))


@torch.no_grad()
def _logits(model: CoarseToFineViT, images: Tensor) -> Tensor:
    return torch.stack(list(model(images)))


def test_a_saved_model_comes_back_whole(
    model: CoarseToFineViT, folder: Path, make_images: Callable[..., Tensor]
) -> None:
    loaded = load(folder)
    assert loaded.config == model.config
    assert loaded.data_config == model.data_config
    assert loaded.class_names == model.class_names
    assert loaded.threshold == 0.625
    assert not loaded.training
    images = make_images(model, 2)
    assert torch.equal(_logits(loaded, images), _logits(model, images))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "variant",
    [{"selection": "negative"}, {"fine_merged": 3}, *({"feature_reuse": reuse} for reuse in get_args(Reuse))],
)
def test_variants_come_back_as_such(
    variant: dict[str, Any], make_model: Make, make_images: Callable[..., Tensor], tmp_path: Path
) -> None:
    model = make_model(**variant)
    model.exit = Exit("margin", eta=0.3, coarse_weight=0.2)
    save(model, tmp_path)
    loaded = load(tmp_path)
    assert (loaded.config, loaded.exit) == (model.config, model.exit)
    images = make_images(model, 2)
    assert torch.equal(_logits(loaded, images), _logits(model, images))


def test_folders_from_before_the_variants_are_the_papers(
    model: CoarseToFineViT, folder: Path, make_images: Callable[..., Tensor]
) -> None:
    parts = {"model": ("selection", "feature_reuse", "fine_merged"), "exit": ("coarse_weight",)}
    for part, names in parts.items():
        _edit_config(folder, lambda c, p=part, n=names: {**c, p: {k: v for k, v in c[p].items() if k not in n}})
    loaded = load(folder)
    assert (loaded.config.selection, loaded.config.feature_reuse, loaded.config.fine_merged) == ("attention", "mlp", 0)
    assert loaded.exit.coarse_weight == 0
    images = make_images(model, 2)
    assert torch.equal(_logits(loaded, images), _logits(model, images))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_weights_are_not_stored_as_what_is_not_read_again(
    dtype: torch.dtype, tmp_path: Path, make_model: Make, fails: Callable[..., Any]
) -> None:
    with fails(f"weights cannot be stored as {dtype}: give torch.bfloat16"):
        save(make_model(), tmp_path / "model", dtype=dtype)
    assert not (tmp_path / "model").exists()


def test_weights_can_be_stored_in_half(
    model: CoarseToFineViT, folder: Path, tmp_path: Path, make_images: Callable[..., Tensor]
) -> None:
    save(model, tmp_path / "half", dtype=torch.bfloat16)
    loaded = load(tmp_path / "half")
    weights = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], tensor.bfloat16().float())
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, tmp_path / "half")]
    assert 1.9 < sizes[0] / sizes[1] < 2.1
    assert model.get_parameter("coarse_pos_embed").dtype == torch.float32


AUTHORS_NAMES = {
    "coarse_pos_embed": "pos_embed_list.0",
    "backbone.pos_embed": "pos_embed_list.1",
    "feature_reuse.norm.weight": "reuse_block.0.weight",
    "feature_reuse.norm.bias": "reuse_block.0.bias",
    "feature_reuse.mlp.fc1.weight": "reuse_block.1.fc1.weight",
    "feature_reuse.mlp.fc1.bias": "reuse_block.1.fc1.bias",
    "feature_reuse.mlp.fc2.weight": "reuse_block.1.fc2.weight",
    "feature_reuse.mlp.fc2.bias": "reuse_block.1.fc2.bias",
}


def _authors_weights(model: CoarseToFineViT) -> dict[str, Tensor]:
    return {AUTHORS_NAMES.get(n, n.removeprefix("backbone.")): t.clone() for n, t in model.state_dict().items()}


def _write_authors(path: Path, weights: Any, **besides: Any) -> Path:
    torch.save({"model": weights, **besides}, path)
    return path


WIDE = {"embed_dim": 128, "num_heads": 2}
"""The authors' files do not name the number of heads; each has 64 channels."""


@pytest.fixture(scope="module")
def authors_weights(make_model: Make) -> dict[str, Tensor]:
    """Only to be read."""
    return _authors_weights(make_model(**WIDE))


@pytest.mark.parametrize(
    ("grid", "size"),
    [
        pytest.param(7, {"embed_dim": 192, "num_heads": 3, "patch_size": 16, "num_classes": 1000}, id="usual"),
        pytest.param(9, WIDE, id="unusual"),
    ],
)
def test_authors_checkpoint_gives_their_logits(
    grid: int, size: dict[str, int], make_model: Make, make_images: Callable[..., Tensor], tmp_path: Path
) -> None:
    model = make_model(coarse_grid=grid, **size)
    options = argparse.Namespace(lr=np.float64(5e-4), output_dir=Path("runs"), coarse_stage_size=grid)
    besides = {
        "flop": [np.float64(1.1), 4.0],
        "anytime_classification": [np.float64(75.5), np.float32(80.8)],
        "best": np.array([1.0, 2.0]),
        "epoch": 299,
        "optimizer": None,
        "args": options,
    }
    path = _write_authors(tmp_path / "checkpoint.pth", _authors_weights(model), **besides)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    images = make_images(model, 1)

    loaded = load(path)

    reference = Reference(
        model.state_dict(),
        heads=size["num_heads"],
        grid=grid,
        patch=size.get("patch_size", 4),
        ratio=0.5,
        momentum=0.99,
    )
    with torch.no_grad():
        state = reference.coarse(images)
        expected = torch.stack([state.logits, reference.fine(images, state)])
    torch.testing.assert_close(_logits(loaded, images), expected, atol=1e-4, rtol=1e-4)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    assert (loaded.config.selection, loaded.config.feature_reuse) == ("attention", "mlp")
    assert (loaded.class_names is not None) == (model.config.num_classes == 1000)
    assert loaded.data_config["crop_pct"] == 0.875
    save(loaded, tmp_path / "converted")
    assert torch.equal(_logits(load(tmp_path / "converted"), images), _logits(loaded, images))


def test_authors_weights_of_a_distributed_run(authors_weights: dict[str, Tensor], tmp_path: Path) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in authors_weights.items()}
    loaded = load_authors_checkpoint(_write_authors(tmp_path / "a.pth", wrapped))
    assert torch.equal(loaded.get_parameter("coarse_pos_embed"), authors_weights["pos_embed_list.0"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param({"reuse_block.1.fc1.bias": None}, r"missing reuse_block\.1\.fc1\.bias", id="missing"),
        pytest.param({"pos_embed_list.1": None}, r"missing pos_embed_list\.1", id="missing-positions"),
        pytest.param({"aux_head.weight": torch.zeros(3)}, r"unknown aux_head\.weight", id="unknown"),
        pytest.param(
            {"reuse_block.0.weight": torch.zeros(3)}, r"reuse_block\.0\.weight is \[3\] where \[128\]", id="misshapen"
        ),
        pytest.param(
            {"pos_embed_list.0": torch.zeros(1, 9, 128)}, r"pos_embed_list\.0 is \[1, 9, 128\]", id="not-a-square"
        ),
        pytest.param({"pos_embed_list.0": torch.zeros(5)}, r"pos_embed_list\.0 is \[5\]", id="no-positions"),
        pytest.param({"cls_token": torch.zeros(1, 1, 100)}, "100 channels", id="width"),
        pytest.param({"blocks.2.mlp.fc2.bias": None}, r"missing blocks\.2\.mlp\.fc2\.bias", id="missing-in-a-block"),
    ],
)
def test_weights_are_named_as_the_authors_do(
    change: dict[str, Any],
    named: str,
    authors_weights: dict[str, Tensor],
    tmp_path: Path,
    fails: Callable[..., Any],
) -> None:
    weights = {name: t for name, t in {**authors_weights, **change}.items() if t is not None}
    with fails(named):
        load(_write_authors(tmp_path / "a.pth", weights))


def test_authors_file_without_blocks(
    authors_weights: dict[str, Tensor], tmp_path: Path, fails: Callable[..., Any]
) -> None:
    weights = {name: tensor for name, tensor in authors_weights.items() if not name.startswith("blocks.")}
    with fails(r"missing blocks\.0\.norm1\.weight"):
        load(_write_authors(tmp_path / "a.pth", weights))


class _Runs:
    """Pickled, it makes a folder when it is read."""

    def __init__(self, victim: Path) -> None:
        self.victim = str(victim)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.victim,)


def test_nothing_in_a_file_is_executed(
    authors_weights: dict[str, Tensor], tmp_path: Path, fails: Callable[..., Any], make_model: Make
) -> None:
    victim = tmp_path / "executed"
    path = _write_authors(tmp_path / "a.pth", authors_weights, args=_Runs(victim))
    with fails(r"it would load (posix|os)\.mkdir"):
        load(path)
    with fails("would load posix.mkdir"):
        initialise(make_model(), str(path))
    assert not victim.exists()
    torch.load(path, weights_only=False)
    assert victim.exists(), "the file is as harmful as meant"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"", "damaged or no torch file", id="empty"),
        pytest.param(b"garbage" * 100, "no torch file", id="garbage"),
        pytest.param(b"PK\x03\x04" + b"\0" * 500, "damaged or no torch file", id="half-a-zip"),
    ],
)
def test_files_that_are_no_checkpoint(content: bytes, reason: str, tmp_path: Path, fails: Callable[..., Any]) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with fails(reason):
        load(tmp_path / "a.pth")


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, {"model": [1]}, {"model": {"head.weight": 3}}])
def test_torch_files_of_other_content(content: Any, tmp_path: Path, fails: Callable[..., Any]) -> None:
    torch.save(content, tmp_path / "a.pth")
    with fails("holds no named tensors"):
        load(tmp_path / "a.pth")


def _edit_config(folder: Path, change: Callable[[Any], Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: _edit_config(folder, lambda config: {k: v for k, v in config.items() if k != name})


def _with_model(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: _edit_config(folder, lambda c: {**c, "model": {**c["model"], **changes}})


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(lambda f: (f / "config.json").unlink(), r"has no config\.json", id="no-config"),
        pytest.param(lambda f: (f / "model.safetensors").unlink(), r"has no .*model\.safetensors", id="no-weights"),
        pytest.param(lambda f: (f / "config.json").write_text("{"), "is damaged", id="half-a-config"),
        pytest.param(lambda f: (f / "config.json").write_bytes(b"\xff\xfe\0"), "is damaged", id="binary-config"),
        pytest.param(lambda f: (f / "config.json").write_text("[]"), "describes no cfvit model", id="list-config"),
        pytest.param(_truncate, "is damaged", id="truncated-weights"),
        pytest.param(lambda f: (f / "model.safetensors").write_bytes(b""), "is damaged", id="empty-weights"),
        pytest.param(_without("model"), "describes no cfvit model", id="no-model"),
        pytest.param(_without("data_config"), "describes no cfvit model", id="no-data-config"),
        pytest.param(_without("class_names"), "describes no cfvit model", id="no-class-names"),
        pytest.param(_without("exit"), "describes no cfvit model", id="no-exit"),
        pytest.param(_with_model(depht=3), "describes no cfvit model.*depht", id="unknown-field"),
        pytest.param(_with_model(num_classes="many"), "describes no cfvit model", id="wrong-type"),
        pytest.param(_with_model(selection="best"), "selection is 'best': give one of attention", id="selection"),
        pytest.param(_with_model(feature_reuse="linear"), r"missing feature_reuse\.mlp\.weight", id="other-reuse"),
        pytest.param(_with_model(num_classes=8), r"backbone\.head\.weight is \[7, 48\] where \[8, 48\]", id="classes"),
        pytest.param(_with_model(coarse_grid=3), "coarse_pos_embed is", id="grid"),
        pytest.param(_with_model(backbone="resnet18", timm_kwargs={}), "resnet18", id="backbone"),
    ],
)
def test_damaged_folders(damage: Callable[[Path], None], reason: str, folder: Path, fails: Callable[..., Any]) -> None:
    damage(folder)
    with fails(reason):
        load(folder)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        *[("mean", value, "mean is") for value in (0.5, [0.5], [0.5, 0.5, "x"], [0.5, 0.5, float("nan")], None)],
        *[("std", [1.0, 1.0, value], "std is") for value in (0, -1, float("inf"), "1", True)],
        *[("crop_pct", value, "crop_pct is") for value in (0, -1, float("nan"), [1], 1e30)],
        *[("interpolation", value, "interpolation is .*: give one of nearest, ") for value in ("hope", 3, {}, None)],
        ("crop_mode", "left", "crop_mode is 'left': give one of center, squash, border"),
        *[("input_size", value, "input_size is") for value in (64, None, [3, 1, 1], [1, 64, 64])],
        ("zoom", 2, "there is no field 'zoom'"),
        *[("class_names", value, "do not name 7 classes") for value in ("abcdefg", [1] * 7, ["a"] * 6, [None] * 7)],
    ],
)
def test_what_would_mislead_is_refused_on_loading_and_on_saving(
    name: str, value: Any, reason: str, folder: Path, tmp_path: Path, fails: Callable[..., Any]
) -> None:
    model = load(folder)

    def damaged(config: dict[str, Any]) -> dict[str, Any]:
        return config | ({name: value} if name in config else {"data_config": config["data_config"] | {name: value}})

    _edit_config(folder, damaged)
    with fails(f"config.json cannot be used .*{reason}"):
        load(folder)
    if name == "class_names":
        model.class_names = value
    else:
        model.data_config[name] = value
    with fails(f"the model cannot be used .*{reason}.*: correct its attributes to save it"):
        save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("method", "place"), [("cascade", "small"), ("dvt", "."), ("msdnet", ".")])
def test_a_run_of_another_method_is_told(method: str, place: str, tmp_path: Path, fails: Callable[..., Any]) -> None:
    (tmp_path / "recipe.yaml").write_text(f"backbone: deit_tiny_patch16_224\nmethod: {method}\n")
    (tmp_path / "checkpoint.pt").touch()
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "model.safetensors").touch()
    with fails(f"holds a run of --method {method}, which is no coarse-to-fine model: give"):
        load(tmp_path)


def test_a_run_that_was_stopped_before_its_first_model_is_told(tmp_path: Path, fails: Callable[..., Any]) -> None:
    (tmp_path / "recipe.yaml").write_text("backbone: deit_tiny_patch16_224\nmethod: cf_vit\n")
    (tmp_path / "checkpoint.pt").touch()
    with fails("holds a run without a model, which the first evaluation writes: continue it with --resume"):
        load(tmp_path)


def test_no_such_model(fails: Callable[..., Any]) -> None:
    with fails("no model 'deit_tiny_imaginary': give a saved folder"):
        load("deit_tiny_imaginary")


@pytest.mark.parametrize(
    ("writer", "said"),
    [
        ("modeling.weights.save_file", "No space left on device"),
        ("checkpoints.json.dumps", "No space left on device"),
    ],
)
def test_full_disk_leaves_what_was_there(
    writer: str,
    said: str,
    model: CoarseToFineViT,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[..., Any],
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*arguments: Any, **options: Any) -> None:
        for path in folder.glob(".*"):
            path.write_bytes(b"the first half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"cfvit.{writer}", full)
    with fails(said):
        save(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("error", [OSError(), RuntimeError("PytorchStreamWriter failed\nin the middle")])
def test_failed_writing_is_told_in_one_line(error: Exception, tmp_path: Path, fails: Callable[..., Any]) -> None:
    with fails("cannot write .*file"), atomic_write(tmp_path / "file"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made(model: CoarseToFineViT, tmp_path: Path, fails: Callable[..., Any]) -> None:
    (tmp_path / "file").touch()
    with fails("cannot write .*file/model"):
        save(model, tmp_path / "file" / "model")


def test_other_errors_while_writing_are_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyError), atomic_write(tmp_path / "file"):
        raise KeyError("a defect")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_written_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    with atomic_write(tmp_path / "ours") as file:
        file.touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


HEAD, REUSE = "backbone.head.weight", "feature_reuse.mlp.fc1.weight"


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_initialise_from_another_grid_and_other_classes(folder: Path, model: CoarseToFineViT, make_model: Make) -> None:
    new = make_model(coarse_grid=5, num_classes=3, seed=1)
    before = _weights(new)
    initialise(new, str(folder))
    after, source = _weights(new), _weights(model)
    for name, side in (("coarse_pos_embed", 4), ("backbone.pos_embed", 8)):
        positions = source.pop(name)
        old = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        resized = nn.functional.interpolate(old, [side // 4 * 5] * 2, mode="bicubic", antialias=True)
        expected = torch.cat([positions[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)
        torch.testing.assert_close(after.pop(name), expected)
    for name, tensor in after.items():
        assert torch.equal(tensor, (before if name.startswith("backbone.head.") else source)[name]), name


def test_initialise_keeps_a_head_of_the_same_classes(folder: Path, model: CoarseToFineViT, make_model: Make) -> None:
    new = make_model(seed=1)
    initialise(new, str(folder))
    assert torch.equal(_weights(new)[HEAD], _weights(model)[HEAD])


def test_initialise_from_the_authors(authors_weights: dict[str, Tensor], tmp_path: Path, make_model: Make) -> None:
    path = _write_authors(tmp_path / "a.pth", authors_weights, flop=[np.float64(1.1)])
    new = make_model(**WIDE, coarse_grid=5, seed=1)
    initialise(new, str(path))
    assert torch.equal(_weights(new)[REUSE], authors_weights["reuse_block.1.fc1.weight"])
    assert torch.equal(_weights(new)[HEAD], authors_weights["head.weight"])


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_initialise_from_a_plain_vit(
    kind: str, tmp_path: Path, make_timm_model: Callable[..., nn.Module], make_model: Make
) -> None:
    plain = make_timm_model(img_size=32, num_classes=3)
    folder = tmp_path / "plain"
    timm.models.save_for_hf(plain, str(folder), safe_serialization=True)
    if kind == "folder":
        source = folder
    else:
        source = tmp_path / "plain.pt"
        torch.save(load_file(folder / "model.safetensors"), source)
    new = make_model(seed=1)
    reuse = _weights(new)[REUSE]
    initialise(new, str(source))
    weights = plain.state_dict()
    for name, tensor in new.backbone.state_dict().items():
        assert torch.equal(tensor, weights[name]) != name.startswith("head."), name
    assert torch.equal(_weights(new)[REUSE], reuse)
    assert new.backbone.head.out_features == 7
    assert new.get_parameter("coarse_pos_embed").shape == (1, 17, 48)
    assert torch.equal(new.get_parameter("coarse_pos_embed")[:, 0], weights["pos_embed"][:, 0])


def test_initialise_from_another_architecture(folder: Path, make_model: Make, fails: Callable[..., Any]) -> None:
    with fails("does not fit the model: missing backbone.blocks.5"):
        initialise(make_model(depth=6), str(folder))


def test_bundled_models_are_those_that_load(
    model: CoarseToFineViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    bundled = tmp_path / "bundled"
    for name in ("second", "first", "no_weights", "no_config"):
        save(model, bundled / name)
    (bundled / "no_weights" / "model.safetensors").unlink()
    (bundled / "no_config" / "config.json").unlink()
    (bundled / "README.md").touch()
    assert bundled_models() == ["first", "second"]
    assert load("second").config == model.config


def test_every_bundled_model_loads() -> None:
    for name in bundled_models():
        assert load(name).class_names, name


def test_weights_of_timms_training_script_are_read(tmp_path: Path) -> None:
    """``train.py`` wraps the state dict, adds its options, and DDP prefixes the names."""
    weights = {"module.cls_token": torch.ones(1, 1, 4)}
    torch.save({"state_dict": weights, "args": argparse.Namespace(lr=1)}, tmp_path / "last.pth")
    assert torch.equal(read_weights(tmp_path / "last.pth").tensors["cls_token"], torch.ones(1, 1, 4))


@pytest.mark.parametrize("shape", [(), (0,), (1, 1, 65), (1, 1, 64 * 10**6)])
def test_authors_files_of_impossible_width(shape: tuple[int, ...], tmp_path: Path, fails: Callable[..., Any]) -> None:
    names = ("pos_embed_list.0", "pos_embed_list.1", "patch_embed.proj.weight", "head.weight")
    weights = {"cls_token": torch.zeros(1).expand(shape) if shape else torch.zeros(())}
    torch.save({"model": {**weights, **{name: torch.zeros(()) for name in names}}}, tmp_path / "a.pth")
    with fails("channels: CF-DeiT has a multiple of 64"):
        load(tmp_path / "a.pth")


def test_plain_vits_are_refused_with_what_they_are_for(tmp_path: Path, fails: Callable[..., Any]) -> None:
    backbone = timm.create_model("deit_tiny_patch16_224", depth=1, num_classes=3)
    torch.save({"model": backbone.state_dict()}, tmp_path / "deit.pth")
    with fails("missing pos_embed_list.0, pos_embed_list.1; weights of a plain ViT are for pretrained_backbone"):
        load(tmp_path / "deit.pth")
    (tmp_path / "config.json").write_text('{"architecture": "deit_tiny_patch16_224"}')
    with fails("holds a plain ViT, not a coarse-to-fine model: train one from it with --initial-weights"):
        load(tmp_path)


# The order of an authors' model's classes


def _numbered(root: Path) -> Path:
    """Folders ``0`` to ``11`` of one image each, whose colour says which."""
    for number in range(12):
        (root / str(number)).mkdir(parents=True)
        Image.new("L", (32, 32), 20 * number).save(root / str(number) / "1.png")
    return root


def test_authors_models_number_classes_as_torchvision_does(
    make_model: Make, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = _write_authors(tmp_path / "a.pth", _authors_weights(make_model(**WIDE, num_classes=12)))
    data = _numbered(tmp_path / "data")
    save(load(path), tmp_path / "converted")
    for model in (load(path), load(tmp_path / "converted")):
        source = labelled_images(model, str(data))
        assert source.class_names == sorted(map(str, range(12)))
        colours = [int(np.asarray(source.read(i)[0]).max()) // 20 for i in range(12)]
        assert [source.class_names[source.read(i)[1]] for i in range(12)] == list(map(str, colours))
    assert not recwarn.list


def test_a_model_that_does_not_say_its_order_is_told(make_model: Make, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="does not say how its classes are numbered: they are taken in natural order"):
        source = labelled_images(make_model(num_classes=12), str(_numbered(tmp_path / "data")))
    assert source.class_names == list(map(str, range(12)))


@pytest.mark.parametrize(("data_set", "named"), [(None, True), ("IMNET", True), ("CARS", False), ("INAT", False)])
def test_a_thousand_classes_are_imagenets_unless_the_file_says_otherwise(
    data_set: str | None, named: bool, make_model: Make, tmp_path: Path
) -> None:
    weights = _authors_weights(make_model(**WIDE, num_classes=1000))
    options = {} if data_set is None else {"args": argparse.Namespace(data_set=data_set)}
    loaded = load(_write_authors(tmp_path / "a.pth", weights, **options))
    assert (loaded.class_names is not None, loaded.class_order) == (named, None if named else "torchvision")


def test_authors_lvvit_files_of_timms_saver_load(
    make_model: Make, make_images: Callable[..., Tensor], tmp_path: Path
) -> None:
    model = make_model(backbone="lvvit_small_patch16_224", embed_dim=64, num_heads=1, mlp_ratio=3.0, depth=2)
    content = {
        "epoch": 3,
        "arch": "cf_lvvit_small",
        "state_dict": _authors_weights(model),
        "args": argparse.Namespace(),
    }
    torch.save(content, tmp_path / "lvvit.pth.tar")
    loaded = load(tmp_path / "lvvit.pth.tar")
    assert loaded.data_config["crop_pct"] == 0.9
    assert loaded.get_parameter("backbone.aux_head.weight").equal(model.get_parameter("backbone.aux_head.weight"))
