"""From files to answers: their order, their cost, and what the unreadable ones do to the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cfvit import Predictor, count_macs, eval_transform, load, open_image
from cfvit.prediction import FileAnswer, FileFailure, classify_files


@pytest.fixture(scope="module")
def predictor(colour_model: Path) -> Predictor:
    return Predictor(load(colour_model))


@pytest.fixture(scope="module")
def photos(colours: Path) -> list[Path]:
    return sorted((colours / "val").glob("*/*.png"))


@pytest.fixture
def mixed(photos: list[Path], tmp_path: Path) -> list[Path]:
    """Bad files before, between and after good ones."""
    text, missing = tmp_path / "text.png", tmp_path / "missing.png"
    text.write_text("no image")
    return [text, *photos[:3], missing, text, *photos[3:5], missing]


def _answers(paths: list[Path], predictor: Predictor, batch_size: int) -> list[FileAnswer]:
    results = list(classify_files(paths, predictor, batch_size))
    assert all(isinstance(result, FileAnswer) for result in results)
    return [result for result in results if isinstance(result, FileAnswer)]


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_failures_keep_their_place(mixed: list[Path], predictor: Predictor, batch_size: int) -> None:
    results = list(classify_files(mixed, predictor, batch_size))
    assert [result.path for result in results] == mixed
    failures = {i: result.error for i, result in enumerate(results) if isinstance(result, FileFailure)}
    assert sorted(failures) == [0, 4, 5, 8]
    assert failures[4] == failures[8] == "no such file"
    assert failures[0] == failures[5] == "not an image, or of a format that Pillow does not read"


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_files_are_answered_as_their_images_by_the_predictor(
    photos: list[Path], predictor: Predictor, batch_size: int
) -> None:
    transform = eval_transform(predictor.model.data_config)
    expected = predictor(torch.stack([transform(open_image(path)) for path in photos]))
    answers = _answers(photos, predictor, batch_size)
    assert [answer.stage for answer in answers] == expected.stage.tolist()
    assert [answer.confidence for answer in answers] == pytest.approx(expected.confidence.tolist(), abs=1e-5)
    names = predictor.model.class_names
    assert names is not None
    assert [answer.label for answer in answers] == [names[i] for i in expected.logits.argmax(-1)]


def test_an_image_is_charged_for_the_stages_that_it_ran(photos: list[Path], predictor: Predictor) -> None:
    macs = count_macs(predictor.model)
    charged = {(answer.stage, answer.gmacs) for answer in _answers(photos, predictor, 8)}
    assert charged == {(0, macs.coarse / 1e9), (1, (macs.coarse + macs.fine) / 1e9)}


def test_watch_sees_the_readable_images_of_each_batch(mixed: list[Path], predictor: Predictor) -> None:
    seen: list[tuple[list[Path], Tensor]] = []
    list(classify_files(mixed, predictor, 3, watch=lambda paths, images: seen.append((paths, images))))
    assert [paths for paths, _ in seen] == [mixed[1:3], mixed[3:4], mixed[6:8]]
    transform = eval_transform(predictor.model.data_config)
    for paths, images in seen:
        assert torch.equal(images, torch.stack([transform(open_image(path)) for path in paths]))


def test_without_a_readable_file_neither_model_nor_watch_is_called(tmp_path: Path, predictor: Predictor) -> None:
    missing = [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"]
    seen: list[list[Path]] = []
    results = list(classify_files(missing, predictor, 2, watch=lambda paths, images: seen.append(paths)))
    assert results == [FileFailure(path, "no such file") for path in missing]
    assert seen == []


def test_no_files_no_answers(predictor: Predictor) -> None:
    assert list(classify_files([], predictor)) == []


def test_a_model_without_class_names_gives_numbers(photos: list[Path], colour_model: Path) -> None:
    model = load(colour_model)
    model.class_names = None
    assert {answer.label for answer in _answers(photos, Predictor(model), 100)} <= {"0", "1", "2"}
