"""Token labels: what a teacher saw at each place of an image, cut out together with the training crop.

Token labelling is LV-ViT's (Jiang et al., "All Tokens Matter", 2021): each patch learns a label of its
own. The label maps on disk are in the format of that paper's project, whose files are read as they are.
"""

from __future__ import annotations

import io
import json
import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.transforms.functional as image_functions
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.transforms import RandomHorizontalFlip

from cfvit.calibration.calibrated import parse_record
from cfvit.data import (
    UNREADABLE,
    DataSource,
    EvalImages,
    ImageError,
    TrainImages,
    difference_of_classes,
    eval_loader,
    progress_bar,
)
from cfvit.errors import CfvitError, first_line
from cfvit.files import atomic_write
from cfvit.training.teacher import Teacher

MAX_CLASSES = 2049
"""Half precision, in which class indices are stored, counts to 2048 without a gap."""

ORIGIN_FILE = "labels.json"
"""Beside the folders of the classes: a `MapsOrigin`."""

MAP_SIZE, TOP_SCORES = 18, 5
"""Places on a side of a published label map, and scores at each."""

_MAX_SCORE = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class MapsOrigin:
    """What the label maps of a folder were made of, as it is written into the folder."""

    teacher: str  # its name
    weights_sha256: str  # of the teacher's weights; these, not the name, tell teachers apart
    class_names: list[str]  # of the data, by class index
    size: int  # places on a side of a map
    cfvit: str  # the version that made the maps


