"""Models on disk: our folders, the authors' files, files of training runs. Nothing read is executed."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, astuple, replace
from importlib import resources
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import ImageNetInfo
from torch import Tensor

from cfvit.calibration import Calibration
from cfvit.calibration.calibrated import CALIBRATION_FILE, parse_record, read_calibration
from cfvit.data import difference_of_classes, readable_class_names
from cfvit.errors import CfvitError, first_line
from cfvit.files import atomic_write
from cfvit.inference.engines.exported import is_exported
from cfvit.modeling import backbones, timm_vit, transformers_vit
from cfvit.modeling.exit import Exit
from cfvit.modeling.model import CoarseToFineViT, ModelConfig, check_description, create_model
from cfvit.modeling.weights import (
    CONFIG_FILE,
    HUB,
    MODEL_TYPE,
    PREPARED_BY,
    PREPROCESSOR_FILE,
    WEIGHTS_FILE,
    Weights,
    digest_of,
    from_hub,
    is_of_plain_network,
    read_weights,
    require_finite,
    write_weights,
)


def save(model: CoarseToFineViT, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Writes ``config.json`` and ``model.safetensors``, the Hub's convention.

    A ``calibration.json`` of a former model in the folder is removed.

    Args:
        folder: made if it is not there. Files are replaced one by one, each as a whole.
        dtype: store weights in this precision, such as ``torch.bfloat16``; loading gives float32.

    Raises:
        CfvitError: the folder cannot be written; a ``dtype`` that is not of floats of 16 bits or more.
    """
    if dtype is not None and not (dtype.is_floating_point and dtype.itemsize > 1):
        raise CfvitError(f"weights cannot be stored as {dtype}: give torch.bfloat16, torch.float16 or torch.float32")
    check_description(model, "the model", "correct its attributes to save it")
    folder = Path(folder)
    if is_exported(folder):
        raise CfvitError(f"{folder} holds an exported model, beside which no other is found: choose another folder")
    known = getattr(model.backbone, "pretrained_cfg", {})  # a class of one's own may have none
    kwargs = {k: v for k, v in model.config.timm_kwargs.items() if k != "pretrained_cfg_overlay"}  # in data_config
    trained = model.trained and _fine_stage(model.trained)
    config = {
        "model": {**asdict(model.config), "timm_kwargs": dict(model.config.timm_kwargs)},
        "data_config": model.data_config,
        "class_names": model.class_names,
        "exit": asdict(model.exit),
        **({} if model.class_order is None else {"class_order": model.class_order}),
        **({} if trained == _fine_stage(model.config) else {"trained": trained}),
        # what timm has to find here to make the plain ViT of the model, by `backbones.cfvit_backbone`
        "model_type": MODEL_TYPE,
        "architecture": backbones.cfvit_backbone.__name__,
        "num_classes": model.config.num_classes,
        "model_args": {"backbone": model.config.backbone, "img_size": model.image_size, **kwargs},
        "pretrained_cfg": {k: known.get(k) for k in ("first_conv", "classifier", "fixed_input_size")}
        | model.data_config,
    }
    write_weights(model, folder / WEIGHTS_FILE, dtype)
    _write_config(folder, config)
    (folder / CALIBRATION_FILE).unlink(missing_ok=True)


def save_exit(exit: Exit, folder: Path, model: ModelConfig | None = None) -> None:
    """Changes what a saved model knows of its exit, and of its fine stage if one is given; nothing else in its folder.

    Raises:
        CfvitError: the folder cannot be written; it is then as it was.
    """
    config = json.loads((folder / CONFIG_FILE).read_text())
    if model is not None:
        fine = _fine_stage(model)
        was = {name: config["model"].get(name, 0) for name in fine}
        if fine != was:
            config["trained"] = config.get("trained", was)
            config["model"] |= fine
    _write_config(folder, {**config, "exit": asdict(exit)})


def _fine_stage(config: ModelConfig) -> dict[str, Any]:
    """What of a configuration may be chosen after training."""
    return {"informative_ratio": config.informative_ratio, "fine_merged": config.fine_merged}


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    with atomic_write(folder / CONFIG_FILE) as file:
        file.write_text(json.dumps(config, indent=2) + "\n")


def weights_digest(model: CoarseToFineViT) -> str:
    """16 hexadecimal digits that another model's weights or fine stage hardly ever give: a SHA-256 of them by name.

    Of their values as float32, so that neither the device nor a precision that loses nothing matters. The
    blocks' matrices are left out, which would slow down loading: training changes the norms and biases too.
    """
    tensors = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in sorted(model.state_dict().items())
        if ".blocks." not in name or tensor.ndim <= 1
    }
    fine = (model.config.informative_ratio, model.config.fine_merged)
    return digest_of(tensors, "" if fine == (0.5, 0) else repr(fine))[:16]  # digests are older than other fine stages


