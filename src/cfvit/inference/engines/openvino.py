"""Graphs in OpenVINO's format, run by OpenVINO."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import openvino

CORE = openvino.Core()
"""One for the whole process: it frees the main thread's signal stack when it goes, and the next signal would crash."""


class OpenVinoGraph:
    """One graph; see `cfvit.inference.engines.exported.Graph`. Threads may share it.

    The first single image compiles the graph once more for a batch of one, which is a tenth faster, int8 a quarter.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        # in float32, where some processors would take bfloat16
        self._options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        self._model = CORE.read_model(path)
        self._compiled = {False: CORE.compile_model(self._model, "CPU", self._options)}
        self.inputs = tuple(each.any_name for each in self._model.inputs)
        self._outputs = [each.any_name for each in self._model.outputs]
        self._own, self._compiling = threading.local(), threading.Lock()

    def __call__(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        single = next(len(array) for array in given.values() if array.ndim) == 1
        requests = vars(self._own).setdefault("requests", {})  # one holds the memory of a run and is for one thread
        if single not in requests:
            with self._compiling:
                if single not in self._compiled:
                    model = self._model.clone()
                    batched = [each for each in model.inputs if each.partial_shape.rank.get_length()]
                    model.reshape({each: openvino.PartialShape([1, *each.partial_shape[1:]]) for each in batched})
                    self._compiled[single] = CORE.compile_model(model, "CPU", self._options)
            requests[single] = self._compiled[single].create_infer_request()
        answers = requests[single].infer(dict(given))  # copies, which the next run leaves alone
        return {name: answers[name] for name in self._outputs}