def read_origin(root: Path) -> MapsOrigin | None:
    """What the label maps in a folder were made of; None where it does not say, as of published maps.

    Raises:
        CfvitError: a damaged ``labels.json``.
    """
    path = root / ORIGIN_FILE
    try:
        return parse_record(MapsOrigin, path.read_text(), ORIGIN_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CfvitError(f"{path} is damaged ({first_line(error)}): remove {root} and make the maps again") from error


def label_path_of(root: Path, source: DataSource, index: int) -> Path:
    """Where the label map of the data set's image ``index`` is stored: ``root/CLASS_FOLDER/STEM.pt``.

    Raises:
        CfvitError: data whose images have no names, or lie in no class folder.
    """
    name = Path(source.name(index))
    if name.parent.name in ("", ".."):
        raise CfvitError(f"{name} has no class folder, by which label maps are kept: give an image folder or a tar")
    return root / name.parent.name / f"{name.stem}.pt"


def require_own_maps(source: DataSource) -> None:
    """Refuses two images with one place for their label maps.

    Raises:
        CfvitError: names the two.
    """
    owners: dict[str, int] = {}
    for index in range(len(source)):
        owner = owners.setdefault(str(label_path_of(Path(), source, index)), index)
        if owner != index:
            raise CfvitError(
                f"{source.name(owner)} and {source.name(index)} would share a label map: rename one of them"
            )


def read_label_map(path: Path, num_classes: int) -> Tensor:
    """Reads the label map of one image, ``[2, k, h, w]`` in half precision; nothing in the file is executed.

    It has, at each place, the k highest scores (logits) of a teacher, and the classes that they belong to.

    Raises:
        CfvitError: no such file, damaged, of another shape, or scores and classes that cannot be.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CfvitError(f"no label map at {path}: make the missing ones with cfvit token-labels") from error
    except Exception as error:  # torch raises whatever it likes on damaged files
        reason = "it is more than a tensor" if "weights_only" in str(error) else first_line(error)
        raise CfvitError(
            f"label map {path} is damaged ({reason}): remove it and run cfvit token-labels again"
        ) from error
    sound = isinstance(content, Tensor) and content.ndim == 4 and len(content) == 2 and content.numel() > 0
    if sound and content.dtype is torch.float16 and content[0].isfinite().all():
        classes = content[1].float()
        if (classes == classes.round()).all() and classes.min() >= 0 and classes.max() < num_classes:
            return content
    got = f"{list(content.shape)} in {content.dtype}" if isinstance(content, Tensor) else f"a {type(content).__name__}"
    raise CfvitError(
        f"label map {path} is {got}, not [2, k, h, w] in torch.float16 of finite scores and classes below "
        f"{num_classes}: remove it and run cfvit token-labels for this data"
    )


class LabelledTransform:
    """Timm's training transform that also says what part of the image it shows.

    With the same seeds it gives the same images as timm's own: crop and flip are drawn here, from
    ``random`` and torch as timm does, all else is timm's. Token labels follow crop and flip; the
    rotations, shears and translations of an augmentation policy and erased regions they do not.

    Args:
        input_size: ``(3, H, W)``.
        options: of ``timm.data.create_transform`` for training; of the geometric ones ``scale``,
            ``ratio``, ``hflip`` and ``interpolation`` alone.

    Raises:
        ValueError: another geometry, such as ``vflip``.
    """

    def __init__(self, input_size: tuple[int, int, int], **options: Any) -> None:
        parts: Any = create_transform(input_size, is_training=True, separate=True, **options)
        geometry, self.augment, self.finish = parts
        self.crop, *flips = geometry.transforms
        self.flip_share = sum(flip.p for flip in flips if isinstance(flip, RandomHorizontalFlip))
        known = isinstance(self.crop, RandomResizedCropAndInterpolation)
        if not known or len(flips) != (self.flip_share > 0):
            raise ValueError(f"token labels cannot follow {geometry}: leave a random resized crop and hflip")

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """Augments an image.

        Returns:
            The normalised image ``[3, H, W]``, and its window ``[5]``: top, left, height and width
            of the crop as shares of the whole image, and 1 if it is flipped left to right, else 0.
        """
        top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        by = self.crop.interpolation
        by = random.choice(by) if isinstance(by, (tuple, list)) else by
        whole: Any = image  # torchvision's types speak of tensors alone
        shown = image_functions.resized_crop(whole, top, left, height, width, list(self.crop.size), by)
        flipped = self.flip_share > 0 and bool(torch.rand(1) < self.flip_share)
        if flipped:
            shown = image_functions.hflip(shown)
        window = [top / image.height, left / image.width, height / image.height, width / image.width, float(flipped)]
        return self.finish(self.augment(shown)), torch.tensor(window)


class LabelledImages(TrainImages):
    """Training images with their label maps: ``(tensor, target, map [2, k, h, w], window [5])``.

    An image that has no map because it cannot be read is left out, with a warning that names it.
    All maps are of the first one's shape; an item with another is refused when it is asked for.

    Raises:
        CfvitError: readable images without a label map, maps of other classes, two images with one map.
    """

    def __init__(self, source: DataSource, indices: Sequence[int], transform: LabelledTransform, root: Path) -> None:
        require_own_maps(source)
        origin = read_origin(root)
        if origin and (differs := difference_of_classes(source.class_names, origin.class_names)):
            raise CfvitError(
                f"the label maps in {root} are of other classes ({differs}): "
                "make maps of this data with cfvit token-labels and another --out"
            )
        missing = {i: path for i in indices if not (path := label_path_of(root, source, i)).is_file()}
        for index, path in missing.items():
            try:
                source.read(index)
            except ImageError as error:
                warnings.warn(f"skipped {source.name(index)}: {error}", stacklevel=2)
                continue
            raise CfvitError(
                f"{len(missing)} of {len(indices)} training images have no label map, the first is {path}: "
                f"make them with cfvit token-labels --out {root}"
            )
        super().__init__(source, [i for i in indices if i not in missing], transform)
        self.root = root
        self.shape = self._read_map(self.indices[0]).shape if self.indices else None

    def augment(self, image: Image.Image, target: int, index: int) -> tuple[Any, ...]:
        """The item of an image: ``(tensor, target, map, window)``.

        Raises:
            CfvitError: a label map that is damaged or of another shape than the first one.
        """
        tensor, window = self.transform(image)
        label_map = self._read_map(index)
        if label_map.shape != self.shape:
            raise CfvitError(
                f"label map {label_path_of(self.root, self.source, index)} is {list(label_map.shape)}, "
                f"the first one {list(self.shape or ())}: remove it and run cfvit token-labels again"
            )
        return tensor, target, label_map, window

    def _read_map(self, index: int) -> Tensor:
        return read_label_map(label_path_of(self.root, self.source, index), len(self.source.class_names))


def pool_labels(maps: Tensor, windows: Tensor, grid: tuple[int, int], num_classes: int) -> Tensor:
    """As `pool_scores`, from stored label maps.

    A class that is not among the k has score 0, as in LV-ViT's training; `to_label_maps` shifts the
    stored scores so that this is right on the whole.

    Args:
        maps: ``[B, 2, k, h, w]``, see `read_label_map`.
        windows: ``[B, 5]``, see `LabelledTransform`.
        grid: rows and columns; ``(1, 1)`` gives the label of the whole crop.
    """
    batch, _, _, height, width = maps.shape
    scores = torch.zeros(batch, num_classes, height, width, device=maps.device)
    return pool_scores(scores.scatter_(1, maps[:, 1].long(), maps[:, 0].float()), grid, windows)


def pool_scores(scores: Tensor, grid: tuple[int, int], windows: Tensor | None = None) -> Tensor:
    """Soft labels of the cells of a grid over each crop, from the scores of all classes.

    Each cell's scores are the mean over a lattice of bilinear samples of the label map, spaced by at most
    one place of the map, so that none is passed over (`torchvision.ops.roi_align` with its adaptive
    count). A map's place ``i`` of ``h`` covers the shares ``i/h`` to ``(i+1)/h`` of the image.

    Args:
        scores: ``[B, C, h, w]``, such as a teacher's.
        grid: rows and columns.
        windows: ``[B, 5]``, see `LabelledTransform`; by default the whole map.

    Returns:
        ``[B, rows * cols, C]`` in float32, in rows from the top left; they sum to 1 over the classes.
    """
    if windows is None:
        windows = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0]]).expand(len(scores), -1)
    windows = windows.to(scores.device, torch.float32)
    height, width = scores.shape[-2:]
    top, left, tall, wide = windows[:, :4].unbind(1)
    image = torch.arange(len(windows), device=windows.device, dtype=windows.dtype)
    corners = [image, left * width, top * height, (left + wide) * width, (top + tall) * height]
    boxes = torch.stack(corners, dim=1)  # as torchvision has them
    pooled = roi_align(scores.float(), boxes, grid, aligned=True)
    flipped = windows[:, 4, None, None, None] > 0.5
    pooled = torch.where(flipped, pooled.flip(-1), pooled)  # [B, C, rows, cols]
    return pooled.flatten(2).transpose(1, 2).softmax(dim=-1)


@dataclass(frozen=True)
class LabelCounts:
    """What `make_token_labels` did."""

    made: int  # label maps written
    kept: int  # label maps that were there
    unreadable: list[tuple[str, str]]  # names of images without a label map, and why


def make_token_labels(
    source: DataSource, teacher: Teacher, out: Path, *, size: int = MAP_SIZE, batch_size: int = 32, workers: int = 2
) -> LabelCounts:
    """Writes the label map of every image that has none yet, with a progress bar.

    The teacher sees the whole image, squashed to its input size, so that shares of the map are
    shares of the image. A map is ``[2, 5, size, size]`` in half precision, fewer than 5 where there
    are fewer classes; see `to_label_maps`.

    Args:
        out: gets ``labels.json``, a `MapsOrigin`, and a folder per class.

    Raises:
        CfvitError: other classes than the teacher's, two images with one place for their maps, maps of another or
            unknown origin in ``out``, a full disk. What has been written is kept and used by another call.
    """
    teacher.require_classes(source.class_names)
    if len(source.class_names) > MAX_CLASSES:
        raise CfvitError(
            f"{len(source.class_names)} classes are more than label maps can hold, {MAX_CLASSES}: "
            "train with the teacher itself"
        )
    root = getattr(getattr(source.dataset, "reader", None), "root", None)
    if root and out.resolve().is_relative_to(Path(root).resolve()):
        raise CfvitError(f"{out} lies within the data, where its folders would be classes: choose another folder")
    require_own_maps(source)
    _claim(out, MapsOrigin(teacher.name, teacher.weights_sha256(), source.class_names, size, version("cfvit")))
    unreadable: list[tuple[str, str]] = []
    shape = (2, min(TOP_SCORES, len(source.class_names)), size, size)

    def is_there(index: int) -> bool:
        """Whether an image has its map; a damaged one and one of another shape are made again."""
        try:
            return read_label_map(label_path_of(out, source, index), len(source.class_names)).shape == shape
        except CfvitError:
            return False

    missing: list[int] = []
    with progress_bar(len(source)) as advance:
        for index in range(len(source)):
            missing += [] if is_there(index) else [index]
            advance(1)
    images = EvalImages(source, {**teacher.data_config, "crop_pct": 1.0, "crop_mode": "squash"}, missing)
    with progress_bar(len(missing)) as advance:
        for pixels, targets, places in eval_loader(images, batch_size, workers, teacher.device):
            readable = targets != UNREADABLE
            if readable.any():
                maps = to_label_maps(teacher.dense(pixels[readable].to(teacher.device)), size).cpu()
                for index, label_map in zip(places[readable].tolist(), maps, strict=True):
                    content = io.BytesIO()  # writing straight to a full disk, torch would not say that it is full
                    torch.save(label_map.clone(), content)
                    with atomic_write(label_path_of(out, source, index)) as file:
                        file.write_bytes(content.getvalue())
            for index in places[~readable].tolist():
                try:
                    source.read(index)
                    reason = "could not be read a moment ago"
                except ImageError as error:
                    reason = str(error)
                unreadable.append((source.name(index), reason))
            advance(len(places))
    return LabelCounts(len(missing) - len(unreadable), len(source) - len(missing), unreadable)


def to_label_maps(logits: Tensor, size: int) -> Tensor:
    """Label maps of a teacher's logits at each place: the highest, and their classes.

    Softmax does not mind by how much all logits of a place are shifted, but a reader of maps takes
    the classes that are not stored to have score 0. So the scores are shifted until the softmax with
    that 0 gives these classes together what the teacher gives them: by the log of the mean of their
    exponentials. Where every class is stored, the highest is shifted to 0, near which half precision
    is finest. Scores that are not finite raise `CfvitError`.

    Args:
        logits: ``[B, C, h, w]``; interpolated to ``size`` places on a side.

    Returns:
        ``[B, 2, k, size, size]`` in half precision, k at most 5. Where that does not reach to the mean
        of the classes that are not stored, the scores keep their distance from the highest.
    """
    logits = F.interpolate(logits.float(), (size, size), mode="bilinear", antialias=True)
    logits = logits - logits.amax(dim=1, keepdim=True)
    scores, classes = logits.topk(min(TOP_SCORES, logits.shape[1]), dim=1)
    others = logits.shape[1] - scores.shape[1]
    if others:
        unstored = logits.scatter(1, classes, -math.inf)
        mean = unstored.logsumexp(dim=1, keepdim=True) - math.log(others)
        scores = scores - mean.clamp(min=-_MAX_SCORE)
    maps = torch.stack([scores.clamp(min=-_MAX_SCORE), classes.float()], dim=1).half()
    if not maps.isfinite().all():
        raise CfvitError("the teacher gives scores that are not finite: check its weights")
    return maps


def _claim(out: Path, origin: MapsOrigin) -> None:
    """Writes down what the maps in a folder will be made of, or compares it with what is written there."""
    was = read_origin(out)
    differs = None
    if was is None:
        if any(out.glob("*/*.pt")):
            raise CfvitError(f"{out} holds label maps of unknown origin, without {ORIGIN_FILE}: give another --out")
        with atomic_write(out / ORIGIN_FILE) as file:
            file.write_text(json.dumps(asdict(origin), indent=2) + "\n")
    elif was.weights_sha256 != origin.weights_sha256:
        which = f"not {origin.teacher}" if was.teacher != origin.teacher else "with other weights"
        differs = f"are by teacher {was.teacher}, {which}"
    elif was.size != origin.size:
        differs = f"are of {was.size} x {was.size} places, not {origin.size}"
    elif classes := difference_of_classes(origin.class_names, was.class_names):
        differs = f"are of other classes ({classes})"
    if differs:
        raise CfvitError(f"the label maps in {out} {differs}: give another --out, or remove the folder")
