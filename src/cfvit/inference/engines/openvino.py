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
    """One graph; see `cfvit.inference.engines.exported.Graph`. Threads may share it."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        # in float32, where some processors would take bfloat16
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        self._compiled = CORE.compile_model(path, "CPU", options)
        self.inputs = tuple(each.any_name for each in self._compiled.inputs)
        self._outputs = [each.any_name for each in self._compiled.outputs]
        self._own = threading.local()  # a request holds the memory of a run and is for one thread

    def __call__(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if not hasattr(self._own, "request"):
            self._own.request = self._compiled.create_infer_request()
        answers = self._own.request.infer(dict(given))  # copies, which the next run leaves alone
        return {name: answers[name] for name in self._outputs}
