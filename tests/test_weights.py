"""Weights from anywhere: loaded whole, or one line that names the file and the fault; never a half in silence."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import tempfile
import uuid
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from cfvit import CfvitError, CoarseToFineViT, load, save
from cfvit.checkpoints import initialise
from cfvit.modeling.backbones import create_backbone
from cfvit.modeling.weights import read_weights

Make = Callable[..., CoarseToFineViT]
Fails = Callable[..., Any]
FUZZ = int(os.environ.get("CFVIT_FUZZ", "100"))
NAME = "deit_tiny_patch16_224"
TINY: dict[str, Any] = {"embed_dim": 24, "num_heads": 2, "depth": 2, "patch_size": 4}


def _vit(size: Any = 16, classes: int = 5, name: str = NAME, **changes: Any) -> Any:
    torch.manual_seed(0)
    network = timm.create_model(name, img_size=size, num_classes=classes, **{**TINY, **changes})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    return network


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def _filled(source: Any, size: Any = 16, classes: int = 5, name: str = NAME, **changes: Any) -> dict[str, Tensor]:
    sides = size if isinstance(size, tuple) else (size, size)
    network = create_backbone(name, img_size=sides, num_classes=classes, pretrained=source, **{**TINY, **changes})
    return network.state_dict()


def _save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def _equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


# Positions


def _grid(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    return resample_abs_pos_embed(positions, list(new), list(old), num_prefix_tokens=1)


def test_what_fits_exactly_does_not_change_and_its_grid_is_told(tmp_path: Path) -> None:
    """As many places as of a square: timm takes them for its published square."""
    plain = _vit((16, 64))  # 4 x 16 = 8 x 8
    file = _save(plain.state_dict(), tmp_path / "plain.pth")
    with pytest.warns(UserWarning, match=r"plain\.pth are taken as 4 x 16, not 8 x 8: .* FILE#8x8"):
        assert _equal(_filled(file, (16, 64)), plain.state_dict())


def test_published_positions_of_the_same_number_do_not_change() -> None:
    """The issue's own case: 18 x 32 = 24 x 24 places in a model that is published at 24 x 24."""
    torch.manual_seed(0)
    kwargs: dict[str, Any] = {"embed_dim": 24, "num_heads": 2, "depth": 1}
    plain = timm.create_model("vit_tiny_patch16_384", img_size=(288, 512), **kwargs)
    ours = create_backbone(
        "vit_tiny_patch16_384", img_size=(288, 512), num_classes=1000, pretrained=plain.state_dict(), **kwargs
    )
    assert _equal(ours.state_dict(), plain.state_dict())


@pytest.mark.parametrize("how", ["options", "config"])
@pytest.mark.parametrize(("old", "new"), [((8, 8), (4, 16)), ((4, 16), (8, 8)), ((2, 3), (4, 6)), ((3, 5), (4, 4))])
def test_a_grid_that_is_known_is_resampled(
    old: tuple[int, int], new: tuple[int, int], how: str, tmp_path: Path
) -> None:
    size, new_size = (4 * old[0], 4 * old[1]), (4 * new[0], 4 * new[1])
    plain = _vit(size)
    if how == "config":
        timm.models.save_for_hf(plain, str(tmp_path), model_args={"img_size": size}, safe_serialization=True)
        source = str(tmp_path)
    else:
        source = f"{_save(plain.state_dict(), tmp_path / 'plain.pth')}#{old[0]}x{old[1]}"
    expected = _grid(plain.state_dict()["pos_embed"], old, new)
    torch.testing.assert_close(_filled(source, new_size)["pos_embed"], expected)


def test_a_square_is_resampled_without_being_told(tmp_path: Path) -> None:
    plain = _vit(16)
    ours = _filled(_save(plain.state_dict(), tmp_path / "plain.pth"), (24, 32))
    torch.testing.assert_close(ours["pos_embed"], _grid(plain.state_dict()["pos_embed"], (4, 4), (6, 8)))


