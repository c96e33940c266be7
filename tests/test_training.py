"""The training loop: it learns, it can be stopped at any step, and many processes are as one."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data.config import resolve_model_data_config
from torch import Tensor
from torch.nn import functional

from cfvit import CoarseToFineOutput, CoarseToFineViT, Predictor, create_model, load, save
from cfvit.calibration import Drop
from cfvit.data import open_data
from cfvit.errors import UsageError
from cfvit.evaluation.calibrate import calibrate_model
from cfvit.evaluation.metrics import evaluate_model
from cfvit.methods import cf_vit
from cfvit.methods.base import Batch, TokenLabels
from cfvit.modeling.losses import token_label_loss
from cfvit.modeling.model import TokenOutput
from cfvit.processes import Process
from cfvit.training import log, loop
from cfvit.training import setup as preparation
from cfvit.training.loop import Stopped, train
from cfvit.training.recipe import DIGITS, Recipe
from cfvit.training.setup import attention_for_gradients
from cfvit.training.step import draw_mixed_cells, make_batch
from cfvit.training.tokens import pool_labels, pool_scores

CPU = Process(rank=0, world=1, device=torch.device("cpu"))
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
PATIENCE = 240
"""Seconds after which a process that should have ended or spoken counts as hung."""


@pytest.fixture(autouse=True)
def cpu_with_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As the processes that the tests start, so that figures can be equal to the last bit."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    """Nothing is at random but the order of the images and their crops."""
    changes = {
        "holdout": 0.1,
        "epochs": 2,
        "drop_path_rate": 0.0,
        "lr_base": 2e-3,
        "lr_base_size": 16,
        "warmup_epochs": 0.0,
        "ema_decay": 0.0,
        "crop_scale_min": 0.5,
        "auto_augment": "none",
        "color_jitter": 0.0,
        "random_erasing": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "repeated_augmentation": 1,
        "log_interval": 1,
    }
    return tiny_recipe.replace(changes)


@pytest.fixture
def restless(recipe: Recipe) -> Recipe:
    """Every source of randomness, and everything that has to be remembered: 5 steps in each of 4 epochs."""
    return recipe.replace(
        {
            "epochs": 4,
            "drop_path_rate": 0.2,
            "warmup_epochs": 1.0,
            "ema_decay": 0.9,
            "auto_augment": "rand-m9-mstd0.5-inc1",
            "random_erasing": 0.25,
            "mixup": 0.8,
            "cutmix": 1.0,
            "clip_grad": 1.0,
            "checkpoint_interval": 3,
        }
    )


def _log(out: Path, event: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    timed = {"images_per_second", "matrix_share"}
    return [{k: v for k, v in line.items() if k not in timed} for line in lines if line["event"] == event]


def _command(recipe: Recipe, out: Path, config: Path, *more: str) -> list[str]:
    config.write_text(recipe.to_yaml())
    return ["-m", "cfvit", "train", "--config", str(config), "--out", str(out), *more]


def _start(recipe: Recipe, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, *_command(recipe, out, out.with_suffix(".yaml"), *more)]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True)


def _signal_at_step(process: subprocess.Popen[str], out: Path, step: int, number: signal.Signals) -> str:
    """Sends a signal to the whole group, as a terminal does, once the log speaks of a step; gives the last words."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(FileNotFoundError, json.JSONDecodeError, IndexError):
            if _log(out, "train")[-1]["step"] >= step:
                break
        time.sleep(0.01)
    os.killpg(process.pid, number)
    return process.communicate(timeout=PATIENCE)[1]


