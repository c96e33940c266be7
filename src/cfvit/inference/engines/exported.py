"""Exported models: what their folder says, and the engine that answers from its graphs."""

from __future__ import annotations

import math
import sys
import threading
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
class TwoStageScores:
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
    before: TwoStageScores  # the model in torch
    after: TwoStageScores  # the exported one


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
    """One exported graph: arrays in and out, by name, of any batch size. Threads may share it."""

    inputs: tuple[str, ...]

    def __call__(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...


class OnnxGraph:
    """A graph in ONNX, run by ONNX Runtime."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # without the warning that an input has a default value
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = tuple(each.name for each in self._session.get_inputs())
        self._outputs = [each.name for each in self._session.get_outputs()]

    def __call__(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        answers: list[Any] = list(self._session.run(self._outputs, dict(given)))
        return dict(zip(self._outputs, answers, strict=True))


class OpenVinoGraph:
    """A graph in OpenVINO's format.

    The first single image compiles it once more for a batch of one, which is a tenth faster, int8 a quarter.
    """

    _core: Any = None  # never freed: with it the main thread's signal stack would go, and the next signal crash
    _lock = threading.Lock()

    def __init__(self, path: Path, threads: int) -> None:
        without_telemetry()
        import openvino

        with self._lock:
            OpenVinoGraph._core = self._core or openvino.Core()
        # in float32, where some processors would take bfloat16
        self._options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        self._model = self._core.read_model(path)
        self._compiled = {False: self._core.compile_model(self._model, "CPU", self._options)}
        self.inputs = tuple(each.any_name for each in self._model.inputs)
        self._outputs = [each.any_name for each in self._model.outputs]
        self._own = threading.local()

    def __call__(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        single = next(len(array) for array in given.values() if array.ndim) == 1
        requests = vars(self._own).setdefault("requests", {})  # one holds the memory of a run and is for one thread
        if single not in requests:
            with self._lock:
                if single not in self._compiled:
                    model = self._model.clone()
                    batched = [each for each in model.inputs if each.partial_shape.rank.get_length()]
                    model.reshape({each: [1, *each.partial_shape[1:]] for each in batched})
                    self._compiled[single] = self._core.compile_model(model, "CPU", self._options)
            requests[single] = self._compiled[single].create_infer_request()
        answers = requests[single].infer(dict(given))  # copies, which the next run leaves alone
        return {name: answers[name] for name in self._outputs}


def without_telemetry() -> None:
    """Keeps OpenVINO and nncf from reporting their use to Google Analytics; call it before either is imported.

    They would do so without asking, in a process that is forked from a thread, which is not safe beside others.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore[reportArgumentType] as if not installed


def open_graph(folder: Path, stage: str, format: Format, threads: int = 0) -> Graph:
    """A graph of an exported folder.

    Args:
        threads: that it computes with; 0 for as many as the runtime chooses.

    Raises:
        CfvitError: it is missing or damaged, or what runs it is not installed.
    """
    path = folder / f"{stage}{'.onnx' if format == 'onnx' else '.xml'}"
    if not path.is_file():
        raise CfvitError(f"{folder} has no {path.name}: export the model again")
    try:
        return OnnxGraph(path, threads) if format == "onnx" else OpenVinoGraph(path, threads)
    except ImportError as error:
        raise CfvitError(f"models exported to {format} need {error.name}: install cfvit[{format}]") from error
    except Exception as error:  # each runtime has its own kinds, which name places in its source
        raise CfvitError(f"{folder} is damaged, {format} cannot read it: export it again") from error


class ExportedEngine:
    """Answers from the graphs ``coarse`` and ``fine`` of an exported folder, on the CPU with as many threads as torch.

    Raises:
        CfvitError: no exported model in the folder, one whose graphs do not fit its description, or what runs it is not
            installed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.model, self.weight = read_exported(self.folder), torch.empty(0)
        self._coarse, self._fine = (
            open_graph(self.folder, stage, self.model.format, torch.get_num_threads()) for stage in ("coarse", "fine")
        )
        state, _ = self.coarse(torch.zeros(2, 3, *self.model.image_size))
        sizes = state.logits.shape[1], state.class_attention.shape[1]
        if sizes != (self.model.config.num_classes, math.prod(self.model.grid)):
            raise CfvitError(f"{folder} has graphs of another model than its {EXPORT_FILE} says: export it again")

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