@pytest.mark.parametrize(
    ("positions", "reason"),
    [
        pytest.param(
            lambda p: torch.cat([p, p[:, :6]], 1), "has 23 positions, which are not 1 of class token", id="not"
        ),
        pytest.param(lambda p: p[:, 1:], "has 16 positions, .*: give its grid as .*#ROWSxCOLUMNS", id="no-class-token"),
        pytest.param(lambda p: p[..., :7], r"pos_embed is \[1, 17, 7\] where \[1, 17, 24\]", id="width"),
    ],
)
def test_a_grid_that_is_not_known_is_refused(
    positions: Callable[[Tensor], Tensor], reason: str, tmp_path: Path, fails: Fails
) -> None:
    state = _state(_vit(16))
    state["pos_embed"] = positions(state["pos_embed"])
    with fails(reason):
        _filled(_save(state, tmp_path / "plain.pth"))


# Networks of another kind


@pytest.mark.parametrize(
    ("theirs", "ours", "reason"),
    [
        ("deit_tiny_distilled_patch16_224", NAME, "dist_token"),
        (NAME, "deit_tiny_distilled_patch16_224", "dist_token"),
        ("vit_small_patch14_dinov2", NAME, "ls1"),
        (NAME, "vit_small_patch14_reg4_dinov2", "reg_token"),
        (NAME, "eva02_tiny_patch14_224", "does not fit"),
        ("lvvit_tiny_patch16_224", NAME, "does not fit"),
    ],
)
def test_weights_of_another_kind_are_refused_by_the_files_name(
    theirs: str, ours: str, reason: str, tmp_path: Path, fails: Fails
) -> None:
    file = _save(_vit(16, name=theirs).state_dict(), tmp_path / "plain.pth")
    with fails(rf"plain\.pth.*{reason}"):
        _filled(file, name=ours)


def test_another_patch_size_is_loaded_or_refused(tmp_path: Path, fails: Fails) -> None:
    file = _save(_vit(16, patch_size=8).state_dict(), tmp_path / "plain.pth")
    with pytest.warns(UserWarning, match=r"patches of .*plain\.pth are 8 x 8 pixels and are resampled to 4 x 4: give"):
        assert _filled(file)["patch_embed.proj.weight"].shape == (24, 3, 4, 4)
    state = _state(_vit(16))
    state["patch_embed.proj.weight"] = torch.ones(24, 3, 4, 0)
    with fails(r"plain\.pth does not fit"):
        _filled(_save(state, tmp_path / "plain.pth"))


# Wrappers, prefixes, extras


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "model.",
        "backbone.",
        "encoder.",
        "model.backbone.",
        "net.",
        "a.b.c.",
    ],
)
def test_prefixes_are_taken_off(prefix: str, tmp_path: Path) -> None:
    plain = _vit()
    file = _save({"state_dict": {prefix + k: v for k, v in plain.state_dict().items()}}, tmp_path / "plain.pth")
    assert _equal(_filled(file), plain.state_dict())


def test_one_of_several_networks_is_chosen(tmp_path: Path, fails: Fails) -> None:
    plain, other = _vit().state_dict(), _state(_vit())
    other["cls_token"] += 1
    state = {f"model.{name}": tensor for name, tensor in plain.items()}
    state |= {f"ema.module.{name}": tensor for name, tensor in other.items()}
    file = _save({"state_dict": state}, tmp_path / "last.ckpt")
    with fails(r"holds the networks ema\.module, model: give one of them, such as .*last\.ckpt#ema\.module"):
        _filled(file)
    for choice, expected in (("model", plain), ("ema", other), ("ema.module", other)):
        assert _equal(_filled(f"{file}#{choice}"), expected)


def test_other_parts_of_a_network_are_left_out_and_told(tmp_path: Path) -> None:
    plain = _vit()
    state = {f"backbone.{name}": tensor for name, tensor in plain.state_dict().items()}
    state |= {"neck.weight": torch.ones(3), "criterion.weight": torch.ones(3)}
    with pytest.warns(UserWarning, match=r"backbone is read, 2 other weights \(neck\.weight, criterion\.weight\)"):
        assert _equal(_filled(_save({"teacher": state, "student": {}}, tmp_path / "dino.pth")), plain.state_dict())