def warn_of_other_weights(model: CoarseToFineViT, calibration: Calibration, source: Path) -> None:
    """A warning if a calibration was made with other weights than this model's."""
    if calibration.origin and calibration.origin.weights not in ("", weights_digest(model)):
        warnings.warn(
            f"{source} was made with other weights or another fine stage than this model's: calibrate this model, "
            "unless it is a copy whose answers are nearly the same",
            stacklevel=2,
        )


def apply_calibration(model: CoarseToFineViT, path: Path) -> None:
    """Reads a calibration and has the model use its exit, with a warning if it was made with other weights.

    Raises:
        CfvitError: it cannot be read, or is of another number of classes.
    """
    calibration = read_calibration(path)
    if calibration.classes != model.config.num_classes:
        raise CfvitError(
            f"{path} does not fit: the calibration is of {calibration.classes} classes and the model has "
            f"{model.config.num_classes}: calibrate this model"
        )
    model.exit = calibration.exit
    warn_of_other_weights(model, calibration, path)


def load(path_or_name: str | Path) -> CoarseToFineViT:
    """A model ready for use, in evaluation mode on the CPU in float32.

    If a folder holds a ``calibration.json`` that does not describe the model, that is a warning.

    Args:
        path_or_name: a folder written by `save`, one of the authors' ``.pth`` files, one of
            `bundled_models`, or ``hf-hub:OWNER/NAME``, such a folder on the Hugging Face Hub.

    Raises:
        CfvitError: nothing there, or not a model; a missing, unknown or misshapen weight is named.
    """
    path = from_hub(str(path_or_name)) if str(path_or_name).startswith(HUB) else Path(path_or_name)
    if path.is_dir():
        return _load_folder(path)
    if path.name in (CONFIG_FILE, WEIGHTS_FILE) and (path.parent / CONFIG_FILE).is_file():
        raise CfvitError(f"{path} is one of the files of a model: give their folder, {path.parent}")
    if path.is_file():
        return load_authors_checkpoint(path)
    if str(path_or_name) in bundled_models():
        return _load_folder(_bundled_folder() / str(path_or_name))
    raise CfvitError(
        f"no model {str(path_or_name)!r}: give a saved folder, an authors' .pth file, "
        f"or a bundled name ({', '.join(bundled_models()) or 'none here'})"
    )


def bundled_models() -> list[str]:
    """Names of the models that come with the package."""
    folders = {path.parent for path in _bundled_folder().glob(f"*/{CONFIG_FILE}")}
    return sorted(folder.name for folder in folders if (folder / WEIGHTS_FILE).is_file())


def _bundled_folder() -> Path:
    return Path(str(resources.files("cfvit"))) / "bundled"


def _refusal(folder: Path) -> str | None:
    """What a folder holds in place of a model that `load` reads; None if it holds one."""
    if is_exported(folder):
        return "holds an exported model, which cfvit.Predictor, predict and eval take: load another"
    if _is_backbone_folder(folder):
        return "holds a plain ViT, not a coarse-to-fine model: train one from it with --initial-weights"
    missing = next((name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).exists()), None)
    if missing is None:
        return None
    if (folder / "checkpoint.pt").is_file() and not any(folder.rglob(WEIGHTS_FILE)):  # a cascade has folders of two
        return "holds a run without a model, which the first evaluation writes: continue it with --resume"
    recipe = folder / "recipe.yaml"
    if recipe.is_file() and (method := re.search(r"^method: (\w+)", recipe.read_text(), re.MULTILINE)):
        what = f"holds a run of --method {method[1]}, which is no coarse-to-fine model"
        return f"{what}: give the folder of a run of --method cf_vit"
    return f"is no saved model: it has no {missing}"


