"""Exported models: what their folder says, and the engine that answers from its graphs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from cfvit.errors import CfvitError, first_problem
from cfvit.modeling.cost import StageMacs
from cfvit.modeling.exit import Exit
from cfvit.modeling.model import CoarseState, CoarseToFineViT, ModelConfig, check_description

EXPORT_FILE = "cfvit.json"
"""Says what an exported folder holds."""

WEIGHTS_FILE = "weights.data"
"""Holds the weights of all ONNX graphs of a folder, each once."""

Format = Literal["onnx", "openvino"]


@dataclass(frozen=True)
class Scores:
    """How good a model is on some images."""

    coarse: float  # right answers in percent, if this stage answers all images
    fine: float  # right answers in percent, if this stage answers all images
    eta: float | None  # of the model, or None
    answered: float | None  # right answers in percent at eta
    fine_share: float | None  # share of images that go on at eta, in [0, 1]


@dataclass(frozen=True)
class Quantised:
    """What became of a model in eight-bit integers."""

    calibrated_on: int  # number of images that the ranges were found on
    scored_on: int  # number of other images, on which eta was chosen
    # an answer is right if it is the label, or if it agrees with the fine stage in torch
    measure: Literal["accuracy", "agreement"]
    before: Scores  # the model in torch
    after: Scores  # the exported one


@dataclass(frozen=True)
class ExportedModel:
    """What a folder of an exported model says of it, under the names that a `CoarseToFineViT` has."""

    format: Format  # of the graphs ``coarse``, ``fine`` and ``whole``
    config: ModelConfig
    image_size: tuple[int, int]  # height and width in pixels
    data_config: dict[str, Any]
    class_names: list[str] | None
    class_order: Literal["natural", "torchvision"] | None
    exit: Exit
    macs: StageMacs  # cost of an image
    source: str  # `cfvit.checkpoints.weights_digest` of the exported weights
    difference: float  # the largest difference from torch that was seen when the export was checked; before quantising
    versions: dict[str, str]  # of the packages that made it
    quantised: Quantised | None = None  # of a model in eight-bit integers

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the coarse grid."""
        return self.config.grid

    @property
    def coarse_size(self) -> tuple[int, int]:
        """The size of images that the coarse stage of an exported model takes: whole ones alone."""
        return self.image_size

    @property
    def threshold(self) -> float | None:
        """The calibrated eta, or None."""
        return self.exit.eta

    label_of = CoarseToFineViT.label_of


class Graph(Protocol):
    """One exported graph: arrays in and out, by name, of any batch size.

    Args:
        threads: that it computes with; 0 for as many as the runtime chooses.
    """

    inputs: tuple[str, ...]

    def __init__(self, path: Path, threads: int = 0) -> None: ...

    def __call__(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...


def graph_kind(format: Format) -> type[Graph]:
    """What opens graphs of a format.

    Raises:
        CfvitError: what runs them is not installed.
    """
    try:
        if format == "onnx":
            from cfvit.inference.engines.onnx import OnnxGraph

            return OnnxGraph
        without_telemetry()
        from cfvit.inference.engines.openvino import OpenVinoGraph

        return OpenVinoGraph
    except ImportError as error:
        raise CfvitError(f"models exported to {format} need {error.name}: install cfvit[{format}]") from error


def without_telemetry() -> None:
    """Keeps OpenVINO and nncf from reporting their use to Google Analytics; call it before either is imported.

    They would do so without asking, in a process that is forked from a thread, which is not safe beside others.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore[reportArgumentType] as if not installed


def graph_file(folder: Path, stage: str, format: Format) -> Path:
    """Where a graph lies in an exported folder."""
    return folder / f"{stage}{'.onnx' if format == 'onnx' else '.xml'}"


class ExportedEngine:
    """Answers from the graphs ``coarse`` and ``fine`` of an exported folder, on the CPU with as many threads as torch.

    Raises:
        CfvitError: no exported model in the folder, or what runs it is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.model, self.weight = read_exported(self.folder), torch.empty(0)
        kind = graph_kind(self.model.format)
        paths = [graph_file(self.folder, stage, self.model.format) for stage in ("coarse", "fine")]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise CfvitError(f"{folder} has no {' and no '.join(missing)}: export the model again")
        try:
            self._coarse, self._fine = (kind(path, torch.get_num_threads()) for path in paths)
        except Exception as error:  # each runtime has its own kinds, which name places in its source
            raise CfvitError(f"{folder} is damaged, {self.model.format} cannot read it: export it again") from error

    def coarse(self, images: Tensor) -> tuple[CoarseState, Tensor]:
        """The coarse stage and its confidence, see `cfvit.inference.engines.Engine`."""
        answer = self._coarse({"images": _array(images)})
        state = CoarseState(*(torch.from_numpy(answer[f.name]) for f in fields(CoarseState)))
        return state, torch.from_numpy(answer["confidence"])

    def fine(self, images: Tensor, state: CoarseState) -> tuple[Tensor, Tensor]:
        """The fine stage and its confidence, see `cfvit.inference.engines.Engine`."""
        given = {**vars(state), "coarse_logits": state.logits, "images": images}
        answer = self._fine({name: _array(given[name]) for name in self._fine.inputs})
        return torch.from_numpy(answer["logits"]), torch.from_numpy(answer["confidence"])

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        """Copied and pickled by the folder."""
        return ExportedEngine, (self.folder,)


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.numpy())


def is_exported(path: str | Path) -> bool:
    """Whether a path is a folder of an exported model."""
    return (Path(path) / EXPORT_FILE).is_file()


def read_exported(folder: Path) -> ExportedModel:
    """What a folder says of the exported model in it.

    Raises:
        CfvitError: it holds none, or one that this version does not read.
    """
    path = folder / EXPORT_FILE
    try:
        model = TypeAdapter(ExportedModel).validate_json(path.read_bytes(), extra="forbid")
    except OSError as error:
        raise CfvitError(
            f"{folder} holds no exported model: give a folder of cfvit export, or a model that cfvit.load gives"
        ) from error
    except ValidationError as error:
        raise CfvitError(f"{path} cannot be used ({first_problem(error.errors())}): export the model again") from error
    model.data_config.update({k: tuple(v) for k, v in model.data_config.items() if isinstance(v, list)})
    check_description(model, path, "export the model again")
    return model
