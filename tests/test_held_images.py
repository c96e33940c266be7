"""Images held decoded: the same images, less work."""

from __future__ import annotations

import errno
import gc
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from cfvit.data import ImageError, open_data
from cfvit.errors import CfvitError
from cfvit.training import held_images
from cfvit.training.held_images import hold
from cfvit.training.loop import train
from cfvit.training.recipes import Recipe


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


def test_another_process_maps_the_same_file_and_the_file_goes_with_its_owner(mixed: Path) -> None:
    held = hold(open_data(str(mixed)), 0)
    assert held.pixels is not None
    file = Path(held.pixels.name)
    twin = pickle.loads(pickle.dumps(held.pixels))
    assert np.array_equal(twin[0:105], held.pixels[0:105])
    del twin
    gc.collect()
    assert file.exists()
    held = replace(held, pixels=None)
    gc.collect()
    assert not file.exists()


def test_want_of_room_is_one_line_and_leaves_no_file(
    mixed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(held_images.tempfile, "tempdir", str(tmp_path / "full"))
    (tmp_path / "full").mkdir()

    def fail(self: object, pixels: np.ndarray) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(held_images._Pixels, "append", fail)
    with pytest.raises(CfvitError, match=r"No space left on device; 0 of 5 were held.*TMPDIR.*hold-decoded"):
        hold(open_data(str(mixed)), 0)
    gc.collect()
    assert not list((tmp_path / "full").iterdir())


def test_a_run_with_held_images_is_the_run_without(colours: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        data=str(colours),
        holdout=0.2,
        backbone="test_vit",
        timm_kwargs={"patch_size": 4},
        coarse_grid=2,
        epochs=1,
        batch_size=16,
        workers=1,
    )
    figures = [train(recipe.replace({"hold_decoded": held}), tmp_path / str(held)) for held in (False, True)]
    assert figures[0] == figures[1]
    ours, theirs = (load_file(tmp_path / str(held) / "model.safetensors") for held in (True, False))
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
