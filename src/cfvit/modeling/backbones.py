"""Which of timm's models can be read in two stages, and how they are made and filled.

A backbone is timm's own model, unchanged, so that its weights load key for key. How it is taken
apart is in `timm_vit`, the two-stage method in `model`. A model of one's own is added in one file
that subclasses timm's ``VisionTransformer`` and registers it with timm, as `lvvit` does.
"""

from __future__ import annotations

import copy
import difflib
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import timm
import timm.models.eva
import torch
from timm.data import resolve_model_data_config
from timm.layers import HybridEmbed, PatchEmbed
from timm.layers.activations import QuickGELU
from timm.models import load_pretrained, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

import cfvit.modeling.lvvit
import cfvit.modeling.transformers_vit  # noqa: F401 - these two register their models with timm
from cfvit.errors import CfvitError, first_line
from cfvit.modeling.timm_vit import ATTENTIONS, BLOCKS, EXTRA_TOKENS, Backbone, patch_side, resample_positions
from cfvit.modeling.weights import Weights, read_weights

# timm reports a resampled position embedding with a warning; here it is the normal case.
logging.getLogger("timm.models._builder").setLevel(logging.ERROR)

Pretrained = bool | str | Path | Mapping[str, Tensor] | Weights
"""Timm's own weights or none, what `read_weights` reads, or weights that were read."""

WHAT_WOULD_DO = "choose a ViT with a class token, such as deit_small_patch16_224 or vit_small_patch14_dinov2"


def patch_size(backbone: str, **timm_kwargs: Any) -> tuple[int, int]:
    """Height and width of a patch, in pixels, of a timm model by its name.

    Raises:
        CfvitError: timm has no such model, or it cannot be read in two stages.
    """
    return patch_side(_skeleton(backbone, **timm_kwargs))


def preprocessing(backbone: str, **timm_kwargs: Any) -> dict[str, Any]:
    """How timm prepares images for a model by its name, in timm's keys. Raises as `patch_size` does."""
    return data_config_of(_skeleton(backbone, **timm_kwargs))


def data_config_of(network: nn.Module) -> dict[str, Any]:
    """How timm prepares images for a network, in timm's keys; without lists, which an overlay from a file has."""
    resolved = resolve_model_data_config(network)
    return {key: tuple(value) if isinstance(value, list) else value for key, value in resolved.items()}


def create_backbone(
    name: str,
    *,
    img_size: tuple[int, int],
    num_classes: int,
    pretrained: Pretrained = False,
    **timm_kwargs: Any,
) -> Backbone:
    """Timm's model ``name`` at ``img_size`` pixels (height, width), its position embedding resampled to fit.

    Args:
        pretrained: True for timm's own weights (downloaded or cached), what `read_weights` reads, or a state
            dict. A head for another number of classes is left untrained, with a warning.

    Raises:
        CfvitError: unknown or unsuitable model, or weights that cannot be had or do not fit.
    """
    _skeleton(name, **timm_kwargs)
    options: dict[str, Any] = {"img_size": img_size, "num_classes": num_classes, **timm_kwargs}
    if pretrained is True:
        try:
            model = cast(Backbone, timm.create_model(name, pretrained=True, **options))
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CfvitError(f"timm's weights of {name} cannot be had ({reason}): give a local file instead") from error
    else:
        model = cast(Backbone, timm.create_model(name, **options))
    if not isinstance(pretrained, bool):
        if isinstance(pretrained, Mapping):
            pretrained = Weights("the given weights", dict(pretrained))
        _load(model, pretrained if isinstance(pretrained, Weights) else read_weights(pretrained), name)
    rope: Any = getattr(model, "rope", None)
    if getattr(rope, "aug_active", False):
        rope.aug_active = False  # drawn anew for each stage, it would move the two grids apart
    return model


