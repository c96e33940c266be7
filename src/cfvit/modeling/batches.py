"""Batches of images: their shape is checked, and what belongs to them is indexed together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from cfvit.errors import CfvitError


@dataclass(eq=False)
class Rows:
    """Tensors, or `Rows` of them, with a row for each image. Index them like one tensor: ``rows[hard]``."""

    def __getitem__(self, index: Any) -> Self:
        """The rows of a mask, of indices or of a slice."""

        def pick(part: Any) -> Any:
            moves = isinstance(index, Tensor) and isinstance(part, Tensor)
            return part[index.to(part.device, non_blocking=True) if moves else index]

        return type(self)(*(pick(getattr(self, f.name)) for f in fields(self)))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """All rows of several parts, copied."""
        columns = ([getattr(part, f.name) for part in parts] for f in fields(cls))
        return cls(
            *(torch.cat(column) if isinstance(column[0], Tensor) else column[0].join(column) for column in columns)
        )


def check_images(images: Tensor, *sizes: tuple[int, int]) -> None:
    """Checks that images are floats ``[B, 3, H, W]`` with one of these heights and widths.

    Raises:
        CfvitError: they are not.
    """
    allowed = " or ".join(f"[B, 3, {height}, {width}]" for height, width in sizes)
    if not isinstance(images, Tensor):
        raise CfvitError(f"images are a {type(images).__name__}: give a tensor, normalised {allowed}")
    if images.ndim != 4 or images.shape[1] != 3 or tuple(images.shape[2:]) not in sizes:
        raise CfvitError(f"images of shape {list(images.shape)}: give normalised {allowed}")
    if not images.is_floating_point():
        kind = str(images.dtype).removeprefix("torch.")
        raise CfvitError(f"images of {kind}: give floats {allowed}, normalised by model.data_config")
