"""Adaptation without labels: a trained ViT teaches both stages made of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from cfvit import create_model, load, save
from cfvit.errors import UsageError
from cfvit.methods.base import create_method
from cfvit.processes import Process
from cfvit.training.loop import Stopped, train
from cfvit.training.recipe import RECIPES, Recipe
from cfvit.training.setup import assemble, open_run, prepare, with_preprocessing
from cfvit.training.step import make_batch

CPU = Process(rank=0, world=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def plain(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain ViT that was trained on the colours with labels, as its owner has it: a file of weights."""
    folder = tmp_path_factory.mktemp("plain")
    quiet: dict[str, Any] = {"auto_augment": "none", "color_jitter": 0.0, "random_erasing": 0.0}
    recipe = Recipe(
        data=(str(colours),),
        method="plain",
        backbone="test_vit",
        timm_kwargs={"patch_size": 4},
        coarse_grid=2,
        epochs=6,
        batch_size=16,
        lr_base=2e-3,
        lr_base_size=16,
        warmup_epochs=0.0,
        mixup=0.0,
        cutmix=0.0,
        ema_decay=0.0,
        drop_path_rate=0.0,
        repeated_augmentation=1,
        workers=0,
        **quiet,
    )
    figures = train(recipe, folder / "run")
    assert figures["validation_plain_top1"] > 90
    return folder / "run" / "model.safetensors"


@pytest.fixture
def recipe(colours: Path, plain: Path) -> Recipe:
    return replace(
        RECIPES["adapt"],
        data=(str(colours / "train"),),
        val_data=None,
        holdout=0.2,
        backbone="test_vit",
        timm_kwargs={"patch_size": 4},
        coarse_grid=2,
        initial_weights=str(plain),
        epochs=6,
        batch_size=16,
        lr_base=2e-3,
        lr_base_size=16,
        ema_decay=0.0,
        workers=0,
        log_interval=1,
    )


def test_both_stages_come_to_answer_as_the_plain_network(recipe: Recipe, tmp_path: Path) -> None:
    figures = train(recipe, tmp_path / "run")
    assert figures["holdout_coarse_agreement"] > 80, "chance is a third"
    assert figures["holdout_fine_agreement"] > 80
    assert not any("top1" in name for name in figures), "there are no labels"
    model = load(tmp_path / "run")
    assert model.threshold == figures["threshold"]
    assert model.class_names == ["blue", "green", "red"], "as the folder of the plain network says"
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "train"]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_the_run_starts_from_what_the_network_knows(recipe: Recipe, plain: Path) -> None:
    """With all cells split and no reuse yet, the fine stage is the plain network."""
    _, model = prepare(recipe, CPU)
    network = timm.create_model("test_vit", img_size=16, patch_size=4, num_classes=3)
    network.load_state_dict(load_file(plain))
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fine = model.eval()(images, informative_ratio=1.0).fine
        torch.testing.assert_close(fine, network.eval()(images), atol=1e-5, rtol=1e-5)


