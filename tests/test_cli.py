"""The commands in this process: what they say and where, their exit status, and the numbers they give."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from calibrations import Cli, error
from conftest import COLOURS, Outcome
from PIL import Image
from torch import Tensor

import cfvit
from cfvit import CoarseToFineViT, Predictor, count_macs, eval_transform, load, open_image
from cfvit.cli import main
from cfvit.data import find_images
from cfvit.errors import CfvitError, UsageError
from cfvit.training.recipe import RECIPES, Recipe

PREDICTION_KEYS = ["path", "label", "confidence", "stage", "gmacs"]


def _json(outcome: Outcome) -> list[dict[str, Any]]:
    return [json.loads(line) for line in outcome.out]


@pytest.fixture(scope="module")
def photos(colours: Path) -> list[Path]:
    """Those of which some exit and some go on."""
    return find_images([colours / "val"])


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    path = tmp_path / "bad.png"
    path.write_text("no image")
    return path


# predict


def test_predict_gives_the_predictors_answers_as_json(cfvit_main: Cli, colour_model: Path, photos: list[Path]) -> None:
    outcome = cfvit_main("predict", photos[0].parent.parent, "--model", colour_model, "--json", "--batch-size", 7)
    assert outcome.status == 0
    rows = _json(outcome)
    assert [list(row) for row in rows] == [PREDICTION_KEYS] * len(photos)
    assert [row["path"] for row in rows] == list(map(str, photos))

    model = load(colour_model)
    transform = eval_transform(model.data_config)
    expected = Predictor(model)(torch.stack([transform(open_image(path)) for path in photos]))
    macs = count_macs(model)
    assert [row["label"] for row in rows] == [model.label_of(int(i)) for i in expected.logits.argmax(-1)]
    assert [row["confidence"] for row in rows] == pytest.approx(expected.confidence.tolist(), abs=1e-5)
    assert [row["stage"] for row in rows] == expected.stage.tolist()
    assert {(row["stage"], row["gmacs"]) for row in rows} == {(0, macs.coarse / 1e9), (1, macs.both / 1e9)}


def test_predict_sums_up_on_standard_error(cfvit_main: Cli, colour_model: Path, photos: list[Path]) -> None:
    outcome = cfvit_main("predict", *photos, "--model", colour_model, "--json")
    rows = _json(outcome)
    easy = sum(row["stage"] == 0 for row in rows)
    mean = sum(row["gmacs"] for row in rows) / len(rows)
    (summary,) = outcome.err
    assert summary.startswith(f"{len(rows)} images: {easy} answered at the coarse stage")
    assert f"{mean:.3f} GMACs each, plain backbone {count_macs(load(colour_model)).backbone / 1e9:.3f}" in summary


def test_predict_in_words(cfvit_main: Cli, colour_model: Path, photos: list[Path]) -> None:
    rows = _json(cfvit_main("predict", *photos, "--model", colour_model, "--json"))
    outcome = cfvit_main("predict", *photos, "--model", colour_model)
    assert outcome.status == 0
    assert [line.split() for line in outcome.out] == [
        [
            row["path"],
            row["label"],
            f"{row['confidence']:.1%}",
            ("coarse", "fine")[row["stage"]],
            f"{row['gmacs']:.3f}",
            "GMACs",
        ]
        for row in rows
    ]


@pytest.mark.parametrize("stage", [0, 1])
def test_threshold_0_and_1_force_a_stage(stage: int, cfvit_main: Cli, colour_model: Path, photos: list[Path]) -> None:
    outcome = cfvit_main("predict", *photos, "--model", colour_model, "--threshold", stage, "--json")
    assert {row["stage"] for row in _json(outcome)} == {stage}
    exits = 0 if stage else len(photos)
    assert f" {exits} answered at the coarse stage (eta {stage})" in outcome.err[-1]


def test_a_dear_model_is_said_to_cost_more(cfvit_main: Cli, colour_model: Path, photos: list[Path]) -> None:
    macs = count_macs(load(colour_model))
    outcome = cfvit_main("predict", photos[0], "--model", colour_model, "--threshold", 0)
    assert outcome.err[-1].startswith("1 image: ")
    assert outcome.err[-1].endswith(f"{1 - macs.coarse / macs.backbone:.0%} saved")


def test_an_unreadable_file_is_reported_and_the_others_answered(
    cfvit_main: Cli, colour_model: Path, photos: list[Path], bad: Path
) -> None:
    outcome = cfvit_main("predict", photos[0], bad, photos[1], "--model", colour_model, "--json")
    assert outcome.status == 1
    rows = _json(outcome)
    assert [row["path"] for row in rows] == [str(photos[0]), str(bad), str(photos[1])]
    assert [list(row) for row in rows] == [PREDICTION_KEYS, ["path", "error"], PREDICTION_KEYS]
    assert [line for line in outcome.err if "cfvit: " in line] == [f"cfvit: {bad}: {rows[1]['error']}"]

    outcome = cfvit_main("predict", photos[0], bad, photos[1], "--model", colour_model)
    assert outcome.status == 1
    assert [line.split()[0] for line in outcome.out] == [str(photos[0]), str(photos[1])]
    assert outcome.err[0] == f"cfvit: {bad}: {rows[1]['error']}"


def test_nothing_but_unreadable_files(cfvit_main: Cli, colour_model: Path, bad: Path) -> None:
    outcome = cfvit_main("predict", bad, "--model", colour_model)
    assert error(outcome, 1).startswith(f"{bad}: not an image")


def test_file_names_that_are_no_text_are_answered_too(
    cfvit_main: Cli, colour_model: Path, photos: list[Path], tmp_path: Path
) -> None:
    try:
        odd = Path(shutil.copy(photos[0], tmp_path / os.fsdecode(b"\xff.png")))
    except OSError:
        pytest.skip("this file system takes no such name")
    outcome = cfvit_main("predict", odd, "--model", colour_model)
    assert outcome.status == 0
    assert r"\udcff.png" in outcome.out[0]
    (row,) = _json(cfvit_main("predict", odd, "--model", colour_model, "--json"))
    assert Path(row["path"]) == odd


def test_a_name_with_line_breaks_takes_one_line(
    cfvit_main: Cli, colour_model: Path, photos: list[Path], bad: Path, tmp_path: Path
) -> None:
    odd, worse = (
        Path(shutil.copy(file, tmp_path / f"{name}\n\r\x1b[31m\u2028.png"))
        for name, file in (("odd", photos[0]), ("worse", bad))
    )
    outcome = cfvit_main("predict", odd, worse, "--model", colour_model)
    assert (outcome.status, len(outcome.out), len(outcome.err)) == (1, 1, 2)
    assert r"odd\n\r\x1b[31m\u2028.png " in outcome.out[0]
    assert r"worse\n\r\x1b[31m\u2028.png: not an image" in outcome.err[0]
    rows = _json(cfvit_main("predict", odd, worse, "--model", colour_model, "--json"))
    assert [Path(row["path"]) for row in rows] == [odd, worse]


def test_a_warning_is_given_once(cfvit_main: Cli, make_colours: Callable[..., Path], tmp_path: Path) -> None:
    """Training opens its data several times."""
    data = make_colours()
    (data / "blue" / "1.heic").touch()
    outcome = cfvit_main("train", "--data", data, "--out", tmp_path / "run", "--backbone", "resnet18")
    assert outcome.status == 1
    skipped = (
        f"cfvit: {data}: 1 file is skipped for the suffix (1 .heic): convert pictures to .jpg or .png to have them read"
    )
    assert outcome.err[:-1] == [skipped]


def test_explain_writes_a_picture_per_readable_image(
    cfvit_main: Cli, colour_model: Path, photos: list[Path], bad: Path, tmp_path: Path
) -> None:
    assert photos[0].stem == photos[11].stem
    folder = tmp_path / "pictures"
    files = (photos[0], bad, photos[11])
    assert cfvit_main("predict", *files, "--model", colour_model, "--explain", folder).status == 1
    pictures = sorted(folder.iterdir())
    assert [path.name for path in pictures] == [f"{photos[0].stem}-2.png", f"{photos[0].stem}.png"]
    for path in pictures:
        with Image.open(path) as image:
            image.verify()


def test_pictures_that_cannot_be_written(cfvit_main: Cli, colour_model: Path, photos: list[Path], bad: Path) -> None:
    outcome = cfvit_main("predict", photos[0], "--model", colour_model, "--explain", bad)
    assert error(outcome, 1).startswith("cannot write ")


# what is wrong is said in one line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "x.png", "--threshold", "1.5"], "--threshold.*<= 1"),
        (["predict", "x.png", "--threshold", "-0.1"], "--threshold.*>= 0"),
        (["predict", "x.png", "--threshold", "nan"], "nan.*--threshold"),
        (["predict", "x.png", "--batch-size", "0"], "--batch-size.*> 0"),
        (["predict", "x.png", "--treshold", "0.5"], "--treshold.*--threshold"),
        (["predict"], "PATHS"),
        (["predict", "x.png", "--output", "x.jsonl", "--ray-workers", "2"], "--ray-workers.*add --ray"),
        (["eval"], "--data"),
        (["eval", "--data", "x", "--thresholds", "0.5", "2"], "--thresholds.*<= 1"),
        (["train", "--epoch", "3"], "--epoch.*--epochs"),
        (["train", "--epochs", "three"], "--epochs.*three"),
        (["train", "--epochs", "0"], "epochs is 0: give at least 1"),
        (["train", "--precision", "int8"], "int8.*float32"),
        (["train", "--recipe", "diet"], "'diet'.*deit"),
        (["train"], "--out"),
        (["train", "--config", "nowhere.yaml", "--out", "x"], "nowhere.yaml"),
        (["convert", "x.pth"], "FOLDER"),
        (["demo", "--epochs", "0"], "--epochs.*> 0"),
        (["predikt", "x.png"], "predikt.*predict"),
        (["--modle"], "--modle"),
    ],
    ids=" ".join,
)
def test_wrong_usage(
    arguments: list[str], message: str, cfvit_main: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(message, error(cfvit_main(*arguments), 2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "nowhere.png"], "nowhere.png: no such file"),
        (["predict", "empty"], "empty: a folder without images"),
        (["predict", "photo.png", "--model", "nowhere"], "no model 'nowhere'.*deit_tiny_imagenet"),
        (["predict", "photo.png", "--model", "empty"], "empty is no saved model"),
        (["predict", "photo.png", "--model", "photo.png"], "photo.png is "),
        (["eval", "--data", "nowhere"], "no data at nowhere"),
        (["eval", "--data", "empty"], "empty has no sub-folders"),
        (["convert", "nowhere.pth", "out"], "no file nowhere.pth"),
        (["convert", "photo.png", "out"], "photo.png is "),
        (["bench", "--model", "nowhere"], "no model 'nowhere'"),
        (["train", "--data", "nowhere", "--out", "out"], "no data at nowhere"),
    ],
    ids=" ".join,
)
def test_wrong_data_or_model(
    arguments: list[str],
    message: str,
    cfvit_main: Cli,
    photos: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(photos[0], "photo.png")
    Path("empty").mkdir()
    assert re.search(message, error(cfvit_main(*arguments), 1))


def test_explain_never_overwrites_the_photos(cfvit_main: Cli, photos: list[Path]) -> None:
    before = [photo.read_bytes() for photo in photos]
    outcome = cfvit_main("predict", str(photos[0]), "--explain", str(photos[0].parent))
    assert re.search("choose another folder", error(outcome, 2))
    assert [photo.read_bytes() for photo in photos] == before


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    with pytest.raises(CfvitError, match="no model 'nowhere'"):
        main(["predict", str(tmp_path), "--model", "nowhere", "--debug"])
    with pytest.raises(UsageError, match="no recipe"):
        main(["train", "--debug", "--recipe", "nothing"])


# eval


def _by_predictor(model: CoarseToFineViT, folder: Path, eta: float) -> tuple[float, float, float]:
    """Top-1 in percent, share of exits and GMACs per image, one image at a time."""
    transform, macs = eval_transform(model.data_config), count_macs(model)
    right, stages = 0, []
    for path in sorted(folder.glob("*/*.png")):
        prediction = Predictor(model, eta)(transform(open_image(path))[None])
        right += model.label_of(int(prediction.logits.argmax())) == path.parent.name
        stages.append(int(prediction.stage))
    spent = sum(macs.both if stage else macs.coarse for stage in stages) / 1e9
    return 100 * right / len(stages), stages.count(0) / len(stages), spent / len(stages)


def test_eval_agrees_with_the_predictor(cfvit_main: Cli, colour_model: Path, colours: Path) -> None:
    model = load(colour_model)
    eta = model.threshold
    assert eta is not None
    outcome = cfvit_main(
        "eval", "--data", colours, "--model", colour_model, "--thresholds", 0, 1, "--json", "--workers", 0
    )
    assert (outcome.status, outcome.err) == (0, [])
    coarse, fine, *points = _json(outcome)
    assert [point["threshold"] for point in points] == [0, eta, 1]
    for point in points:
        expected = _by_predictor(model, colours / "val", point["threshold"])
        assert (point["accuracy"], point["exit_share"], point["gmacs"]) == pytest.approx(expected)
    assert 0 < points[1]["exit_share"] < 1
    for name, stage, point in (("coarse", coarse, points[0]), ("fine", fine, points[-1])):
        assert stage == {"stage": name, "top1": point["accuracy"], "top5": 100, "gmacs": point["gmacs"]}


def test_eval_in_words(cfvit_main: Cli, colour_model: Path, colours: Path) -> None:
    arguments = ("eval", "--data", colours, "--model", colour_model, "--thresholds", 0, 1, "--workers", 0)
    coarse, fine, _, own, _ = _json(cfvit_main(*arguments, "--json"))
    outcome = cfvit_main(*arguments)
    assert outcome.out[0].strip() == "33 images"
    rows = [line.split() for line in outcome.out]
    for stage in (coarse, fine):
        assert [stage["stage"], f"{stage['top1']:.2f}", "100.00", f"{stage['gmacs']:.3f}"] in rows
    (marked,) = [line for line in outcome.out if "(the model's)" in line]
    assert marked.split("(the model's)")[1].split()[:3] == [
        f"{own['accuracy']:.2f}",
        f"{own['exit_share']:.1%}",
        f"{own['gmacs']:.3f}",
    ]


def test_eval_leaves_out_and_reports_what_cannot_be_read(
    cfvit_main: Cli, colour_model: Path, make_colours: Callable[..., Path]
) -> None:
    data = make_colours(per_class=3)
    arguments = ("eval", "--data", data, "--model", colour_model, "--json", "--workers", 0)
    removed = Path(shutil.copy(data / "red" / "1.png", data.parent))
    (data / "red" / "1.png").unlink()
    expected = cfvit_main(*arguments)
    (data / "red" / "1.png").write_bytes(removed.read_bytes()[:100])
    outcome = cfvit_main(*arguments)
    assert (expected.status, outcome.status) == (0, 1)
    assert outcome.out == expected.out
    (line,) = outcome.err
    assert line.startswith("cfvit: ")
    assert "1.png cannot be read and is not counted" in line


def test_eval_of_nothing_readable(cfvit_main: Cli, colour_model: Path, make_colours: Callable[..., Path]) -> None:
    data = make_colours(per_class=1)
    for path in data.glob("*/*.png"):
        path.write_text("no image")
    outcome = cfvit_main("eval", "--data", data, "--model", colour_model, "--workers", 0)
    assert "none of the 3 images can be read" in error(outcome, 1)


def test_eval_of_some_classes_only(cfvit_main: Cli, colour_model: Path, make_colours: Callable[..., Path]) -> None:
    """The folder's classes 0 and 1 are the model's 1 and 2."""
    data = make_colours(per_class=5)
    shutil.rmtree(data / "blue")
    outcome = cfvit_main(
        "eval", "--data", data, "--model", colour_model, "--thresholds", 0, 1, "--json", "--workers", 0
    )
    assert outcome.status == 0
    for point in _json(outcome)[2:]:
        expected = _by_predictor(load(colour_model), data, point["threshold"])
        assert (point["accuracy"], point["exit_share"], point["gmacs"]) == pytest.approx(expected)


def test_eval_of_a_class_that_the_model_does_not_know(
    cfvit_main: Cli, colour_model: Path, make_colours: Callable[..., Path]
) -> None:
    data = make_colours()
    (data / "red").rename(data / "purple")
    outcome = cfvit_main("eval", "--data", data, "--model", colour_model)
    assert "class 'purple' of the data is not among the model's 3 classes" in error(outcome, 1)


def test_eval_of_other_classes_than_those_of_a_model_without_names(
    cfvit_main: Cli, make_model: Callable[..., CoarseToFineViT], make_colours: Callable[..., Path], tmp_path: Path
) -> None:
    cfvit.save(make_model(), tmp_path / "nameless")
    outcome = cfvit_main("eval", "--data", make_colours(), "--model", tmp_path / "nameless")
    assert "has 3 classes, the model has 7 without names" in error(outcome, 1)


# convert


def test_convert_writes_a_folder_that_gives_the_same_logits(
    cfvit_main: Cli, authors_file: Path, make_images: Callable[..., Tensor], tmp_path: Path
) -> None:
    before = hashlib.sha256(authors_file.read_bytes()).hexdigest()
    folder = tmp_path / "new" / "folder"
    outcome = cfvit_main("convert", authors_file, folder)
    assert (outcome.status, outcome.out) == (0, [])
    assert str(folder) in outcome.err[0]
    direct, converted = load(authors_file), load(folder)
    images = make_images(direct, 2)
    with torch.no_grad():
        assert torch.equal(torch.stack(list(converted(images))), torch.stack(list(direct(images))))
    assert converted.config == direct.config
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert hashlib.sha256(authors_file.read_bytes()).hexdigest() == before


def test_convert_replaces_a_model_only_if_told_to(cfvit_main: Cli, authors_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    assert cfvit_main("convert", authors_file, folder).status == 0
    (folder / "config.json").write_text("kept")
    message = error(cfvit_main("convert", authors_file, folder), 1)
    assert "already holds a model" in message
    assert "--overwrite" in message
    assert (folder / "config.json").read_text() == "kept"
    assert cfvit_main("convert", authors_file, folder, "--overwrite").status == 0
    assert load(folder).config == load(authors_file).config


def test_convert_names_a_missing_weight(cfvit_main: Cli, authors_file: Path, tmp_path: Path) -> None:
    content = torch.load(authors_file, weights_only=True)
    del content["model"]["reuse_block.1.fc1.weight"]
    torch.save(content, tmp_path / "broken.pth")
    message = error(cfvit_main("convert", tmp_path / "broken.pth", tmp_path / "folder"), 1)
    assert "reuse_block.1.fc1.weight" in message
    assert not (tmp_path / "folder").exists()


# models


def test_models_lists_what_is_bundled(cfvit_main: Cli) -> None:
    outcome = cfvit_main("models")
    assert (outcome.status, outcome.err) == (0, [])
    for name in cfvit.bundled_models():
        (line,) = [line for line in outcome.out if name in line]
        model = load(name)
        size = "x".join(map(str, model.image_size))
        for value in (size, model.config.num_classes, f"{count_macs(model).coarse / 1e9:.2f}"):
            assert str(value) in line.split()


# train


def test_print_recipe_is_a_config_that_gives_the_same_recipe(cfvit_main: Cli, tmp_path: Path) -> None:
    outcome = cfvit_main("train", "--recipe", "digits", "--print-recipe", "--epochs", 7, "--mixup", 0.25)
    assert (outcome.status, outcome.err) == (0, [])
    expected = RECIPES["digits"].replace({"epochs": 7, "mixup": 0.25})
    text = "\n".join(outcome.out)
    assert Recipe(**yaml.safe_load(text)) == expected
    config = tmp_path / "recipe.yaml"
    config.write_text(text)
    again = cfvit_main("train", "--config", config, "--print-recipe")
    assert Recipe(**yaml.safe_load("\n".join(again.out))) == expected


def test_flags_override_the_config_and_that_the_recipe(cfvit_main: Cli, tmp_path: Path) -> None:
    """Of fields that hold names with values, name by name; another method has options of its own."""
    config = tmp_path / "recipe.yaml"
    config.write_text(
        "epochs: 5\nlr_base: 1e-2\nmethod: evit\nmethod_options: {keep_rate: 0.5}\ntimm_kwargs: {depth: 3}\n"
    )
    flags = ("--epochs", 9, "--timm-kwargs.patch-size", 8, "--method", "tome", "--method-options.merged", 4)
    outcome = cfvit_main("train", "--recipe", "finetune", "--config", config, *flags, "--print-recipe")
    changes = {"epochs": 9, "lr_base": 0.01, "timm_kwargs": {"depth": 3, "patch_size": 8}}
    expected = RECIPES["finetune"].replace({**changes, "method": "tome", "method_options": {"merged": 4}})
    assert Recipe(**yaml.safe_load("\n".join(outcome.out))) == expected


def test_every_field_of_a_recipe_is_a_flag(cfvit_main: Cli) -> None:
    """Zero is a value like any other."""
    flags = ("--compile", "--mixup", 0, "--method", "plain", "--timm-kwargs.patch-size", 4, "--val-data", "x")
    printed = yaml.safe_load("\n".join(cfvit_main("train", "--recipe", "imagenette", "--print-recipe", *flags).out))
    changes = {"compile": True, "mixup": 0.0, "method": "plain", "timm_kwargs": {"patch_size": 4}, "val_data": "x"}
    assert Recipe(**printed) == RECIPES["imagenette"].replace(changes)


def test_a_mistyped_field_in_a_config_is_corrected(cfvit_main: Cli, tmp_path: Path) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text("epoch: 5\n")
    message = error(cfvit_main("train", "--config", config, "--out", tmp_path / "run"), 2)
    assert message == "there is no field 'epoch': did you mean 'epochs'?"
    assert not (tmp_path / "run").exists()


def test_train_leaves_a_model_of_the_data_and_refuses_to_start_over(
    cfvit_main: Cli, colours: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    size = ("--coarse-grid", 2, "--timm-kwargs.patch_size", 4)
    arguments = ("train", "--recipe", "digits", "--data", colours, "--out", run, "--epochs", 1, *size)
    outcome = cfvit_main(*arguments)
    assert (outcome.status, outcome.out) == (0, [])
    assert str(run) in outcome.err[-1]
    model = load(run)
    assert model.class_names == list(COLOURS)
    assert model.image_size == (16, 16)
    assert model.threshold is not None
    before = (run / "model.safetensors").read_bytes()
    message = error(cfvit_main(*arguments), 1)
    assert "--resume" in message
    assert (run / "model.safetensors").read_bytes() == before


# in a process of their own


def test_help_does_not_wait_for_torch() -> None:
    """Every command's help, and that of a bare call, in one process."""
    script = """
import contextlib, sys
from cfvit.cli import app, main
commands = [[name] for name in app if not name.startswith("-")]
for words in [[], ["--help"], ["--version"], *([*command, "--help"] for command in commands)]:
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 0, words
assert len(commands) >= 7, commands
for name, in commands:
    for argument in app[name].assemble_argument_collection(parse_docstring=True):
        assert argument.parameter.help or argument.children, (name, argument.name)
loaded = sorted({"torch", "timm", "numpy", "matplotlib"} & set(sys.modules))
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    for word in (
        "predict",
        "--threshold",
        "--thresholds",
        "--print-recipe",
        "--overwrite",
        "--rounds",
        cfvit.__version__,
    ):
        assert word in done.stdout


def test_python_m_cfvit_is_the_command_line() -> None:
    command = [sys.executable, "-m", "cfvit"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: cfvit COMMAND" in done.stdout
    done = subprocess.run([*command, "nonsense"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r'cfvit: .*"nonsense".*\n', done.stderr)


def test_cost_is_the_table_of_the_docs(cfvit_main: Cli) -> None:
    names = ("deit_tiny_patch16_224", "lvvit_tiny_patch16_224", "eva02_tiny_patch14_224")
    outcome = cfvit_main("cost", *names)
    head, rule, *rows = outcome.out
    page = (Path(__file__).parents[1] / "docs" / "backbones.md").read_text().splitlines()
    assert outcome.status == 0
    assert head.count("|") == rule.count("|") == 9
    assert [row.split(" ")[1] for row in rows] == list(names)
    assert {head, *rows} <= set(page)


def test_cost_of_other_grids_and_shares(cfvit_main: Cli) -> None:
    wide = ("cost", "test_vit", "--coarse-grid", "2x3", "--fine-share", "1", "--json")
    [line] = map(json.loads, cfvit_main(*wide).out)
    assert line["pixels"] == [64, 96]
    assert line["macs"]["100% hard"] == line["macs"]["both"]
    assert cfvit_main("cost", "test_vit", "--coarse-grid", "2y3").status == 2
    refused = cfvit_main("cost", "resnet18")
    assert refused.status == 1
    assert "hierarchy" in refused.err[0]


def test_cost_of_a_method(cfvit_main: Cli) -> None:
    [line] = map(json.loads, cfvit_main("cost", "deit_small_patch16_224", "--method", "evit", "--json").out)
    assert (line["method"], line["backbone"]) == ("evit", "deit_small_patch16_224")
    assert (round(line["gmacs"], 1), round(line["backbone_gmacs"], 1)) == (3.0, 4.6)
    half = ("cost", "deit_small_patch16_224", "--method", "evit", "--method-options.keep-rate", "0.5")
    assert cfvit_main(*half).out[-1] == "| deit_small_patch16_224 | EViT | keep 0.5 | 2.31 | 4.60 |"
    refused = cfvit_main("cost", "deit_small_patch16_224", "--method", "plain", "--method-options.keep-rate", "0.5")
    assert refused.status == 2
    assert cfvit_main("cost", "deit_small_patch16_224", "--method", "evitt").status == 2
    several = cfvit_main("cost", "test_vit", "deit_small_patch16_224", "--method", "evit")
    assert several.out[2:] == ["| deit_small_patch16_224 | EViT | keep 0.7 | 3.03 | 4.60 |"]
    assert several.err[0].startswith("test_vit is left out: the method is written for")
    for ignored in (["--method-options.keep-rate", "0.5"], ["--method", "cascade", "--fine-share", "0.2"]):
        assert cfvit_main("cost", "deit_small_patch16_224", *ignored).status == 2


def test_eval_writes_a_report(colours: Path, colour_model: Path, tmp_path: Path, cfvit_main: Cli) -> None:
    arguments = ("eval", "--data", colours, "--model", colour_model, "--workers", 0)
    outcome = cfvit_main(*arguments, "--report", tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert outcome.status == 0
    assert outcome.err[-1] == f"the report is {tmp_path / 'report' / 'report.html'}"
    assert outcome.out == cfvit_main(*arguments).out
    assert str(colour_model) in page
    assert "33 images" in page
