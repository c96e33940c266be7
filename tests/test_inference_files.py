"""From files to answers: their order, their cost, and what the unreadable ones do to the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Outcome
from PIL import Image
from torch import Tensor

from cfvit import CfvitError, Predictor, count_macs, eval_transform, load, open_image
from cfvit.inference.files import FileAnswer, FileFailure, classify_files
from cfvit.inference.stream import FINE


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


def test_failures_keep_their_place_among_images_that_wait_for_the_fine_stage(
    photos: list[Path], predictor: Predictor, tmp_path: Path
) -> None:
    missing = [tmp_path / f"{i}.png" for i in range(len(photos))]
    paths = [path for pair in zip(photos, missing, strict=True) for path in pair]
    alone = {result.path: result for path in photos for result in classify_files([path], predictor)}
    stages = [result.stage for result in alone.values() if isinstance(result, FileAnswer)]
    assert 0 < sum(stages) < len(photos) == len(stages)
    results = list(classify_files(paths, predictor, 4))
    assert [result.path for result in results] == paths
    for result in results:
        if isinstance(result, FileAnswer):
            same = alone[result.path]
            assert isinstance(same, FileAnswer)
            assert (result.label, result.stage, result.gmacs) == (same.label, same.stage, same.gmacs)
            assert result.confidence == pytest.approx(same.confidence, abs=1e-5)
        else:
            assert result.error == "no such file"
            assert result.path in missing


def test_a_file_named_twice_is_answered_twice(photos: list[Path], predictor: Predictor) -> None:
    paths = [photos[0], photos[1], photos[0], photos[0]]
    assert [answer.path for answer in _answers(paths, predictor, 2)] == paths


def test_an_error_of_watch_comes_after_the_answers_before_it(photos: list[Path], predictor: Predictor) -> None:
    def watch(paths: list[Path], images: Tensor) -> None:
        if photos[4] in paths:
            raise CfvitError("the disk is full")

    results = []
    with pytest.raises(CfvitError, match="the disk is full"):
        for result in classify_files(photos, predictor, 4, watch=watch):
            results.append(result.path)
    assert results == photos[:4]


def test_who_stops_early_gets_no_error(photos: list[Path], predictor: Predictor) -> None:
    seen: list[Path] = []
    answers = classify_files(photos, predictor, 4, watch=lambda paths, images: seen.extend(paths))
    assert next(answers).path == photos[0]
    before = len(seen)
    answers.close()  # type: ignore[attr-defined]
    assert len(seen) == before < len(photos)


class TestScaledDecode:
    """Large JPEGs are decoded in part for the coarse stage, and in full for the fine one."""

    @staticmethod
    def _smooth(seed: int, size: tuple[int, int] = (1600, 1200), mode: str = "RGB") -> Image.Image:
        """A photo without fine detail, of which a part of the pixels says as much as all."""
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)

    @pytest.fixture(scope="class")
    def large(self, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
        """JPEGs of several kinds, and PNGs between them. Only to be read."""
        folder = tmp_path_factory.mktemp("large")
        exif = Image.Exif()
        exif[0x0112] = 6
        kinds: list[tuple[str, str, dict[str, Any]]] = [
            ("plain.jpg", "RGB", {}),
            ("grey.jpg", "L", {}),
            ("picture.png", "RGB", {}),
            ("cmyk.jpg", "CMYK", {}),
            ("turned.jpg", "RGB", {"exif": exif}),
            ("progressive.jpg", "RGB", {"progressive": True}),
            ("another.png", "RGB", {}),
            ("unsampled.jpg", "RGB", {"subsampling": 0}),
        ]
        for seed, (name, mode, options) in enumerate(kinds):
            quality = {"quality": 95} if name.endswith("jpg") else {}
            self._smooth(seed, mode=mode).save(folder / name, **quality, **options)
        return [folder / name for name, _, _ in kinds]

    @pytest.fixture
    def doomed(self, large: list[Path], tmp_path: Path) -> list[Path]:
        """Copies of them, which may be deleted."""
        return [Path(shutil.copy(path, tmp_path)) for path in large]

    @staticmethod
    def _between(paths: list[Path], colour_model: Path) -> Predictor:
        """A threshold that some of the images reach, and none comes close to."""
        model = load(colour_model)
        transform = eval_transform(model.data_config)
        with torch.inference_mode():
            images = torch.stack([transform(open_image(path)) for path in paths])
            ordered = model.exit.coarse(model.coarse(images).logits).sort().values
        widest = 1 + int(ordered[1:-1].diff().argmax())
        assert ordered[widest + 1] - ordered[widest] > 0.02
        return Predictor(model, float(ordered[widest : widest + 2].mean()))

    @pytest.mark.parametrize("batch_size", [1, 3, 32])
    def test_answers_are_those_of_whole_images(self, batch_size: int, large: list[Path], colour_model: Path) -> None:
        predictor = self._between(large, colour_model)
        whole = list(classify_files(large, predictor, batch_size))
        scaled = list(classify_files(large, predictor, batch_size, scaled_decode=True))
        assert len(whole) == len(scaled) == len(large)
        for one, other in zip(whole, scaled, strict=True):
            assert isinstance(one, FileAnswer)
            assert isinstance(other, FileAnswer)
            assert (one.path, one.label, one.stage, one.gmacs) == (other.path, other.label, other.stage, other.gmacs)
            assert other.confidence == pytest.approx(one.confidence, abs=0.05)
        assert {answer.stage for answer in whole if isinstance(answer, FileAnswer)} == {0, 1}

    def test_jpegs_are_read_in_part_first_and_in_full_if_they_go_on(
        self, large: list[Path], colour_model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[tuple[Path, bool, tuple[int, int]]] = []

        def record(path: Path, least: int | None = None) -> Image.Image:
            image = open_image(path, least)
            read.append((path, least is None, image.size))
            return image

        monkeypatch.setattr("cfvit.inference.files.open_image", record)
        predictor = self._between(large, colour_model)
        answers = list(classify_files(large, predictor, scaled_decode=True))
        hard = [answer.path for answer in answers if isinstance(answer, FileAnswer) and answer.stage == FINE]
        assert sorted(path for path, full, _ in read if full) == sorted(hard)
        sides = {path.name: min(size) for path, full, size in read if not full}
        assert {side for name, side in sides.items() if name.endswith("png")} == {1200}
        assert {side for name, side in sides.items() if name.endswith("jpg")} == {150}

    def test_watch_gets_images_of_the_coarse_size(self, large: list[Path], colour_model: Path) -> None:
        seen: list[tuple[list[Path], Tensor]] = []
        predictor = Predictor(load(colour_model), 1)
        list(
            classify_files(
                large, predictor, 5, watch=lambda paths, images: seen.append((paths, images)), scaled_decode=True
            )
        )
        assert [paths for paths, _ in seen] == [large[:5], large[5:]]
        assert [tuple(images.shape) for _, images in seen] == [(5, 3, 16, 16), (3, 3, 16, 16)]

    def test_photos_are_upright(self, tmp_path: Path, colour_model: Path) -> None:
        halves = Image.new("RGB", (1600, 1600), (255, 0, 0))
        halves.paste((0, 0, 255), (800, 0, 1600, 1600))
        exif = Image.Exif()
        exif[0x0112] = 6
        halves.save(tmp_path / "turned.jpg", exif=exif)
        seen: list[Tensor] = []
        predictor = Predictor(load(colour_model), 0)
        list(
            classify_files(
                [tmp_path / "turned.jpg"],
                predictor,
                watch=lambda paths, images: seen.append(images[0]),
                scaled_decode=True,
            )
        )
        red, blue = seen[0][0], seen[0][2]
        assert (red[:6] > blue[:6]).all()
        assert (red[-6:] < blue[-6:]).all()

    @pytest.mark.parametrize("batch_size", [1, 2, 32])
    def test_a_truncated_one_fails_alone_and_in_its_place(
        self, batch_size: int, large: list[Path], colour_model: Path, tmp_path: Path
    ) -> None:
        cut, missing = tmp_path / "cut.jpg", tmp_path / "missing.jpg"
        cut.write_bytes(large[0].read_bytes()[: large[0].stat().st_size // 2])
        paths = [missing, *large[:2], cut, *large[2:], cut, missing]
        results = list(classify_files(paths, self._between(large, colour_model), batch_size, scaled_decode=True))
        assert [result.path for result in results] == paths
        failed = {i: result.error for i, result in enumerate(results) if isinstance(result, FileFailure)}
        assert sorted(failed) == [0, 3, len(paths) - 2, len(paths) - 1]
        assert failed[0] == "no such file"
        assert "truncated" in failed[3]

    @pytest.mark.parametrize("gone", [[1], [0, 2], [0, 1, 2, 3, 4, 5, 6, 7]])
    def test_one_that_is_gone_when_it_is_to_be_read_in_full_fails_alone(
        self, gone: list[int], doomed: list[Path], colour_model: Path
    ) -> None:
        def watch(paths: list[Path], images: Tensor) -> None:
            for i in gone:
                doomed[i].unlink(missing_ok=True)

        results = list(classify_files(doomed, Predictor(load(colour_model), 1), watch=watch, scaled_decode=True))
        assert [result.path for result in results] == doomed
        assert [i for i, result in enumerate(results) if isinstance(result, FileFailure)] == gone
        assert {result.error for result in results if isinstance(result, FileFailure)} == {"no such file"}

    def test_one_that_is_gone_and_was_named_twice_fails_twice(self, doomed: list[Path], colour_model: Path) -> None:
        paths = [doomed[0], doomed[1], doomed[0]]
        results = list(
            classify_files(
                paths,
                Predictor(load(colour_model), 1),
                watch=lambda read, images: doomed[0].unlink(),
                scaled_decode=True,
            )
        )
        assert [isinstance(result, FileFailure) for result in results] == [True, False, True]

    def test_from_the_command_line(
        self, large: list[Path], colour_model: Path, cfvit_main: Callable[..., Outcome]
    ) -> None:
        given = ("predict", *large, "--model", colour_model, "--threshold", "1", "--json")
        whole, scaled = cfvit_main(*given), cfvit_main(*given, "--scaled-decode")
        assert whole.status == scaled.status == 0
        for one, other in zip(map(json.loads, whole.out), map(json.loads, scaled.out), strict=True):
            assert other.pop("confidence") == pytest.approx(one.pop("confidence"), abs=0.1)
            assert other == one
        assert len(whole.out) == len(large)

    def test_pictures_and_scaled_decoding_exclude_each_other(
        self, large: list[Path], tmp_path: Path, colour_model: Path, cfvit_main: Callable[..., Outcome]
    ) -> None:
        outcome = cfvit_main(
            "predict", large[0], "--model", colour_model, "--scaled-decode", "--explain", tmp_path / "pictures"
        )
        assert outcome.status == 2
        assert "--scaled-decode" in outcome.err[-1]
        assert not (tmp_path / "pictures").exists()


def test_an_answer_that_is_not_a_number_is_a_failure(photos: list[Path], make_model: Callable[..., Any]) -> None:
    """Finite weights may overflow."""
    model = make_model()
    torch.nn.init.constant_(model.get_parameter("backbone.blocks.0.mlp.fc2.weight"), 1e30)
    for threshold in (0.0, 0.5, 1.0):
        answers = list(classify_files(photos, Predictor(model, threshold)))
        assert all(isinstance(answer, FileFailure) and "is not a number" in answer.error for answer in answers)
