"""``cfvit calibrate`` from the command line to the file, what then uses it, and how drift is told."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import tarfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COLOURS, Outcome
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import cfvit
from cfvit import (
    Calibration,
    CfvitError,
    CoarseState,
    CoarseToFineViT,
    Predictor,
    StageMacs,
    calibrate,
    count_macs,
    load,
    save,
)
from cfvit.benchmark.measure import compare_with_backbone
from cfvit.calibration import (
    Accuracy,
    Drop,
    GmacsBudget,
    LatencyBudget,
    Risk,
    Saving,
    StageLatency,
    Target,
    check_drift,
)
from cfvit.calibration.overlap import shared_images
from cfvit.calibration.records import parse_record, read_calibration, write_calibration
from cfvit.calibration.temperature import fit_temperature
from cfvit.checkpoints import apply_calibration, save_exit, weights_digest
from cfvit.data import (
    EvalImages,
    eval_transform,
    find_images,
    open_data,
    open_image,
    open_images,
    split_holdout,
)
from cfvit.evaluation import calibrate as calibrate_module
from cfvit.evaluation.calibrate import NOT_COMPARED, measure_latency
from cfvit.modeling.exit import Exit, Measure, confidence_of, goes_on
from cfvit.plots.explain import explain
from cfvit.training.recipe import DIGITS

Cli = Callable[..., Outcome]
Images = tuple[Tensor, Tensor, Tensor]
MEASURES: tuple[Measure, ...] = ("max_probability", "margin", "entropy", "energy")
QUICK = ("--workers", 0)


def _error(outcome: Outcome, status: int) -> str:
    """The one line on standard error of a command that failed and said nothing else."""
    assert (outcome.status, outcome.out) == (status, []), outcome
    (line,) = outcome.err
    assert line.startswith("cfvit: ")
    return line.removeprefix("cfvit: ")


@pytest.fixture(scope="module")
def pixels(colour_model: Path, colours: Path) -> Tensor:
    """``val`` as a model sees it."""
    images = EvalImages(open_data(str(colours), "validation"), load(colour_model).data_config)
    return torch.stack([images[i][0] for i in range(len(images))])


@pytest.fixture(scope="module")
def network(colour_model: Path, colours: Path, pixels: Tensor) -> CoarseToFineViT:
    """The untrained model with its classes named so that the fine stage is better. Only to be read."""
    model = load(colour_model)
    with torch.inference_mode():
        coarse, fine = (logits.argmax(-1) for logits in model(pixels))
    labels = _labels(list(COLOURS), colours)

    def gain(order: tuple[int, ...]) -> int:
        wanted = torch.tensor(order)[labels]
        return int((fine == wanted).sum() - (coarse == wanted).sum())

    best = max(itertools.permutations(range(3)), key=gain)
    assert gain(best) > 3
    model.class_names = [name for _, name in sorted(zip(best, COLOURS, strict=True))]
    return model


def _labels(class_names: list[str], colours: Path) -> Tensor:
    source = open_data(str(colours), "validation").aligned(class_names)
    return torch.tensor([source.read(i)[1] for i in range(len(source))])


@pytest.fixture(scope="module")
def saved(network: CoarseToFineViT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save(network, folder)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A saved model that a test may calibrate."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture(scope="module")
def images(network: CoarseToFineViT, pixels: Tensor, colours: Path) -> Images:
    """Logits of both stages and labels of ``val``."""
    with torch.inference_mode():
        coarse, fine = network(pixels)
    return coarse, fine, _labels(network.class_names or [], colours)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is counted once for all tests, which would spend most of their time on it."""
    for module in ("cfvit.modeling.cost", "cfvit.evaluation.calibrate", "cfvit.evaluation.metrics"):
        monkeypatch.setattr(f"{module}.count_macs", _macs)


def _macs(model: CoarseToFineViT) -> StageMacs:
    key = repr(model.config)
    if key not in COUNTED:
        COUNTED[key] = count_macs(model)
    return COUNTED[key]


COUNTED: dict[str, StageMacs] = {}


def _run(cfvit_main: Cli, model: Path | str, data: Path | str, *more: object) -> Outcome:
    return cfvit_main("calibrate", "--data", data, "--model", model, *QUICK, *map(str, more))


def _store(calibration: Calibration, folder: Path) -> None:
    """What `cfvit calibrate` leaves in a model's folder."""
    write_calibration(calibration, folder / "calibration.json")
    save_exit(calibration.exit, folder)


def _assert_alike(found: Calibration, expected: Calibration) -> None:
    """Up to rounding, as batches are cut otherwise, and to where it comes from, which only the command knows."""
    for each in (found, expected):
        assert isinstance(each, Calibration)
    said = replace(expected, origin=None, warnings=(*expected.warnings, NOT_COMPARED))
    _assert_close(asdict(replace(found, origin=None)), asdict(said))