def _load(model: Backbone, weights: Weights, name: str) -> None:
    """Loads weights, positions resampled; all but heads of other classes must fit."""
    tensors = in_timms_keys(model, weights)
    own = model.state_dict()
    heads = {key for key in own if key.split(".")[0] in HEADS}
    unfit = [f"no {key}" for key in heads - tensors.keys()]
    unfit = ["no head"] if unfit and not heads & tensors.keys() else unfit
    unfit += [f"{k} of {list(tensors[k].shape)}" for k in heads & tensors.keys() if tensors[k].shape != own[k].shape]
    if unfit:
        tensors = {**tensors, **{key: own[key] for key in heads}}
    load_strictly(model, tensors, f"{weights.source} does not fit {name}")
    if unfit:
        what = f"{', '.join(sorted(unfit))} for {model.num_classes} classes"
        warnings.warn(f"{weights.source} has {what}: the head is untrained", stacklevel=2)


HEADS = frozenset({"head", "head_dist", "aux_head"})
"""Modules with an output for each class."""


def in_timms_keys(model: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """Weights as published, under the keys and in the shapes of timm's ViT; those of other models as they are.

    Position embeddings are resampled to the model's grid. See `_resampled_positions` for which grid they are of.
    Weights of another kind raise `CfvitError`.
    """
    if not isinstance(model, VisionTransformer | Eva):
        return weights.tensors
    activation = getattr(getattr(model.blocks[0], "mlp", None), "act", None)
    if weights.activation == "quick_gelu" and not isinstance(activation, QuickGELU):
        raise CfvitError(
            f"{weights.source} computes with QuickGELU and {type(model).__name__} does not: "
            "choose a ..._quickgelu_... model"
        )
    tensors = dict(weights.tensors)
    if {"dist_token", "pos_embed"} <= tensors.keys() and getattr(model, "reg_token", None) is not None:
        positions = tensors["pos_embed"]  # registers, such as a distillation token without a head, have none in timm
        tensors["cls_token"] = tensors["cls_token"] + positions[:, :1]
        tensors["reg_token"] = tensors.pop("dist_token") + positions[:, 1:2]
        tensors["pos_embed"] = positions[:, 2:]
    reader = copy.copy(model)  # without positions, whose grid timm would guess
    reader._parameters = {**model._parameters, "pos_embed": None}
    try:
        if isinstance(model, Eva):
            tensors = timm.models.eva.checkpoint_filter_fn(tensors, reader)
        else:
            tensors = checkpoint_filter_fn(tensors, cast(Any, reader), adapt_layer_scale=True)
    except Exception as error:  # timm converts foreign shapes as far as it gets
        raise CfvitError(
            f"{weights.source} does not fit {type(model).__name__} ({first_line(error)}): give weights of that model"
        ) from error
    patch = tensors.get("patch_embed.proj.weight")
    if patch is not None and patch.ndim == 4:
        sides = {tensor.shape[2:] for tensor in weights.tensors.values() if tensor.ndim == 4}
        if sides and patch.shape[2:] not in sides:
            theirs = " x ".join(map(str, min(sides)))
            warnings.warn(
                f"the patches of {weights.source} are {theirs} pixels and are resampled to "
                f"{patch.shape[2]} x {patch.shape[3]}: give --timm-kwargs.patch_size to keep their size",
                stacklevel=3,
            )
    own, given = model.pos_embed, tensors.get("pos_embed")
    alike = all((name in tensors) == (getattr(model, name, None) is not None) for name in EXTRA_TOKENS)
    if own is not None and given is not None and alike and given.ndim == 3 and given.shape[::2] == own.shape[::2]:
        tensors["pos_embed"] = _resampled_positions(model, given, weights)
    return tensors


def _resampled_positions(model: Backbone, positions: Tensor, weights: Weights) -> Tensor:
    """Positions at the model's grid. Their own is what the source says, or the model's where as many fit, or a square.

    Raises:
        CfvitError: it is none of these.
    """
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    target: tuple[int, int] = cast(Any, model.patch_embed).grid_size
    places = positions.shape[1] - prefix
    side = math.isqrt(max(places, 0))
    grid = weights.grid
    if grid is not None and math.prod(grid) != places:
        raise CfvitError(
            f"{weights.source} has {places} positions of patches, not {grid[0]} x {grid[1]}: give their own grid"
        )
    if grid is None and places == math.prod(target):
        grid = target
        if side**2 == places and target != (side, side):
            warnings.warn(
                f"the positions of {weights.source} are taken as {target[0]} x {target[1]}, not {side} x {side}: "
                f"if that is wrong, give their file as FILE#{side}x{side}",
                stacklevel=2,
            )
    elif grid is None and side**2 == places > 0:
        grid = side, side
    if grid is None:
        raise CfvitError(
            f"{weights.source} has {positions.shape[1]} positions, which are not {prefix} of class token and the like "
            f"and a square grid: give its grid as {weights.source}#ROWSxCOLUMNS, or weights of another model"
        )
    return resample_positions(model, positions, grid, target)


@register_model
def cfvit_backbone(pretrained: bool = False, *, backbone: str, **timm_kwargs: Any) -> Any:
    """The plain ViT of a saved coarse-to-fine model: what ``timm.create_model("local-dir:FOLDER")`` makes of it.

    Args:
        pretrained: with the saved weights, whose positions are resampled to another ``img_size``.
        backbone: timm's name of it.
    """
    timm_kwargs.pop("pretrained_model_args", None)  # as timm read them; these arguments hold the same
    network: Any = timm.create_model(backbone, **timm_kwargs)

    def plain(tensors: Mapping[str, Tensor], _: nn.Module) -> dict[str, Tensor]:
        prefix = "backbone."
        ours = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        size, patch = network.pretrained_cfg["input_size"][1:], patch_side(network)
        grid = size[0] // patch[0], size[1] // patch[1]
        return in_timms_keys(network, Weights("the saved model", ours, grid))

    if pretrained:
        load_pretrained(network, num_classes=network.num_classes, filter_fn=plain)
    return network


def load_strictly(
    network: nn.Module, weights: Mapping[str, Tensor], complaint: str, spelled: Callable[[str], str] = str
) -> None:
    """Copies weights into a network, each of its own and no other, in the network's precision.

    Args:
        complaint: how the error begins.
        spelled: our name of a weight to the one to show.

    Raises:
        CfvitError: names the first weights that are missing, unknown, misshapen or no floats of 16 bits or more.
    """
    own = network.state_dict()
    problems = [f"missing {spelled(name)}" for name in own if name not in weights]
    problems += [f"unknown {spelled(name)}" for name in weights if name not in own]
    problems += [
        f"{spelled(name)} is {list(tensor.shape)} where {list(own[name].shape)} is needed"
        for name, tensor in weights.items()
        if name in own and tensor.shape != own[name].shape
    ]
    problems += [
        f"{spelled(name)} is {str(tensor.dtype).removeprefix('torch.')} where floats of 16 bits or more are needed"
        for name, tensor in weights.items()
        if name in own and own[name].is_floating_point() and not (tensor.is_floating_point() and tensor.itemsize > 1)
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CfvitError(f"{complaint}: {'; '.join(problems[:5])}{more}")
    network.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in weights.items()})


