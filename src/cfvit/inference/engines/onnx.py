"""Graphs in ONNX, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


class OnnxGraph:
    """One graph; see `cfvit.inference.engines.exported.Graph`. Threads may share it."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # without the warning that an input has a default value
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = tuple(each.name for each in self._session.get_inputs())
        self._outputs = [each.name for each in self._session.get_outputs()]

    def __call__(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        answers: list[Any] = list(self._session.run(self._outputs, dict(given)))
        return dict(zip(self._outputs, answers, strict=True))
