"""Weights from where people keep them: files, folders, the Hub. Nothing that is read is ever executed."""

from __future__ import annotations

import argparse
import builtins
import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cfvit.errors import CfvitError, first_line
from cfvit.files import atomic_write
from cfvit.modeling import transformers_vit
from cfvit.modeling.config import Preprocessing

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PREPROCESSOR_FILE = "preprocessor_config.json"
FILES_OF_FOLDERS = (WEIGHTS_FILE, "pytorch_model.bin")

_OF_PLAIN_DATA = frozenset(
    ["argparse", "collections", "datetime", "decimal", "fractions", "numpy", "pathlib", "types", "uuid", "zoneinfo"]
)
"""Modules of what checkpoints hold beside the tensors: options, figures, paths, dates."""


class _NotRead:
    """Stands for a value that is no tensor and that nobody asks for, so that no code of its class runs."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


_CONTAINERS: dict[str, Any] = {"collections.defaultdict": lambda *_: {}, "collections.deque": lambda *_: []}
"""What stands for containers, which are filled as they are read."""

PREPARED_BY: dict[str, Any] = {
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 0.9,
    "crop_mode": "center",
}
"""timm's keys of preprocessing without the size, with the values of most of its ViTs."""

WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "teacher")
"""Where a checkpoint keeps its weights; ``teacher`` is DINO's better network."""

AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "average")
"""Where it keeps their average over the training."""


@dataclass(frozen=True, eq=False)
class Weights:
    """Named tensors, and what is known of the network that they are of."""

    source: str  # where they come from, for messages
    tensors: dict[str, Tensor]  # under timm's names as far as `read_weights` knows the spelling
    grid: tuple[int, int] | None = None  # rows and columns of its patches
    class_names: list[str] | None = None  # a name for each class
    # timm's keys of how images are prepared for it, as far as the folder says; never ``input_size``
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    activation: str | None = None  # of its MLPs, as transformers calls it
    besides: Mapping[str, Any] = field(default_factory=dict)  # what else the checkpoint holds


def read_weights(source: str | Path, wrappers: Sequence[str] = WRAPPERS) -> Weights:
    """Weights from a file, a folder or the Hub.

    A file is a ``.safetensors`` or torch file; what the names of a network begin with as a part of another one
    (``module.``, ``backbone.`` and the like) is taken off. A folder, given as such or as ``local-dir:FOLDER``, holds
    ``config.json`` of timm or transformers beside the weights; ``hf-hub:OWNER/NAME`` is such a folder on the Hub.

    Args:
        source: behind a ``#`` may follow which weights of a checkpoint to take, and the grid of their positions:
            ``FILE#state_dict_ema``, ``FILE#18x32`` (rows x columns), ``FILE#state_dict_ema,18x32``.
        wrappers: keys under which a torch file may hold its state dict.

    Raises:
        CfvitError: nothing there, no named tensors in it, values that are not finite, something that would have to be
            executed, or a network of another kind.
    """
    place, _, options = str(source).partition("#")
    place, options = (str(source), "") if Path(source).exists() else (place, options)
    choice, grid = None, None
    for option in filter(None, options.split(",")):
        if sides := re.fullmatch(r"(\d+)x(\d+)", option):
            grid = int(sides[1]), int(sides[2])
        else:
            choice = option
    path = from_hub(place) if place.startswith(HUB) else Path(place.removeprefix("local-dir:"))
    if path.is_file() and path.name in (CONFIG_FILE, *FILES_OF_FOLDERS) and (path.parent / CONFIG_FILE).is_file():
        path = path.parent
    config: dict[str, Any] = {}
    if path.is_dir():
        path, config = _read_folder(path)
    if not path.is_file():
        raise CfvitError(f"no weights at {path}: give a .safetensors, .pth or .pt file, or a folder with {CONFIG_FILE}")
    content = _read(path)
    tensors, besides = _unwrapped(content, path, wrappers, choice)
    tensors = transformers_vit.timm_weights(_without_prefix(tensors, path, choice))
    require_finite(tensors, str(path))
    ids: Any = config.get("id2label")  # transformers' names, or LABEL_0 and so on where it knows none
    named = isinstance(ids, dict) and all(str(i) in ids for i in range(len(ids)))
    named = named and any(ids[str(i)] != f"LABEL_{i}" for i in range(len(ids)))
    names = config.get("label_names") or ([str(ids[str(i)]) for i in range(len(ids))] if named else None)
    vision = config.get("vision_config", config)
    return Weights(
        place,
        tensors,
        grid or _grid_of(config, tensors),
        names,
        _preprocessing(path.parent, config) if config else {},
        vision.get("hidden_act"),
        besides,
    )