class _Harmful:
    def __init__(self, run: Any, *arguments: Any) -> None:
        self.call = run, arguments

    def __reduce__(self) -> Any:
        return self.call


def _extras() -> dict[str, Any]:
    kinds = ("f2", "i1", "u2", "?", "c8", "U4", "S3", "M8[s]", "m8[D]")
    numbers = defaultdict(list, {"top1": [np.float32(1)], "top5": [Fraction(1, 2), Decimal(1)]})
    return {
        "scalars": [np.dtype(kind).type(1) for kind in ("f2", "i1", "u8", "?", "c8")] + [np.str_("x"), np.bytes_(b"x")],
        "arrays": [np.zeros(3, kind) for kind in kinds] + [np.array([{"a": 1}, None, Path("x")], dtype=object)],
        "args": argparse.Namespace(out=Path("runs"), lr=np.float32(1), data_set="CIFAR"),
        "hyper_parameters": {"path": PureWindowsPath("C:/x"), "space": SimpleNamespace(a=1), "kind": int},
        "meters": [numbers, deque([1, 2], maxlen=3), Counter("ab"), OrderedDict(a=1)],
        "begun": [datetime(2026, 1, 1, tzinfo=UTC), date(2026, 1, 1), timedelta(1), uuid.uuid4()],
    }


def test_harmless_extras_do_not_matter(tmp_path: Path) -> None:
    plain = _vit()
    file = _save({"state_dict": plain.state_dict(), **_extras()}, tmp_path / "plain.ckpt")
    assert _equal(_filled(file), plain.state_dict())
    assert read_weights(file).besides["args"].data_set == "CIFAR"


@pytest.mark.parametrize(
    ("extra", "refused"),
    [
        (_Harmful(eval, "1"), "eval"),
        (_Harmful(os.mkdir, "x"), "posix.mkdir"),
        (_Harmful(shutil.rmtree, "x"), "shutil.rmtree"),
    ],
)
def test_what_would_run_is_refused_by_its_name(extra: Any, refused: str, tmp_path: Path, fails: Fails) -> None:
    with fails(rf"plain\.ckpt is not read \(it would load {refused}\)"):
        _filled(_save({"state_dict": _vit().state_dict(), "extra": extra}, tmp_path / "plain.ckpt"))


def test_nothing_of_numpys_runs_either(tmp_path: Path) -> None:
    path = tmp_path / "made.npy"
    harmful = _Harmful(np.save, str(path), 1)
    file = _save({"state_dict": _vit().state_dict(), "extra": harmful}, tmp_path / "plain.ckpt")
    _filled(file)
    assert not path.exists()
    torch.load(file, weights_only=False)
    assert path.exists(), "the file is as harmful as meant"