def _assert_weights_equal(run: Path, other: Path) -> None:
    expected = load_file(other / "model.safetensors")
    for name, tensor in load_file(run / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def test_learns_what_is_easy(recipe: Recipe, tmp_path: Path) -> None:
    figures = train(recipe.replace({"epochs": 4}), tmp_path / "run")
    losses = [line["loss"] for line in _log(tmp_path / "run", "train")]
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert figures["validation_coarse_top1"] > 60
    assert figures["validation_fine_top1"] > 60
    assert _log(tmp_path / "run", "eval")[-1] == {"event": "eval", "epoch": 3, "step": 20, **figures}
    model = load(tmp_path / "run")
    assert model.class_names == ["blue", "green", "red"]
    assert model.threshold == figures["threshold"]


def test_all_cells_are_split_at_first(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratios: list[float] = []
    exact = CoarseToFineViT.forward

    def record(self: CoarseToFineViT, images: Tensor, *, informative_ratio: float | None = None) -> Any:
        if self.training:
            assert informative_ratio is not None
            ratios.append(informative_ratio)
        return exact(self, images, informative_ratio=informative_ratio)

    monkeypatch.setattr(CoarseToFineViT, "forward", record)
    train(recipe.replace({"epochs": 3, "informative_ratio": 0.25}), tmp_path / "run")
    assert ratios == [1.0] * 10 + [0.25] * 5


def test_killed_run_resumes_as_if_nothing_had_happened(restless: Recipe, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = _start(restless.replace({"workers": 1}), killed)
    _signal_at_step(process, killed, 8, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    step = torch.load(killed / "checkpoint.pt", weights_only=True)["step"]
    assert 6 <= step < 20

    train(restless, whole)
    train(restless, killed, resume=True)

    for event in ("train", "eval"):
        assert _log(killed, event) == _log(whole, event)
    assert [line["step"] for line in _log(killed, "train")] == list(range(1, 21))
    _assert_weights_equal(killed, whole)


def test_resumes_anywhere_in_an_epoch(restless: Recipe, tmp_path: Path, fails: Callable[..., Any]) -> None:
    changes = {"optimizer": "muon", "repeated_augmentation": 3, "accumulate": 2, "batch_size": 8, "epochs": 2}
    muon = restless.replace(changes)
    train(muon, tmp_path / "whole")
    for step in (5, 7):
        stopped = tmp_path / f"stopped{step}"
        with fails(f"stopped at step {step}: add --resume", Stopped):
            train(muon, stopped, stop=_stop_at(step))
        train(muon, stopped, resume=True)
        for event in ("train", "eval"):
            assert _log(stopped, event) == _log(tmp_path / "whole", event)
        _assert_weights_equal(stopped, tmp_path / "whole")


def _stop_at(step: int) -> Callable[[], bool]:
    """Asked once in each step, this stops a run at the given one."""
    left = iter(range(step - 1, -1, -1))
    return lambda: next(left) == 0


def test_sigterm_stops_cleanly(restless: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = {"epochs": 1000, "eval_interval": 1000, "checkpoint_interval": 100_000}
    long = restless.replace({**settings, "workers": 1})
    said = _signal_at_step(process := _start(long, out), out, 2, signal.SIGTERM)
    assert process.returncode == 1
    step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    assert step >= 2
    assert said.splitlines()[-1] == f"cfvit: stopped at step {step}: add --resume to continue"
    assert "Traceback" not in said


def test_a_log_in_a_file_follows_steps_and_evaluations(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "SECONDS_BETWEEN_LINES", 0.0)
    train(recipe.replace({"epochs": 1}), tmp_path / "run")
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("epoch 1/1: step ") and ", loss " in line for line in lines) == 5
    start = lines.index("epoch 1/1: evaluating")
    shown = [f"epoch 1/1, evaluating: image {count} of {count}" for count in (9, 33)]
    assert lines[start + 1 : start + 3] == shown
    few = "eta was chosen on 9 held-out images, too few to rely on it: give a larger --holdout"
    assert lines[-1] == f"{few}, or choose it with cfvit calibrate"


@pytest.mark.parametrize(
    ("method", "holdout", "said"),
    [
        ("cf_vit", 0.005, "no image was held out, .*: give a larger --holdout, or choose it with cfvit calibrate"),
        ("cascade", 0.005, "no image was held out, so no eta was chosen: give a larger --holdout"),
        ("msdnet", 0.02, "eta was chosen on 2 held-out images, too few to rely on it: give a larger --holdout"),
    ],
)
def test_a_run_with_exits_says_whether_its_etas_can_be_relied_on(
    method: str, holdout: float, said: str, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"method": method, "holdout": holdout, "epochs": 1, "batch_size": 64, "workers": 0}
    train(recipe.replace(changes), tmp_path / "run")
    assert re.fullmatch(said, capsys.readouterr().err.splitlines()[-1])


def test_a_stop_during_an_evaluation_is_acknowledged_and_kept(
    recipe: Recipe,
    tmp_path: Path,
    fails: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    collect = loop.collect

    def stopped(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        assert "stopping after this evaluation" in capsys.readouterr().err
        return collect(*arguments)

    with monkeypatch.context() as patch, fails("stopped at step 5: add --resume to continue", Stopped):
        patch.setattr(loop, "collect", stopped)
        train(recipe, tmp_path / "run")
    train(recipe, tmp_path / "run", resume=True)
    assert [line["step"] for line in _log(tmp_path / "run", "eval")] == [5, 10]


def test_nothing_is_resumed_or_overwritten_unasked(recipe: Recipe, tmp_path: Path, fails: Callable[..., Any]) -> None:
    with fails("holds no run to resume"):
        train(recipe, tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "model.safetensors").write_bytes(b"somebody's model")
    with fails("already holds a model"):
        train(recipe, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"somebody's model"
    (tmp_path / "model.safetensors").rename(tmp_path / "cfvit.json")
    with fails("already holds a model"):
        train(recipe, tmp_path)


def test_unreadable_images_end_a_run_with_workers(recipe: Recipe, tmp_path: Path, fails: Callable[..., Any]) -> None:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(12):
            (tmp_path / "data" / name / f"{number}.png").write_text("no image")
    with fails("training images in a row cannot be read"):
        train(recipe.replace({"data": str(tmp_path / "data"), "workers": 1}), tmp_path / "run")


@pytest.fixture
def label_maps(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Maps in which a quarter of each image is of the next class."""
    root = tmp_path_factory.mktemp("maps")
    folder = colours / "train"
    for label, name in enumerate(sorted(child.name for child in folder.iterdir())):
        (root / name).mkdir()
        for path in (folder / name).iterdir():
            classes = torch.full((1, 18, 18), float(label))
            classes[:, :9, :9] = (label + 1) % 3
            torch.save(torch.stack([torch.full((1, 18, 18), 8.0), classes]).half(), root / name / f"{path.stem}.pt")
    return root


@pytest.fixture
def token_recipe(recipe: Recipe, label_maps: Path) -> Recipe:
    tiny = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
    changes = {"backbone": "lvvit_tiny_patch16_224", "timm_kwargs": tiny, "coarse_grid": "2x3", "hflip": 0.5}
    return recipe.replace({**changes, "token_labels": str(label_maps), "mix_token": True, "ema_decay": 0.9})


def test_learns_from_token_labels(token_recipe: Recipe, tmp_path: Path) -> None:
    figures = train(token_recipe.replace({"epochs": 6}), tmp_path / "run")
    losses = [line["loss"] for line in _log(tmp_path / "run", "train")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert figures["validation_coarse_top1"] > 60
    assert figures["validation_fine_top1"] > 60
    model = load(tmp_path / "run")
    assert model.grid == (2, 3)
    assert model.image_size == (32, 48)


def test_all_cells_are_split_at_first_with_token_labels_too(
    token_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the loss is asked for; that the network then splits so many is tested below."""
    ratios: list[float] = []

    exact = cf_vit.CfViT.loss

    def record(self: cf_vit.CfViT, running: Any, batch: Batch, split: float) -> Tensor:
        if batch.token_labels is not None:
            ratios.append(split)
        return exact(self, running, batch, split)

    monkeypatch.setattr(cf_vit.CfViT, "loss", record)
    train(token_recipe.replace({"epochs": 3, "informative_ratio": 0.25}), tmp_path / "run")
    assert ratios == [1.0] * 10 + [0.25] * 5


@pytest.mark.parametrize("from_teacher", [False, True])
@pytest.mark.parametrize("mix", [False, True])
def test_every_token_is_scored_against_its_own_label(from_teacher: bool, mix: bool, token_recipe: Recipe) -> None:
    torch.manual_seed(0)
    tiny: dict[str, Any] = {"embed_dim": 32, "depth": 4, "num_heads": 2}
    model = create_model("lvvit_tiny_patch16_224", num_classes=3, coarse_grid=(2, 3), **tiny)
    model.class_names = ["a", "b", "c"]
    images, targets = torch.randn(4, 3, 64, 96), torch.tensor([0, 1, 2, 0])
    maps = torch.stack([torch.rand(4, 1, 18, 18) * 5, torch.randint(3, (4, 1, 18, 18)).float()], dim=1).half()
    windows = torch.tensor([[0.1, 0.2, 0.5, 0.6, 1.0], [0.0, 0.0, 1.0, 1.0, 0.0]]).repeat(2, 1)
    scores, seen = torch.randn(4, 3, 5, 7), {}

    def network(images: Tensor, split: float, labels: TokenLabels) -> TokenOutput:
        output = model.forward_tokens(images, informative_ratio=split, mixed=labels.mixed)
        seen.update(ratio=split, mixed=labels.mixed, output=output)
        return output

    nothing: Any = None
    teacher: Any = SimpleNamespace(places=lambda asked: scores) if from_teacher else None
    labelled = {"token_labels": None, "teacher": "resnet18"} if from_teacher else {}
    recipe = token_recipe.replace({"mix_token": mix, "token_label_weight": 0.5, **labelled})
    method = cf_vit.CfViT(recipe)
    trained = preparation.TrainState(method, model, network, nothing, nothing, nothing, nothing, teacher)
    seed = next(seed for seed in range(99) if 0 < draw_mixed_cells((2, 3), seed, torch.device("cpu")).sum() < 6)
    batch = [images, targets] if from_teacher else [images, targets, maps, windows]
    running: Any = network
    loss = method.loss(running, make_batch(recipe, trained, batch, seed, CPU.device), 0.5)

    mixed = draw_mixed_cells((2, 3), seed, torch.device("cpu")).tolist() if mix else [False] * 6
    assert seen["ratio"] == 0.5
    assert (seen["mixed"].tolist() if mix else [False] * 6) == mixed
    fine, coarse = (
        pool_scores(scores, grid) if from_teacher else pool_labels(maps, windows, grid, 3) for grid in ((4, 6), (2, 3))
    )
    labels = []
    for b in range(4):
        for cell in seen["output"].informative[b].tolist():
            row, column = divmod(cell, 3)
            corner = 12 * row + 2 * column
            labels += [fine[3 - b if mixed[cell] else b, corner + step] for step in (0, 1, 6, 7)]
        labels += [coarse[3 - b if mixed[cell] else b, cell] for cell in seen["output"].others[b].tolist()]
    whole = torch.eye(3)[targets] * 0.9 + 0.1 / 3
    whole = (1 - sum(mixed) / 6) * whole + sum(mixed) / 6 * whole.flip(0)
    expected = token_label_loss(seen["output"], whole, torch.stack(labels).reshape(4, -1, 3), 0.5)
    torch.testing.assert_close(loss, expected)


def test_token_labels_resume_as_if_nothing_had_happened(token_recipe: Recipe, tmp_path: Path) -> None:
    train(token_recipe, tmp_path / "whole")
    with pytest.raises(Stopped, match="stopped at step 7"):
        train(token_recipe, tmp_path / "stopped", stop=_stop_at(7))
    train(token_recipe, tmp_path / "stopped", resume=True)
    whole, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_a_teacher_gives_the_labels_as_training_goes(token_recipe: Recipe, tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = timm.create_model("test_resnet", num_classes=3)
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    asked = {"token_labels": None, "teacher": "test_resnet", "teacher_weights": str(tmp_path / "teacher.safetensors")}
    train(token_recipe.replace({**asked, "epochs": 1, "mix_token": False}), tmp_path / "run")
    losses = [line["loss"] for line in _log(tmp_path / "run", "train")]
    assert all(math.isfinite(loss) for loss in losses)
    train(token_recipe.replace({**asked, "epochs": 1, "mix_token": False, "token_label_weight": 0}), tmp_path / "other")
    assert [line["loss"] for line in _log(tmp_path / "other", "train")] != losses


def test_label_maps_that_are_missing_or_damaged(
    token_recipe: Recipe, label_maps: Path, tmp_path: Path, fails: Callable[..., Any]
) -> None:
    first, second = sorted(label_maps.rglob("*.pt"))[:2]
    first.write_bytes(b"no tensor")
    with fails(f"label map {first} is damaged"):
        train(token_recipe.replace({"workers": 1, "holdout": 0.0}), tmp_path / "damaged")
    second.unlink()
    with fails(rf"1 of \d+ training images have no label map, the first is {second}"):
        train(token_recipe.replace({"holdout": 0.0}), tmp_path / "missing")


def test_token_labels_need_an_auxiliary_head(token_recipe: Recipe, tmp_path: Path, fails: Callable[..., Any]) -> None:
    plain = {"backbone": "test_vit", "timm_kwargs": {"patch_size": 4}, "coarse_grid": 2}
    with fails("test_vit has no auxiliary head", UsageError):
        train(token_recipe.replace(plain), tmp_path / "run")


def test_runs_are_not_mixed_up(recipe: Recipe, tmp_path: Path, fails: Callable[..., Any]) -> None:
    out = tmp_path / "run"
    train(recipe.replace({"epochs": 1}), out)
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with fails("already holds a run: add --resume"):
        train(recipe.replace({"epochs": 1}), out)
    with fails("has epochs 1, not 2: resume with the same recipe"):
        train(recipe, out, resume=True)
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    figures = train(recipe.replace({"epochs": 1, "eval_batch_size": 5, "checkpoint_interval": 7}), out, resume=True)
    assert {"event": "eval", "epoch": 0, "step": 5, **figures} == _log(out, "eval")[-1]


@pytest.mark.parametrize("change", ["added", "removed", "renamed"])
def test_a_run_is_not_resumed_on_other_images(
    change: str, recipe: Recipe, make_colours: Callable[..., Path], tmp_path: Path, fails: Callable[..., Any]
) -> None:
    """Which are held out depends on them all: with others, eta would be chosen on images that were trained on."""
    data = make_colours("data", per_class=8)
    short = recipe.replace({"data": str(data), "epochs": 1})
    train(short, tmp_path / "run")
    checkpoint = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    image = min((data / "red").iterdir())
    if change == "added":
        image.with_name(f"zz{image.suffix}").write_bytes(image.read_bytes())
    else:
        image.rename(tmp_path / "away" if change == "removed" else image.with_name(f"zz{image.suffix}"))
    with fails("training images are not those of the checkpoint in .*: give the same images"):
        train(short, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == checkpoint


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_damaged_checkpoint(content: bytes | None, recipe: Recipe, tmp_path: Path, fails: Callable[..., Any]) -> None:
    if content is None:
        torch.save({"another": "program's"}, tmp_path / "checkpoint.pt")
    else:
        (tmp_path / "checkpoint.pt").write_bytes(content)
    with fails("checkpoint.pt is damaged"):
        train(recipe, tmp_path, resume=True)


def test_a_checkpoint_that_lacks_a_part_is_told(recipe: Recipe, tmp_path: Path, fails: Callable[..., Any]) -> None:
    train(short := recipe.replace({"epochs": 1, "ema_decay": 0.9}), tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for part in ("model", "optimizer", "scaler", "average", "step", "class_names", "images"):
        torch.save({name: value for name, value in state.items() if name != part}, tmp_path / "checkpoint.pt")
        with fails("has a damaged checkpoint.pt .*: train anew"):
            train(short, tmp_path, resume=True)
    for part in ("recipe", "world"):
        torch.save({name: value for name, value in state.items() if name != part}, tmp_path / "checkpoint.pt")
        with fails(f"checkpoint.pt is damaged ..{part}..: choose another folder"):
            train(short, tmp_path, resume=True)
    torch.save({**state, "class_names": 3}, tmp_path / "checkpoint.pt")
    with fails("has a damaged checkpoint.pt .class_names is no list.: train anew"):
        train(short, tmp_path, resume=True)


def test_accumulated_gradients_are_those_of_the_whole_batch(recipe: Recipe, tmp_path: Path) -> None:
    once = recipe.replace({"epochs": 1, "optimizer": "sgd", "lr_base": 0.1})
    train(once, tmp_path / "once")
    train(once.replace({"batch_size": 8, "accumulate": 2}), tmp_path / "twice")
    for one, two in zip(_log(tmp_path / "once", "train"), _log(tmp_path / "twice", "train"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["lr"] == one["lr"]
    expected = load_file(tmp_path / "once" / "model.safetensors")
    start = create_model("test_vit", num_classes=3, coarse_grid=2, patch_size=4, depth=2).state_dict()
    assert not torch.allclose(expected["backbone.head.bias"], start["backbone.head.bias"], atol=1e-3)
    for name, tensor in load_file(tmp_path / "twice" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("method", ["cf_vit", "coarse_only", "plain"])
def test_positions_and_class_token_do_not_decay(recipe: Recipe, optimizer: str, method: str) -> None:
    changed = recipe.replace({"optimizer": optimizer, "method": method, "weight_decay": 0.05})
    _, model = preparation.prepare(changed, CPU)
    trained = preparation.assemble(changed, model, 80, CPU)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = trained.optimizer.param_groups
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    expected = {
        name: 0.0 if parameter.ndim == 1 or name.endswith(("pos_embed", "cls_token")) else 0.05
        for name, parameter in model.named_parameters()
        if method != "coarse_only" or not _is_of_the_fine_stage(name)
    }
    assert decay == expected


def _is_of_the_fine_stage(name: str) -> bool:
    """Whether the coarse stage does without this weight."""
    return name.startswith("feature_reuse.") or name == "backbone.pos_embed"


def test_coarse_stage_alone_learns_and_no_image_goes_on(
    recipe: Recipe, colours: Path, tmp_path: Path, cfvit_main: Callable[..., Any], fails: Callable[..., Any]
) -> None:
    figures = train(recipe.replace({"method": "coarse_only", "epochs": 4}), tmp_path / "run")
    losses = [line["loss"] for line in _log(tmp_path / "run", "train")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    scores = {f"{images}_coarse_top{k}" for images in ("holdout", "validation") for k in (1, 5)}
    assert set(figures) == scores, "nothing is chosen: its eta is 0"
    assert figures["validation_coarse_top1"] > 60
    of_run = ("--model", tmp_path / "run", "--data", colours)
    assert [json.loads(line)["stage"] for line in cfvit_main("eval", *of_run, "--json").out] == ["coarse"]
    for command, *options, status, said in (
        ("calibrate", "--max-drop", 1, "--best", 1, "fine stage was never trained"),
        ("eval", "--report", tmp_path, 1, "fine stage was never trained"),
        ("eval", "--thresholds", 0.5, 2, "--thresholds are for a CF-ViT"),
    ):
        outcome = cfvit_main(command, *of_run, *options)
        assert (outcome.status, len(outcome.err)) == (status, 1) and said in outcome.err[0]
    save(load(tmp_path / "run"), tmp_path / "copy")
    copy = load(tmp_path / "copy")
    assert Predictor(copy).threshold == 0.0
    with fails("fine stage was never trained"):
        Predictor(copy, 0.5)
    with fails("fine stage was never trained"):
        calibrate_model(copy, str(colours), Drop(1), batch_size=8, workers=0)


def test_coarse_stage_alone_gives_the_fine_one_no_gradient(recipe: Recipe) -> None:
    changed = recipe.replace({"method": "coarse_only", "ema_decay": 0.9})
    _, model = preparation.prepare(changed, CPU)
    trained = preparation.assemble(changed, model, 80, CPU)
    trained.network(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, _ in model.named_parameters() if not _is_of_the_fine_stage(name)}
    waited_for = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert reached == waited_for, "processes wait for the gradient of each"


def test_coarse_stage_alone_resumes(restless: Recipe, tmp_path: Path) -> None:
    coarse = restless.replace({"method": "coarse_only", "epochs": 2})
    train(coarse, tmp_path / "whole")
    with pytest.raises(Stopped, match="stopped at step 7"):
        train(coarse, tmp_path / "stopped", stop=_stop_at(7))
    train(coarse, tmp_path / "stopped", resume=True)
    assert _log(tmp_path / "stopped", "eval") == _log(tmp_path / "whole", "eval")
    _assert_weights_equal(tmp_path / "stopped", tmp_path / "whole")


def test_a_compiled_run_is_the_run_without(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a compiler that traces and makes no code, which is what takes long."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    short = recipe.replace({"method": "plain", "epochs": 1, "timm_kwargs": {"patch_size": 4, "depth": 2}})
    for name, compile in (("whole", False), ("compiled", True)):
        train(short.replace({"compile": compile}), tmp_path / name)
    losses, expected = ([line["loss"] for line in _log(tmp_path / name, "train")] for name in ("compiled", "whole"))
    assert losses == pytest.approx(expected, abs=1e-4)
    assert _log(tmp_path / "compiled", "eval") == _log(tmp_path / "whole", "eval")


@pytest.fixture
def forkable(restless: Recipe, each_block_gives_its_class_attention_here: None) -> Recipe:
    """Two epochs of which the first splits all cells."""
    return restless.replace({"epochs": 2, "all_cells_share": 0.5})


def test_fork_by_the_same_recipe_is_the_same_run(forkable: Recipe, tmp_path: Path) -> None:
    train(forkable, tmp_path / "whole")
    train(forkable.replace({"log_interval": 2}), tmp_path / "fork", fork=tmp_path / "whole")
    assert [line["step"] for line in _log(tmp_path / "fork", "train")] == [6, 8, 10]
    assert _log(tmp_path / "fork", "eval") == _log(tmp_path / "whole", "eval")[1:]
    _assert_weights_equal(tmp_path / "fork", tmp_path / "whole")
    assert (tmp_path / "fork" / "recipe.yaml").read_text() == forkable.replace({"log_interval": 2}).to_yaml()


@pytest.fixture
def forked_at(forkable: Recipe, tmp_path: Path) -> Path:
    """A run to fork, stopped in the step after it split all cells for the last time."""
    with pytest.raises(Stopped, match="stopped at step 6"):
        train(forkable, tmp_path / "trunk", stop=_stop_at(6))
    return tmp_path / "trunk"


def test_forks_part_ways(forkable: Recipe, forked_at: Path, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"informative_ratio": 0.25},
        {"attention_momentum": 0.0},
        {"selection": "negative"},
    ]
    heads = []
    for number, change in enumerate(changes):
        train(forkable.replace(change), tmp_path / str(number), fork=forked_at)
        heads.append(load_file(tmp_path / str(number) / "model.safetensors")["backbone.head.weight"])
        config = load(tmp_path / str(number)).config
        assert all(getattr(config, name) == value for name, value in change.items())
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(heads, 2))


@pytest.mark.parametrize(("name", "value"), [("lr_base", 1e-3), ("feature_reuse", "none"), ("seed", 1)])
def test_forks_of_another_recipe_are_refused(
    name: str, value: Any, forkable: Recipe, tmp_path: Path, fails: Callable[..., Any]
) -> None:
    """The recipe is compared before anything else is looked at."""
    trunk = tmp_path / "trunk"
    trunk.mkdir()
    torch.save({"recipe": forkable.to_dict(), "world": 1}, trunk / "all_cells.pt")
    was = getattr(forkable, name)
    allowed = "a fork may change attention_momentum, informative_ratio, selection"
    with fails(f"the run in {trunk} has {name} {was!r}, not {value!r}: give that; {allowed}$"):
        train(forkable.replace({name: value}), tmp_path / "fork", fork=trunk)


def test_runs_that_cannot_be_forked(recipe: Recipe, tmp_path: Path, fails: Callable[..., Any]) -> None:
    with fails(f"{tmp_path} holds no all_cells.pt: fork a run that is through the epochs that split all cells"):
        train(recipe, tmp_path / "fork", fork=tmp_path)
    (tmp_path / "all_cells.pt").write_bytes(b"garbage")
    with fails("all_cells.pt is damaged"):
        train(recipe, tmp_path / "fork", fork=tmp_path)
    assert not (tmp_path / "fork" / "model.safetensors").exists()


@pytest.mark.parametrize("fork_again", [False, True])
def test_forked_run_resumes(fork_again: bool, forkable: Recipe, forked_at: Path, tmp_path: Path) -> None:
    """Whether it is told again where it began or not."""
    changed = forkable.replace({"selection": "random", "informative_ratio": 0.75})
    train(changed, tmp_path / "whole", fork=forked_at)
    with pytest.raises(Stopped, match="stopped at step 8"):
        train(changed, tmp_path / "stopped", fork=forked_at, stop=_stop_at(3))
    train(changed, tmp_path / "stopped", resume=True, fork=forked_at if fork_again else None)
    for event in ("train", "eval"):
        assert _log(tmp_path / "stopped", event) == _log(tmp_path / "whole", event)
    _assert_weights_equal(tmp_path / "stopped", tmp_path / "whole")


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 of scikit-learn's digits to learn from and 200 others. Only to be read."""
    from sklearn.datasets import load_digits  # takes as long to import as torch

    folder = tmp_path_factory.mktemp("few_digits")
    scans: Any = load_digits()
    for place, i in enumerate(np.random.default_rng(0).permutation(len(scans.target))[:600].tolist()):
        target = folder / ("train" if place % 3 else "val") / str(scans.target[i])
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray((scans.images[i] * 255 / 16).astype(np.uint8)).save(target / f"{i}.png")
    return folder


@pytest.mark.usefixtures("each_block_gives_its_class_attention_here")
@pytest.mark.parametrize(
    "variants",
    [
        {"selection": "negative", "feature_reuse": "none"},
        {"selection": "random", "feature_reuse": "linear"},
        {"attention_momentum": 0.0, "feature_reuse": "class_token"},
        {"feature_reuse": "uninformative"},
    ],
    ids=lambda variants: "-".join(map(str, variants.values())),
)
def test_the_papers_variants_learn_digits(variants: dict[str, Any], few_digits: Path, tmp_path: Path) -> None:
    brief = {
        "data": str(few_digits),
        "holdout": 0.0,
        "coarse_grid": 2,
        "timm_kwargs": {"patch_size": 4, "depth": 2},
        "epochs": 7,
        "lr_base": 1e-2,
        "warmup_epochs": 0.5,
        "ema_decay": 0.0,
        "crop_scale_min": 1.0,
        "color_jitter": 0.0,
        "eval_interval": 7,
    }
    figures = train(DIGITS.replace({**brief, **variants}), tmp_path / "run")
    assert figures["validation_coarse_top1"] > 20, "chance is 10"
    assert figures["validation_fine_top1"] > 30


def test_plain_backbone_is_saved_for_timm(recipe: Recipe, tmp_path: Path) -> None:
    plain = recipe.replace({"method": "plain", "epochs": 1, "crop_pct": 1.0, "holdout": 0.0})
    figures = train(plain, tmp_path / "plain")
    assert set(figures) == {"validation_plain_top1", "validation_plain_top5"}
    checkpoint = torch.load(tmp_path / "plain" / "checkpoint.pt", weights_only=True)["model"]
    reference = create_model("test_vit", num_classes=3, coarse_grid=2, patch_size=4, depth=2).eval()
    reference.backbone.load_state_dict(checkpoint)
    backbone = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(backbone(images), reference.backbone(images))
    prepared = resolve_model_data_config(backbone)
    assert (prepared["input_size"], prepared["crop_pct"]) == ((3, 16, 16), 1.0)

    fine_tuned = recipe.replace(
        {"initial_weights": str(tmp_path / "plain"), "epochs": 1, "lr_base": 0.0, "min_lr": 0.0}
    )
    train(fine_tuned, tmp_path / "fine_tuned")
    weights = load(tmp_path / "fine_tuned").backbone.state_dict()
    for name, tensor in backbone.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, msg=name)


def _train_with_two_processes(recipe: Recipe, out: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, *_command(recipe, out, out.with_suffix(".yaml"))]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 0, ended.stderr


def test_two_processes_count_every_image_once(recipe: Recipe, colours: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    untrained = {"timm_kwargs": {"patch_size": 4}, "lr_base": 1e-6, "min_lr": 0.0}
    _train_with_two_processes(recipe.replace({**untrained, "epochs": 1, "batch_size": 8}), out)
    assert [line["step"] for line in _log(out, "train")] == [1, 2, 3, 4, 5]
    (figures,) = _log(out, "eval")
    evaluation = evaluate_model(load(out), open_data(str(colours), "validation"), [], 16, 0, CPU)
    assert evaluation.images == 33
    for score in evaluation.stages:
        assert figures[f"validation_{score.stage}_top1"] == pytest.approx(score.top1, abs=1e-3)
        assert 10 < score.top1 < 100, "figures that could tell a wrong count"


def test_processes_that_number_the_classes_otherwise_are_refused(
    recipe: Recipe,
    make_colours: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[..., Any],
) -> None:
    """As where the machines of a run do not hold the same data. This process is the first of two."""
    ours, theirs = (recipe.replace({"data": str(make_colours(name))}) for name in ("ours", "theirs"))
    (tmp_path / "theirs" / "green").rename(tmp_path / "theirs" / "yellow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        joined = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    for name, value in {**joined, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, *_command(theirs, tmp_path / "run", tmp_path / "theirs.yaml")]
    environment = {**ENVIRONMENT, **joined, "RANK": "1"}
    other = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    with fails("^class 1 of the data is 'green', and 'red' for process 1: give the data with the same class folders"):
        train(ours, tmp_path / "run")
    said = other.communicate(timeout=PATIENCE)[1].splitlines()
    assert other.returncode == 1
    expected = (
        "cfvit: class 1 of the data is 'red', and 'green' for process 0: give the data with the same class folders"
    )
    assert [line for line in said if line.startswith("cfvit:")] == [expected]
    assert not (tmp_path / "run").exists()


def test_full_disk_leaves_the_last_checkpoint(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., Any]
) -> None:
    out = tmp_path / "run"
    written = torch.save

    def fill_up(content: dict[str, Any], file: Path) -> None:
        if content["step"] == 4:
            file.write_bytes(b"the first half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(content, file)

    monkeypatch.setattr(torch, "save", fill_up)
    with fails("cannot write .*checkpoint.pt .No space left on device"):
        train(recipe.replace({"checkpoint_interval": 2}), out)
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 2
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == [
        "checkpoint.pt",
        "class_names.json",
        "log.jsonl",
        "recipe.yaml",
    ]


@pytest.mark.parametrize("interval", [500, 3])
def test_loss_that_is_no_number_ends_the_run(
    interval: int, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., Any]
) -> None:
    steps = iter(range(1, 100))

    def diverge(output: CoarseToFineOutput, *_: Any) -> Tensor:
        return output.fine.sum() * (1.0 if next(steps) < 7 else math.nan)

    monkeypatch.setattr(cf_vit, "coarse_to_fine_loss", diverge)
    with fails("the loss is nan at step .*: lower --lr-base"):
        train(recipe.replace({"epochs": 3, "checkpoint_interval": interval}), tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] in (5, 6)
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"batch_size": 100}, "81 training images do not fill one step of 100 x 1 images on 1 process"),
        ({"holdout": 0.99}, "training images do not fill one step"),
        ({"data": ""}, "no data: name what to train on"),
        ({"optimizer": "adamm"}, "optimizer 'adamm'"),
        ({"auto_augment": "rnd-m9"}, "timm cannot augment so"),
        ({"backbone": "resnet18"}, "^resnet18 is a hierarchy of convolutions"),
        ({"method": "plain", "informative_ratio": 0.3}, "informative_ratio is 0.3, without effect with --method plain"),
        ({"method": "cascade", "selection": "random"}, "selection is 'random', .*: leave it at 'attention'"),
        ({"initial_weights": "nowhere"}, "no weights at nowhere"),
        ({"data": "nowhere"}, "no data at nowhere"),
    ],
)
def test_runs_that_cannot_start(
    changes: dict[str, Any], reason: str, recipe: Recipe, tmp_path: Path, fails: Callable[..., Any]
) -> None:
    with fails(reason):
        train(recipe.replace(changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("precision", "fused"), [("bfloat16", False), ("float32", True)])
def test_attention_is_fused_on_a_cpu_but_in_half_precision(precision: str, fused: bool) -> None:
    part = torch.randn(1, 2, 5, 8, requires_grad=True)

    def is_fused() -> bool:
        output = functional.scaled_dot_product_attention(part, part, part)
        assert output.grad_fn is not None
        return "Flash" in output.grad_fn.name()

    with attention_for_gradients(Recipe().replace({"precision": precision}), torch.device("cpu")):
        assert is_fused() == fused
    assert is_fused()


def test_bfloat16_autocast(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[torch.dtype] = set()
    exact = cf_vit.coarse_to_fine_loss

    def look(output: CoarseToFineOutput, *details: Any) -> Tensor:
        seen.update(logits.dtype for logits in output if not logits.is_meta)  # without data it is only costed
        return exact(output, *details)

    monkeypatch.setattr(cf_vit, "coarse_to_fine_loss", look)
    train(recipe.replace({"epochs": 1, "precision": "bfloat16"}), tmp_path / "run")
    assert seen == {torch.bfloat16}
    assert all(math.isfinite(line["loss"]) for line in _log(tmp_path / "run", "train"))
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in load(tmp_path / "run").parameters())
