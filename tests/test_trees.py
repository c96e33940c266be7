"""Folders and tars: the same rules for both, an order of the names alone, and nothing lost in silence."""

from __future__ import annotations

import io
import os
import random
import shutil
import tarfile
import tempfile
import unicodedata
import warnings
from collections.abc import Callable
from contextlib import suppress
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.utils.misc import natural_key as timms_key

from cfvit.data import find_images, has_validation_split, natural_key, open_data, open_images
from cfvit.data.trees import FOREIGN_FOLDERS, scan
from cfvit.errors import CfvitError

Fails = Callable[..., Any]
FUZZ = int(os.environ.get("CFVIT_FUZZ", "100"))
"""Examples of each fuzz test."""


def _image(colour: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


PNG = _image()


def _write(root: Path, *names: str) -> Path:
    """Images, and by a final slash folders."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(PNG)
    return root


def _tar(folder: Path, file: Path, inside: str = ".") -> Path:
    with tarfile.open(file, "w") as archive:
        archive.add(folder, inside)
    return file


# The order of classes


@pytest.mark.parametrize("names", [["A", "a"], ["1", "01"], ["b10", "B2", "b2", "B10"], ["ß", "ss", "SS"]])
def test_the_order_depends_on_the_names_alone(names: list[str]) -> None:
    orders = {tuple(sorted(random.sample(names, len(names)), key=natural_key)) for _ in range(50)}
    assert len(orders) == 1


@settings(max_examples=FUZZ, deadline=None)
@given(st.lists(st.from_regex(r"[a-z_./ -]{0,4}[0-9]{0,3}[a-z]{0,3}[0-9]{0,2}", fullmatch=True), unique=True))
def test_the_order_is_timms_for_usual_names(names: list[str]) -> None:
    ours = sorted(names, key=natural_key)
    assert [timms_key(name) for name in ours] == sorted(timms_key(name) for name in names)


@settings(max_examples=FUZZ, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=6))
def test_any_names_have_one_order(names: list[str]) -> None:
    """A total order: equal keys are equal names, up to the form of Unicode."""
    different = {unicodedata.normalize("NFC", name) for name in names}
    assert len({repr(natural_key(name)) for name in names}) == len(different)
    assert sorted(different, key=natural_key) == sorted(sorted(different), key=natural_key)


def test_numbers_of_any_script_are_numbers_and_others_are_characters() -> None:
    assert sorted(["5²3.png", "①", "x10", "x9", "x٣"], key=natural_key) == ["5²3.png", "x٣", "x9", "x10", "①"]
    assert sorted(["9" * 5000, "1" + "0" * 5000], key=natural_key)[0] == "9" * 5000


def test_classes_that_differ_in_zeros_or_case_have_an_order(tmp_path: Path) -> None:
    names = ["001", "01", "1", "A", "a", "Ä", "ä"]
    assert all(sorted(order, key=natural_key) == names for order in permutations(names))
    assert open_data(str(_write(tmp_path / "data", *(f"{name}/1.png" for name in names)))).class_names == names


def test_torchvisions_order_is_by_characters(tmp_path: Path) -> None:
    root = _write(tmp_path / "data", *(f"{name}/1.png" for name in ("0", "1", "10", "2", "b", "C")))
    natural, plain = open_data(str(root)), open_data(str(root), class_order="torchvision")
    assert natural.class_names == ["0", "1", "2", "10", "b", "C"]
    assert plain.class_names == sorted(natural.class_names)
    for source in (natural, plain):
        assert {source.name(i).split("/")[0]: source.class_names[source.read(i)[1]] for i in range(6)} == {
            name: name for name in natural.class_names
        }


def test_forms_of_unicode_do_not_matter(tmp_path: Path, fails: Fails) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    source = open_data(str(_write(tmp_path / "data", f"{decomposed}/1.png", "tea/1.png")))
    assert source.class_names == [composed, "tea"]
    for names in ([composed, "tea"], [decomposed, "tea"]):
        assert source.aligned(names).class_names == names
    with fails("two folders 'caf\u00e9', in two forms of Unicode"):
        open_data(str(_write(tmp_path / "data", f"{composed}/1.png")))


# What is a class


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("foreign", [".ipynb_checkpoints", ".thumbnails", "@eaDir", "__MACOSX"])
def test_hidden_and_foreign_folders_are_no_classes(foreign: str, kind: str, tmp_path: Path) -> None:
    root = _write(
        tmp_path / "data",
        "a/1.png",
        "b/1.png",
        f"{foreign}/1.png",
        f"a/{foreign}/1.png",
        "b/._1.png",
        f"b/{foreign}/x/",
    )
    source = open_data(str(root if kind == "folder" else _tar(root, tmp_path / "data.tar")))
    assert source.class_names == ["a", "b"]
    assert [source.name(i) for i in range(len(source))] == ["a/1.png", "b/1.png"]


SPLITS = ["train/a/1.png", "train/b/1.png", "val/a/2.png", "val/b/2.png", "val/b/3.png"]


@pytest.mark.parametrize("inside", [".", "set", "deep/er"])
@pytest.mark.parametrize("kind", ["folder", "tar", "tars"])
def test_splits_of_a_folder_and_of_a_tar_are_never_merged(kind: str, inside: str, tmp_path: Path) -> None:
    root = _write(tmp_path / "data" / inside, *SPLITS)
    data = tmp_path / "data"
    if kind == "tar":
        data = _tar(tmp_path / "data", tmp_path / "data.tar")
    if kind == "tars":
        for name in ("train", "val"):
            _tar(root / name, root / f"{name}.tar", name)
            shutil.rmtree(root / name)
    train, validation = open_data(str(data), "train"), open_data(str(data), "validation")
    assert has_validation_split(str(data))
    assert [train.name(i) for i in range(len(train))] == ["a/1.png", "b/1.png"]
    assert [validation.name(i) for i in range(len(validation))] == ["a/2.png", "b/2.png", "b/3.png"]


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        pytest.param(["a/1.png", "b/1.png", "c.png"], "train", r"c\.png lies beside the class folders", id="stray"),
        pytest.param(["a/1.png", "a/in/1.png", "b/1.png"], "train", "a holds the folder in: put", id="nested"),
        pytest.param(["a/in/1.png", "b/1.png"], "train", "a holds the folder in: put", id="deeper"),
        pytest.param(["a/1.png", "b/"], "train", "b has no images", id="empty-class"),
        pytest.param(["1.png"], "train", "has no sub-folders", id="flat"),
        pytest.param(["a/1.png"], "train", "holds 1 class", id="one-class"),
        pytest.param(["train/a/1.png", "train/b/1.png"], "validation", "give data with the split", id="other-split"),
        pytest.param([*SPLITS[:2], "val/1.png"], "validation", "val has no sub-folders", id="flat-val"),
    ],
)
def test_a_tar_is_judged_as_a_folder_is(
    names: list[str], split: str, message: str, kind: str, tmp_path: Path, fails: Fails
) -> None:
    root = _write(tmp_path / "data", *names)
    with fails(message):
        open_data(str(root if kind == "folder" else _tar(root, tmp_path / "data.tar")), split)


def test_a_flat_val_is_told_in_training_too(tmp_path: Path, fails: Fails) -> None:
    root = _write(tmp_path / "data", *SPLITS[:2], "val/1.png")
    assert has_validation_split(str(root))
    with fails("val has no sub-folders"):
        open_data(str(root), "validation")
    test = _write(tmp_path / "other", *SPLITS[:2], "test/1.png")
    assert not has_validation_split(str(test)), "unlabelled images for a contest"


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (["Train/a/1.png", "Train/b/1.png", "Val/a/1.png"], "train", "Train is named as .*: rename it to train"),
        (["Train/a/1.png", "Train/b/1.png", "Val/a/1.png"], "validation", "Val is named as .*: rename it to val"),
        (["train/a/1.png", "train/b/1.png", "VALID/1.png"], "validation", "VALID is named as .*: rename it to valid"),
        (["Train/1.png", "Test/1.png"], "train", "Train is named as .*: rename it to train"),
        (["Train/a/1.png", "Train/b/1.png"], "validation", "Train holds the folder a"),
        (["train/1.png", "val/1.png"], "train", "train has no sub-folders"),
        (["train/1.png", "val/1.png"], "validation", "val has no sub-folders"),
    ],
)
def test_splits_are_not_taken_for_classes(
    names: list[str], split: str, message: str, kind: str, tmp_path: Path, fails: Fails
) -> None:
    root = _write(tmp_path / "data", *names)
    with fails(message):
        open_data(str(root if kind == "folder" else _tar(root, tmp_path / "data.tar")), split)


def test_classes_may_be_named_as_splits_are(tmp_path: Path) -> None:
    """A train is a class of COCO."""
    root = _write(tmp_path / "data", "Test/1.png", "bus/1.png", "train/1.png")
    for data in (root, _tar(root, tmp_path / "data.tar")):
        assert open_data(str(data)).class_names == ["bus", "Test", "train"]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_what_lies_beside_splits_is_told(kind: str, tmp_path: Path) -> None:
    root = _write(tmp_path / "data", *SPLITS, "test/1.png", "cat/1.png", "dog/1.png", "@eaDir/x/", ".git/x/")
    data = str(root if kind == "folder" else _tar(root, tmp_path / "data.tar"))
    for split in ("train", "validation"):
        with pytest.warns(UserWarning, match=r"has splits: what lies beside them is not read \(cat, dog\)"):
            assert open_data(data, split).class_names == ["a", "b"]


def test_a_tar_of_tars_has_a_class_for_each(tmp_path: Path) -> None:
    """As ImageNet is handed out: ``n01440764.tar`` and its kin, in one tar or in a folder."""
    root = tmp_path / "tars"
    root.mkdir()
    for shade, name in enumerate(("x", "y")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "1.png").write_bytes(_image(shade))
        _tar(folder, root / f"{name}.tar", "." if name == "x" else name)
    for data in (root, _tar(root, tmp_path / "all.tar")):
        source = open_data(str(data))
        assert source.class_names == ["x", "y"]
        assert [(np.asarray(source.read(i)[0]).max(), source.read(i)[1]) for i in range(2)] == [(0, 0), (1, 1)]
    (root / "x").mkdir()
    with pytest.raises(CfvitError, match=r"x is there as a folder and as x\.tar"):
        open_data(str(root))


def test_a_tar_that_cannot_be_read_is_one_line(tmp_path: Path, fails: Fails) -> None:
    root = _write(tmp_path / "data", "a/1.png", "b/1.png")
    whole = _tar(root, tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.add(root, ".")
    (tmp_path / "cut.tar").write_bytes(whole[:2000])
    (tmp_path / "text.tar").write_bytes(b"no tar" * 200)
    for name in ("packed", "cut", "text"):
        with fails("damaged, compressed or no tar"):
            open_data(str(tmp_path / f"{name}.tar"))


# The same tree as a folder and as a tar

NAME = st.one_of(
    st.sampled_from(
        [
            "a",
            "A",
            "1",
            "01",
            "val",
            "train",
            "test",
            "Train",
            "VAL",
            "é",
            "e\u0301",
            "a.b",
            "5²3",
            "①",
            "ⅷ",
            "x y",
            "ß",
        ]
    ),
    st.sampled_from([".hidden", "@eaDir", "__MACOSX", "._a", "lost+found"]),
    st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=5).filter(
        lambda name: name not in (".", "..")
    ),
)
SUFFIX = st.sampled_from([".png", ".PNG", ".jpg", "", ".txt", ".heic"])
PATH = st.tuples(st.lists(NAME, max_size=3), NAME, SUFFIX).map(lambda p: "/".join([*p[0], p[1] + p[2]]))
LINK = st.tuples(PATH, st.lists(st.one_of(NAME, st.just("..")), min_size=1, max_size=4).map("/".join))


def _build(root: Path, paths: list[str], links: list[tuple[str, str]], folders: list[str]) -> None:
    """As much of a tree as can be there at once."""
    for path in folders:
        with suppress(OSError):
            (root / path).mkdir(parents=True, exist_ok=True)
    for path in paths:
        with suppress(OSError):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(PNG)
    for path, target in links:
        with suppress(OSError):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).symlink_to(target)


def _outcome(data: Path, split: str) -> Any:
    """Classes and images, or the refusal, without the place of the data."""
    try:
        source = open_data(str(data), split)
    except CfvitError as error:
        assert "\n" not in str(error).replace("\\n", "")
        return str(error).replace(str(data), "DATA")
    images = [(source.name(i), source.read(i)[1]) for i in range(len(source))]
    assert all(unicodedata.normalize("NFC", Path(name).parts[0]) == source.class_names[c] for name, c in images)
    return source.class_names, images


def test_a_link_back_makes_no_split_of_a_folder(tmp_path: Path) -> None:
    data = tmp_path / "data"
    _build(data, ["a.png", "train/b.png"], [("train/back", "..")], [])
    _tar(data, tmp_path / "data.tar")
    for place in (data, tmp_path / "data.tar"):
        assert "DATA/a.png lies beside the class folders" in _outcome(place, "train")


@settings(max_examples=FUZZ, deadline=None)
@given(
    st.lists(PATH, min_size=1, max_size=8),
    st.lists(LINK, max_size=2),
    st.lists(NAME, max_size=2),
    st.sampled_from(["train", "validation"]),
)
def test_folder_and_tar_of_a_tree_agree(
    paths: list[str], links: list[tuple[str, str]], folders: list[str], split: str
) -> None:
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root, tar = Path(place) / "in" / "data", Path(place) / "tar" / "data"
        root.mkdir(parents=True)
        tar.parent.mkdir()
        _build(root, paths, links, folders)
        _tar(root, tar.with_suffix(".tar"))
        assert _outcome(root, split) == _outcome(tar.with_suffix(".tar"), split)
        for data in (root, tar.with_suffix(".tar")):
            assert not any(
                part.startswith(".") or part.lower() in FOREIGN_FOLDERS
                for name in scan(data).images
                for part in name.split("/")
            )


# Links


def test_links_are_followed_in_folders_and_in_tars(tmp_path: Path) -> None:
    root = _write(tmp_path / "data", "a/1.png", "b/1.png")
    (root / "a" / "2.png").symlink_to("../b/1.png")
    (root / "b" / "around").symlink_to("..")
    (root / "b" / "nowhere.png").symlink_to("absent.png")
    (root / "b" / "itself.png").symlink_to("itself.png")
    (root / "b" / "through_a_file.png").symlink_to("1.png/../1.png")
    (root / "c").symlink_to("b")
    os.link(root / "a" / "1.png", root / "b" / "hard.png")
    expected = ["a/1.png", "a/2.png", "b/1.png", "b/hard.png", "c/1.png", "c/hard.png"]
    for data in (root, _tar(root, tmp_path / "data.tar")):
        with pytest.warns(UserWarning, match=f"{data}: 6 broken links are skipped, b/itself.png first: mend"):
            source = open_data(str(data))
        assert [source.name(i) for i in range(len(source))] == expected
        assert all(source.read(i)[0].size == (4, 4) for i in range(len(source)))


def test_predict_finds_the_images_of_linked_folders_once(tmp_path: Path) -> None:
    photos, elsewhere = _write(tmp_path / "photos", "1.png"), _write(tmp_path / "elsewhere", "2.png", "sub/3.png")
    (photos / "linked").symlink_to(elsewhere)
    (photos / "linked" / "back").symlink_to(photos)
    (photos / "twice").symlink_to(elsewhere / "sub")
    found = [file.relative_to(photos).as_posix() for file in find_images([photos])]
    assert found == ["1.png", "linked/2.png", "linked/sub/3.png"]


def test_a_file_named_beside_its_folder_comes_once(tmp_path: Path) -> None:
    root = _write(tmp_path / "photos", "1.png", "2.png")
    assert find_images([root / "2.png", root, root / "1.png"]) == [root / "2.png", root / "1.png"]


def test_pictures_of_other_suffixes_are_told_with_their_count(tmp_path: Path) -> None:
    root = _write(tmp_path / "photos", "a.png", "b.heic", "c/d.HEIC", "c/e.jxl", "f.jpe", "notes.txt")
    expected = r"4 files are skipped for the suffix \(2 \.heic, 1 \.jpe, 1 \.jxl\): convert"
    with pytest.warns(UserWarning, match=expected):
        assert find_images([root]) == [root / "a.png"]
    with pytest.warns(UserWarning, match=expected):
        assert len(open_images(root)) == 1
    (tmp_path / "outer").mkdir()
    (root / "gone.png").symlink_to("absent.png")
    _tar(root, tmp_path / "outer" / "packed.tar")
    with (
        pytest.warns(UserWarning, match=expected),
        pytest.warns(UserWarning, match="1 broken link is skipped, packed/gone"),
    ):
        assert len(open_images(tmp_path / "outer")) == 1


def test_a_link_back_to_where_it_lies_is_no_split(tmp_path: Path, fails: Fails) -> None:
    root = _write(tmp_path / "in" / "data", "a.png")
    (root / "train").symlink_to("..")
    for data in (root, _tar(root, tmp_path / "data.tar")):
        with fails("has no sub-folders"):
            open_data(str(data))


# Photos without classes


def _names(source: Any) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def test_photos_of_any_depth_and_of_several_sources(tmp_path: Path) -> None:
    folder = _write(tmp_path / "photos", "10.png", "2.png", "a/b/c/1.png", ".hidden/1.png", "@eaDir/1.png")
    tar = _tar(_write(tmp_path / "packed", "x/y/1.png", "x/2.png"), tmp_path / "more.tar")
    single = _write(tmp_path, "single.png") / "single.png"
    source = open_images([folder, str(tar), single, folder / "a"])
    assert _names(source) == [
        *(f"{folder}/{name}" for name in ("2.png", "10.png", "a/b/c/1.png")),
        *(f"{tar}/{name}" for name in ("x/2.png", "x/y/1.png")),
        str(single),
        f"{folder}/a/b/c/1.png",  # named twice, it counts twice
    ]
    assert source.class_names == []
    assert all(source.read(i)[0].size == (4, 4) for i in range(len(source)))
    assert source.folder(4) == f"{tar}/x/y"


def test_a_cap_keeps_so_many_of_each_folder(tmp_path: Path) -> None:
    names = [*(f"a/{i}.png" for i in range(20)), *(f"b/{i}.png" for i in range(3)), *(f"b/c/{i}.png" for i in range(9))]
    root = _write(tmp_path / "photos", *names)
    capped = open_images(f"{root}@5", seed=1)
    folders = [Path(name).parent.relative_to(root).as_posix() for name in _names(capped)]
    assert {folder: folders.count(folder) for folder in folders} == {"a": 5, "b": 3, "b/c": 5}
    assert _names(capped) == [name for name in _names(open_images(root)) if name in _names(capped)]
    assert _names(open_images(f"{root}@5", seed=1)) == _names(capped)
    assert _names(open_images(f"{root}@5", seed=2)) != _names(capped)
    alone = open_images(f"{root / 'a'}@5", seed=1)
    assert len(alone) == 5


def test_no_photos(tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "empty").mkdir()
    with fails("empty has no images"):
        open_images(tmp_path / "empty")
    with fails("no data at .*absent"):
        open_images([tmp_path / "absent", tmp_path / "empty"])


@pytest.mark.parametrize("names", [SPLITS, ["train/1.png", "train/2.png", *(f"val/{i}.png" for i in range(3))]])
def test_photos_are_of_the_split_that_is_asked_for(names: list[str], tmp_path: Path) -> None:
    root = _write(tmp_path / "data", *names)
    for data in (root, _tar(root, tmp_path / "data.tar")):
        assert len(open_images(data, "train")) == 2
        assert len(open_images(data, "validation")) == 3
