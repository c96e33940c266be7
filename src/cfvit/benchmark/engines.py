"""What contenders are prepared with: torch in three ways, and exported models."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cfvit.benchmark.names import EngineName
from cfvit.data import DataSource
from cfvit.inference.engines import Engine
from cfvit.inference.engines.exported import ExportedEngine, Format, open_graph
from cfvit.inference.engines.packing import accelerate
from cfvit.inference.engines.pytorch import compiled, recorded
from cfvit.methods.base import create_method
from cfvit.modeling.model import CoarseToFineViT

IN_TORCH: dict[EngineName, bool | None] = {"eager": False, "torch": None, "compiled": True}
"""The argument ``compile`` of engines and predictors; all other engines run exported graphs."""


def prepare(
    network: Any, engine: EngineName, run: Callable[[Any], Callable[..., Any]] = lambda network: network
) -> Any:
    """Prepares a network without an exit for an engine in torch, so that the backbone and its rivals are treated alike.

    Args:
        run: from the prepared network to the function that is called, and that is compiled if any is.
    """
    fast = run(network if engine == "eager" else accelerate(network))
    return compiled(fast) if engine == "compiled" else recorded(fast) if engine == "torch" else fast


class Engines:
    """A model and its plain backbone, made ready once for each engine. They share the model's weights in torch.

    Args:
        model: in evaluation mode, on its device and in its precision; for exported engines in float32 on a CPU.
        source: images to quantise by; noise without any, which costs answers and not speed.
    """

    def __init__(self, model: CoarseToFineViT, source: DataSource | None = None) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (8, *model.image_size, 3), np.uint8)
        self.model = model
        self.source = source or DataSource(cast(Any, [(Image.fromarray(pixels), 0) for pixels in noise]), [])
        self.stages: Callable[[EngineName], Engine] = cache(self._stages)
        self.plain: Callable[[EngineName], Callable[[Tensor], Any]] = cache(self._plain)

    def _stages(self, name: EngineName) -> Engine:
        if name in IN_TORCH:
            return create_method("cf_vit").engine(self.model, IN_TORCH[name])
        from cfvit.deploy.export import export

        format, int8 = format_of(name)
        with TemporaryDirectory() as folder:
            export(self.model, folder, format=format, int8=self.source if int8 else None)
            return ExportedEngine(folder)

    def _plain(self, name: EngineName) -> Callable[[Tensor], Any]:
        if name in IN_TORCH:
            return prepare(self.model.backbone, name)
        from cfvit.deploy.graphs import trace, write_graphs
        from cfvit.deploy.quantising import calibration_images, quantise

        format, int8 = format_of(name)
        graph = trace(self.model.backbone, {"x": torch.zeros(2, 3, *self.model.image_size)}, ["logits"])
        if int8:
            images, _ = calibration_images(self.source, self.model.data_config)
            graph = quantise(graph, [{"x": image[None].numpy()} for image in images])
        with TemporaryDirectory() as folder:
            write_graphs({"plain": graph}, Path(folder), format)
            run = open_graph(Path(folder), "plain", format, torch.get_num_threads())
        return lambda images: torch.from_numpy(run({"x": images.numpy()})["logits"])


def format_of(name: EngineName) -> tuple[Format, bool]:
    """The format of an exported engine's graphs, and whether they are quantised."""
    format, _, int8 = name.partition("-")
    return cast(Format, format), bool(int8)