def require_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuses weights that are not numbers.

    Raises:
        CfvitError: names the first.
    """
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout is not torch.strided:
            raise CfvitError(
                f"{source} cannot be used: {name} is no dense tensor with values: save the weights as such"
            )
        if tensor.is_floating_point() and not tensor.float().isfinite().all():  # as they are used
            raise CfvitError(
                f"{source} cannot be used: {name} holds values that are not finite, as after a training that diverged: "
                "give an earlier checkpoint"
            )


def write_weights(network: nn.Module, path: Path, dtype: torch.dtype | None = None, **metadata: str) -> None:
    """Writes the weights of a network as ``.safetensors``, as a whole or not at all.

    Args:
        dtype: the precision to store them in; by default as they are.
        metadata: what else the file's header says.

    Raises:
        CfvitError: the file cannot be written; it is then as it was.
    """
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in network.state_dict().items()}
    with atomic_write(path) as file:
        save_file(tensors, file, metadata={"format": "pt", **metadata})


def digest_of(tensors: Mapping[str, Tensor], more: str = "") -> str:
    """A SHA-256 of weights by name and value, on whatever device they are, and of ``more``."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    digest.update(more.encode())
    return digest.hexdigest()


HUB = ("hf-hub:", "hf_hub:")
"""How the name of a folder on the Hub begins."""


def from_hub(name: str) -> Path:
    """The folder ``hf-hub:OWNER/NAME``, or ``hf-hub:OWNER/NAME@REVISION``, downloaded or cached.

    Raises:
        CfvitError: it cannot be had, for example without a network.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition(":")[2].partition("@")
    try:
        wanted = [CONFIG_FILE, PREPROCESSOR_FILE, *FILES_OF_FOLDERS]
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted))
    except Exception as error:  # the network, the Hub and its client raise whatever they like
        raise CfvitError(f"{name} cannot be had ({first_line(error)}): give a local file or folder instead") from error


MODEL_TYPE = "cfvit"
"""Marks the ``config.json`` of a coarse-to-fine model, so that transformers does not take it for one of timm's."""