def test_averaged_weights_are_told_and_can_be_chosen(tmp_path: Path, fails: Fails) -> None:
    plain, averaged = _vit(), _state(_vit())
    averaged["cls_token"] += 1
    file = _save({"state_dict": plain.state_dict(), "state_dict_ema": averaged, "epoch": 3}, tmp_path / "last.pth")
    with pytest.warns(UserWarning, match=r"averaged weights; state_dict is taken: give .*last\.pth#state_dict_ema"):
        assert _equal(_filled(file), plain.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _equal(_filled(f"{file}#state_dict_ema"), averaged)
    with fails("holds no state_dict_best: it has state_dict, state_dict_ema"):
        _filled(f"{file}#state_dict_best")
    with fails("holds no state_dict_ema: it has one state dict alone"):
        _filled(f"{_save(averaged, tmp_path / 'bare.pth')}#state_dict_ema")


@pytest.mark.parametrize("name", ["state_dict_ema", "model_ema", "weights"])
def test_the_only_weights_of_a_file_are_taken(name: str, tmp_path: Path, fails: Fails) -> None:
    plain = _vit().state_dict()
    file = _save({name: plain, "epoch": 3, "optimizer": {"lr": 1}}, tmp_path / "last.pth")
    assert _equal(_filled(file), plain)
    with fails(rf"last\.pth holds {name}, other: give one of them, such as .*last\.pth#{name}"):
        _filled(_save({name: plain, "other": plain}, tmp_path / "last.pth"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused(value: float, tmp_path: Path, make_model: Make, fails: Fails) -> None:
    state = _state(_vit())
    state["blocks.1.norm1.weight"][3] = value
    with fails(r"blocks\.1\.norm1\.weight holds values that are not finite"):
        _filled(_save(state, tmp_path / "plain.pth"))
    model = make_model()
    model.get_parameter("backbone.head.bias").data[0] = value
    save(model, tmp_path / "model")
    with fails(r"backbone\.head\.bias holds values that are not finite"):
        load(tmp_path / "model")


def test_weights_that_overflow_as_they_are_used_are_refused(tmp_path: Path, fails: Fails) -> None:
    state = _state(_vit())
    state["norm.weight"] = state["norm.weight"].double() * 1e300
    with fails(r"norm\.weight holds values that are not finite"):
        _filled(_save(state, tmp_path / "plain.pth"))
    state["norm.weight"] = torch.eye(2).to_sparse()
    with fails(r"norm\.weight is no dense tensor"):
        _filled(_save(state, tmp_path / "sparse.pth"))


def test_a_grid_that_is_given_must_be_the_positions_own(tmp_path: Path, fails: Fails) -> None:
    file = _save(_state(_vit()), tmp_path / "plain.pth")
    with fails("positions of patches, not 7 x 9: give their own grid"):
        _filled(f"{file}#7x9")


@pytest.mark.parametrize("kind", ["int8", "uint8", "bool", "complex64", "float8_e4m3fn", "float8_e5m2"])
def test_weights_that_are_no_usual_floats_are_refused(kind: str, tmp_path: Path, fails: Fails) -> None:
    """Those of 8 bits were divided by scales that the file may keep under any name."""
    state = _state(_vit())
    state["head.weight"] = state["head.weight"].to(getattr(torch, kind))
    with fails(rf"head\.weight is {kind} where floats of 16 bits or more are needed"):
        _filled(_save(state, tmp_path / "plain.pth"))


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        (["head.weight", "head.bias"], "no head"),
        (["head.bias"], r"no head\.bias"),
        (["head.weight"], r"no head\.weight"),
    ],
)
def test_a_head_that_is_not_there_is_told(missing: list[str], told: str, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in _vit().state_dict().items() if name not in missing}
    with pytest.warns(UserWarning, match=rf"plain\.pth has {told} for 5 classes: the head is untrained"):
        ours = _filled(_save(state, tmp_path / "plain.pth"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in state.items() if not name.startswith("head."))


def test_a_head_of_another_number_of_classes_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"has head\.bias of \[3\], head\.weight of \[3, 24\] for 5 classes"):
        _filled(_save(_vit(classes=3).state_dict(), tmp_path / "plain.pth"))


def test_a_head_of_as_many_but_other_classes_is_told(tmp_path: Path, make_model: Make) -> None:
    old, new = make_model(num_classes=2), make_model(num_classes=2)
    old.class_names, new.class_names = ["cat", "dog"], ["cat", "fox"]
    save(old, tmp_path / "old")
    with pytest.warns(UserWarning, match="of other classes: class 1 is 'fox' here, 'dog' there"):
        initialise(new, str(tmp_path / "old"))


@pytest.mark.parametrize("file", ["checkpoint.pt", "model.safetensors", "config.json"])
def test_files_of_a_run_say_which_folder_to_give(file: str, tmp_path: Path, make_model: Make, fails: Fails) -> None:
    model = make_model()
    save(model, tmp_path / "run")
    torch.save({"recipe": {}, "optimizer": {}, "model": model.state_dict()}, tmp_path / "run" / "checkpoint.pt")
    for use in (load, lambda path: initialise(make_model(), str(path))):
        with fails(f"give .*{re.escape(str(tmp_path / 'run'))}|holds a coarse-to-fine model: give the folder"):
            use(tmp_path / "run" / file)


# transformers


def _as_transformers(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The names of `ViTForImageClassification`, written backwards from timm's by hand."""
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
        "norm.": "layernorm.",
    }
    parts = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("head."):
            out[name.replace("head.", "classifier.")] = tensor
        elif block := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name):
            layer = f"{prefix}encoder.layer.{block[1]}."
            if block[2] == "attn.qkv":
                for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    out[f"{layer}attention.attention.{part}.{block[3]}"] = piece
            else:
                out[f"{layer}{parts[block[2]]}.{block[3]}"] = tensor
        else:
            start = next(start for start in names if name.startswith(start))
            out[prefix + names[start] + name.removeprefix(start)] = tensor
    return out


