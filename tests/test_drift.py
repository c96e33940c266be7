"""``cfvit eval --against``: whether images in use look like those that eta was chosen on."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from calibrations import QUICK, Cli, Images, error
from conftest import COLOURS
from PIL import Image

from cfvit import Calibration
from cfvit.calibration import check_drift
from cfvit.data import open_images


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
        assert message in error(cfvit_main("eval", "--against", calibrated, "--data", tmp_path / name), 1)


def test_images_are_opened_with_and_without_classes(colours: Path, tmp_path: Path) -> None:
    assert len(open_images(str(colours))) == 33
    photo = colours / "val" / "red" / "0.png"
    (source,) = [open_images(str(photo))]
    assert (len(source), source.name(0)) == (1, str(photo))
    with tarfile.open(tmp_path / "packed.tar", "w") as tar:
        tar.add(colours / "val", arcname=".")
    assert len(open_images(str(tmp_path / "packed.tar"))) == 33


@pytest.mark.parametrize("flag", ["--report", "--calibration", "--thresholds"])
def test_against_goes_with_nothing_that_needs_labels_or_eta(
    flag: str, cfvit_main: Cli, model: Path, colours: Path
) -> None:
    outcome = cfvit_main("eval", "--data", colours, "--against", model, flag, 1)
    assert "--against needs neither labels nor eta" in error(outcome, 2)