def _load_folder(folder: Path) -> CoarseToFineViT:
    if refusal := _refusal(folder):
        raise CfvitError(f"{folder} {refusal}")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        weights = load_file(folder / WEIGHTS_FILE)
        model = CoarseToFineViT(ModelConfig(**config["model"]))
        trained = config.get("trained", {})
        model.trained = None if trained is None else replace(model.config, **trained)
        model.data_config = {k: tuple(v) if isinstance(v, list) else v for k, v in config["data_config"].items()}
        model.class_names, model.class_order = config["class_names"], config.get("class_order")
        model.exit = parse_record(Exit, json.dumps(config["exit"]), f"{folder / CONFIG_FILE}: exit")
    except (OSError, json.JSONDecodeError, SafetensorError, UnicodeDecodeError) as error:
        raise CfvitError(f"{folder} is damaged ({first_line(error)}): save or copy the model again") from error
    except (KeyError, TypeError, AttributeError, CfvitError) as error:
        raise CfvitError(
            f"{folder / CONFIG_FILE} describes no cfvit model ({error}): save it with cfvit.save"
        ) from error
    require_finite(weights, str(folder / WEIGHTS_FILE))
    backbones.load_strictly(model, weights, f"{folder} does not fit the model")
    check_description(model, folder / CONFIG_FILE, "save it with cfvit.save")
    record = folder / CALIBRATION_FILE
    if record.exists():
        calibration = read_calibration(record)
        if calibration.exit == model.exit:
            warn_of_other_weights(model, calibration, record)
        else:
            recorded, used = (", ".join(map(str, astuple(exit))) for exit in (calibration.exit, model.exit))
            warnings.warn(
                f"{record} is stale and not used: its measure, temperatures and eta are {recorded}, those in "
                f"{CONFIG_FILE} {used}: calibrate again, or use it with --calibration",
                stacklevel=2,
            )
    return model.eval()


def initialise(model: CoarseToFineViT, source: str) -> None:
    """Fills a new model with trained weights, its head untrained where the classes differ.

    What is odd about the weights becomes a warning, such as a head of other classes.

    Args:
        source: ``"timm"`` for timm's own weights of the backbone; weights of a plain ViT that
            `cfvit.modeling.weights.read_weights` reads, of timm or transformers; a model that `load` reads, whose
            position embeddings are resampled to the new grid.

    Raises:
        CfvitError: nothing there, or weights of another architecture.
    """
    start = None if source == "timm" else _read_start(source)
    names = None if start is None else start.class_names
    if isinstance(start, CoarseToFineViT):
        weights, keep = start.state_dict(), set[str]()
        for name, scale in (("coarse_pos_embed", 1), ("backbone.pos_embed", 2)):
            if name in weights:
                old, new = ((scale * grid[0], scale * grid[1]) for grid in (start.grid, model.grid))
                weights[name] = timm_vit.resample_positions(start.backbone, weights[name], old, new)
    else:
        weights = CoarseToFineViT(model.config, True if start is None else start).state_dict()
        keep = {name for name in weights if name.startswith("feature_reuse.")}
        if model.feature_reuse is not None:
            model.feature_reuse.start_at_zero()
    own = model.state_dict()
    heads = {name for name in own if name.removeprefix("backbone.").split(".")[0] in backbones.HEADS}
    if any(name in weights and weights[name].shape != own[name].shape for name in heads):
        keep |= heads
    elif names is not None and model.class_names is not None and len(names) == len(model.class_names):
        other = difference_of_classes(model.class_names, names)
        if other is not None:
            warnings.warn(f"the head of {source} is of other classes: {other}", stacklevel=2)
    complete = {**weights, **{name: own[name] for name in keep}}
    backbones.load_strictly(model, complete, f"{source} does not fit the model")


def _read_start(source: str) -> Weights | CoarseToFineViT:
    """Weights of a plain ViT, or a coarse-to-fine model: ours, the authors' or a bundled one."""
    path = Path(source)
    ours = source in bundled_models() if not path.exists() else path.is_dir() and not _is_backbone_folder(path)
    weights = None if ours else read_weights(source)
    return load(source) if weights is None or "pos_embed_list.0" in weights.tensors else weights


def is_coarse_to_fine(source: str) -> bool:
    """Whether `initialise` would read a coarse-to-fine model there, not a plain ViT."""
    return source != "timm" and isinstance(_read_start(source), CoarseToFineViT)


def class_names_of(source: str) -> list[str] | None:
    """The class names of trained weights, None where they have none. ``source`` is as of `initialise`."""
    return None if source == "timm" else _read_start(source).class_names


def classes_of(source: str, backbone: str) -> tuple[list[str] | None, int]:
    """The class names of trained weights, None where they have none, and how many classes there are.

    ``source`` is as of `initialise`, ``backbone`` timm's name of the architecture. Weights without a head are refused.
    """
    if source == "timm":
        with torch.device("meta"):
            network: Any = timm.create_model(backbone)
        return None, network.num_classes
    start = _read_start(source)
    if isinstance(start, CoarseToFineViT):
        return start.class_names, start.config.num_classes
    head = start.tensors.get("head.weight")
    if head is None:
        raise CfvitError(f"{source} has no head.weight: give weights of a trained classifier")
    return start.class_names, len(head)


