"""Data sets: folders, tars and what timm reads, as a `DataSource` of images with class indices."""

from __future__ import annotations

import io
import os
import posixpath
import re
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, Protocol

import numpy as np
import timm.data
from PIL import Image
from timm.data import ImageNetInfo

from cfvit.data.images import IMAGE_SUFFIXES, ImageError, open_image, to_rgb
from cfvit.data.trees import StoredImage, Tree, holds_folders, is_foreign, natural_key, scan, tell_skipped
from cfvit.errors import CfvitError, first_line

ClassOrder = Literal["natural", "torchvision"]
"""How classes are numbered: as people sort names, ``2`` before ``10``, or by characters, as the authors' code does."""

SPLITS = {"train": ("train", "training"), "validation": ("val", "validation", "valid", "test")}
"""The names of the folders and tars of a split; the first that is there holds."""

_IDENTIFIER = re.compile(r"n\d{8}")
_SPLIT_NAMES = frozenset(name for names in SPLITS.values() for name in names)


class _Dataset(Protocol):
    def __getitem__(self, index: int) -> Any: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class DataSource:
    """A data set before any transform."""

    dataset: _Dataset  # `StoredImages` of a folder or a tar, or timm's data set
    # by class index, ImageNet's identifiers replaced by words. Empty where classes do not matter.
    class_names: list[str]
    # the class index to give instead of each of the data set's own, if they differ
    targets: Sequence[int] | None = None

    def aligned(self, class_names: Sequence[str]) -> DataSource:
        """The same images with class indices that follow ``class_names``. The forms of Unicode do not matter.

        Raises:
            CfvitError: a class that is not among them, or is there twice.
        """
        nfc = partial(unicodedata.normalize, "NFC")
        counts, places = Counter(map(nfc, class_names)), {nfc(name): place for place, name in enumerate(class_names)}
        for name in self.class_names:
            if not counts[nfc(name)]:
                if list(class_names) == [str(index) for index in range(len(class_names))]:
                    raise CfvitError(
                        f"class {name!r} of the data is not among the model's {len(class_names)} classes, which have "
                        "numbers for names: name the folders alike or, if the model's weights had no names, name "
                        "them in the order of the model's answers, by model.class_names and cfvit.save, or before "
                        "training by label_names (docs/training.md)"
                    )
                raise CfvitError(
                    f"class {name!r} of the data is not among the model's {len(class_names)} classes "
                    f"({', '.join(list(class_names)[:4])}, ...): name the folders alike"
                )
            if counts[nfc(name)] > 1:
                raise CfvitError(
                    f"class {name!r} of the data is the name of several of the model's classes: give these "
                    "names of their own in model.class_names and save the model again"
                )
        moved = [places[nfc(name)] for name in self.class_names]
        targets = moved if self.targets is None else [moved[target] for target in self.targets]
        return replace(self, class_names=list(class_names), targets=targets)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Image and class index. Raises `ImageError` where the image cannot be read."""
        image, target = self._item(index)
        image = to_rgb(image) if isinstance(image, Image.Image) else open_image(image)
        return image, int(target) if self.targets is None else self.targets[int(target)]

    def stored(self, index: int) -> IO[bytes]:
        """An image as it is stored, or its pixels where the data set gives these.

        Raises `ImageError` where it cannot be opened.
        """
        image, _ = self._item(index)
        if isinstance(image, Image.Image):
            return io.BytesIO(image.tobytes())
        if isinstance(image, (str, Path)):
            try:
                return Path(image).open("rb")
            except OSError as error:
                raise ImageError(f"cannot be opened ({error.strerror or error})") from error
        return io.BytesIO(image) if isinstance(image, bytes) else image

    def _item(self, index: int) -> tuple[Any, Any]:
        reader = getattr(self.dataset, "reader", None)
        try:
            return (reader if reader is not None else self.dataset)[index][:2]
        except OSError as error:
            raise ImageError(f"cannot be opened ({error.strerror or error})") from error

    def name(self, index: int) -> str:
        """The file's name as the reader knows it, or its number."""
        reader = getattr(self.dataset, "reader", None)
        return str(reader.filename(index)) if reader is not None else f"image {index}"

    def folder(self, index: int) -> str:
        """The folder that an image lies in, or the folder within its tar."""
        return str(PurePosixPath(self.name(index)).parent)


