"""Networks as ONNX graphs: the two stages, both joined with the exit in between, and how they are stored."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cfvit.inference.engines.exported import WEIGHTS_FILE, Format, without_telemetry
from cfvit.modeling.model import CoarseState, CoarseToFineViT

STATE = [f.name for f in fields(CoarseState)]
FEWEST_BYTES = 1024
"""Smaller weights stay in the graphs."""


class _Coarse(nn.Module):
    """The coarse stage: all of its state, and its confidence."""

    def __init__(self, model: CoarseToFineViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        state = self.model.coarse(images)
        return (*(getattr(state, name) for name in STATE), self.model.exit.coarse(state.logits))


class _Fine(_Coarse):
    """The fine stage, from images and what it needs of their state."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: Tensor,
        tokens: Tensor,
        embedding: Tensor,
        class_attention: Tensor,
        class_token: Tensor | None = None,
        coarse_logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The state's other parts are not read."""
        unused = tokens[:, 0]
        logits, token = (unused if part is None else part for part in (coarse_logits, class_token))
        state = CoarseState(logits, tokens, embedding, class_attention, token)
        logits = self.model.fine(images, state)
        return logits, self.model.exit.fine(logits)


def stage_graphs(model: CoarseToFineViT) -> dict[str, Any]:
    """The graphs ``coarse`` and ``fine`` of a model in float32 on the CPU, as ``onnx.ModelProto``."""
    images = torch.zeros(2, 3, *model.image_size)
    with torch.no_grad():
        state = model.coarse(images)
    needed = ["tokens", "embedding", "class_attention"]
    needed += ["class_token"] if model.config.feature_reuse == "class_token" else []
    given = {"images": images, **{name: getattr(state, name) for name in needed}}
    given |= {"coarse_logits": state.logits} if model.exit.coarse_weight else {}
    return {
        "coarse": trace(_Coarse(model), {"images": images}, [*STATE, "confidence"]),
        "fine": trace(_Fine(model), given, ["logits", "confidence"]),
    }


def trace(network: nn.Module, inputs: Mapping[str, Tensor], outputs: list[str]) -> Any:
    """A network as an ``onnx.ModelProto`` for batches of any size, also none.

    Args:
        inputs: examples of two images, by the names of the network's arguments.
    """
    from onnxscript import optimizer

    batch = torch.export.Dim("batch", min=0)
    with silent():
        program = torch.onnx.export(
            network.eval(),
            kwargs=dict(inputs),
            dynamo=True,
            verbose=False,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes={name: {0: batch} for name in inputs},
            custom_translation_table={torch.ops.aten.sort.stable: _sort},
        )
        assert program is not None
        # weights that are reshaped would be no weights to nncf; by default large ones are not folded
        optimizer.fold_constants(program.model, input_size_limit=sys.maxsize, output_size_limit=sys.maxsize)
        optimizer.remove_unused_nodes(program.model)
    return program.model_proto


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Hides what torch and nncf print and log."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _sort(self: Any, stable: bool = False, dim: int = -1, descending: bool = False) -> Any:
    """Sorting as ONNX has it: TopK of all, in which the lower index goes first among equals. torch translates none."""
    from onnxscript import opset18

    whole: Any = opset18.Shape(self, start=dim, end=None if dim == -1 else dim + 1)
    return opset18.TopK(self, whole, axis=dim, largest=int(descending), sorted=1)


_EXIT = """
sure = GreaterOrEqual (coarse_confidence, eta)
unsure = Not (sure)
always = GreaterOrEqual (eta, one)
asked = Or (unsure, always)
allowed = Greater (eta, zero)
on = And (asked, allowed)
columns = NonZero (on)
rows = Transpose (columns)
hard = Squeeze (columns, first)
"""
"""Who goes on, as `cfvit.modeling.exit.goes_on` decides it."""
_ANSWER = """
logits = ScatterND (coarse_logits, rows, fine_logits)
confidence = ScatterND (coarse_confidence, rows, fine_confidence)
stage = Cast <to = 7> (on)
"""
"""The answers of the fine stage in their places."""