def _skeleton(name: str, **timm_kwargs: Any) -> Backbone:
    """The model without memory for its weights, once it is known to be suitable."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(["*deit*", "*vit*", "eva*"]), n=3)
        mend = f"did you mean {', '.join(near)}?" if near else WHAT_WOULD_DO
        if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
            mend = "give timm's own name, and such weights as pretrained_backbone or --initial-weights"
        raise CfvitError(f"timm has no model {name!r}: {mend}")
    model = _on_meta(name, _Arguments(timm_kwargs))
    reason = _refusal(model)
    if reason is None:
        return cast(Backbone, model)
    if timm_kwargs and _refusal(_on_meta(name, _Arguments())) is None:
        raise CfvitError(f"{name} with {_spelled(timm_kwargs)} {reason}: leave out or change these arguments")
    raise CfvitError(f"{name} {reason}: {WHAT_WOULD_DO}")


class _Arguments(dict[str, Any]):
    """Keyword arguments that can be the key of a cache."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride] - nobody changes them
        return hash(repr(sorted(self.items())))


@lru_cache(maxsize=8)
def _on_meta(name: str, timm_kwargs: _Arguments) -> nn.Module:
    """The model without memory for its weights, to be read alone: it is made once for several questions."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, **timm_kwargs)
    except Exception as error:
        if timm_kwargs and (reason := _refusal(_on_meta(name, _Arguments()))):
            raise CfvitError(f"{name} {reason}: {WHAT_WOULD_DO}") from error
        reason = " ".join(str(error).split())[:200]
        given, mend = (f" with {_spelled(timm_kwargs)}", "arguments") if timm_kwargs else ("", "name")
        raise CfvitError(f"timm cannot build {name}{given} ({reason}): change the {mend}") from error


def _spelled(timm_kwargs: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in timm_kwargs.items())


_WINDOWED = {"SwinTransformer", "SwinTransformerV2", "SwinTransformerV2Cr", "VisionTransformerSAM"}
_WINDOWED |= {"Hiera", "MaxxVit", "GlobalContextVit", "Nest", "Twins", "DaVit"}
_PER_PAIR = "adds to its attention a bias for each pair of patches of one fixed grid, which patches of two sizes lack"
_OTHER_ATTENTION = {
    "Beit": _PER_PAIR,
    "VisionTransformerRelPos": _PER_PAIR,
    "Xcit": "attends across channels, not patches, so that no class attention chooses the informative cells",
    "Cait": "lets the class token attend in its last blocks only, too late to average its attention over the blocks",
    "NaFlexVit": "packs patches of images of any size its own way, and timm's plain ViTs hold the same weights",
}


def _refusal(model: Any) -> str | None:
    """Why a model cannot be read in two stages, or None."""
    kind, its = type(model).__name__, type(model)
    base: Any = Eva if isinstance(model, Eva) else VisionTransformer
    plain = isinstance(model, VisionTransformer | Eva)  # a subclass may change parts that are read: stem, blocks, head
    plain = plain and its._pos_embed in (base._pos_embed, VisionTransformerDistilled._pos_embed)
    if not (plain and its.forward_features is base.forward_features and its.forward is base.forward):
        if kind in _OTHER_ATTENTION:
            return _OTHER_ATTENTION[kind]
        if kind in _WINDOWED:
            return "attends within windows of one grid, so patches of two sizes cannot share a sequence"
        if len({info["reduction"] for info in getattr(model, "feature_info", []) if "reduction" in info}) > 1:
            return "is a hierarchy of convolutions or poolings, without one sequence of patches"
        return f"is a {kind}, not one of timm's plain vision transformers"
    if len(model.blocks) == 0:
        return "has no blocks"
    if model.cls_token is None:
        return "has no class token, whose attention chooses the informative cells"
    if not model.global_pool:
        return "has its pooling switched off, so that there is no one answer for an image"
    unknown = {type(block).__name__ for block in model.blocks if type(block) not in BLOCKS}
    branches = [branch for block in model.blocks for branch in getattr(block, "attns", [block])]
    kinds = {type(branch.attn) for branch in branches if hasattr(branch, "attn")}
    unknown |= {kind.__name__ for kind in kinds if kind not in ATTENTIONS}
    if unknown:
        return f"is built of {', '.join(sorted(unknown))}, whose class attention is not read here"
    embed = model.patch_embed
    read = type(embed).forward in (PatchEmbed.forward, HybridEmbed.forward) or hasattr(embed, "features")
    if not isinstance(embed, PatchEmbed | HybridEmbed) or not read:
        return f"embeds its patches by a {type(embed).__name__} without features(images), so it is not read here"
    if getattr(model, "patch_drop", None) is not None and not isinstance(model.patch_drop, nn.Identity):
        return "drops patches at random in training, which the choice of informative cells cannot"
    return None
