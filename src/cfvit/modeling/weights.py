"""Reading files of weights of which nothing is ever executed."""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from cfvit.errors import CfvitError, first_line

_MULTIARRAY: Any = import_module("numpy._core.multiarray")
_HARMLESS: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    np.dtype,
    np.ndarray,
    np.float64,
    np.float32,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
    type(np.dtype(np.int64)),
    (_MULTIARRAY.scalar, "numpy.core.multiarray.scalar"),
    (_MULTIARRAY.scalar, "numpy._core.multiarray.scalar"),
    (_MULTIARRAY._reconstruct, "numpy.core.multiarray._reconstruct"),
    (_MULTIARRAY._reconstruct, "numpy._core.multiarray._reconstruct"),
]
"""Besides tensors, what checkpoints hold: options and figures. None of these runs code when read."""


def read_weights(path: Path, wrappers: tuple[str, ...] = ("model", "state_dict")) -> dict[str, Tensor]:
    """Named tensors from a ``.safetensors`` or torch file, without the ``module.`` of a distributed run.

    Args:
        wrappers: keys under which a torch file may hold its state dict.

    Raises:
        CfvitError: no such file, no named tensors in it, or something that would have to be executed.
    """
    if not path.is_file():
        raise CfvitError(f"no weights at {path}: give a .safetensors, .pth or .pt file")
    content = _read(path)
    for wrapper in wrappers:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    named = isinstance(content, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    if not named:
        raise CfvitError(f"{path} holds no named tensors: give a checkpoint with a state dict")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it would load {refused.group(1)}" if refused else "it is no torch file"
        raise CfvitError(f"{path} is not read ({what}): give a checkpoint of plain tensors") from error
    except Exception as error:
        raise CfvitError(f"{path} is damaged or no torch file ({first_line(error)}): copy it again") from error