def preprocessing_of(source: str) -> dict[str, Any]:
    """How images are prepared for trained weights, in timm's keys without ``input_size``, as far as it is known.

    ``source`` is as of `initialise`.
    """
    if source == "timm":
        return {}
    start = _read_start(source)
    known = start.data_config if isinstance(start, CoarseToFineViT) else start.preprocessing
    return {key: known[key] for key in PREPARED_BY if key in known}


def _is_backbone_folder(path: Path) -> bool:
    try:
        return is_of_plain_network(json.loads((path / CONFIG_FILE).read_text()))
    except (OSError, ValueError, AttributeError):
        return False


_AUTHORS_PREFIXES = {
    "pos_embed_list.0": "coarse_pos_embed",
    "pos_embed_list.1": "backbone.pos_embed",
    "reuse_block.0.": "feature_reuse.norm.",
    "reuse_block.1.": "feature_reuse.mlp.",
    "": "backbone.",
}
"""How the authors' names of weights begin, and ours; the first that fits holds."""

_AUTHORS_CROPS = {"CF-DeiT": 224 / 256, "CF-LV-ViT": 0.9}
"""The authors resize the shorter side to the input's divided by this, and crop the centre."""

_HEAD_DIM = 64
_AUTHORS_DEITS = {192: "deit_tiny_patch16_224", 384: "deit_small_patch16_224", 768: "deit_base_patch16_224"}
_AUTHORS_LVVITS = {240: "lvvit_tiny_patch16_224", 384: "lvvit_small_patch16_224", 512: "lvvit_medium_patch16_224"}


def load_authors_checkpoint(path: str | Path) -> CoarseToFineViT:
    """A model from one of the authors' ``.pth`` files, which is only read.

    The file holds ``{"model": state_dict, ...}`` or, of LV-ViT, ``{"state_dict": state_dict, ...}``: timm's keys for
    the backbone, besides
    ``pos_embed_list.0`` (coarse) and ``.1`` (fine), ``reuse_block.0`` (norm) and
    ``reuse_block.1.fc1``, ``.fc2``; an LV-ViT is known by the convolutions of its stem. Size and grid follow
    from the shapes. The file does not say how many heads there are: a width that has no DeiT or
    LV-ViT of its own is taken to have 64 channels in each.

    Raises:
        CfvitError: not such a file, or a missing, unknown or misshapen weight, which is named.
    """
    read = read_weights(path, wrappers=("model", "state_dict"))
    weights, options = read.tensors, read.besides.get("args")
    kind = "CF-LV-ViT" if any(name.startswith("patch_embed.conv") for name in weights) else "CF-DeiT"
    model = CoarseToFineViT(_authors_config(weights, path, kind))
    ours = {_respelled(name, _AUTHORS_PREFIXES): tensor for name, tensor in weights.items()}
    theirs = {prefix: name for name, prefix in _AUTHORS_PREFIXES.items()}
    complaint = f"{path} does not fit the model"
    backbones.load_strictly(model, ours, complaint, lambda name: _respelled(name, theirs))
    model.data_config.update(crop_pct=_AUTHORS_CROPS[kind], interpolation="bicubic")
    wnids = ImageNetInfo().label_names()
    data_set = str(getattr(options, "data_set", "IMNET"))
    if model.config.num_classes == len(wnids) and data_set.upper() in ("IMNET", "IMAGENET"):
        model.class_names = readable_class_names(wnids)
    else:
        model.class_order = "torchvision"
    return model.eval()