def is_of_plain_network(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is timm's or transformers', and not a coarse-to-fine model's, which timm reads too."""
    named = {"architecture", "architectures", "model_type"} & set(config)
    return bool(named) and config.get("model_type") != MODEL_TYPE


def _read_folder(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file of weights in a folder of timm's or transformers', and its configuration."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        known = is_of_plain_network(config)
    except (OSError, ValueError, AttributeError) as error:
        raise CfvitError(f"{folder} has no {CONFIG_FILE} that can be read: give the file of weights itself") from error
    if not known:
        if "data_config" in config:
            raise CfvitError(
                f"{folder} holds a coarse-to-fine model: give the folder itself where such a model is taken, or else "
                f"the plain ViT in it, which cfvit convert {folder} PLAIN --to timm writes"
            )
        raise CfvitError(f"{folder / CONFIG_FILE} names no architecture: give a folder of timm's or of transformers'")
    return next((folder / f for f in FILES_OF_FOLDERS if (folder / f).is_file()), folder / WEIGHTS_FILE), config


def _read(path: Path) -> Any:
    """What a file holds. Where torch refuses a kind of plain data, it is read again with a stand-in for that kind."""
    stand_ins: dict[str, Any] = {}
    while True:
        try:
            if path.suffix == ".safetensors":
                return load_file(path)
            known = [argparse.Namespace, *((stand_in, name) for name, stand_in in stand_ins.items())]
            with torch.serialization.safe_globals(known):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            refused = re.search(r"GLOBAL (\S+)", str(error))
            name = refused[1] if refused else ""
            plain = name.split(".")[0] in _OF_PLAIN_DATA or isinstance(getattr(builtins, name, None), type)
            name = name if "." in name else f"builtins.{name}"  # as torch's message shortens it
            if not plain or name in stand_ins:
                what = f"it would load {name.removeprefix('builtins.')}" if refused else "it is no torch file"
                raise CfvitError(f"{path} is not read ({what}): give a checkpoint of plain tensors") from error
            stand_ins[name] = _CONTAINERS.get(name, _NotRead)
        except Exception as error:
            raise CfvitError(f"{path} is damaged or no torch file ({first_line(error)}): copy it again") from error


def _are_named_tensors(content: Any) -> bool:
    """Whether something is a state dict."""
    named = isinstance(content, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    return named and len(content) > 0


def _unwrapped(
    content: Any, path: Path, wrappers: Sequence[str], choice: str | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict of a checkpoint, and what else the checkpoint holds."""
    besides: dict[str, Any] = {}
    nested = [key for key, value in content.items() if isinstance(value, dict)] if isinstance(content, dict) else []
    if nested:
        if "recipe" in content and "optimizer" in content:
            raise CfvitError(
                f"{path} is the checkpoint of a run: give its folder, {path.parent}, which holds the model"
            )
        state_dicts = [key for key in nested if _are_named_tensors(content[key])]
        usual = [key for key in wrappers if content.get(key) and key in nested]
        if len(state_dicts) > 1 and not usual and choice is None:
            raise CfvitError(
                f"{path} holds {', '.join(map(str, state_dicts))}: give one of them, such as {path}#{state_dicts[0]}"
            )
        key = choice if choice in nested else next(iter(usual + state_dicts), None)
        averages = [name for name in AVERAGES if name in nested and name != key]
        if averages and key is not None:
            warnings.warn(
                f"{path} also holds averaged weights; {key} is taken: give {path}#{averages[0]} to take those",
                stacklevel=3,
            )
        besides = {name: value for name, value in content.items() if name != key}
        content = content.get(key)
        inner = next(
            (key for key in wrappers if isinstance(content, dict) and isinstance(content.get(key), dict)), None
        )
        content = content if inner is None else content[inner]
    if not _are_named_tensors(content):
        raise CfvitError(f"{path} holds no named tensors: give a checkpoint with a state dict")
    if choice is not None and choice not in nested and not any(name.startswith(f"{choice}.") for name in content):
        raise CfvitError(f"{path} holds no {choice}: it has {', '.join(map(str, nested)) or 'one state dict alone'}")
    return content, besides


def _without_prefix(tensors: dict[str, Tensor], path: Path, choice: str | None) -> dict[str, Tensor]:
    """Weights under the names that they have in the network itself; those of other parts are left out, and told."""
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    chosen = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{choice}.")}
    tensors = {name.removeprefix(f"{choice}."): tensor for name, tensor in chosen.items()} or tensors
    if any(re.search(r"(^|\.)(feature_reuse\.|coarse_pos_embed$)", name) for name in tensors):
        raise CfvitError(f"{path} holds a coarse-to-fine model's weights: give its folder, {path.parent}")
    depths = {name[: found.start()] for name in tensors if (found := re.search(r"(?<![^.])blocks\.\d", name))}
    vits = sorted(prefix for prefix in depths if f"{prefix}cls_token" in tensors)
    if len(vits) > 1 and "" not in vits:
        names = ", ".join(prefix[:-1] for prefix in vits)
        raise CfvitError(f"{path} holds the networks {names}: give one of them, such as {path}#{vits[0][:-1]}")
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*(n.split(".")[:-1] for n in tensors), strict=False))
    prefix = vits[0] if vits else "".join(f"{parts[0]}." for parts in shared)
    left_out = [name for name in tensors if not name.startswith(prefix)]
    if left_out:
        warnings.warn(
            f"{path} holds more than a ViT: {prefix[:-1]} is read, {len(left_out)} other weights "
            f"({', '.join(left_out[:3])}{', ...' * (len(left_out) > 3)}) are left out",
            stacklevel=3,
        )
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _preprocessing(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """How images are prepared, in timm's keys, as far as a folder of timm's or transformers' states it."""
    try:
        stated = config.get("pretrained_cfg", {})
        if not stated and (folder / PREPROCESSOR_FILE).is_file():
            file = json.loads((folder / PREPROCESSOR_FILE).read_text())
            stated = transformers_vit.preprocessing(config.get("model_type", ""), file)[1]
        found = {key: stated[key] for key in PREPARED_BY if stated.get(key) is not None}
        found = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
        Preprocessing(**{"input_size": (3, 1, 1), **PREPARED_BY, **found})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, CfvitError) as error:
        raise CfvitError(
            f"{folder} does not say how images are prepared ({first_line(error)}): correct {CONFIG_FILE} or "
            f"{PREPROCESSOR_FILE}"
        ) from error
    return found


def _grid_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Rows and columns of patches by a configuration of timm's or transformers', None where it does not say."""
    vision = config.get("vision_config", config)
    size = config.get("model_args", {}).get("img_size") or vision.get("image_size")
    size = size or config.get("pretrained_cfg", {}).get("input_size", [None])[1:]
    projection = tensors.get("patch_embed.proj.weight")
    sides = [size, size] if isinstance(size, int) else size
    if projection is None or projection.ndim != 4 or not sides or len(sides) != 2:
        return None
    return sides[0] // projection.shape[2], sides[1] // projection.shape[3]
