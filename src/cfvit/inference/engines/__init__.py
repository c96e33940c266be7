"""What runs the two stages: one seam, whatever computes behind it."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Engine(Protocol):
    """Runs both stages of a model. `cfvit.Predictor` and its streams are written on this alone.

    Batches may have any number of images, none as well. Images are ``[B, 3, H, W]`` on the device and in the precision
    of ``weight``; the coarse stage also takes them at ``model.coarse_size``.

    Attributes:
        model: what the answers mean: ``image_size``, ``coarse_size``, ``config``, ``data_config``, ``class_names``,
            ``label_of``, ``threshold`` and ``exit``.
        weight: a tensor on the device and in the precision of the images.
    """

    @property
    def model(self) -> Any: ...

    @property
    def weight(self) -> Tensor: ...

    def coarse(self, images: Tensor) -> tuple[Any, Tensor]:
        """What the coarse stage knows of the images, and its confidence ``[B]`` in float32.

        The first are `cfvit.modeling.batches.Rows` with ``logits`` and whatever the fine stage needs.
        """
        ...

    def fine(self, images: Tensor, state: Any) -> tuple[Tensor, Tensor]:
        """Logits ``[B, classes]`` and confidence ``[B]`` of the fine stage, for the images that ``state`` describes."""
        ...