def load_transformers(folder: str | Path) -> CoarseToFineViT:
    """A model both of whose stages begin with the weights of a ViT, DeiT or DINOv2 of transformers. To be trained.

    ``model.backbone`` computes what theirs does, unless the image's side, which ``preprocessor_config.json`` gives, is
    another than that of their positions: then these are resampled. The coarse stage takes half as many cells a side.
    Feature reuse begins at zero. A head that reads more than the class token, as DINOv2's does, starts untrained, with
    a warning.

    Args:
        folder: with ``config.json``, the weights, and ``preprocessor_config.json``, without which images are
            prepared as transformers does by default, with a warning.

    Raises:
        CfvitError: not such a folder, another kind of model, or weights that do not fit.
    """
    folder, weights = Path(folder), read_weights(folder)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        if "architecture" in config:
            raise CfvitError("a folder of timm's is not converted: cfvit train --initial-weights takes it as it is")
        file = folder / PREPROCESSOR_FILE
        preprocessor = json.loads(file.read_text()) if file.exists() else {}
        arguments = transformers_vit.timm_arguments(config, weights.tensors)
        size, prepared = transformers_vit.preprocessing(config["model_type"], preprocessor)
    except CfvitError as error:
        raise CfvitError(f"{folder}: {error}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CfvitError(
            f"{folder} cannot be read ({first_line(error)}): save the model again by transformers"
        ) from error
    head = weights.tensors.get("head.weight")
    patch = backbones.patch_size(transformers_vit.BACKBONE, **arguments)
    size = size or tuple(side * cells for side, cells in zip(patch, weights.grid or (14, 14), strict=True))
    classes = len(config.get("id2label", ())) or 1000 if head is None else len(head)
    grid = tuple(max(1, side // (2 * cell)) for side, cell in zip(size, patch, strict=True))
    model = create_model(
        transformers_vit.BACKBONE,
        num_classes=classes,
        coarse_grid=grid[0] if grid[0] == grid[1] else (grid[0], grid[1]),
        pretrained_backbone=weights,
        pretrained_cfg_overlay=prepared,
        **arguments,
    )
    if model.feature_reuse is not None:
        model.feature_reuse.start_at_zero()
    if not preprocessor:
        mean = ", ".join(f"{value:g}" for value in prepared["mean"])
        warnings.warn(
            f"{folder} has no preprocessor_config.json: images are normalised by the mean {mean}, as transformers does "
            f"by default: correct data_config in {CONFIG_FILE} if that is wrong",
            stacklevel=2,
        )
    if model.image_size != size:
        warnings.warn(
            f"images are read at {model.image_size[0]} x {model.image_size[1]} pixels, not {size[0]} x {size[1]}: "
            f"sides are multiples of twice the patch, {2 * patch[0]}",
            stacklevel=2,
        )
    return model.eval()


def _respelled(name: str, prefixes: Mapping[str, str]) -> str:
    old, new = next(pair for pair in prefixes.items() if name.startswith(pair[0]))
    return new + name.removeprefix(old)


def _authors_config(weights: dict[str, Tensor], path: str | Path, kind: str) -> ModelConfig:
    needed = ("cls_token", "pos_embed_list.0", "pos_embed_list.1", "patch_embed.proj.weight", "head.weight")
    backbones_by_width = _AUTHORS_LVVITS if kind == "CF-LV-ViT" else _AUTHORS_DEITS
    missing = [name for name in needed if name not in weights]
    if missing:
        hint = "; weights of a plain ViT are for pretrained_backbone or --initial-weights"
        plain = missing == ["pos_embed_list.0", "pos_embed_list.1"]
        raise CfvitError(f"{path} does not fit a {kind}: missing {', '.join(missing)}{hint if plain else ''}")
    dim = weights["cls_token"].shape[-1] if weights["cls_token"].ndim else 0
    if dim not in backbones_by_width and dim not in range(_HEAD_DIM, 4097, _HEAD_DIM):
        raise CfvitError(f"{path} has {dim} channels: {kind} has a multiple of {_HEAD_DIM}, at most 4096")
    for key, dims in (("patch_embed.proj.weight", 4), ("head.weight", 2)):
        if weights[key].ndim != dims or 0 in weights[key].shape:
            raise CfvitError(f"{path} does not fit a {kind}: {key} is {list(weights[key].shape)}")
    name = backbones_by_width.get(dim, backbones_by_width[384])
    with torch.device("meta"):
        usual: Any = timm.create_model(name)
    blocks = [int(found.group(1)) for key in weights if (found := re.match(r"blocks\.(\d+)\.", key))]
    depth = min(1 + max(blocks), 99) if blocks else len(usual.blocks)
    patch = (2 if kind == "CF-LV-ViT" else 1) * weights["patch_embed.proj.weight"].shape[-1]
    differs = {"embed_dim": dim, "num_heads": dim // _HEAD_DIM} if dim != usual.embed_dim else {}
    differs |= {"depth": depth} if depth != len(usual.blocks) else {}
    differs |= {"patch_size": patch} if patch != usual.patch_embed.patch_size[0] else {}
    return ModelConfig(
        backbone=name,
        num_classes=weights["head.weight"].shape[0],
        coarse_grid=math.isqrt(max(1, weights["pos_embed_list.0"].numel() // dim - 1)),
        timm_kwargs=differs,
    )
