"""A model's exit is saved with it, and predictor, sweep, pictures and benchmark follow the same one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrations import MEASURES, QUICK, Cli, Images, store
from torch import Tensor

from cfvit import Calibration, CfvitError, CoarseState, CoarseToFineViT, Predictor, load, save
from cfvit.benchmark.measure import compare_with_backbone
from cfvit.modeling.exit import Exit, Measure, confidence_of, goes_on
from cfvit.plots.explain import explain


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Exit("hope"), "measure is 'hope'"),  # type: ignore[arg-type]
        (lambda: Exit(coarse_temperature=0), "coarse_temperature is 0"),
        (lambda: Exit(fine_temperature=float("nan")), "fine_temperature is nan"),
        (lambda: Exit(eta=1.5), "threshold is 1.5"),
        (lambda: Exit(eta="0.5"), "threshold is '0.5'"),  # type: ignore[arg-type]
        (lambda: Exit(eta=True), "threshold is True"),
    ],
)
def test_rules_out_of_range_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(CfvitError, match=message):
        make()


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


@pytest.mark.parametrize("measure", MEASURES)
def test_predict_shows_only_shares_in_percent(
    measure: Measure, cfvit_main: Cli, model: Path, colours: Path, calibration: Calibration
) -> None:
    chosen = replace(calibration, measure=measure, threshold=0.99996)
    store(chosen, model)
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