def test_labels_go_by_the_names_of_the_classes(
    recipe: Recipe, plain: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """The network keeps the order of its answers, whatever that of the data's folders."""
    theirs = Path(shutil.copytree(plain.parent, tmp_path / "theirs", ignore=shutil.ignore_patterns("*.pt", "recipe*")))
    config = json.loads((theirs / "config.json").read_text())
    config["label_names"] = ["red", "blue", "green"]
    (theirs / "config.json").write_text(json.dumps(config))
    weights = load_file(plain)
    answers = {name: tensor[[2, 0, 1]] for name, tensor in weights.items() if name.startswith("head.")}
    save_file({**weights, **answers}, theirs / "model.safetensors")
    labelled = replace(recipe, initial_weights=str(theirs), label_weight=1.0, epochs=1, lr_base=1e-6, initial_share=0.0)
    figures = train(labelled, tmp_path / "run")
    assert figures["holdout_coarse_top1"] > 60 and figures["holdout_fine_top1"] > 60, "chance is a third"
    assert load(tmp_path / "run").class_names == ["red", "blue", "green"]
    assert not [warning for warning in recwarn if "other classes" in str(warning.message)]


def test_the_weights_bring_how_their_images_are_prepared(
    recipe: Recipe, plain: Path, tmp_path: Path, fails: Callable[..., Any]
) -> None:
    """Of a folder, also for the teacher, and of a model; what is given for timm goes before."""
    theirs = Path(shutil.copytree(plain.parent, tmp_path / "theirs", ignore=shutil.ignore_patterns("*.pt", "recipe*")))
    config = json.loads((theirs / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.9, 0.8, 0.7], "crop_pct": 0.8}
    (theirs / "config.json").write_text(json.dumps(config))
    made = create_model(
        "test_vit", num_classes=3, coarse_grid=2, patch_size=4, pretrained_backbone=theirs / "model.safetensors"
    )
    assert (made.data_config["mean"], made.class_names) == ((0.1, 0.2, 0.3), ["blue", "green", "red"])
    started = with_preprocessing(replace(recipe, initial_weights=str(theirs), epochs=1, method="plain"))
    _, model = prepare(started, CPU)
    assert assemble(started, model, 90, CPU).teacher.data_config["std"] == (0.9, 0.8, 0.7)  # pyright: ignore
    one_size = {**recipe.timm_kwargs, "dynamic_img_size": False}
    other = replace(recipe, initial_weights=str(theirs), epochs=1, method="dvt", timm_kwargs=one_size)
    train(other, tmp_path / "run")
    assert open_run(tmp_path / "run")[2].data_config["mean"] == (0.1, 0.2, 0.3)
    save(made, tmp_path / "model")
    given = {"patch_size": 4, "pretrained_cfg_overlay": {"mean": [0.4, 0.4, 0.4]}}
    after = with_preprocessing(replace(recipe, initial_weights=str(tmp_path / "model"), timm_kwargs=given))
    assert after.timm_kwargs["pretrained_cfg_overlay"]["mean"] == [0.4, 0.4, 0.4]
    assert prepare(after, CPU)[1].data_config["crop_pct"] == 0.8
    config["pretrained_cfg"]["mean"] = "bright"
    (theirs / "config.json").write_text(json.dumps(config))
    with fails("theirs does not say how images are prepared .*mean"):
        train(replace(recipe, initial_weights=str(theirs)), tmp_path / "other")


def test_the_teacher_answers_for_the_mixed_view_and_does_not_learn(recipe: Recipe) -> None:
    always = replace(recipe, mix_probability=1.0, mixup=0.8, cutmix=0.0)
    data, model = prepare(always, CPU)
    trained = assemble(always, model, len(data.train), CPU)
    assert trained.teacher is not None
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = make_batch(always, trained, [images.clone(), torch.zeros(4, dtype=torch.long)], 3, CPU.device)
    assert batch.target is None and batch.teacher is not None
    assert not torch.allclose(batch.images, images), "images are mixed with one another"
    plain: Any = create_method("plain").build(recipe.model_config(3), recipe.initial_weights).eval()
    with torch.no_grad():
        torch.testing.assert_close(batch.teacher, plain(batch.images), atol=1e-5, rtol=1e-5)
    assert not batch.teacher.requires_grad


def test_photos_may_lie_anywhere_and_labelled_data_scores_beside_them(
    recipe: Recipe, colours: Path, plain: Path, tmp_path: Path
) -> None:
    deep = tmp_path / "photos" / "2019" / "summer"
    shutil.copytree(colours / "train", deep)
    named = tmp_path / "named"
    named.mkdir()
    shutil.copy(plain.with_name("config.json"), named)
    shutil.copy(plain, named)
    several = replace(
        recipe,
        data=(str(tmp_path / "photos"), f"{colours / 'train'}@5"),
        initial_weights=str(named),
        val_data=str(colours),
        epochs=1,
    )
    data, _ = prepare(several, CPU)
    assert len(data.train) == round(0.8 * (90 + 15))
    figures = train(several, tmp_path / "run")
    assert {"validation_fine_top1", "validation_fine_agreement", "holdout_fine_agreement"} <= set(figures)
    assert load(tmp_path / "run").class_names == ["blue", "green", "red"]


def test_it_resumes_as_if_nothing_had_happened(recipe: Recipe, tmp_path: Path) -> None:
    steps = iter(range(100))
    train(replace(recipe, epochs=2), tmp_path / "whole")
    with pytest.raises(Stopped):
        train(replace(recipe, epochs=2), tmp_path / "stopped", stop=lambda: next(steps) == 5)
    train(replace(recipe, epochs=2), tmp_path / "stopped", resume=True)
    for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items():
        torch.testing.assert_close(load_file(tmp_path / "stopped" / "model.safetensors")[name], tensor)


def test_the_saved_model_is_part_of_the_way_back_to_where_the_run_began(recipe: Recipe, tmp_path: Path) -> None:
    _, model = prepare(recipe, CPU)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved, reached = {}, {}
    for share in (0.0, 0.25, 1.0):
        train(replace(recipe, epochs=1, initial_share=share), tmp_path / f"{share}")
        saved[share] = load(tmp_path / f"{share}").state_dict()
        reached[share] = torch.load(tmp_path / f"{share}" / "checkpoint.pt")["model"]
    for name, begun in start.items():
        torch.testing.assert_close(reached[0.25][name], reached[0.0][name], msg="training itself is as without")
        torch.testing.assert_close(saved[0.0][name], reached[0.0][name])
        torch.testing.assert_close(saved[0.25][name], 0.75 * reached[0.0][name] + 0.25 * begun)
        torch.testing.assert_close(saved[1.0][name], begun)


@pytest.mark.parametrize("method", ["cf_vit", "sit", "ia_red2", "dvt"])
def test_a_run_of_any_method_is_opened_from_its_folder(
    method: str, recipe: Recipe, plain: Path, colours: Path, cfvit_main: Callable[..., Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    one_size = {**recipe.timm_kwargs, "dynamic_img_size": False}
    half = replace(recipe, method=method, epochs=2, initial_share=0.5, val_data=str(colours), timm_kwargs=one_size)
    figures = train(half, run)
    begun, reached = prepare(half, CPU)[1].state_dict(), torch.load(run / "checkpoint.pt")["model"]
    _, made, network = open_run(run)
    for name, tensor in network.named_parameters():
        share = 0.0 if made.is_added(name) else 0.5
        torch.testing.assert_close(tensor, reached[name].lerp(begun[name], share), msg=name)
    weights = load_file(run / "model.safetensors")
    save_file({k: v.bfloat16() if v.is_floating_point() else v for k, v in weights.items()}, run / "model.safetensors")
    given = ["--model", run, "--data", colours, "--plain", plain, "--workers", "0", "--json"]
    outcome = cfvit_main("eval", *given)
    lines = [line for line in map(json.loads, outcome.out) if "stage" in line]
    assert [line["stage"] for line in lines][: len(made.points(network))] == list(made.points(network))
    for line in lines[: len(made.points(network))]:
        assert line["top1"] == pytest.approx(figures[f"validation_{line['stage']}_top1"], abs=4), (
            "bfloat16 moves little"
        )
        assert line["agreement"] == pytest.approx(figures[f"validation_{line['stage']}_agreement"], abs=4)
        assert line["gmacs"] == pytest.approx(made.macs(network)[line["stage"]] / 1e9, rel=0.1)
    assert (len(lines) > len(made.points(network))) == (method == "dvt")
    if method == "dvt":
        assert lines[0]["gmacs"] <= lines[-1]["gmacs"] <= lines[-2]["gmacs"]


def test_what_a_method_adds_learns_alone_at_first_and_by_a_rate_of_its_own(
    recipe: Recipe, tmp_path: Path, fails: Callable[..., Any]
) -> None:
    one_size = {**recipe.timm_kwargs, "dynamic_img_size": False}
    apart = replace(recipe, method="dynamicvit", epochs=2, added_lr_scale=10.0, timm_kwargs=one_size)
    begun = prepare(apart, CPU)[1].state_dict()
    for alone in (2, 1):  # of two epochs
        train(replace(apart, added_only_epochs=alone), tmp_path / f"{alone}")
        checkpoint = torch.load(tmp_path / f"{alone}" / "checkpoint.pt")
        for name, tensor in checkpoint["model"].items():
            learns = name.startswith("predictors.") or alone == 1
            assert torch.equal(tensor, begun[name]) != learns, name
    rates = {group["added"]: group["lr"] for group in checkpoint["optimizer"]["param_groups"]}
    assert rates[True] == pytest.approx(10 * rates[False])
    with fails("cf_vit adds no weights to the ViT: leave out added_lr_scale", UsageError):
        train(replace(recipe, added_lr_scale=10.0), tmp_path / "none")


def test_a_share_of_random_weights_is_refused(recipe: Recipe, fails: Callable[..., Any]) -> None:
    labelled = replace(recipe, label_weight=1.0, fine_teacher_weight=0.0, coarse_teacher_weight=0.0)
    lost = replace(labelled, initial_weights=None, initial_share=0.3)
    with fails("initial_share is 0.3 in a run from random weights", UsageError):
        assemble(lost, prepare(lost, CPU)[1], 90, CPU)


def test_another_architecture_may_teach(recipe: Recipe, tmp_path: Path) -> None:
    other = timm.create_model("test_efficientnet", num_classes=3)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    taught = replace(recipe, teacher="test_efficientnet", teacher_weights=str(tmp_path / "other.safetensors"), epochs=1)
    assert "holdout_fine_agreement" in train(taught, tmp_path / "run")


def test_what_cannot_teach_is_refused(recipe: Recipe, tmp_path: Path, fails: Callable[..., Any]) -> None:
    with fails("a run without labels starts from a trained ViT", UsageError):
        train(replace(recipe, initial_weights=None), tmp_path / "a")
    with fails("a run without labels learns from a teacher", UsageError):
        unlabelled = {"fine_teacher_weight": 0.0, "coarse_teacher_weight": 0.0, "coarse_fine_weight": 1.0}
        train(recipe.replace(unlabelled), tmp_path / "b")
    train(replace(recipe, epochs=1), tmp_path / "adapted")
    with fails("starts from the coarse-to-fine model .*adapted, which is no teacher: name a plain ViT", UsageError):
        train(replace(recipe, initial_weights=str(tmp_path / "adapted")), tmp_path / "c")


def test_a_start_of_other_classes_does_not_teach(
    recipe: Recipe, colours: Path, tmp_path: Path, fails: Callable[..., Any]
) -> None:
    other: Any = timm.create_model("test_vit", img_size=16, patch_size=4, num_classes=12)
    save_file(other.state_dict(), tmp_path / "twelve.safetensors")
    labelled = recipe.replace(
        {"data": str(colours), "label_weight": 1.0, "initial_weights": str(tmp_path / "twelve.safetensors")}
    )
    with fails("twelve.safetensors has 12 classes, the data 3, so it cannot teach them"):
        train(labelled, tmp_path / "run")
