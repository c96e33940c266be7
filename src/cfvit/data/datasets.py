"""Images and data sets: careful reading of single files, timm's readers and transforms on top.

Every image, in training, evaluation and prediction alike, is read by `open_image`.
"""

from __future__ import annotations

import io
import os
import random
import re
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np
import timm.data
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from cfvit.data.labels import readable_class_names
from cfvit.errors import CfvitError, first_line

IMAGE_SUFFIXES = frozenset(
    [".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".jp2", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"]
)
"""What a folder is searched for; a file named outright is read whatever its name."""

timm.data.set_img_extensions(sorted(IMAGE_SUFFIXES))  # by itself timm finds .png and .jpeg alone

MAX_PIXELS = 178_956_970
"""Larger images are refused, as by Pillow itself: decoded, they would take more than 500 MB."""


MAX_ASPECT = 200
"""Images that are longer for their width are refused: brought to a model's height, they would fill the memory."""

UNREADABLE = -1
"""The target that stands for an image that could not be read."""

FAILURES_IN_A_ROW = 100
"""So many unreadable training images one after the other end the run."""


class ImageError(CfvitError):
    """One image cannot be read; the message says why, without the file's name."""


def open_image(source: str | Path | IO[bytes] | bytes, least: int | None = None) -> Image.Image:
    """Decodes an image to 8-bit RGB as a person would see it.

    The first frame of an animation; upright by its EXIF orientation; transparency on white;
    CMYK, palette, greyscale and 16-bit images converted.

    Args:
        least: a JPEG may be decoded at a half, a quarter or an eighth of its size if its shorter side
            keeps so many pixels; others are decoded in full.

    Raises:
        ImageError: no such file, not an image, truncated, larger than `MAX_PIXELS`, longer than `MAX_ASPECT`.
    """
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ImageError(
                        f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}: shrink it first"
                    )
                if max(image.size) > MAX_ASPECT * min(image.size):
                    raise ImageError(f"{image.width} x {image.height} pixels, longer than {MAX_ASPECT} to 1: cut it")
                if least is not None:
                    image.draft(None, (least, least))
                image.load()
                return _to_rgb(_upright(image))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"more than {MAX_PIXELS:,} pixels: shrink it first") from error
    except UnidentifiedImageError as error:
        raise ImageError("not an image, or of a format that Pillow does not read") from error
    except FileNotFoundError as error:
        raise ImageError("no such file") from error
    except IsADirectoryError as error:
        raise ImageError("a folder without images") from error
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise ImageError(f"damaged or truncated ({first_line(error)})") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF, of which the pixels know nothing
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        return Image.fromarray(_to_8_bit(values, image.mode)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(values: np.ndarray, mode: str) -> np.ndarray:
    """Deep greyscale to 8 bits: 16-bit integers by their full range, floats in [0, 1] or [0, 255]."""
    full = 65535.0 if mode != "F" else 1.0 if values.max(initial=0) <= 1 else 255.0
    return (values * (255 / full)).round().clip(0, 255).astype(np.uint8)


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """The files named, and all images in the folders named, sorted within each folder.

    A path that does not exist and a folder without images stand for themselves: `open_image` will
    say what is wrong with each, and the others still get their answers.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            found += inside or [path]
        else:
            found.append(path)
    return found


def eval_transform(data_config: dict[str, Any]) -> Any:
    """Timm's evaluation transform of a model: PIL image to normalised ``[3, S, S]``."""
    return timm.data.create_transform(**data_config, is_training=False)


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
        return (_to_rgb(image) if isinstance(image, Image.Image) else open_image(image)), int(target)

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


class TrainImages(Dataset):
    """Augmented training images. An item is asked for by ``(position, seed)``.

    All random choices of the transform follow from the seed, whatever worker makes the item. An
    unreadable file is replaced by the next readable one, with a warning that names it; where there
    is none, the target is `UNREADABLE`, which the run refuses.
    """

    def __init__(self, source: DataSource, indices: Sequence[int], transform: Any) -> None:
        self.source, self.indices, self.transform = source, indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, ...]:
        position, seed = key
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes longer than an augmentation, for GPUs' sake
        return self.augment(*self._read(position))

    def augment(self, image: Image.Image, target: int, index: int) -> tuple[Any, ...]:
        """The item of an image, given also its number in the source: ``(tensor, target)``."""
        return self.transform(image), target

    def _read(self, position: int) -> tuple[Image.Image, int, int]:
        index = self.indices[position]
        for offset in range(min(len(self), FAILURES_IN_A_ROW)):
            index = self.indices[(position + offset) % len(self)]
            try:
                return *self.source.read(index), index
            except ImageError as error:
                warnings.warn(f"skipped {self.source.name(index)}: {error}", stacklevel=2)
        return Image.new("RGB", (8, 8)), UNREADABLE, index