class StoredImages:
    """Images of folders and tars with a class index each, as timm's readers give them.

    Attributes:
        root: the folder or tar, where there is one of all images.
    """

    def __init__(
        self, names: Sequence[str], images: Sequence[StoredImage], targets: Sequence[int], root: Path | None = None
    ) -> None:
        self.names, self.images, self.targets = names, images, targets
        self.root, self.reader = root, self

    def __getitem__(self, index: int) -> tuple[Path | bytes, int]:
        return self.images[index].content(), self.targets[index]

    def __len__(self) -> int:
        return len(self.images)

    def filename(self, index: int) -> str:
        """The path below the root."""
        return self.names[index]


def open_images(data: str | Path | Sequence[str | Path], split: str = "validation", seed: int = 0) -> DataSource:
    """Images whose classes do not matter, in natural order, source by source.

    Args:
        data: an image, a folder or tar of images at any depth, or what `open_data` reads; or several of them. A file
            counts once in a source, and again in each further source. ``PATH@N`` takes at most N images of each
            folder, the others left out at random.
        split: what is entered of a folder or tar with splits.
        seed: decides which.

    Raises:
        CfvitError: nothing there, or no images.
    """
    sources = [data] if isinstance(data, str | Path) else list(data)
    names: list[str] = []
    images: list[StoredImage] = []
    for source in map(str, sources):
        head, _, count = source.rpartition("@")
        capped = head and count.isdecimal() and not Path(source).exists()
        path = Path(head if capped else source)
        if not path.exists():
            if len(sources) == 1:
                return open_data(str(source), split)
            raise CfvitError(f"no data at {path}: give folders of images, tars or images")
        if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
            found = {str(path): StoredImage(str(path))}
        else:
            root, tree, _ = _enter(path, split)
            found = {f"{root}/{name}": tree.images[name] for name in sorted(tree.images, key=natural_key)}
        if not found:
            raise CfvitError(f"{path} has no images: give a folder of images")
        once: dict[tuple[str, int], str] = {}
        for name, image in found.items():
            once.setdefault((os.path.realpath(image.file), image.start), name)
        kept = _capped(list(once.values()), int(count), seed) if capped else list(once.values())
        names += kept
        images += [found[name] for name in kept]
    return DataSource(StoredImages(names, images, [0] * len(names)), [])


