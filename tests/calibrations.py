"""A model of the colours that can be calibrated, for the tests of calibration: fixtures and what they share."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COLOURS, Outcome
from torch import Tensor

import cfvit
from cfvit import Calibration, CoarseToFineViT, StageMacs, calibrate, load, save
from cfvit.calibration import GmacsBudget
from cfvit.calibration.calibrated import write_calibration
from cfvit.checkpoints import save_exit
from cfvit.data import EvalImages, open_data
from cfvit.evaluation.calibrate import NOT_COMPARED
from cfvit.modeling.exit import Measure

Cli = Callable[..., Outcome]
Images = tuple[Tensor, Tensor, Tensor]
MEASURES: tuple[Measure, ...] = ("max_probability", "margin", "entropy", "energy")
QUICK = ("--workers", 0)


def error(outcome: Outcome, status: int) -> str:
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
    labels = labels_of(list(COLOURS), colours)

    def gain(order: tuple[int, ...]) -> int:
        wanted = torch.tensor(order)[labels]
        return int((fine == wanted).sum() - (coarse == wanted).sum())

    best = max(itertools.permutations(range(3)), key=gain)
    assert gain(best) > 3
    model.class_names = [name for _, name in sorted(zip(best, COLOURS, strict=True))]
    return model


def labels_of(class_names: list[str], colours: Path) -> Tensor:
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
    return coarse, fine, labels_of(network.class_names or [], colours)


def macs_of(model: CoarseToFineViT) -> StageMacs:
    """What an image costs, as commands count it in the tests."""
    return cfvit.count_macs(model)


def run_calibrate(cfvit_main: Cli, model: Path | str, data: Path | str, *more: object) -> Outcome:
    return cfvit_main("calibrate", "--data", data, "--model", model, *QUICK, *map(str, more))


def store(calibration: Calibration, folder: Path) -> None:
    """What `cfvit calibrate` leaves in a model's folder."""
    write_calibration(calibration, folder / "calibration.json")
    save_exit(calibration.exit, folder)


def assert_alike(found: Calibration, expected: Calibration) -> None:
    """Up to rounding, as batches are cut otherwise, and to where it comes from, which only the command knows."""
    for each in (found, expected):
        assert isinstance(each, Calibration)
    said = replace(expected, origin=None, warnings=(*expected.warnings, NOT_COMPARED))
    assert_close(asdict(replace(found, origin=None)), asdict(said))


def assert_close(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_close(found[key], expected[key])
    else:
        assert found == (pytest.approx(expected, abs=1e-5) if isinstance(expected, (int, float, list)) else expected)


def budget(network: CoarseToFineViT) -> float:
    return round(macs_of(network).expected(0.4) / 1e9, 6)


@pytest.fixture(scope="module")
def calibration(network: CoarseToFineViT, images: Images) -> Calibration:
    """By another measure and temperature than the paper's; about half of ``val`` go on."""
    target = GmacsBudget(budget(network))
    macs = macs_of(network)
    return calibrate(*images, macs, target, measure="margin", coarse_temperature=2.0, fine_temperature=0.5)


@pytest.fixture
def calibrated(model: Path, calibration: Calibration) -> Path:
    store(calibration, model)
    return model
