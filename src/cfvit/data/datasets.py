"""Data sets: folders, tars and what timm reads, as a `DataSource` of images with class indices."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np
import timm.data
from PIL import Image

from cfvit.data.images import IMAGE_SUFFIXES, ImageError, find_images, open_image, to_rgb
from cfvit.data.labels import readable_class_names
from cfvit.errors import CfvitError, first_line


class _TimmDataset(Protocol):
    def __getitem__(self, index: int) -> Any: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class DataSource:
    """A labelled data set as timm reads it, before any transform.

    Attributes:
        dataset: timm's data set.
        class_names: by class index, ImageNet's identifiers replaced by words.
        targets: the class index to give instead of each of the data set's own, if they differ.
    """

    dataset: _TimmDataset
    class_names: list[str]
    targets: Sequence[int] | None = None

    def aligned(self, class_names: Sequence[str]) -> DataSource:
        """The same images with class indices that follow ``class_names``.

        Raises:
            CfvitError: a class that is not among them.
        """
        unknown = [name for name in self.class_names if name not in class_names]
        if unknown:
            raise CfvitError(
                f"class {unknown[0]!r} of the data is not among the model's {len(class_names)} classes "
                f"({', '.join(list(class_names)[:4])}, ...): name the folders alike"
            )
        places = [list(class_names).index(name) for name in self.class_names]
        targets = places if self.targets is None else [places[target] for target in self.targets]
        return replace(self, class_names=list(class_names), targets=targets)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Image and class index. Raises `ImageError` where the image cannot be read."""
        image, target = self.decode(index)
        return image, target if self.targets is None else self.targets[target]

    def decode(self, index: int) -> tuple[Image.Image, int]:
        """Image and the data set's own class index, before ``targets``. Raises `ImageError` as `read` does."""
        image, target = self._item(index)
        return (to_rgb(image) if isinstance(image, Image.Image) else open_image(image)), int(target)

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


class ImageFiles:
    """Files as a data set of a single class, which reads them itself."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files, self.reader = files, self

    def __getitem__(self, index: int) -> tuple[Path, int]:
        return self.files[index], 0

    def __len__(self) -> int:
        return len(self.files)

    def filename(self, index: int) -> str:
        """The file, as it was found."""
        return str(self.files[index])


def open_images(data: str) -> DataSource:
    """Images whose classes do not matter: a file, any folder of images, or what `open_data` reads.

    Raises:
        CfvitError: nothing there, or no images.
    """
    root = _split_folder(Path(data), "validation")
    if not root.is_dir() and root.suffix.lower() not in IMAGE_SUFFIXES:
        return open_data(data, "validation")
    files = find_images([root])
    if files == [root] and root.is_dir():
        raise CfvitError(f"{data} has no images: give a folder of images")
    return DataSource(ImageFiles(files), [])


def open_data(data: str, split: str = "train") -> DataSource:
    """Opens an image folder, a tar, or a timm data set such as ``hfds/name`` or ``torch/cifar10``.

    Args:
        data: path or timm's name. A folder with sub-folders for splits is entered at ``split``.
        split: ``train`` or ``validation``.

    Raises:
        CfvitError: nothing there, no images, an empty class, fewer than two classes to train on.
    """
    path = Path(data)
    root = _split_folder(path, split)
    if root.is_dir():
        _refuse_empty_classes(root)
    try:
        if path.exists():
            dataset = timm.data.create_dataset("", root=str(root), split=split, search_split=False)
        elif re.match(r"(hfds|hfids|tfds|wds|torch)/", data, re.IGNORECASE):
            dataset = timm.data.create_dataset(data, root=None, split=split, download=False)
        else:
            raise CfvitError(
                f"no data at {data}: give a folder with one sub-folder per class, a .tar, or a timm name (hfds/...)"
            )
    except CfvitError:
        raise
    except Exception as error:
        raise CfvitError(f"cannot read the data at {data} ({first_line(error)})") from error
    names = _class_names(dataset)
    if len(names) < 2 and split == "train":
        raise CfvitError(f"{data} holds {len(names)} class: give one sub-folder of images per class, at least two")
    return DataSource(cast(_TimmDataset, dataset), readable_class_names(names))


def _split_folder(path: Path, split: str) -> Path:
    """The sub-folder or tar of a split, or the path itself where it has none."""
    synonyms = {"train": ("train", "training"), "validation": ("val", "validation", "valid", "test")}
    for name in synonyms.get(split, (split,)):
        if (path / f"{name}.tar").is_file():
            return path / f"{name}.tar"
        if _class_folders(path / name):  # else it is a class of that name
            return path / name
    return path


def has_validation_split(data: str) -> bool:
    """Whether a folder holds a validation split of its own."""
    return _split_folder(Path(data), "validation") != Path(data)


def _class_folders(root: Path) -> list[Path]:
    """The visible sub-folders of a folder, none if it is not there."""
    return sorted(p for p in root.iterdir() if p.is_dir() and p.name[0] != ".") if root.is_dir() else []


def _refuse_empty_classes(root: Path) -> None:
    folders = _class_folders(root)
    if not folders and not any(root.glob("*.tar")):
        raise CfvitError(f"{root} has no sub-folders: give a folder with one sub-folder of images per class")
    stray = next((p for p in sorted(root.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()), None)
    if stray is not None:
        raise CfvitError(f"{stray} lies beside the class folders of {root}: move it into one, or away")
    for folder in folders:
        if not any(p.suffix.lower() in IMAGE_SUFFIXES for p in folder.rglob("*")):
            raise CfvitError(f"class folder {folder} has no images: fill it or remove it")
        if _class_folders(folder):
            raise CfvitError(
                f"class folder {folder} holds the folder {_class_folders(folder)[0].name}: "
                "put the images of a class into one folder"
            )


def _class_names(dataset: Any) -> list[str]:
    reader = getattr(dataset, "reader", dataset)
    for attribute in ("class_to_idx", "class_name_to_idx"):
        mapping = getattr(reader, attribute, None)
        if mapping:
            return [str(name) for name, _ in sorted(mapping.items(), key=lambda item: item[1])]
    raise CfvitError("the data set does not name its classes: give a folder, a tar or a data set that does")


def split_holdout(source: DataSource, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and indices kept out, chosen at random by the seed alone."""
    order = np.random.default_rng(seed).permutation(len(source)).tolist()
    kept_out = round(share * len(source))
    return sorted(order[kept_out:]), sorted(order[:kept_out])
