"""Checks of what a calibration is made of: sound logits, labels that fit them, every class."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from cfvit.calibration.targets import count_images
from cfvit.errors import CfvitError

_NAMED_CLASSES = 5


def check_logits(logits: Tensor, stage: str) -> None:
    """Refuses logits that are not ``[n, classes]``, are of no image, or are not finite.

    Raises:
        CfvitError: says which image is the first that is not finite.
    """
    if not isinstance(logits, Tensor):
        raise CfvitError(f"{stage} logits are a {type(logits).__name__}: give a tensor of floats [images, classes]")
    if logits.ndim != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        kind = str(logits.dtype).removeprefix("torch.")
        raise CfvitError(f"{stage} logits are {kind} of shape {list(logits.shape)}: give floats [images, classes]")
    if len(logits) == 0:
        raise CfvitError(f"{stage} logits are of no image: give at least one")
    if not logits.isfinite().all():
        bad = (~logits.isfinite()).any(dim=1).nonzero().flatten()
        raise CfvitError(
            f"{stage} logits of {len(bad)} of {len(logits)} images are not finite, image {int(bad[0])} first: "
            "leave these out, or run the model in float32"
        )


def missing_classes(present: Collection[int], names: Sequence[object], images: int) -> str:
    """A clause that tells which classes, by ``names``, have none of the images; empty if there is none.

    ``present`` has the indices of those that have.
    """
    there = set(present)
    missing = [repr(name) for index, name in enumerate(names) if index not in there]
    if len(missing) < 2:
        return f"class {missing[0]} has none of the {count_images(images)}" if missing else ""
    others = len(missing) - _NAMED_CLASSES
    named = f"{', '.join(missing[:_NAMED_CLASSES])}{f' and {others} more' if others > 0 else ''}"
    return f"classes {named} have none of the {count_images(images)}"


def require_classes(present: Collection[int], names: Sequence[object], images: int, allow_missing: bool) -> str:
    """As `missing_classes`. Raises `CfvitError` if one is missing and that is not allowed."""
    missing = missing_classes(present, names, images)
    if missing and not allow_missing:
        raise CfvitError(f"{missing}: add some, or pass allow_missing_classes=True (--allow-missing-classes)")
    return missing


def check_logits_and_labels(coarse: Tensor, fine: Tensor, labels: Tensor) -> None:
    """Refuses logits that cannot be used, and labels that do not fit them.

    Raises:
        CfvitError: says what is wrong with which of them.
    """
    check_logits(coarse, "coarse")
    check_logits(fine, "fine")
    if not isinstance(labels, Tensor):
        raise CfvitError(f"labels are a {type(labels).__name__}: give a tensor of class indices [images]")
    if coarse.shape != fine.shape or labels.shape != coarse.shape[:1]:
        shapes = f"{list(coarse.shape)}, {list(fine.shape)} and {list(labels.shape)}"
        raise CfvitError(f"coarse logits, fine logits and labels are {shapes}: give [n, classes] twice and [n]")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        kind = str(labels.dtype).removeprefix("torch.")
        raise CfvitError(f"labels are {kind}: give class indices as whole numbers")
    classes = coarse.shape[1]
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise CfvitError(f"a label is {int(outside[0])}: give class indices from 0 to {classes - 1}")