def _capped(names: Sequence[str], cap: int, seed: int) -> list[str]:
    """At most ``cap`` names of each folder; what is kept of one does not depend on the others."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folders.setdefault(posixpath.dirname(name), []).append(name)
    kept: set[str] = set()
    for folder, inside in folders.items():
        generator = np.random.default_rng([seed, zlib.crc32(os.fsencode(folder))])
        kept |= {inside[place] for place in generator.permutation(len(inside))[:cap]}
    return [name for name in names if name in kept]


def open_data(data: str, split: str = "train", class_order: ClassOrder = "natural") -> DataSource:
    """Opens an image folder, a tar, or a timm data set such as ``hfds/name`` or ``torch/cifar10``.

    A folder or tar has one sub-folder, or tar within, for each class. One with sub-folders for splits, or with a
    single folder around the classes, is entered.

    Args:
        split: ``train`` or ``validation``.
        class_order: how the classes of a folder or a tar are numbered.

    Raises:
        CfvitError: nothing there, no images, images beside or below the class folders, an empty class, fewer than two
            classes to train on, another split alone.
    """
    path = Path(data)
    if path.exists():
        root, tree, _ = _enter(path, split)
        classes = _images_of_classes(tree, root)
        order = {
            name: i for i, name in enumerate(sorted(classes, key=natural_key if class_order == "natural" else None))
        }
        targets = {image: order[name] for name, images in classes.items() for image in images}
        images = {name: tree.images[name] for name in sorted(targets, key=natural_key)}
        dataset: Any = StoredImages(list(images), list(images.values()), [targets[name] for name in images], Path(root))
        names = list(order)
    elif re.match(r"(hfds|hfids|tfds|wds|torch)/", data, re.IGNORECASE):
        try:
            dataset = timm.data.create_dataset(data, root=None, split=split, download=False)
        except Exception as error:
            raise CfvitError(f"cannot read the data at {data} ({first_line(error)})") from error
        reader = getattr(dataset, "reader", dataset)
        mapping = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
        if not mapping:
            raise CfvitError("the data set does not name its classes: give a folder, a tar or a data set that does")
        names = [str(name) for name in sorted(mapping, key=lambda name: mapping[name])]
    else:
        raise CfvitError(
            f"no data at {data}: give a folder with one sub-folder per class, a .tar, or a timm name (hfds/...)"
        )
    if len(names) < 2 and split == "train":
        raise CfvitError(f"{data} holds {len(names)} class: give one sub-folder of images per class, at least two")
    return DataSource(dataset, readable_class_names(names))


def has_validation_split(data: str) -> bool:
    """Whether a folder or a tar holds a validation split of its own."""
    return Path(data).exists() and _enter(Path(data), "validation")[2]


def _enter(path: Path, split: str) -> tuple[str, Tree, bool]:
    """What a folder or a tar holds, entered at its split, or where a single folder holds all others.

    Returns:
        The place entered, the tree there, and whether that is the split.
    """
    name, entered = None, False
    if path.is_dir():
        tars = {tar.stem: tar for tar in path.glob("*.tar") if tar.is_file()}
        here = path.resolve()  # a link back to where it lies is no split
        folders = {p.name: p for p in path.iterdir() if p.is_dir() and not here.is_relative_to(p.resolve())}
        names = [name for name in {*folders, *tars} if not is_foreign(name)]
        name = _split_among(names, lambda name: name in tars or holds_folders(folders[name]), split, str(path))
        path = path if name is None else tars.get(name, folders.get(name, path))
        entered = name is not None
    tree = scan(path)
    if tree.unreadable:
        raise CfvitError(f"{path}/{tree.unreadable[0]} cannot be opened: change its permissions, or move it away")
    tell_skipped(tree, path)
    root = str(path)
    while True:
        names, inside = tree.names(), tree.names
        name = _split_among(names, lambda name: bool(inside(name)), split, root)  # noqa: B023 - called at once
        entered = entered or name is not None
        single = len(names) == 1 and not tree.has_images() and names[0].lower() not in _SPLIT_NAMES - {path.stem}
        if name is None and single and tree.names(names[0]) and not tree.has_images(names[0]):
            name = names[0]
        if name is None:
            return root, tree, entered
        root, tree = f"{root}/{name}", tree.below(name)


def _split_among(names: Iterable[str], holds_classes: Callable[[str], bool], split: str, root: str) -> str | None:
    """The folder or tar of a split among all of a folder, None where there is none.

    Folders with the name of a split may be classes. They are splits if one of them holds class folders (a ``test`` of
    images without labels is then left out, others without class folders are refused), or if all are named so. A name
    that is not in lower case is refused.
    """
    named = {name.lower(): name for name in sorted(names)}
    there = _SPLIT_NAMES & named.keys()
    whole = {name for name in there if holds_classes(named[name])}
    found = there - {"test"} | whole if whole else there if 1 < len(there) == len(named) else set()
    name = next((name for name in SPLITS[split] if name in found), None)
    if name is None:
        return None
    if named[name] != name:
        raise CfvitError(f"{root}/{named[name]} is named as a split is, but for the case: rename it to {name}")
    beside = sorted(set(names) - _SPLIT_NAMES, key=natural_key)
    if beside:
        more = f" and {len(beside) - 3} more" if len(beside) > 3 else ""
        warnings.warn(
            f"{root} has splits: what lies beside them is not read ({', '.join(beside[:3])}{more})", stacklevel=4
        )
    return name


def _images_of_classes(tree: Tree, root: str) -> dict[str, list[str]]:
    """The paths of the images of each class, by its name in Unicode's NFC."""
    folders = tree.names()
    if not folders:
        raise CfvitError(f"{root} has no sub-folders: give a folder with one sub-folder of images per class")
    inside: dict[str, list[str]] = {folder: [] for folder in ("", *tree.folders)}
    for path in tree.images:
        inside[posixpath.dirname(path)].append(path)
    if inside[""]:
        stray = min(inside[""], key=natural_key)
        raise CfvitError(f"{root}/{stray} lies beside the class folders of {root}: move it into one, or away")
    nested = {folder.split("/")[0]: folder for folder in sorted(tree.folders, reverse=True) if "/" in folder}
    classes: dict[str, list[str]] = {}
    for folder in folders:
        name = unicodedata.normalize("NFC", folder)
        if folder in nested:
            beside = _SPLIT_NAMES.intersection(folders)
            hint = (
                "give data with the split that is asked for" if beside else "put the images of a class into one folder"
            )
            raise CfvitError(
                f"class folder {root}/{folder} holds the folder {posixpath.basename(nested[folder])}: {hint}"
            )
        if not inside[folder]:
            raise CfvitError(f"class folder {root}/{folder} has no images: fill it or remove it")
        if name in classes:
            raise CfvitError(f"{root} holds two folders {name!r}, in two forms of Unicode: merge them")
        classes[name] = inside[folder]
    return classes


