"""The record beside a model: whose weights and exit it is of, and what becomes of a damaged one."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from calibrations import QUICK, Cli, error, run_calibrate, store
from safetensors.torch import load_file, save_file
from torch import Tensor

from cfvit import Calibration, CoarseToFineViT, load, save
from cfvit.calibration.calibrated import read_calibration, write_calibration
from cfvit.checkpoints import apply_calibration, weights_digest

OTHER = "calibration.json was made with other weights or another fine stage than this model's: calibrate this model, "


def _changed(model: Path, change: Callable[[Tensor], Tensor]) -> None:
    weights = load_file(model / "model.safetensors")
    weights["feature_reuse.norm.bias"] = change(weights["feature_reuse.norm.bias"])
    save_file(weights, model / "model.safetensors")


def test_a_calibration_of_other_weights_is_a_warning(cfvit_main: Cli, model: Path, colours: Path) -> None:
    assert run_calibrate(cfvit_main, model, colours, "--max-drop", 1).status == 0
    file = model / "calibration.json"
    origin = read_calibration(model).origin
    assert origin is not None
    assert re.fullmatch("[0-9a-f]{16}", origin.weights)
    words = ("predict", colours / "val", "--model", model, "--json")
    before = cfvit_main(*words)
    assert len(before.err) == 1
    _changed(model, lambda bias: bias + 1e-6)
    after = cfvit_main(*words)
    assert (after.status, len(after.out)) == (0, len(before.out))
    assert [line.startswith("cfvit: ") and OTHER in line for line in after.err] == [True, False]
    with pytest.warns(UserWarning, match=re.escape(OTHER)):
        load(model)

    kept = file.rename(model.parent / "calibration.json")
    assert OTHER in cfvit_main(*words, "--calibration", kept).err[0]
    outcome = cfvit_main("eval", "--data", colours, "--against", kept, "--model", model, *QUICK)
    assert (outcome.status, len(outcome.err)) == (0, 1)
    assert OTHER in outcome.err[0]


def test_a_calibration_of_another_fine_stage_is_a_warning(cfvit_main: Cli, model: Path, colours: Path) -> None:
    assert run_calibrate(cfvit_main, model, colours, "--max-drop", 1).status == 0
    config = json.loads((model / "config.json").read_text())
    config["model"]["informative_ratio"] = 0.4
    (model / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=re.escape(OTHER)):
        load(model)


def test_the_same_weights_in_another_precision_or_an_older_calibration_are_no_warning(
    cfvit_main: Cli, model: Path, colours: Path
) -> None:
    loaded = load(model).bfloat16()
    assert weights_digest(loaded) == weights_digest(loaded.float()) != weights_digest(load(model))
    assert run_calibrate(cfvit_main, model, colours, "--max-drop", 1).status == 0
    content = json.loads((model / "calibration.json").read_text())
    del content["origin"]["weights"]
    (model / "calibration.json").write_text(json.dumps(content))
    _changed(model, lambda bias: bias + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(model)


def test_a_record_of_another_exit_is_told_and_never_applied(
    cfvit_main: Cli, model: Path, calibration: Calibration, colours: Path
) -> None:
    before = load(model).exit
    write_calibration(calibration, model / "calibration.json")
    with pytest.warns(UserWarning, match=r"calibration.json is stale and not used: .* margin, 2.0, 0.5, "):
        assert load(model).exit == before
    for words in (
        ("eval", "--data", colours, "--model", model, "--report", model / "page"),
        ("eval", "--data", colours, "--against", model),
    ):
        outcome = cfvit_main(*words, *QUICK)
        assert [outcome.status, *("is stale" in line for line in outcome.err)][:2] == [0, True], outcome
    assert "promised" not in (model / "page" / "report.html").read_text()


def test_a_record_belongs_to_the_weights_that_it_was_saved_beside(model: Path, calibration: Calibration) -> None:
    store(calibration, model)
    loaded = load(model)
    loaded.threshold = 0.123
    save(loaded, model)
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "model.safetensors"]
    assert load(model).exit == replace(calibration.exit, eta=0.123)


def test_a_calibration_can_be_applied_from_a_folder(model: Path, calibration: Calibration, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    write_calibration(calibration, other / "calibration.json")
    loaded = load(model)
    apply_calibration(loaded, other)
    assert loaded.exit == calibration.exit


def test_a_calibration_of_other_classes_is_refused(
    cfvit_main: Cli, model: Path, colours: Path, make_model: Callable[..., CoarseToFineViT], tmp_path: Path
) -> None:
    assert run_calibrate(cfvit_main, model, colours, "--max-drop", 1).status == 0
    save(make_model(), tmp_path / "other")
    file = model / "calibration.json"
    message = error(cfvit_main("predict", colours / "val", "--model", tmp_path / "other", "--calibration", file), 1)
    assert message.startswith(f"{file} does not fit: the calibration is of 3 classes and the model has 7: ")
    outcome = cfvit_main("eval", "--data", colours, "--model", tmp_path / "other", "--against", file, *QUICK)
    assert error(outcome, 1).startswith("logits of 7 classes, calibrated on 3")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\0", b"", b"[]", b"{}", b"[" * 100_000, b"null"])
def test_a_damaged_calibration_is_one_line(
    content: bytes, cfvit_main: Cli, model: Path, colours: Path, fails: Callable[..., Any]
) -> None:
    (model / "calibration.json").write_bytes(content)
    with fails(r"calibration\.json cannot be used"):
        load(model)
    for words in (("predict", colours / "val"), ("eval", "--data", colours)):
        assert "calibration.json " in error(cfvit_main(*words, "--model", model), 1)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("threshold",), 10**400),
        (("fine_share",), {"value": 5.0, "low": 0.0, "high": 9.0}),
        (("profile", "shares", 0), -3.0),
    ],
)
def test_values_that_cannot_be_are_refused(
    path: tuple[Any, ...], value: Any, cfvit_main: Cli, model: Path, colours: Path
) -> None:
    assert run_calibrate(cfvit_main, model, colours, "--max-drop", 1).status == 0
    content = json.loads((model / "calibration.json").read_text())
    part = content
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    (model / "calibration.json").write_text(json.dumps(content))
    outcome = cfvit_main(
        "eval", "--data", colours, "--against", model / "calibration.json", "--model", "deit_tiny_imagenet"
    )
    assert "calibration.json cannot be used" in error(outcome, 1)


def test_no_such_calibration(cfvit_main: Cli, model: Path, colours: Path) -> None:
    outcome = cfvit_main("predict", colours / "val", "--model", model, "--calibration", "nowhere.json")
    assert error(outcome, 1) == "no calibration at nowhere.json: make one with cfvit calibrate"
    outcome = cfvit_main("eval", "--data", colours, "--against", model)
    assert "no calibration at " in error(outcome, 1)


def test_a_file_that_is_no_calibration_is_not_said_to_be_removed(cfvit_main: Cli, model: Path, colours: Path) -> None:
    arguments = ("predict", colours / "val", "--model", model, "--calibration", model / "model.safetensors")
    message = error(cfvit_main(*arguments), 1)
    assert message.endswith("name a file of cfvit calibrate")
    assert "remove" not in message


def test_a_full_disk_leaves_the_old_calibration_and_still_shows_the_new(
    cfvit_main: Cli, model: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_calibrate(cfvit_main, model, colours, "--max-drop", 1).status == 0
    before = {path.name: path.read_bytes() for path in model.iterdir()}

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    outcome = run_calibrate(cfvit_main, model, colours, "--saving", 60)
    assert outcome.status == 1
    assert "cannot write " in outcome.err[-1]
    assert "No space left on device" in outcome.err[-1]
    assert any(line.startswith("promise: ") for line in outcome.out)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
