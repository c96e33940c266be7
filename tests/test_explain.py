"""Pictures: their numbers are the model's own, and the files are whole or not there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from torch import Tensor

from cfvit import CoarseToFineViT, Predictor, load
from cfvit.modeling.exit import Measure
from cfvit.modeling.tokens import num_informative, rank_cells
from cfvit.plots.explain import Explanation, PictureFolder, draw_explanation, explain

Fails = Callable[..., AbstractContextManager[None]]
COUNT = 6


@pytest.fixture(scope="module")
def model(colour_model: Path) -> CoarseToFineViT:
    return load(colour_model)


@pytest.fixture
def images(model: CoarseToFineViT, make_images: Callable[..., Tensor]) -> Tensor:
    return make_images(model, COUNT)


@pytest.fixture
def threshold(model: CoarseToFineViT, images: Tensor) -> float:
    """Between the confidences: half of the images go on."""
    with torch.no_grad():
        return float(model.coarse(images).confidence.sort().values[COUNT // 2 - 1 : COUNT // 2 + 1].mean())


@pytest.fixture
def explanation(model: CoarseToFineViT, images: Tensor) -> Explanation:
    return explain(model, images[:1], 0.5)[0]


def test_answers_and_stage_are_the_predictors(model: CoarseToFineViT, images: Tensor, threshold: float) -> None:
    explanations = explain(model, images, threshold)
    prediction = Predictor(model, threshold)(images)
    assert [e.stage for e in explanations] == prediction.stage.tolist()
    assert sum(e.stage for e in explanations) == COUNT // 2
    for eta, stage in ((0, 0), (1, 1)):
        forced = Predictor(model, eta)(images)
        labels = [model.label_of(int(i)) for i in forced.logits.argmax(-1)]
        assert [e.answers[stage][0] for e in explanations] == labels
        assert [e.answers[stage][1] for e in explanations] == pytest.approx(forced.confidence.tolist(), abs=1e-6)


def test_split_cells_are_those_of_highest_class_attention(model: CoarseToFineViT, images: Tensor) -> None:
    with torch.no_grad():
        attention = model.coarse(images).class_attention
    rows, columns = model.grid
    split, _ = rank_cells(attention, num_informative(model.config.informative_ratio, rows * columns))
    for i, explanation in enumerate(explain(model, images, 0.5)):
        np.testing.assert_array_equal(explanation.attention.flatten(), attention[i])
        assert explanation.attention.shape == explanation.split.shape == model.grid
        assert set(np.flatnonzero(explanation.split)) == set(split[i].tolist())
        assert explanation.attention[explanation.split].min() >= explanation.attention[~explanation.split].max()


def test_the_image_comes_back_without_its_normalisation(model: CoarseToFineViT) -> None:
    side = model.image_size[0]
    pixels = np.random.default_rng(0).random((side, side, 3), dtype=np.float32)
    mean, std = np.array(model.data_config["mean"]), np.array(model.data_config["std"])
    images = torch.from_numpy((pixels - mean) / std).float().permute(2, 0, 1)[None]
    np.testing.assert_allclose(explain(model, images, 0.5)[0].image, pixels, atol=1e-6)


@pytest.mark.parametrize(
    ("measure", "shown"), [("max_probability", "25.0%"), ("margin", "25.0%"), ("energy", "0.2500")]
)
def test_a_picture_tells_which_stage_answers_and_how_sure_both_are(
    measure: Measure, shown: str, explanation: Explanation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    monkeypatch.setattr(Axes, "set_title", lambda axis, text, **options: titles.append(text))
    for stage in (0, 1):
        each = replace(explanation, measure=measure, answers=(("one", 0.25), ("two", 0.25)), stage=stage)
        draw_explanation(each, tmp_path / "one.png")
    ends = [title.partition("\n")[2] for title in titles if "stage" in title]
    assert ends[:2] == [f"one, {shown} (answers)", f"two, {shown} (not used)"]
    assert ends[2:] == [f"one, {shown} (not used)", f"two, {shown} (answers)"]


def test_a_picture_that_cannot_be_written_is_an_error(
    model: CoarseToFineViT, explanation: Explanation, tmp_path: Path, fails: Fails
) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    with fails("cannot write .*picture.png"):
        draw_explanation(explanation, file / "picture.png")
    with fails("cannot write .*picture.png"):  # before images are read
        PictureFolder(file, model, 0.5)
    assert file.read_text() == "kept"


def test_a_folder_of_pictures_needs_matplotlib_at_once(
    model: CoarseToFineViT, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with fails(r"install cfvit\[plots\]"):
        PictureFolder(tmp_path, model, 0.5)


def test_files_of_one_name_get_a_picture_each(
    model: CoarseToFineViT, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr("cfvit.plots.explain.draw_explanation", lambda explanation, path: drawn.append(path))
    pictures = PictureFolder(tmp_path, model, 0.5)
    pictures([Path("x/a.png"), Path("y/a.jpg"), Path("x/a-2.png")], images[:3])
    pictures([Path("z/a.png"), Path("b.png")], images[:2])
    assert [path.name for path in drawn] == ["a.png", "a-2.png", "a-2-2.png", "a-3.png", "b.png"]
    assert {path.parent for path in drawn} == {tmp_path}