def _assert_close(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            _assert_close(found[key], expected[key])
    else:
        assert found == (pytest.approx(expected, abs=1e-5) if isinstance(expected, (int, float, list)) else expected)


# what is chosen and written


def _budget(network: CoarseToFineViT) -> float:
    return round(_macs(network).expected(0.4) / 1e9, 6)


@pytest.mark.parametrize(
    ("flags", "target"),
    [
        (["--gmacs", "BUDGET"], None),
        (["--saving", "55%"], Saving(55)),
        (["--saving", "55"], Saving(55)),
        (["--accuracy", "20"], Accuracy(20)),
        (["--accuracy", "20%"], Accuracy(20)),
        (["--max-drop", "2.5"], Drop(2.5)),
        (["--latency-ms", "2"], LatencyBudget(2)),
        (["--risk", "0.3"], Risk(0.3)),
        (["--risk", "0.3", "--confidence", "0.8", "--method", "fixed_sequence"], Risk(0.3, 0.8, "fixed_sequence")),
    ],
)
def test_each_target_gives_what_calibrate_gives_for_the_logits(
    flags: list[str],
    target: Target | None,
    cfvit_main: Cli,
    model: Path,
    network: CoarseToFineViT,
    colours: Path,
    images: Images,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed: list[tuple[int, ...]] = []

    def time_stages(model: CoarseToFineViT, images: Tensor) -> StageLatency:
        timed.append(tuple(images.shape))
        return StageLatency(1, 3)  # whatever the batch, so that all sizes lie on one line

    monkeypatch.setattr(calibrate_module, "time_stages", time_stages)
    target = target or GmacsBudget(_budget(network))
    flags = [str(_budget(network)) if flag == "BUDGET" else flag for flag in flags]
    outcome = _run(cfvit_main, model, colours, *flags, "--batch-size", 5)
    assert outcome.status == 0, outcome.err
    latency = StageLatency(1, 3) if isinstance(target, LatencyBudget) else None
    assert timed == ([(size, 3, *network.image_size) for size in (1, 2, 3, 5)] if latency else [])
    expected = calibrate(*images, _macs(network), target, latency=latency)
    _assert_alike(read_calibration(model), expected)


def test_latency_is_measured_on_the_model(cfvit_main: Cli, model: Path, colours: Path) -> None:
    assert _run(cfvit_main, model, colours, "--latency-ms", 1e6, "--batch-size", 2).status == 0
    chosen = read_calibration(model)
    assert chosen.latency is not None
    assert 0 < chosen.latency.low <= chosen.latency.value <= chosen.latency.high


def test_a_few_hard_images_are_timed_as_such(network: CoarseToFineViT, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = {1: 4.0, 2: 6.0, 4: 5.0, 8: 16.0}  # ms of a batch; the third is a disturbance

    def time_stages(model: CoarseToFineViT, images: Tensor) -> StageLatency:
        coarse = 0.5 if len(images) == 8 else 1.0
        return StageLatency(coarse, coarse + fine[len(images)] / len(images))

    monkeypatch.setattr(calibrate_module, "time_stages", time_stages)
    found = measure_latency(network, 8)
    assert (found.coarse, found.both) == (0.5, 2.5)
    assert found.between == pytest.approx([0.5 + ms / 8 for ms in (4, 6, 6, 6, 8.5, 11, 13.5)])
    monkeypatch.setattr(calibrate_module, "time_stages", lambda *arguments: StageLatency(1, 3))
    assert measure_latency(network, 1) == StageLatency(1, 3)


@pytest.mark.parametrize("measure", MEASURES)
def test_the_measure_is_chosen_stored_and_used(
    measure: Measure,
    cfvit_main: Cli,
    model: Path,
    network: CoarseToFineViT,
    colours: Path,
    pixels: Tensor,
    images: Images,
) -> None:
    assert _run(cfvit_main, model, colours, "--gmacs", _budget(network), "--measure", measure).status == 0
    loaded = load(model)
    chosen = read_calibration(model)
    _assert_alike(chosen, calibrate(*images, _macs(network), GmacsBudget(_budget(network)), measure=measure))
    assert loaded.exit == Exit(measure, eta=chosen.threshold)
    assert loaded.threshold == chosen.threshold
    prediction = Predictor(loaded)(pixels)
    assert 0 < prediction.stage.sum() < len(pixels)
    confidence = confidence_of(images[0], measure)
    hard = goes_on(confidence, chosen.threshold)
    assert torch.equal(prediction.stage, hard.long())
    expected = torch.where(hard, confidence_of(images[1], measure), confidence)
    torch.testing.assert_close(prediction.confidence, expected, atol=1e-5, rtol=1e-5)


def test_only_eta_and_its_record_are_written(cfvit_main: Cli, model: Path, colours: Path) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    outcome = _run(cfvit_main, model, colours, "--max-drop", 1)
    assert outcome.err == [f"written to {model / 'calibration.json'}"]
    assert [line for line in outcome.out if NOT_COMPARED in line] == [f"warning: {NOT_COMPARED}"]
    after = {path.name: path.read_bytes() for path in model.iterdir()}
    written = json.loads(after.pop("calibration.json"))
    configs = [json.loads(files.pop("config.json")) for files in (before, after)]
    assert after == before
    assert configs[1].pop("exit")["eta"] == written["threshold"] != configs[0].pop("exit")["eta"]
    assert configs[0] == configs[1]
    origin = written["origin"]
    assert (origin["data"], origin["cfvit"], origin["temperature_images"]) == (str(colours), cfvit.__version__, 0)
    assert datetime.fromisoformat(origin["date"]).tzinfo is not None
    assert (written["images"], written["target"]) == (33, {"kind": "Drop", "points": 1.0})


def test_the_table_shows_each_figure_with_its_interval(cfvit_main: Cli, model: Path, colours: Path) -> None:
    outcome = _run(cfvit_main, model, colours, "--risk", 0.001)
    chosen = read_calibration(model)
    text = "\n".join(outcome.out)
    assert f"eta {chosen.threshold:.9g}, max_probability, 33 images" in text
    for name, figure, form in (
        ("accuracy %", chosen.accuracy, ".2f"),
        ("drop, points", chosen.drop, ".2f"),
        ("GMACs", chosen.gmacs, ".3f"),
        ("saving %", chosen.saving, ".1f"),
    ):
        assert re.search(rf"{name} +{figure.value:{form}} +{figure.low:{form}} to {figure.high:{form}}", text)
    assert re.search(rf"exit share +{chosen.exit_share:.1%} +{1 - chosen.fine_share.high:.1%} to ", text)
    assert f"promise: {chosen.promise}" in outcome.out
    assert [f"warning: {warning}" for warning in chosen.warnings] == outcome.out[-len(chosen.warnings) :]
    assert "33 images are too few to promise this" in text


def test_json_is_the_calibration(cfvit_main: Cli, model: Path, colours: Path) -> None:
    (line,) = _run(cfvit_main, model, colours, "--max-drop", 1, "--json").out
    assert parse_record(Calibration, line, "line") == read_calibration(model)


def test_whether_training_images_were_looked_for_is_among_the_warnings(
    cfvit_main: Cli, model: Path, colours: Path
) -> None:
    for flags, said in (((), True), (("--train-data", colours), False)):
        (line,) = _run(cfvit_main, model, colours, "--max-drop", 1, "--json", *flags).out
        assert (NOT_COMPARED in json.loads(line)["warnings"]) is said
        assert (NOT_COMPARED in read_calibration(model).warnings) is said


def test_temperatures_are_fitted_on_other_images_than_eta_is_chosen_on(
    cfvit_main: Cli, model: Path, network: CoarseToFineViT, colours: Path, images: Images
) -> None:
    arguments = ("--risk", 0.4, "--temperature-scaling", "--measure", "entropy")
    outcome = _run(cfvit_main, model, colours, *arguments)
    chosen = read_calibration(model)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    fitted, kept = order[:16], order[16:]
    temperatures = [fit_temperature(logits[fitted], images[2][fitted]) for logits in images[:2]]
    coarse, fine, labels = (column[kept] for column in images)
    expected = calibrate(
        coarse,
        fine,
        labels,
        _macs(network),
        Risk(0.4),
        measure="entropy",
        coarse_temperature=temperatures[0],
        fine_temperature=temperatures[1],
    )
    assert (chosen.coarse_temperature, chosen.fine_temperature) == pytest.approx(temperatures, abs=1e-4)
    assert (chosen.images, chosen.threshold) == (17, pytest.approx(expected.threshold, abs=1e-4))
    assert any(line.startswith("temperatures: ") and "on 16 other images" in line for line in outcome.out)
    assert load(model).exit == Exit("entropy", chosen.coarse_temperature, chosen.fine_temperature, chosen.threshold)
    again = _run(cfvit_main, model, colours, *arguments)
    assert again.out == outcome.out


@pytest.mark.parametrize(("blues", "fitted"), [(4, True), (5, False)])
def test_a_class_that_only_one_half_has_is_told(
    blues: int, fitted: bool, cfvit_main: Cli, model: Path, make_colours: Callable[..., Path]
) -> None:
    data = make_colours(per_class=9)
    for i in range(1, 9):
        (data / "green" / f"{i}.png").unlink()
    for i in range(blues, 9):
        (data / "blue" / f"{i}.png").unlink()
    outcome = _run(cfvit_main, model, data, "--max-drop", 1, "--temperature-scaling", "--json")
    (line,) = map(json.loads, outcome.out)
    other = (blues + 10) // 2
    half = (
        f"{blues + 10 - other} images, so nothing is known of them"
        if fitted
        else f"{other} images that temperatures were fitted on: give more of them"
    )
    assert [warning for warning in line["warnings"] if "class" in warning] == [f"class 'green' has none of the {half}"]


def test_unreadable_images_are_reported_and_left_out(
    cfvit_main: Cli, model: Path, make_colours: Callable[..., Path]
) -> None:
    data = make_colours()
    (data / "red" / "1.png").write_text("no image")
    outcome = _run(cfvit_main, model, data, "--max-drop", 1)
    assert outcome.status == 1
    assert "1.png cannot be read and is not counted" in outcome.err[0]
    assert read_calibration(model).images == 11


# what is printed


@pytest.mark.parametrize("measure", MEASURES)
def test_predict_shows_only_shares_in_percent(
    measure: Measure, cfvit_main: Cli, model: Path, colours: Path, calibration: Calibration
) -> None:
    chosen = replace(calibration, measure=measure, threshold=0.99996)
    _store(chosen, model)
    photo = colours / "val" / "red" / "0.png"
    outcome = cfvit_main("predict", photo, "--model", model)
    (row,) = map(json.loads, cfvit_main("predict", photo, "--model", model, "--json").out)
    form = ".1%" if measure in ("max_probability", "margin") else ".4f"
    assert outcome.out[0].split()[2] == f"{row['confidence']:{form}}"
    assert "(eta 0.99996), " in outcome.err[-1]


@pytest.mark.parametrize(("eta", "text"), [("0", "0"), ("0.5534", "0.553"), ("0.9999", "0.9999"), ("1", "1")])
def test_eta_has_the_digits_that_it_needs(eta: str, text: str, cfvit_main: Cli, model: Path, colours: Path) -> None:
    photo = colours / "val" / "red" / "0.png"
    assert f"(eta {text}), " in cfvit_main("predict", photo, "--model", model, "--threshold", eta).err[-1]
    outcome = cfvit_main("eval", "--data", colours, "--model", model, "--thresholds", eta, *QUICK)
    assert text in [line.split()[0] for line in outcome.out if line.strip()]


# --out and --calibration


def test_out_leaves_the_model_as_it_is(
    cfvit_main: Cli, model: Path, network: CoarseToFineViT, colours: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    out = tmp_path / "new" / "mine.json"
    arguments = (model, colours, "--gmacs", _budget(network), "--measure", "margin", "--out", out)
    outcome = _run(cfvit_main, *arguments)
    assert outcome.err[-1] == f"written to {out}: give it to predict and eval with --calibration {out}"
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert _run(cfvit_main, *arguments).status == 0, "a former calibration may be replaced"

    chosen = read_calibration(out)
    outcome = cfvit_main("predict", colours / "val", "--model", model, "--calibration", out, "--json")
    rows = [json.loads(line) for line in outcome.out]
    assert sum(row["stage"] for row in rows) == round(chosen.fine_share.value * chosen.images)
    outcome = cfvit_main(
        "eval", "--data", colours, "--model", model, "--calibration", out, "--thresholds", 1, "--json", *QUICK
    )
    own, _ = (json.loads(line) for line in outcome.out[2:])
    assert own["threshold"] == chosen.threshold
    assert (own["accuracy"], own["exit_share"]) == pytest.approx((chosen.accuracy.value, chosen.exit_share))


def test_predict_and_eval_use_the_models_calibration(
    cfvit_main: Cli, model: Path, network: CoarseToFineViT, colours: Path
) -> None:
    assert _run(cfvit_main, model, colours, "--gmacs", _budget(network), "--measure", "energy").status == 0
    chosen = read_calibration(model)
    loaded = load(model)
    transform = eval_transform(loaded.data_config)
    photos = [transform(open_image(path)) for path in find_images([colours / "val"])]
    prediction = Predictor(loaded)(torch.stack(photos))
    assert 0 < prediction.stage.sum() < 33
    outcome = cfvit_main("predict", colours / "val", "--model", model, "--json")
    rows = [json.loads(line) for line in outcome.out]
    assert [row["stage"] for row in rows] == prediction.stage.tolist()
    assert [row["confidence"] for row in rows] == pytest.approx(prediction.confidence.tolist(), abs=1e-5)
    outcome = cfvit_main("eval", "--data", colours, "--model", model, *QUICK)
    (marked,) = [line for line in outcome.out if "(the model's)" in line]
    assert f"{chosen.accuracy.value:.2f}" in marked
    assert f"{chosen.exit_share:.1%}" in marked


def test_a_bundled_model_is_calibrated_into_a_file(cfvit_main: Cli, tmp_path: Path) -> None:
    name = cfvit.bundled_models()[0]
    words = load(name).class_names
    assert words is not None
    for i, word in enumerate(words):
        (tmp_path / "data" / word).mkdir(parents=True)
        Image.new("RGB", (32, 32), (25 * i, 100, 200 - 15 * i)).save(tmp_path / "data" / word / "0.png")
    message = _error(_run(cfvit_main, name, tmp_path / "data", "--max-drop", 1), 2)
    assert message == f"{name} is no folder to write to: name a file with --out FILE.json"
    out = tmp_path / "mine.json"
    assert _run(cfvit_main, name, tmp_path / "data", "--max-drop", 1, "--out", out).status == 0
    assert read_calibration(out).classes == 10


def test_authors_files_are_calibrated_into_a_file(cfvit_main: Cli, authors_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for i in range(3):
        (folder / str(i)).mkdir(parents=True)
        Image.new("RGB", (20, 20), (80 * i, 100, 10)).save(folder / str(i) / "0.png")
    before = authors_file.read_bytes()
    assert "--out FILE.json" in _error(_run(cfvit_main, authors_file, folder, "--max-drop", 1), 2)
    assert _run(cfvit_main, authors_file, folder, "--max-drop", 1, "--out", tmp_path / "a.json").status == 0
    assert authors_file.read_bytes() == before


def test_a_calibration_of_other_classes_is_refused(
    cfvit_main: Cli, model: Path, colours: Path, make_model: Callable[..., CoarseToFineViT], tmp_path: Path
) -> None:
    assert _run(cfvit_main, model, colours, "--max-drop", 1).status == 0
    save(make_model(), tmp_path / "other")
    file = model / "calibration.json"
    message = _error(cfvit_main("predict", colours / "val", "--model", tmp_path / "other", "--calibration", file), 1)
    assert message.startswith(f"{file} does not fit: the calibration is of 3 classes and the model has 7: ")
    outcome = cfvit_main("eval", "--data", colours, "--model", tmp_path / "other", "--against", file, *QUICK)
    assert _error(outcome, 1).startswith("logits of 7 classes, calibrated on 3")


# weights that it was not made with

OTHER = "calibration.json was made with other weights than this model's: calibrate this model, "


def _changed(model: Path, change: Callable[[Tensor], Tensor]) -> None:
    weights = load_file(model / "model.safetensors")
    weights["feature_reuse.norm.bias"] = change(weights["feature_reuse.norm.bias"])
    save_file(weights, model / "model.safetensors")


def test_a_calibration_of_other_weights_is_a_warning(cfvit_main: Cli, model: Path, colours: Path) -> None:
    assert _run(cfvit_main, model, colours, "--max-drop", 1).status == 0
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


def test_the_same_weights_in_another_precision_or_an_older_calibration_are_no_warning(
    cfvit_main: Cli, model: Path, colours: Path
) -> None:
    loaded = load(model).bfloat16()
    assert weights_digest(loaded) == weights_digest(loaded.float()) != weights_digest(load(model))
    assert _run(cfvit_main, model, colours, "--max-drop", 1).status == 0
    content = json.loads((model / "calibration.json").read_text())
    del content["origin"]["weights"]
    (model / "calibration.json").write_text(json.dumps(content))
    _changed(model, lambda bias: bias + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(model)


# what is refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "^no target is given: give one of --gmacs, --saving, --latency-ms, --accuracy, --max-drop, --risk$"),
        (["--gmacs", "1", "--risk", "0.1"], "^--gmacs and --risk are given: give one of"),
        (["--saving", "half"], "--saving.*half"),
        (["--saving", "100%"], "saving is 100.0: give a percentage from 0 to below 100"),
        (["--accuracy", "101"], "accuracy is 101.0"),
        (["--gmacs", "0"], "gmacs is 0.0"),
        (["--max-drop", "-1"], "drop is -1.0"),
        (["--latency-ms", "nan"], "latency is nan|nan.*--latency-ms"),
        (["--risk", "1"], "share of the risk is 1.0"),
        (["--risk", "0.1", "--confidence", "1"], "confidence of the risk is 1.0"),
        (["--risk", "0.1", "--method", "luck"], "method of the risk is 'luck'"),
        (["--saving", "1", "--confidence", "0.9"], "--confidence belongs to --risk and --saving is given"),
        (["--saving", "1", "--method", "upper_bound"], "--method belongs to --risk"),
        (["--saving", "1", "--measure", "hope"], "measure is 'hope': give one of max_probability, margin"),
        (["--saving", "1", "--out", "mine"], "--out mine does not end in .json"),
        (["--saving", "1", "--out", "model/config.json"], "is there and is no calibration: name a new file"),
        (["--saving", "1", "--batch-size", "0"], "--batch-size.*>= 1"),
    ],
    ids=" ".join,
)
def test_wrong_usage(
    flags: list[str], message: str, cfvit_main: Cli, model: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    before = sorted(path.name for path in model.iterdir())
    assert re.search(message, _error(_run(cfvit_main, model, colours, *flags), 2))
    assert sorted(path.name for path in model.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gmacs", "1e-6"], r"out of reach: the coarse stage alone takes [\d.]+ GMACs at eta 0"),
        (["--saving", "99.9"], r"a saving of 99.9% is out of reach: the most is [\d.]+% at eta 0"),
        (["--accuracy", "99.9"], r"an accuracy of 99.9% is out of reach: the best is [\d.]+% at eta"),
        (["--latency-ms", "1e-9"], r"out of reach: the coarse stage alone takes [\d.]+ ms at eta 0"),
    ],
    ids=" ".join,
)
def test_out_of_reach_is_told_with_the_nearest(
    flags: list[str], message: str, cfvit_main: Cli, model: Path, colours: Path
) -> None:
    assert re.search(message, _error(_run(cfvit_main, model, colours, *flags), 1))
    assert not (model / "calibration.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gmacs", "1e-6"], "^1e-06 GMACs is out of reach: the coarse stage alone takes "),
        (["--saving", "99.9%"], "^a saving of 99.9% is out of reach: the most is "),
        (["--latency-ms", "1e-9"], "^1e-09 ms is out of reach: the coarse stage alone takes "),
        (["--max-drop", "1", "--out", "file/mine.json"], "^cannot write file/mine.json "),
        (
            ["--latency-ms", "1", "--batch-size", str(10**12)],
            "^a batch of 1000000000000 images does not fit into memory",
        ),
    ],
    ids=" ".join,
)
def test_what_needs_no_images_is_refused_before_they_are_read(
    flags: list[str], message: str, cfvit_main: Cli, model: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    Path("file").write_text("in the way")
    for name in ("collect_with_progress", "refuse_training_images"):
        monkeypatch.setattr(calibrate_module, name, lambda *arguments: pytest.fail("images were read"))
    outcome = _run(cfvit_main, model, colours, *flags, "--train-data", colours)
    assert re.search(message, _error(outcome, 1))


def test_other_errors_while_timing_are_not_said_to_be_of_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def time_stages(model: CoarseToFineViT, images: Tensor) -> StageLatency:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(calibrate_module, "time_stages", time_stages)
    with pytest.raises(RuntimeError, match="illegal"):
        measure_latency(load(model), 2)


def test_a_missing_class_is_named(cfvit_main: Cli, model: Path, make_colours: Callable[..., Path]) -> None:
    data = make_colours()
    shutil.rmtree(data / "green")
    message = _error(_run(cfvit_main, model, data, "--max-drop", 1), 1)
    assert message.startswith("class 'green' has none of the 8 images: add some, or pass ")
    assert "--allow-missing-classes" in message
    outcome = _run(cfvit_main, model, data, "--max-drop", 1, "--allow-missing-classes")
    assert outcome.status == 0
    assert "warning: class 'green' has none of the 8 images, so nothing is known of them" in outcome.out


def test_a_class_of_which_nothing_can_be_read_is_missing(
    cfvit_main: Cli, model: Path, make_colours: Callable[..., Path]
) -> None:
    data = make_colours(per_class=1)
    (data / "green" / "0.png").write_text("no image")
    assert "class 'green' has none of the 2 images" in _error(_run(cfvit_main, model, data, "--max-drop", 1), 1)


def test_one_image_cannot_be_halved(cfvit_main: Cli, model: Path, make_colours: Callable[..., Path]) -> None:
    data = make_colours(per_class=1)
    for name in ("green", "red"):
        shutil.rmtree(data / name)
    flags = ("--max-drop", 1, "--allow-missing-classes", "--temperature-scaling")
    assert "1 image cannot be halved" in _error(_run(cfvit_main, model, data, *flags), 1)


@pytest.mark.parametrize("flags", [(), ("--temperature-scaling",)])
def test_a_model_whose_answers_are_no_numbers(
    flags: tuple[str, ...], cfvit_main: Cli, model: Path, colours: Path
) -> None:
    weights = load_file(model / "model.safetensors")
    weights["backbone.norm.weight"][0] = torch.nan
    save_file(weights, model / "model.safetensors")
    message = _error(_run(cfvit_main, model, colours, "--max-drop", 1, *flags), 1)
    assert message.startswith("coarse logits of 33 of 33 images are not finite")
    assert not (model / "calibration.json").exists()


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\0", b"", b"[]", b"{}", b"[" * 100_000, b"null"])
def test_a_damaged_calibration_is_one_line(
    content: bytes, cfvit_main: Cli, model: Path, colours: Path, fails: Callable[..., Any]
) -> None:
    (model / "calibration.json").write_bytes(content)
    with fails(r"calibration\.json cannot be used"):
        load(model)
    for words in (("predict", colours / "val"), ("eval", "--data", colours)):
        assert "calibration.json " in _error(cfvit_main(*words, "--model", model), 1)


def test_no_such_calibration(cfvit_main: Cli, model: Path, colours: Path) -> None:
    outcome = cfvit_main("predict", colours / "val", "--model", model, "--calibration", "nowhere.json")
    assert _error(outcome, 1) == "no calibration at nowhere.json: make one with cfvit calibrate"
    outcome = cfvit_main("eval", "--data", colours, "--against", model)
    assert "no calibration at " in _error(outcome, 1)


def test_a_full_disk_leaves_the_old_calibration_and_still_shows_the_new(
    cfvit_main: Cli, model: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _run(cfvit_main, model, colours, "--max-drop", 1).status == 0
    before = {path.name: path.read_bytes() for path in model.iterdir()}

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    outcome = _run(cfvit_main, model, colours, "--saving", 60)
    assert outcome.status == 1
    assert "cannot write " in outcome.err[-1]
    assert "No space left on device" in outcome.err[-1]
    assert any(line.startswith("promise: ") for line in outcome.out)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


# images that the model was trained on


def test_training_images_are_refused(cfvit_main: Cli, model: Path, colours: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(colours / "val", tmp_path / "data"))
    shutil.copy(colours / "train" / "red" / "3.png", data / "red" / "renamed.png")
    shutil.copy(colours / "train" / "green" / "7.png", data / "blue" / "elsewhere.png")
    message = _error(_run(cfvit_main, model, data, "--max-drop", 1, "--train-data", colours), 1)
    expected = "2 of 35 images are among the training images, blue/elsewhere.png first, which is green/7.png there: "
    assert message.startswith(expected)
    assert not (model / "calibration.json").exists()
    outcome = _run(cfvit_main, model, colours, "--max-drop", 1, "--train-data", colours)
    assert (outcome.status, outcome.err) == (0, [f"written to {model / 'calibration.json'}"])


def test_the_recipe_tells_the_training_images_but_for_the_hold_out(
    cfvit_main: Cli, model: Path, colours: Path, tmp_path: Path
) -> None:
    recipe = DIGITS.replace({"data": str(colours), "holdout": 0.2, "seed": 3})
    (model / "recipe.yaml").write_text(recipe.to_yaml())
    source = open_data(str(colours), "train")
    kept, held = split_holdout(source, 0.2, 3)
    for name, indices in (("kept", kept[:1]), ("held", held)):
        data = Path(shutil.copytree(colours / "val", tmp_path / name))
        for index in indices:
            shutil.copy(colours / "train" / source.name(index), data / "red" / f"copy{index}.png")
        outcome = _run(cfvit_main, model, data, "--max-drop", 1)
        if name == "kept":
            assert f"1 image is among the training images, red/copy{kept[0]}.png first" in _error(outcome, 1)
        else:
            assert (outcome.status, f"warning: {NOT_COMPARED}" in outcome.out) == (0, False)


def test_a_recipe_whose_data_is_gone_tells_nothing(cfvit_main: Cli, model: Path, colours: Path) -> None:
    (model / "recipe.yaml").write_text(DIGITS.replace({"data": "gone"}).to_yaml())
    outcome = _run(cfvit_main, model, colours, "--max-drop", 1)
    assert (outcome.status, f"warning: {NOT_COMPARED}" in outcome.out) == (0, True)


def test_a_recipe_that_cannot_be_read_is_an_error_unless_the_images_are_named(
    cfvit_main: Cli, model: Path, colours: Path
) -> None:
    (model / "recipe.yaml").write_text("epoch: 3\n")
    message = _error(_run(cfvit_main, model, colours, "--max-drop", 1), 1)
    assert "recipe.yaml does not tell the training images" in message
    assert message.endswith("name them with --train-data")
    assert _run(cfvit_main, model, colours, "--max-drop", 1, "--train-data", colours).status == 0


def test_shared_images_are_found_in_a_tar_and_unreadable_ones_left_out(colours: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.tar"
    with tarfile.open(packed, "w") as tar:
        tar.add(colours / "train", arcname=".")
    data = Path(shutil.copytree(colours / "val", tmp_path / "data"))
    shutil.copy(colours / "train" / "red" / "3.png", data / "green" / "x.png")
    (data / "red" / "0.png").unlink()
    (data / "red" / "0.png").symlink_to("nowhere.png")
    ours, theirs = open_data(str(data), "validation"), open_data(str(packed), "train")
    ((mine, other),) = shared_images(ours, theirs, range(len(theirs)))
    assert (ours.name(mine), theirs.name(other)) == ("green/x.png", "red/3.png")
    assert shared_images(ours, theirs, [i for i in range(len(theirs)) if i != other]) == []


# a model that carries a calibration


@pytest.fixture(scope="module")
def calibration(network: CoarseToFineViT, images: Images) -> Calibration:
    """By another measure and temperature than the paper's; about half of ``val`` go on."""
    target = GmacsBudget(_budget(network))
    macs = _macs(network)
    return calibrate(*images, macs, target, measure="margin", coarse_temperature=2.0, fine_temperature=0.5)


def test_a_calibrated_model_is_saved_with_its_exit(
    model: Path, calibration: Calibration, pixels: Tensor, images: Images, tmp_path: Path
) -> None:
    loaded = load(model)
    loaded.exit = calibration.exit
    save(loaded, tmp_path / "copy")
    again = load(tmp_path / "copy")
    assert again.exit == Exit("margin", 2.0, 0.5, calibration.threshold) == calibration.exit
    prediction = Predictor(again)(pixels)
    assert 0 < prediction.stage.sum() < len(pixels)
    hard = prediction.stage.bool()
    expected = torch.where(hard, confidence_of(images[1], "margin", 0.5), confidence_of(images[0], "margin", 2.0))
    torch.testing.assert_close(prediction.confidence, expected, atol=1e-5, rtol=1e-5)


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
    _store(calibration, model)
    loaded = load(model)
    loaded.threshold = 0.123
    save(loaded, model)
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "model.safetensors"]
    assert load(model).exit == replace(calibration.exit, eta=0.123)


def test_an_explicit_threshold_means_the_same_measure(
    model: Path, calibration: Calibration, pixels: Tensor, images: Images
) -> None:
    loaded = load(model)
    loaded.exit = calibration.exit
    confidence = confidence_of(images[0], "margin", 2.0)
    eta = float(confidence.sort().values[10:12].mean())
    assert torch.equal(Predictor(loaded, eta)(pixels).stage, goes_on(confidence, eta).long())
    assert Predictor(loaded, 0)(pixels).stage.sum() == 0
    assert Predictor(loaded, 1)(pixels).stage.sum() == len(pixels)


def test_a_wrong_rule_in_the_config_is_refused(model: Path, fails: Callable[..., Any]) -> None:
    config = json.loads((model / "config.json").read_text())
    for change, message in (({"measure": "hope"}, "exit.measure is 'hope'"), ({"eta": 2}, "exit: threshold is 2")):
        (model / "config.json").write_text(json.dumps({**config, "exit": {**config["exit"], **change}}))
        with fails(message):
            load(model)


def test_a_calibration_can_be_applied_from_a_folder(model: Path, calibration: Calibration, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    write_calibration(calibration, other / "calibration.json")
    loaded = load(model)
    apply_calibration(loaded, other)
    assert loaded.exit == calibration.exit


def test_pictures_and_sweeps_follow_the_rule(
    cfvit_main: Cli, model: Path, calibration: Calibration, colours: Path, pixels: Tensor
) -> None:
    loaded = load(model)
    loaded.exit = calibration.exit
    save(loaded, model)
    predictor = Predictor(loaded)
    prediction = predictor(pixels)
    explained = explain(loaded, pixels, predictor.threshold)
    assert [each.stage for each in explained] == prediction.stage.tolist()
    sure = [each.answers[each.stage][1] for each in explained]
    assert sure == pytest.approx(prediction.confidence.tolist(), abs=1e-5)
    etas = (0.05, 0.2)
    arguments = ("--data", colours, "--model", model, "--thresholds", *etas, "--json", *QUICK)
    points = [json.loads(line) for line in cfvit_main("eval", *arguments).out[2:]]
    assert {point["threshold"] for point in points} == {*etas, calibration.threshold}
    for point in points:
        stage = Predictor(loaded, point["threshold"])(pixels).stage
        assert point["exit_share"] == pytest.approx(1 - float(stage.float().mean()))


def test_bench_sends_on_as_many_as_asked_for(
    model: Path, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(model)
    loaded.exit = calibration.exit
    sent: set[int] = set()
    original = CoarseToFineViT.fine

    def fine(self: CoarseToFineViT, images: Tensor, state: CoarseState, **options: Any) -> Tensor:
        if not images.is_meta:  # where costs are counted
            sent.add(len(images))
        return original(self, images, state, **options)

    monkeypatch.setattr(CoarseToFineViT, "fine", fine)
    compare_with_backbone(loaded, 10, 0.3, rounds=1)
    assert sent == {3}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Exit("hope"), "measure is 'hope'"),  # type: ignore[arg-type]
        (lambda: Exit(coarse_temperature=0), "coarse_temperature is 0"),
        (lambda: Exit(fine_temperature=float("nan")), "fine_temperature is nan"),
        (lambda: Exit(eta=1.5), "threshold is 1.5"),
    ],
)
def test_rules_out_of_range_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(CfvitError, match=message):
        make()


# drift


@pytest.fixture
def calibrated(model: Path, calibration: Calibration) -> Path:
    _store(calibration, model)
    return model


def _unlabelled(folder: Path, count: int, brightness: float) -> Path:
    """Images without classes, some in a folder of their own."""
    generator = np.random.default_rng(5)
    (folder / "more").mkdir(parents=True)
    for i in range(count):
        colour = np.array([*COLOURS.values()][i % 3]) * brightness
        pixels = generator.normal(colour, 40 * brightness, (20, 20, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / ("more" if i % 2 else ".") / f"{i}.png")
    return folder


def test_images_of_the_same_kind_are_no_drift(
    cfvit_main: Cli, calibrated: Path, calibration: Calibration, images: Images, tmp_path: Path, colours: Path
) -> None:
    outcome = cfvit_main("eval", "--against", calibrated, "--data", colours, "--json", *QUICK)
    assert outcome.status == 0
    (found,) = map(json.loads, outcome.out)
    assert found == pytest.approx(vars(check_drift(calibration, images[0])), abs=1e-5)
    assert not found["drifted"]

    outcome = cfvit_main("eval", "--against", calibrated, "--data", _unlabelled(tmp_path / "new", 30, 1.0), *QUICK)
    assert (outcome.status, outcome.err) == (0, [])
    assert outcome.out[-1].startswith("looks like the calibration set (p = ")


def test_shifted_images_are_told(cfvit_main: Cli, calibrated: Path, calibration: Calibration, tmp_path: Path) -> None:
    data = _unlabelled(tmp_path / "new", 60, 0.1)
    against = calibrated / "calibration.json"
    outcome = cfvit_main("eval", "--against", against, "--model", calibrated, "--data", data, *QUICK)
    assert (outcome.status, outcome.err) == (0, [])
    assert outcome.out[-1].endswith(": recalibrate")
    rows = {line.split("  ")[0].strip(): line.split() for line in outcome.out[1:-1]}
    assert rows["images"][-2:] == ["33", "60"]
    assert f"{calibration.exit_share:.1%}" in rows["exit share"]
    assert f"{calibration.profile.median:.3f}" in rows["median confidence"]
    (found,) = map(json.loads, cfvit_main("eval", "--against", calibrated, "--data", data, "--json", *QUICK).out)
    assert found["drifted"]
    assert found["sentence"] == outcome.out[-1]


def test_drift_leaves_out_and_reports_what_cannot_be_read(cfvit_main: Cli, calibrated: Path, tmp_path: Path) -> None:
    data = _unlabelled(tmp_path / "new", 4, 1.0)
    (data / "0.png").write_text("no image")
    outcome = cfvit_main("eval", "--against", calibrated, "--data", data, "--json", *QUICK)
    assert outcome.status == 1
    assert json.loads(outcome.out[0])["images"] == 3
    assert outcome.err == [f"cfvit: {data / '0.png'} cannot be read and is not counted"]


def test_drift_of_nothing(cfvit_main: Cli, calibrated: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "has no images: give a folder"), ("nowhere", "no data at ")):
        assert message in _error(cfvit_main("eval", "--against", calibrated, "--data", tmp_path / name), 1)


def test_images_are_opened_with_and_without_classes(colours: Path, tmp_path: Path) -> None:
    assert len(open_images(str(colours))) == 33
    photo = colours / "val" / "red" / "0.png"
    (source,) = [open_images(str(photo))]
    assert (len(source), source.name(0)) == (1, str(photo))
    with tarfile.open(tmp_path / "packed.tar", "w") as tar:
        tar.add(colours / "val", arcname=".")
    assert len(open_images(str(tmp_path / "packed.tar"))) == 33


def test_a_file_that_is_no_calibration_is_not_said_to_be_removed(cfvit_main: Cli, model: Path, colours: Path) -> None:
    arguments = ("predict", colours / "val", "--model", model, "--calibration", model / "model.safetensors")
    message = _error(cfvit_main(*arguments), 1)
    assert message.endswith("name a file of cfvit calibrate")
    assert "remove" not in message


@pytest.mark.parametrize("flag", ["--report", "--calibration"])
def test_against_goes_with_neither_report_nor_calibration(
    flag: str, cfvit_main: Cli, model: Path, colours: Path, tmp_path: Path
) -> None:
    outcome = cfvit_main("eval", "--data", colours, "--against", model, flag, tmp_path / "x")
    assert "--against needs neither labels nor eta" in _error(outcome, 2)


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
    assert _run(cfvit_main, model, colours, "--max-drop", 1).status == 0
    content = json.loads((model / "calibration.json").read_text())
    part = content
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    (model / "calibration.json").write_text(json.dumps(content))
    outcome = cfvit_main(
        "eval", "--data", colours, "--against", model / "calibration.json", "--model", "deit_tiny_imagenette"
    )
    assert "calibration.json cannot be used" in _error(outcome, 1)


def test_doubtful_temperatures_and_an_eta_of_1_are_told(cfvit_main: Cli, model: Path, colours: Path) -> None:
    outcome = _run(cfvit_main, model, colours, "--max-drop", 1, "--temperature-scaling", "--json")
    (line,) = map(json.loads, outcome.out)
    assert "16 images are few to fit a temperature on: use more" in line["warnings"]
    logits = torch.tensor([[2.0, 0.0], [3.0, 0.0]])
    wrong, right, labels = logits, logits.flip(1), torch.tensor([1, 1])
    kept = calibrate(wrong, right, labels, StageMacs(1, 1, 4), Drop(0), allow_missing_classes=True)
    assert kept.threshold == 1
    assert any("no image exits early" in warning for warning in kept.warnings)
