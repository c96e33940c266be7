"""Images held decoded: the same images, less work."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

from cfvit.data import DataSource, ImageError, hold, loading, open_data
from cfvit.data.loading import HeldImages
from cfvit.errors import CfvitError
from cfvit.training.loop import train
from cfvit.training.recipe import Recipe


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Images of several sizes and modes, and one that cannot be read."""
    generator = np.random.default_rng(0)
    for name, shape in {"a/1.png": (7, 5, 3), "a/2.png": (4, 9), "b/1.jpg": (16, 12, 3), "b/3.png": (6, 6, 4)}.items():
        path = tmp_path / "mixed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(path)
    (tmp_path / "mixed" / "b" / "2.png").write_bytes(b"no image")
    return tmp_path / "mixed"


@pytest.mark.parametrize("workers", [0, 2])
def test_held_images_are_those_of_the_source(mixed: Path, workers: int) -> None:
    source = open_data(str(mixed))
    held = hold(source, workers)
    assert len(held) == len(source) == 5
    for index in range(len(source)):
        assert held.name(index) == source.name(index)
        if "2.png" in source.name(index) and "b" in source.name(index):
            continue
        (ours, our_class), (theirs, their_class) = held.read(index), source.read(index)
        assert our_class == their_class
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_unreadable_images_say_why_as_they_do_in_the_source(mixed: Path) -> None:
    source = open_data(str(mixed))
    held = hold(source, 0)
    index = next(i for i in range(5) if source.name(i).endswith("b/2.png"))
    with pytest.raises(ImageError) as theirs:
        source.read(index)
    with pytest.raises(ImageError, match=str(theirs.value)):
        held.read(index)


def test_classes_that_were_aligned_stay_so(mixed: Path) -> None:
    source = open_data(str(mixed)).aligned(["b", "z", "a"])
    held = hold(source, 0)
    assert held.class_names == ["b", "z", "a"]
    assert [held.read(i)[1] for i in (0, 4)] == [source.read(i)[1] for i in (0, 4)] == [2, 0]


def test_images_are_not_read_from_where_they_came_any_more(mixed: Path) -> None:
    held = hold(open_data(str(mixed)), 0)
    expected = np.asarray(held.read(0)[0])
    for file in mixed.rglob("*.*"):
        file.unlink()
    assert np.array_equal(np.asarray(held.read(0)[0]), expected)


class _First(Dataset):
    """The first image of a source, as pixels."""

    def __init__(self, source: DataSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> np.ndarray:
        return np.asarray(self.source.read(index)[0])


def test_a_process_that_inherits_nothing_is_handed_the_pixels(mixed: Path) -> None:
    held = hold(open_data(str(mixed)), 0)
    loader = DataLoader(_First(held), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    (pixels,) = list(loader)
    assert np.array_equal(pixels, np.asarray(held.read(0)[0]))


def test_the_file_has_no_name_that_a_killed_run_could_leave_behind(
    mixed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(loading.tempfile, "tempdir", str(tmp_path / "scratch"))
    held = hold(open_data(str(mixed)), 0)
    assert not list((tmp_path / "scratch").iterdir())
    assert isinstance(held.dataset, HeldImages)
    size = os.fstat(held.dataset.file.fileno()).st_size
    assert 0 < size - 3 * (7 * 5 + 4 * 9 + 16 * 12 + 6 * 6) < 4 * 20  # a line for each image


def test_no_folder_for_temporary_files_is_one_line(
    mixed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loading.tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(CfvitError, match=r"cannot be held.*TMPDIR"):
        hold(open_data(str(mixed)), 0)


@pytest.mark.parametrize("names", [["b", "a"], ["b", "z", "a"]])
def test_a_held_source_is_aligned_as_any_other(names: list[str], mixed: Path) -> None:
    source = open_data(str(mixed))
    for held in (hold(source, 0).aligned(names), hold(source.aligned(["z", "b", "a"]), 0).aligned(["b", "a", "z"])):
        assert isinstance(held.dataset, HeldImages)
        for index in (0, 4):
            assert held.class_names[held.read(index)[1]] == source.class_names[source.read(index)[1]]
    with pytest.raises(CfvitError, match="'b' of the data is not among"):
        hold(source, 0).aligned(["a"])


def test_want_of_room_is_one_line(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk(io.BytesIO):
        def write(self, content: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loading.tempfile, "TemporaryFile", FullDisk)
    with pytest.raises(CfvitError, match=r"No space left on device; 0 of 5 were.*TMPDIR.*hold-decoded"):
        hold(open_data(str(mixed)), 0)


def test_a_run_with_held_images_is_the_run_without(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe.replace({"workers": 1})
    figures = [train(recipe.replace({"hold_decoded": held}), tmp_path / str(held)) for held in (False, True)]
    assert figures[0] == figures[1]
    ours, theirs = (load_file(tmp_path / str(held) / "model.safetensors") for held in (True, False))
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
