"""Pictures of what the model did with an image, as in the paper's figure 9.

Drawing raises `CfvitError` if matplotlib is not installed, or a file cannot be written.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cfvit.files import require_writable
from cfvit.inference.engines import Engine
from cfvit.inference.engines.pytorch import TorchEngine
from cfvit.inference.stream import COARSE, FINE, placed
from cfvit.modeling.exit import Measure, goes_on
from cfvit.modeling.model import CoarseToFineViT
from cfvit.modeling.tokens import num_informative, rank_cells
from cfvit.plots.style import png, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class Explanation:
    """What both stages make of one image; the fine stage is run even where it was not needed."""

    image: np.ndarray  # ``[S, S, 3]`` in [0, 1], as the model saw it, without the normalisation
    attention: np.ndarray  # ``[rows, columns]``, global class attention
    split: np.ndarray  # ``[rows, columns]``, which cells the fine stage splits
    # label and confidence (by the model's `Exit`) of the coarse and of the fine stage
    answers: tuple[tuple[str, float], tuple[str, float]]
    stage: int  # the stage whose answer counts, 0 or 1
    measure: Measure = "max_probability"  # of the confidences


@torch.inference_mode()
def explain(model: CoarseToFineViT | Engine, images: Tensor, threshold: float) -> list[Explanation]:
    """Runs both stages on normalised images ``[B, 3, S, S]``, on any device, and keeps what a picture needs.

    Args:
        model: in torch, or an engine whose states have a ``class_attention``.
    """
    engine = TorchEngine(model) if isinstance(model, CoarseToFineViT) else model
    about = engine.model
    images = placed(images, engine.weight)
    state, sure = engine.coarse(images)
    fine, fine_sure = engine.fine(images, state)
    rows, columns = about.grid
    chosen, _ = rank_cells(state.class_attention, num_informative(about.config.informative_ratio, rows * columns))
    split = torch.zeros_like(state.class_attention, dtype=torch.bool).scatter(1, chosen, True)
    mean, std = (torch.tensor(about.data_config[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = (images.float().cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    def answer(logits: Tensor, confidence: Tensor) -> tuple[str, float]:
        return about.label_of(int(logits.argmax())), float(confidence)

    return [
        Explanation(
            image=pixels[i],
            attention=state.class_attention[i].reshape(rows, columns).cpu().numpy(),
            split=split[i].reshape(rows, columns).cpu().numpy(),
            answers=(answer(state.logits[i], sure[i]), answer(fine[i], fine_sure[i])),
            stage=int(goes_on(sure[i], threshold)),
            measure=about.exit.measure,
        )
        for i in range(len(images))
    ]


def shown_confidence(value: float, measure: Measure) -> str:
    """A probability or a difference of two in percent, another measure as the plain number that it is."""
    return f"{value:.1%}" if measure in ("max_probability", "margin") else f"{value:.4f}"


class PictureFolder:
    """Writes explanations of files into a folder, as ``<stem>.png``; equal stems get a number."""

    def __init__(self, folder: Path, model: CoarseToFineViT | Engine, threshold: float) -> None:
        require_matplotlib()
        require_writable(folder / "picture.png")
        self.folder, self.model, self.threshold = folder, model, threshold
        self.taken: set[str] = set()

    def __call__(self, paths: list[Path], images: Tensor) -> None:
        """Explains a batch of normalised images ``[B, 3, S, S]`` that were read from ``paths``."""
        for path, explanation in zip(paths, explain(self.model, images, self.threshold), strict=True):
            stem = os.fsencode(path.stem)[:200].decode(errors="ignore")  # a longer name could not be written
            name, number = stem, 1
            while name in self.taken:
                number += 1
                name = f"{stem}-{number}"
            self.taken.add(name)
            draw_explanation(explanation, self.folder / f"{name}.png")


def draw_explanation(explanation: Explanation, path: Path) -> None:
    """Writes a PNG of three panels: coarse view and answer, class attention, split cells and fine answer."""
    image, split = explanation.image, explanation.split
    (height, width), (rows, columns) = image.shape[:2], split.shape
    tall, wide = height / rows, width / columns
    extent, white = (0, width, height, 0), {"color": "white", "linewidth": 0.6}
    with png(path, 9.6, 3.7, dpi=110) as figure:
        coarse, attention, fine = figure.subplots(1, 3)
        for axis in (coarse, attention, fine):
            axis.set(xticks=[], yticks=[])
        half = image.reshape(height // 2, 2, width // 2, 2, 3).mean(axis=(1, 3))  # all that the coarse stage sees
        coarse.imshow(half, extent=extent, interpolation="nearest")
        _title(coarse, f"coarse stage, {rows} x {columns} cells", explanation, COARSE)

        attention.imshow(image, extent=extent)
        heat = attention.imshow(
            explanation.attention, extent=extent, cmap="inferno", alpha=0.65, interpolation="nearest"
        )
        bar = figure.colorbar(heat, ax=attention, shrink=0.8)
        bar.set_ticks([explanation.attention.min(), explanation.attention.max()], labels=["low", "high"])
        attention.set_title("global class attention\n", fontsize=10)

        fine.imshow(grey_unsplit(image, split), extent=extent)
        for row, column in np.argwhere(split):  # a cross in each cell that is split
            x, y = column * wide, row * tall
            fine.plot([x + wide / 2] * 2, [y, y + tall], color="white", linewidth=0.4)
            fine.plot([x, x + wide], [y + tall / 2] * 2, color="white", linewidth=0.4)
        title = f"fine stage, {int(split.sum())} of {rows * columns} cells split"
        _title(fine, title, explanation, FINE)
        for axis in (coarse, fine):
            axis.hlines(np.arange(1, rows) * tall, 0, width, **white)
            axis.vlines(np.arange(1, columns) * wide, 0, height, **white)


def _title(axis: Axes, what: str, explanation: Explanation, stage: int) -> None:
    label, confidence = explanation.answers[stage]
    short = label if len(label) <= 28 else label[:27] + "…"
    sure, answers = shown_confidence(confidence, explanation.measure), explanation.stage == stage
    axis.set_title(
        f"{what}\n{short}, {sure} ({'answers' if answers else 'not used'})",
        fontsize=10,
        fontweight="bold" if answers else "normal",
        color="black" if answers else "dimgray",
    )


def grey_unsplit(image: np.ndarray, split: np.ndarray) -> np.ndarray:
    """Cells that are not split, greyed out."""
    height, width = image.shape[0] // split.shape[0], image.shape[1] // split.shape[1]
    mask = split.repeat(height, axis=0).repeat(width, axis=1)[..., None]
    grey = 0.35 * image.mean(axis=-1, keepdims=True) + 0.55
    return np.where(mask, image, np.broadcast_to(grey, image.shape))
