"""``cfvit calibrate`` from the command line to the file: what is chosen, written, printed and refused."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrations import MEASURES, QUICK, Cli, Images, assert_alike, budget, error, macs_of, run_calibrate
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import cfvit
from cfvit import Calibration, CoarseToFineViT, Predictor, StageMacs, calibrate, load, save
from cfvit.calibration import (
    Accuracy,
    Drop,
    GmacsBudget,
    LatencyBudget,
    Risk,
    Saving,
    SelectiveRisk,
    StageLatency,
    Target,
    rank_images,
)
from cfvit.calibration.calibrated import parse_record, read_calibration
from cfvit.calibration.tradeoff import fit_mixture, fit_temperature
from cfvit.checkpoints import save_exit
from cfvit.data import eval_transform, find_images, open_image
from cfvit.errors import CfvitError
from cfvit.evaluation import calibrate as calibrate_module
from cfvit.evaluation.calibrate import NOT_COMPARED, calibrate_model, measure_latency
from cfvit.modeling.config import ModelConfig
from cfvit.modeling.exit import Exit, Measure, confidence_of, goes_on


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
        (["--risk", "30%"], Risk(0.3)),
        (["--selective-risk", "70%", "--confidence", "60%"], SelectiveRisk(0.7, 0.6)),
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
    target = target or GmacsBudget(budget(network))
    flags = [str(budget(network)) if flag == "BUDGET" else flag for flag in flags]
    outcome = run_calibrate(cfvit_main, model, colours, *flags, "--batch-size", 5)
    assert outcome.status == 0, outcome.err
    latency = StageLatency(1, 3) if isinstance(target, LatencyBudget) else None
    assert timed == ([(size, 3, *network.image_size) for size in (1, 2, 3, 5)] if latency else [])
    expected = calibrate(*images, macs_of(network), target, latency=latency)
    assert_alike(read_calibration(model), expected)


def test_latency_is_measured_on_the_model(cfvit_main: Cli, model: Path, colours: Path) -> None:
    assert run_calibrate(cfvit_main, model, colours, "--latency-ms", 1e6, "--batch-size", 2).status == 0
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
    assert run_calibrate(cfvit_main, model, colours, "--gmacs", budget(network), "--measure", measure).status == 0
    loaded = load(model)
    chosen = read_calibration(model)
    assert_alike(chosen, calibrate(*images, macs_of(network), GmacsBudget(budget(network)), measure=measure))
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
    outcome = run_calibrate(cfvit_main, model, colours, "--max-drop", 1)
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
    outcome = run_calibrate(cfvit_main, model, colours, "--risk", 0.001)
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
    (line,) = run_calibrate(cfvit_main, model, colours, "--max-drop", 1, "--json").out
    assert parse_record(Calibration, line, "line") == read_calibration(model)


def test_temperatures_are_fitted_on_other_images_than_eta_is_chosen_on(
    cfvit_main: Cli, model: Path, network: CoarseToFineViT, colours: Path, images: Images
) -> None:
    arguments = ("--risk", 0.4, "--temperature-scaling", "--measure", "entropy")
    outcome = run_calibrate(cfvit_main, model, colours, *arguments)
    chosen = read_calibration(model)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    fitted, kept = order[:16], order[16:]
    temperatures = [fit_temperature(logits[fitted], images[2][fitted]) for logits in images[:2]]
    coarse, fine, labels = (column[kept] for column in images)
    expected = calibrate(
        coarse,
        fine,
        labels,
        macs_of(network),
        Risk(0.4),
        measure="entropy",
        coarse_temperature=temperatures[0],
        fine_temperature=temperatures[1],
    )
    assert (chosen.coarse_temperature, chosen.fine_temperature) == pytest.approx(temperatures, abs=1e-4)
    assert (chosen.images, chosen.threshold) == (17, pytest.approx(expected.threshold, abs=1e-4))
    assert any(line.startswith("temperatures: ") and "on 16 other images" in line for line in outcome.out)
    assert load(model).exit == Exit("entropy", chosen.coarse_temperature, chosen.fine_temperature, chosen.threshold)
    again = run_calibrate(cfvit_main, model, colours, *arguments)
    assert again.out == outcome.out


def test_the_best_of_an_exit_is_fitted_and_chosen(
    cfvit_main: Cli, model: Path, network: CoarseToFineViT, colours: Path, images: Images, tmp_path: Path
) -> None:
    arguments = ("--gmacs", budget(network), "--best", "--out", tmp_path / "mine.json")
    outcome = run_calibrate(cfvit_main, model, colours, *arguments)
    assert outcome.status == 0, outcome.err
    chosen, (coarse, fine, labels) = read_calibration(tmp_path / "mine.json"), images
    weight, temperature = fit_mixture(coarse, fine, labels)
    fitted = (1, temperature, weight)
    used = (chosen.coarse_temperature, chosen.fine_temperature, chosen.coarse_weight)
    assert used == pytest.approx(fitted, abs=1e-3)
    rule = dict(zip(("coarse_temperature", "fine_temperature", "coarse_weight"), used, strict=True))
    target = GmacsBudget(budget(network))
    answers = Exit(**rule).answer(coarse, fine)
    right = {m: rank_images(coarse, answers, labels, m, used[0]).right.mean() for m in MEASURES}
    assert right[chosen.measure] == max(right.values()) > min(right.values())
    assert_alike(chosen, calibrate(*images, macs_of(network), target, measure=chosen.measure, **rule))
    assert any(line.endswith("fitted on the same images") for line in outcome.out)
    assert any("% of the coarse logits" in line for line in outcome.out) == (chosen.coarse_weight > 0)
    assert run_calibrate(cfvit_main, model, colours, *arguments, "--measure", "entropy").status == 0
    assert read_calibration(tmp_path / "mine.json").measure == "entropy"


def test_a_fine_stage_that_was_chosen_before_is_told(
    cfvit_main: Cli, model: Path, network: CoarseToFineViT, colours: Path, tmp_path: Path
) -> None:
    """It stays where eta is chosen again without --best, and the figures are of it; also in a copy of the model."""
    save_exit(network.exit, model, replace(network.config, informative_ratio=0.25))
    save(load(model), tmp_path / "copy")
    copied = load(tmp_path / "copy")
    assert (copied.config.informative_ratio, copied.trained) == (0.25, network.config)
    outcome = run_calibrate(cfvit_main, model, colours, "--max-drop", 3)
    assert any("informative_ratio 0.25, fine_merged 0, as --best chose" in line for line in outcome.err), outcome.err


@pytest.mark.parametrize("flags", [("--gmacs", "BUDGET"), ("--max-drop", 3)], ids=["budget", "drop"])
def test_the_best_that_a_model_can_is_stored_and_used(
    flags: tuple[str, object],
    cfvit_main: Cli,
    model: Path,
    network: CoarseToFineViT,
    colours: Path,
    pixels: Tensor,
    images: Images,
) -> None:
    flags = (flags[0], budget(network) if flags[1] == "BUDGET" else flags[1])
    assert run_calibrate(cfvit_main, model, colours, *flags).status == 0
    papers = read_calibration(model)
    outcome = run_calibrate(cfvit_main, model, colours, *flags, "--best")
    assert outcome.status == 0, outcome.err
    chosen, loaded = read_calibration(model), load(model)
    better = chosen.accuracy.value > papers.accuracy.value or chosen.gmacs.value < papers.gmacs.value
    assert better
    assert loaded.exit == chosen.exit
    assert (loaded.config != network.config) == any(line.startswith("fine stage: ") for line in outcome.err)
    prediction = Predictor(loaded)(pixels)
    assert prediction.stage.double().mean() == pytest.approx(chosen.fine_share.value)
    right = (prediction.logits.argmax(dim=-1) == images[2]).double().mean()
    assert 100 * right == pytest.approx(chosen.accuracy.value)
    assert cfvit.count_macs(loaded).expected(chosen.fine_share.value) / 1e9 == pytest.approx(chosen.gmacs.value)
    assert run_calibrate(cfvit_main, model, colours, *flags, "--best").status == 0
    assert load(model).config == loaded.config, "cheaper than the stage of the training, not than the last choice"


def test_a_fine_stage_out_of_reach_does_not_end_the_search(network: CoarseToFineViT, colours: Path) -> None:
    def search(target: float, config: ModelConfig, *others: ModelConfig) -> ModelConfig:
        model = copy.deepcopy(network)
        model.config = config
        options: dict[str, Any] = {"batch_size": 33, "workers": 0, "best": True, "fine_stages": others}
        return calibrate_model(model, str(colours), Accuracy(target), **options)[1]

    reach: dict[float, ModelConfig] = {}
    for ratio in (0.25, 1.0):
        config = replace(network.config, informative_ratio=ratio)
        with pytest.raises(CfvitError) as caught:
            search(100, config)
        (best,) = re.findall(r"the best is ([\d.]+)%", str(caught.value))
        reach[float(best)] = config
    assert len(reach) == 2
    assert search(max(reach) - 0.01, reach[min(reach)], reach[max(reach)]) == reach[max(reach)]


def test_what_a_promise_is_about_is_fitted_on_other_images(cfvit_main: Cli, model: Path, colours: Path) -> None:
    assert (
        run_calibrate(cfvit_main, model, colours, "--selective-risk", "60%", "--confidence", "50%", "--best").status
        == 0
    )
    chosen = read_calibration(model)
    assert (chosen.images, chosen.origin and chosen.origin.temperature_images) == (17, 16)
    assert chosen.target == SelectiveRisk(0.6, 0.5)


@pytest.mark.parametrize(("blues", "fitted"), [(4, True), (5, False)])
def test_a_class_that_only_one_half_has_is_told(
    blues: int, fitted: bool, cfvit_main: Cli, model: Path, make_colours: Callable[..., Path]
) -> None:
    data = make_colours(per_class=9)
    for i in range(1, 9):
        (data / "green" / f"{i}.png").unlink()
    for i in range(blues, 9):
        (data / "blue" / f"{i}.png").unlink()
    outcome = run_calibrate(cfvit_main, model, data, "--max-drop", 1, "--temperature-scaling", "--json")
    (line,) = map(json.loads, outcome.out)
    other = (blues + 10) // 2
    half = (
        f"{blues + 10 - other} images, so nothing is known of them"
        if fitted
        else f"{other} images that temperatures were fitted on: give more of them"
    )
    assert [warning for warning in line["warnings"] if "class" in warning] == [f"class 'green' has none of the {half}"]


def test_doubtful_temperatures_and_an_eta_of_1_are_told(cfvit_main: Cli, model: Path, colours: Path) -> None:
    outcome = run_calibrate(cfvit_main, model, colours, "--max-drop", 1, "--temperature-scaling", "--json")
    (line,) = map(json.loads, outcome.out)
    assert "16 images are few to fit a temperature on: use more" in line["warnings"]
    logits = torch.tensor([[2.0, 0.0], [3.0, 0.0]])
    wrong, right, labels = logits, logits.flip(1), torch.tensor([1, 1])
    kept = calibrate(wrong, right, labels, StageMacs(1, 1, 4), Drop(0), allow_missing_classes=True)
    assert kept.threshold == 1
    assert any("no image exits early" in warning for warning in kept.warnings)


def test_unreadable_images_are_reported_and_left_out(
    cfvit_main: Cli, model: Path, make_colours: Callable[..., Path]
) -> None:
    data = make_colours()
    (data / "red" / "1.png").write_text("no image")
    outcome = run_calibrate(cfvit_main, model, data, "--max-drop", 1)
    assert outcome.status == 1
    assert "1.png cannot be read and is not counted" in outcome.err[0]
    assert read_calibration(model).images == 11


def test_out_leaves_the_model_as_it_is(
    cfvit_main: Cli, model: Path, network: CoarseToFineViT, colours: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    out = tmp_path / "new" / "mine.json"
    arguments = (model, colours, "--gmacs", budget(network), "--measure", "margin", "--out", out)
    outcome = run_calibrate(cfvit_main, *arguments)
    assert outcome.err[-1] == f"written to {out}: give it to predict and eval with --calibration {out}"
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert run_calibrate(cfvit_main, *arguments).status == 0, "a former calibration may be replaced"

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
    assert run_calibrate(cfvit_main, model, colours, "--gmacs", budget(network), "--measure", "energy").status == 0
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
    some = ["--max-drop", 1, "--allow-missing-classes"]
    for i, word in enumerate(words[:3]):
        (tmp_path / "data" / word).mkdir(parents=True)
        Image.new("RGB", (32, 32), (25 * i, 100, 200 - 15 * i)).save(tmp_path / "data" / word / "0.png")
    message = error(run_calibrate(cfvit_main, name, tmp_path / "data", *some), 2)
    assert message == f"{name} is no folder to write to: name a file with --out FILE.json"
    out = tmp_path / "mine.json"
    assert run_calibrate(cfvit_main, name, tmp_path / "data", *some, "--out", out).status == 0
    assert read_calibration(out).classes == len(words)


def test_authors_files_are_calibrated_into_a_file(cfvit_main: Cli, authors_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for i in range(3):
        (folder / str(i)).mkdir(parents=True)
        Image.new("RGB", (20, 20), (80 * i, 100, 10)).save(folder / str(i) / "0.png")
    before = authors_file.read_bytes()
    assert "--out FILE.json" in error(run_calibrate(cfvit_main, authors_file, folder, "--max-drop", 1), 2)
    assert run_calibrate(cfvit_main, authors_file, folder, "--max-drop", 1, "--out", tmp_path / "a.json").status == 0
    assert authors_file.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "^no target is given: give one of --gmacs, --saving, --latency-ms, .*, --risk, --selective-risk$"),
        (["--gmacs", "1", "--risk", "0.1"], "^--gmacs and --risk are given: give one of"),
        (["--saving", "half"], "--saving.*half"),
        (["--saving", "100%"], "saving is 100.0: give a percentage from 0 to below 100"),
        (["--accuracy", "101"], "accuracy is 101.0"),
        (["--gmacs", "0"], "gmacs is 0.0"),
        (["--max-drop", "-1"], "drop is -1.0"),
        (["--latency-ms", "nan"], "latency is nan|nan.*--latency-ms"),
        (["--risk", "1"], "share of the risk is 1.0"),
        (["--risk", "%"], "'%' is no number: give one such as 10%"),
        (["--saving", "most"], "'most' is no number: give one such as 10%"),
        (["--risk", "0.1", "--confidence", "1"], "confidence of the risk is 1.0"),
        (["--risk", "0.1", "--method", "luck"], "method of the risk is 'luck'"),
        (["--saving", "1", "--confidence", "0.9"], "--confidence belongs to --risk and --saving is given"),
        (["--saving", "1", "--method", "upper_bound"], "--method belongs to --risk"),
        (["--selective-risk", "0.1", "--method", "upper_bound"], "--method belongs to --risk and --selective-risk is"),
        (["--selective-risk", "0"], "share of the selective risk is 0.0"),
        (["--saving", "1", "--measure", "hope"], "measure is 'hope': give one of max_probability, margin"),
        (["--saving", "1", "--out", "mine"], "--out mine does not end in .json"),
        (["--saving", "1", "--out", "model/config.json"], "is there and is no calibration: name a new file"),
        (["--saving", "1", "--batch-size", "0"], "--batch-size.*> 0"),
    ],
    ids=" ".join,
)
def test_wrong_usage(
    flags: list[str], message: str, cfvit_main: Cli, model: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    before = sorted(path.name for path in model.iterdir())
    assert re.search(message, error(run_calibrate(cfvit_main, model, colours, *flags), 2))
    assert sorted(path.name for path in model.iterdir()) == before


def test_out_of_reach_is_told_with_the_nearest(cfvit_main: Cli, model: Path, colours: Path) -> None:
    message = error(run_calibrate(cfvit_main, model, colours, "--accuracy", 99.9), 1)
    assert re.search(r"an accuracy of 99.9% is out of reach: the best is [\d.]+% at eta", message)
    assert not (model / "calibration.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gmacs", "1e-6"], r"^1e-06 GMACs is out of reach: the coarse stage alone takes [\d.]+ GMACs at eta 0"),
        (["--saving", "99.9%"], r"^a saving of 99.9% is out of reach: the most is [\d.]+% at eta 0"),
        (["--latency-ms", "1e-9"], r"^1e-09 ms is out of reach: the coarse stage alone takes [\d.]+ ms at eta 0"),
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
    outcome = run_calibrate(cfvit_main, model, colours, *flags, "--train-data", colours)
    assert re.search(message, error(outcome, 1))


def test_other_errors_while_timing_are_not_said_to_be_of_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def time_stages(model: CoarseToFineViT, images: Tensor) -> StageLatency:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(calibrate_module, "time_stages", time_stages)
    with pytest.raises(RuntimeError, match="illegal"):
        measure_latency(load(model), 2)


def test_a_missing_class_is_named(cfvit_main: Cli, model: Path, make_colours: Callable[..., Path]) -> None:
    data = make_colours()
    shutil.rmtree(data / "green")
    message = error(run_calibrate(cfvit_main, model, data, "--max-drop", 1), 1)
    assert message.startswith("class 'green' has none of the 8 images: add some, or pass ")
    assert "--allow-missing-classes" in message
    outcome = run_calibrate(cfvit_main, model, data, "--max-drop", 1, "--allow-missing-classes")
    assert outcome.status == 0
    assert "warning: class 'green' has none of the 8 images, so nothing is known of them" in outcome.out


def test_a_class_of_which_nothing_can_be_read_is_missing(
    cfvit_main: Cli, model: Path, make_colours: Callable[..., Path]
) -> None:
    data = make_colours(per_class=1)
    (data / "green" / "0.png").write_text("no image")
    assert "class 'green' has none of the 2 images" in error(run_calibrate(cfvit_main, model, data, "--max-drop", 1), 1)


def test_one_image_cannot_be_halved(cfvit_main: Cli, model: Path, make_colours: Callable[..., Path]) -> None:
    data = make_colours(per_class=1)
    for name in ("green", "red"):
        shutil.rmtree(data / name)
    flags = ("--max-drop", 1, "--allow-missing-classes", "--temperature-scaling")
    assert "1 image cannot be halved" in error(run_calibrate(cfvit_main, model, data, *flags), 1)


@pytest.mark.parametrize("flags", [(), ("--temperature-scaling",)])
def test_a_model_whose_answers_are_no_numbers(
    flags: tuple[str, ...], cfvit_main: Cli, model: Path, colours: Path
) -> None:
    weights = load_file(model / "model.safetensors")
    weights["backbone.norm.weight"][:] = 3e38  # finite, but not the answers
    save_file(weights, model / "model.safetensors")
    message = error(run_calibrate(cfvit_main, model, colours, "--max-drop", 1, *flags), 1)
    assert message.startswith("coarse logits of 33 of 33 images are not finite")
    assert not (model / "calibration.json").exists()