@pytest.mark.parametrize("kind", ["folder", "file", "bare"])
def test_transformers_weights_are_timms(kind: str, tmp_path: Path) -> None:
    """The other kinds were compared with transformers itself: the same numbers to the bit, but for DeiT's (4e-6)."""
    plain = _vit()
    state = _as_transformers(_state(plain), "vit." if kind != "bare" else "")
    state |= (
        {"vit.pooler.dense.weight": torch.ones(2), "vit.embeddings.mask_token": torch.ones(2)} if kind != "bare" else {}
    )
    config = {"model_type": "vit", "image_size": 16, "id2label": {str(i): f"class {i}" for i in range(5)}}
    file = _save(state, tmp_path / "pytorch_model.bin")
    if kind != "bare":
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert read_weights(file).class_names == [f"class {i}" for i in range(5)]
    assert _equal(_filled(tmp_path if kind == "folder" else file), plain.state_dict())


# Any state dict: loaded whole, or one line

CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["remove", "misshape", "rename", "integer", "float8", "nan", "half", "extra", "empty"]),
        st.integers(0, 1000),
    ),
    max_size=3,
)
PREFIXES = st.sampled_from(
    ["", "module.", "_orig_mod.", "model.", "backbone.", "encoder.", "module.model.", "net.", "x"]
)
WRAPPER = st.sampled_from([None, "model", "state_dict", "state_dict_ema", "weights", "teacher"])
_PLAIN = _vit().state_dict()


def _changed(changes: list[tuple[str, int]]) -> dict[str, Tensor]:
    state = {name: tensor.clone() for name, tensor in _PLAIN.items()}
    for change, place in changes:
        if not state:
            break
        name = sorted(state)[place % len(state)]
        tensor = state[name]
        if change == "remove":
            del state[name]
        elif change == "misshape":
            state[name] = torch.cat([tensor, tensor])
        elif change == "rename":
            state[f"{name}_2"] = state.pop(name)
        elif change == "integer":
            state[name] = tensor.to(torch.int8)
        elif change == "float8":
            state[name] = tensor.to(torch.float8_e4m3fn)
        elif change == "nan" and tensor.is_floating_point() and tensor.numel():
            state[name] = torch.full_like(tensor, torch.nan)
        elif change == "half":
            state[name] = tensor.half()
        elif change == "extra":
            state[f"extra.{place}"] = torch.ones(2)
        elif change == "empty":
            state[name] = tensor[:0]
    return state


@settings(max_examples=FUZZ, deadline=None)
@given(CHANGES, PREFIXES, WRAPPER)
def test_any_state_dict_is_loaded_whole_or_refused_in_one_line(
    changes: list[tuple[str, int]], prefix: str, wrapper: str | None
) -> None:
    given_state = _changed(changes)
    named = {prefix + name: tensor for name, tensor in given_state.items()}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        file = _save(named if wrapper is None else {wrapper: named, "epoch": 1}, Path(folder) / "plain.pth")
        try:
            ours = _filled(file)
        except CfvitError as error:
            assert "plain.pth" in str(error)
            assert "\n" not in str(error)
            return
        texts = [str(warning.message) for warning in said]
        heads = {name for name in _PLAIN if name.startswith("head.")}
        untrained = any("the head is untrained" in text for text in texts)
        for name, tensor in ours.items():
            if name not in heads or not untrained:
                assert torch.equal(tensor, given_state[name].to(tensor.dtype)), name
        left_out = set(given_state) - set(ours) - (heads if untrained else set())
        assert not left_out or any("left out" in text for text in texts)
