"""The demonstration on a small share of its data, and the words in which it sums up."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cfvit.benchmark.measure import compare_with_backbone
from cfvit.cli import digits_demo as demo
from cfvit.cli.digits_demo import run_demo, verdict, write_digits

Fails = Callable[..., AbstractContextManager[None]]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*/*.png")]


def test_digits_are_all_scans_each_once(digits: Path) -> None:
    train, val = _names(digits / "train"), _names(digits / "val")
    assert len(train) + len(val) == len({*train, *val}) == 1797
    assert len(val) == round(1797 / 4)
    for split in ("train", "val"):
        assert sorted(path.name for path in (digits / split).iterdir()) == [str(digit) for digit in range(10)]


def test_a_digit_is_its_scan_in_the_folder_of_its_class(digits: Path) -> None:
    from sklearn.datasets import load_digits  # takes as long to import as torch

    images, labels = load_digits(return_X_y=True)
    for number in (0, 400, 1796):
        (path,) = digits.glob(f"*/*/{number:04d}.png")
        assert path.parent.name == str(labels[number])
        with Image.open(path) as image:
            np.testing.assert_array_equal(np.asarray(image), (images[number].reshape(8, 8) * 255 / 16).astype(np.uint8))


@pytest.mark.parametrize(
    ("drop", "saved", "speedup", "words"),
    [
        (-0.25, 0.6, 1.25, ["keeps the plain ViT's accuracy (+0.2 points)", "saves 60% of its MACs", "20% less time"]),
        (0.0, 0.5, 2.0, ["keeps the plain ViT's accuracy (+0.0 points)", "saves 50% of its MACs", "50% less time"]),
        (0.25, 0.75, 2.0, ["keeps the plain ViT's accuracy (-0.2 points)", "saves 75% of its MACs"]),
        (2.0, 0.6, 1.25, ["loses 2.0 points of accuracy", "saves 60% of its MACs", "That misses the aim"]),
        (0.0, 0.4, 1.25, ["keeps the plain ViT's accuracy", "saves 40% of its MACs", "That misses the aim"]),
        (2.0, -0.25, 0.8, ["loses 2.0 points", "spends 25% more MACs", "takes 25% more time", "That misses the aim"]),
        (0.0, 0.6, 0.5, ["keeps the plain ViT's accuracy", "saves 60% of its MACs", "takes 100% more time"]),
    ],
)
def test_verdict(drop: float, saved: float, speedup: float, words: list[str]) -> None:
    said = verdict(drop, saved, speedup)
    for word in words:
        assert word in said
    assert ("misses the aim" in said) == ("That misses the aim" in words)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 12th scan, as if these were all, and a short measurement of speed."""
    import sklearn.datasets

    scans: Any = sklearn.datasets.load_digits()
    scans.images, scans.target = scans.images[::12], scans.target[::12]
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: scans)
    monkeypatch.setattr(demo, "BENCH_BATCH", 8)
    monkeypatch.setattr(demo, "compare_with_backbone", partial(compare_with_backbone, rounds=1))


@pytest.mark.usefixtures("small", "timed_at_once")
def test_the_demo_trains_compares_draws_and_classifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out"
    run_demo(out, epochs=1)
    said = capsys.readouterr().out
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.png")) == [
        "explained/easy.png",
        "explained/hard.png",
        "photos/china.png",
        "photos/flower.png",
        "trade_off.png",
    ]
    for path in out.rglob("*.png"):
        with Image.open(path) as image:
            image.verify()
    lines = said.splitlines()
    (heading,) = [line for line in lines if "answered coarse" in line]
    below = lines[lines.index(heading) + 1 :]
    assert below[0].strip().startswith("plain ViT ")
    assert below[1].strip().startswith("coarse-to-fine ")
    assert below[2].startswith("Coarse-to-fine ")
    for photo in ("china.jpg", "flower.jpg"):
        assert any(line.strip().startswith(f"{photo}: ") for line in lines)


@pytest.mark.parametrize(("module", "extra"), [("sklearn", "demo"), ("matplotlib.figure", "plots")])
def test_what_is_not_installed_is_named_before_the_training(
    module: str, extra: str, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(demo, "train", lambda *arguments: pytest.fail("trained first"))
    with fails(rf"install cfvit\[{extra}\]"):
        run_demo(tmp_path / "out", epochs=1)


def test_a_place_that_cannot_be_written_is_refused_before_the_training(
    tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "train", lambda *arguments: pytest.fail("trained first"))
    (tmp_path / "file").write_text("")
    with fails("cannot write to .*file"):
        run_demo(tmp_path / "file", epochs=1)