class TrainSampler(Sampler):
    """The order of one rank's training images, as ``(position, seed)``, fixed by seed and epoch.

    Call `set_position` before each epoch; ``start`` leaves out what a resumed run has seen.
    """

    def __init__(self, dataset: TrainImages, repeats: int, seed: int, rank: int, world: int) -> None:
        self.seed, self.rank, self.epoch, self.start = seed, rank, 0, 0
        self.order: Any
        if repeats > 1:
            self.order = RepeatAugSampler(dataset, num_replicas=world, rank=rank, num_repeats=repeats)
        else:
            self.order = DistributedSampler(dataset, num_replicas=world, rank=rank, seed=seed)

    def set_position(self, epoch: int, start: int) -> None:
        """Chooses the epoch, and how many of this rank's images of it to leave out."""
        self.epoch, self.start = epoch, start
        self.order.set_epoch(epoch if self.order.__class__ is DistributedSampler else self.seed * 100_003 + epoch)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for place, position in enumerate(self.order):
            if place >= self.start:
                yield position, combine_seeds(self.seed, self.epoch, self.rank, place)

    def __len__(self) -> int:
        return len(self.order) - self.start


def next_batch(batches: Iterator[Any]) -> Any:
    """The next batch of a loader; an error in a loading process says what it said there, in one line.

    Raises:
        CfvitError: as raised by the data set; for anything else, that images cannot be loaded, and why.
    """
    try:
        return next(batches)
    except StopIteration:
        raise
    except Exception as error:  # torch has put the loading process's traceback in front
        said = [type(error).__name__, *str(error).strip().splitlines()][-1]
        if isinstance(error, CfvitError):
            raise CfvitError(re.sub(r"^cfvit\.[\w.]+: ", "", said)) from error
        raise CfvitError(f"images cannot be loaded ({said}): check the data, or give fewer --workers") from error


def leave_signals_to_the_run(worker: int) -> None:
    """For loading processes: Ctrl-C and SIGTERM reach the whole group, but the run alone decides what to do.

    A SIGTERM that the run itself sends does end the process: multiprocessing sends one at exit, and waits.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS lacks it and keeps torch's handler, which ends on any SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_run, args=(os.getppid(),), daemon=True).start()


def _end_with_the_run(run: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run:
        pass
    os._exit(0)


def combine_seeds(*parts: int) -> int:
    """One 32-bit seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class EvalImages(Dataset):
    """Images in their order under the evaluation transform, a share of them for each rank.

    An item is ``(image, target, index)``; an unreadable file has target -1 and a black image.
    """

    def __init__(
        self,
        source: DataSource,
        data_config: dict[str, Any],
        indices: Sequence[int] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        chosen = range(len(source)) if indices is None else indices
        self.source, self.indices = source, list(chosen)[rank::world]
        self.transform, self.shape = eval_transform(data_config), data_config["input_size"]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Tensor, int, int]:
        index = self.indices[item]
        try:
            image, target = self.source.read(index)
        except ImageError:
            return torch.zeros(self.shape), UNREADABLE, index
        return self.transform(image), target, index


def eval_loader(dataset: Dataset, batch_size: int, workers: int, device: torch.device) -> DataLoader:
    """Batches in order, the last one short."""
    return DataLoader(
        dataset,
        batch_size,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_run,
    )