def whole_graph(coarse: Any, fine: Any, eta: float | None) -> Any:
    """One graph of both of `stage_graphs`, the second for the images alone that need it: ``logits, confidence, stage``.

    ``eta`` is the default of the input of this name; None for an input that has to be given.
    """
    from onnx import TensorProto, compose, helper, numpy_helper, parser

    first = compose.add_prefix(coarse, "coarse_", rename_inputs=False).graph
    second = compose.add_prefix(fine, "fine_").graph
    sources = {each.name: f"coarse_{each.name.removeprefix('coarse_')}" for each in fine.graph.input}
    sources["images"] = "images"
    picked = "\n".join(f"fine_{name} = Gather <axis = 0> ({source}, hard)" for name, source in sources.items())

    def nodes(text: str) -> list[Any]:
        return [parser.parse_node(line) for line in text.strip().splitlines()]

    constants = {"zero": np.float32(0), "one": np.float32(1), "first": [0]}
    constants |= {} if eta is None else {"eta": np.float32(eta)}
    images, logits = coarse.graph.input[0], coarse.graph.output[0]
    graph = helper.make_graph(
        [
            *first.node,
            *nodes(_EXIT + picked),
            *second.node,
            *nodes(_ANSWER),
        ],
        "whole",
        [images, helper.make_tensor_value_info("eta", TensorProto.FLOAT, [])],
        [
            logits,
            helper.make_tensor_value_info("confidence", TensorProto.FLOAT, ["batch"]),
            helper.make_tensor_value_info("stage", TensorProto.INT64, ["batch"]),
        ],
        [
            *first.initializer,
            *second.initializer,
            *(numpy_helper.from_array(np.array(value), name) for name, value in constants.items()),
        ],
    )
    return helper.make_model(graph, opset_imports=coarse.opset_import, ir_version=coarse.ir_version)


def write_graphs(graphs: Mapping[str, Any], folder: Path, format: Format) -> None:
    """Writes graphs by their names; in ONNX they share `WEIGHTS_FILE`. The graphs given are left as they are."""
    import onnx
    from onnx.external_data_helper import set_external_data

    if format == "openvino":
        for name, graph in graphs.items():
            _write_openvino(graph, folder / f"{name}.xml")
        return
    places: dict[bytes, int] = {}
    with (folder / WEIGHTS_FILE).open("wb") as file:
        for name, graph in graphs.items():
            stored = onnx.ModelProto.FromString(graph.SerializeToString())
            for tensor in stored.graph.initializer:
                content = tensor.raw_data
                if len(content) < FEWEST_BYTES:
                    continue
                if content not in places:
                    places[content] = file.tell()
                    file.write(content)
                set_external_data(tensor, WEIGHTS_FILE, places[content], len(content))
                tensor.ClearField("raw_data")
            onnx.save(stored, folder / f"{name}.onnx")


def _write_openvino(graph: Any, path: Path) -> None:
    """Converts a graph, in which TopK has to keep the order of equals, as ONNX's does."""
    without_telemetry()
    import onnx
    import openvino
    from openvino import opset11

    source, graph = path.with_suffix(".onnx"), onnx.ModelProto.FromString(graph.SerializeToString())
    for default in [each for each in graph.graph.initializer if each.name == "eta"]:
        graph.graph.initializer.remove(default)  # OpenVINO has no inputs with a default and would take a constant
    onnx.save(graph, source)
    model = openvino.convert_model(source)
    for node in model.get_ops():
        if node.get_type_name() == "TopK":
            given = node.get_attributes()
            stable = opset11.topk(
                node.input_value(0),
                node.input_value(1),
                given["axis"],
                given["mode"],
                given["sort"],
                given["index_element_type"],
                stable=True,
            )
            for old, new in zip(node.outputs(), stable.outputs(), strict=True):
                for target in old.get_target_inputs():
                    target.replace_source_output(new)
    openvino.save_model(model, path, compress_to_fp16=False)
    source.unlink()