def split_holdout(source: DataSource, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and indices kept out, chosen at random by the seed alone."""
    order = np.random.default_rng(seed).permutation(len(source)).tolist()
    kept_out = round(share * len(source))
    return sorted(order[kept_out:]), sorted(order[:kept_out])


def readable_class_names(names: Sequence[str]) -> list[str]:
    """ImageNet's identifiers (``n01440764``) as words (``tench``); other names as they are.

    The first synonym is used where that is unambiguous among all of ImageNet, otherwise all of
    them, and with the identifier where even these are (``crane``, bird and machine). So no two
    classes share a name, and a subset of ImageNet is named as the whole.
    """
    if not names or not all(_IDENTIFIER.fullmatch(name) for name in names):
        return list(names)  # and timm's tables, which take a while to read, are not needed
    info = ImageNetInfo()
    wnids = info.label_names()
    if not set(names) <= set(wnids):
        return list(names)
    described = {wnid: info.label_name_to_description(wnid) for wnid in wnids}
    first = {wnid: description.split(", ")[0] for wnid, description in described.items()}
    uses_of_first, uses_of_all = Counter(first.values()), Counter(described.values())
    return [
        first[name]
        if uses_of_first[first[name]] == 1
        else described[name]
        if uses_of_all[described[name]] == 1
        else f"{described[name]} ({name})"
        for name in names
    ]


def difference_of_classes(names: Sequence[str], others: Sequence[str]) -> str | None:
    """The first difference between two lists of classes, in words; None if they are the same.

    Names compare in Unicode's NFC and, where that tells the classes of each list apart, by their first synonym in
    any case.
    """
    if len(names) != len(others):
        return f"{len(names)} classes here, {len(others)} there"

    def exact(name: str) -> str:
        return unicodedata.normalize("NFC", name)

    def loose(name: str) -> str:
        return exact(name).split(",")[0].split(" (n")[0].casefold()

    unambiguous = all(len(set(map(loose, each))) == len(each) for each in (names, others))
    spelled = loose if unambiguous else exact
    for index, (ours, theirs) in enumerate(zip(names, others, strict=True)):
        if spelled(ours) != spelled(theirs):
            return f"class {index} is {ours!r} here, {theirs!r} there"
    return None


def have_one_order(names: Sequence[str]) -> bool:
    """Whether classes in natural order are in torchvision's too, by characters, or are ImageNet's, which have one."""
    if list(names) == sorted(names):
        return True
    return set(names) <= set(readable_class_names(ImageNetInfo().label_names()))
