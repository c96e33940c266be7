"""Recipes: everything that a training run depends on, as one typed, frozen configuration.

A recipe is chosen by name, overridden by a YAML file, then by command-line flags. The result
is written beside the model as ``recipe.yaml``, from which the run can be repeated.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from cfvit.errors import UsageError
from cfvit.modeling.variants import CoarseLoss, Reuse, Selection, Stages

Precision = Literal["auto", "float32", "bfloat16", "float16"]
TimmKwargs = dict[str, bool | int | float | str | None]


def _about(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The DeiT recipe with the coarse-to-fine losses: the paper's training from scratch.

    Defaults follow DeiT (Touvron et al., 2021) and CF-ViT's section "Implementation": 300 epochs,
    of which the first 200 split all cells, batch 1024.
    """

    data: str = _about("", "image folder, tar, or timm data set (hfds/..., torch/...) to train on")
    val_data: str | None = _about(None, "data to validate on; by default DATA's own validation split, if it has one")
    holdout: float = _about(0.05, "share of the training images kept out, to choose eta on")

    backbone: str = _about("deit_small_patch16_224", "timm ViT with a class token, or an lvvit")
    coarse_grid: int | str = _about(7, "side of the coarse grid in cells, or ROWSxCOLUMNS such as 5x8")
    informative_ratio: float = _about(0.5, "share of cells that the fine stage splits")
    attention_momentum: float = _about(0.99, "beta of the global class attention")
    selection: Selection = _about("attention", "cells to split: highest class attention, lowest, or random (Table 4)")
    feature_reuse: Reuse = _about("mlp", "what the fine stage takes over of coarse features (Table 5)")
    timm_kwargs: TimmKwargs | None = _about(None, "further timm arguments, as in --timm-kwargs.patch_size 8")
    initial_weights: str | None = _about(
        None, "start from these: 'timm', a file of backbone weights, or a saved or bundled cfvit model"
    )
    stages: Stages = _about("both", "train both, the coarse one alone, or for comparison the plain ViT (backbone)")
    coarse_loss: CoarseLoss = _about("kl", "what the coarse stage learns from: the fine one, or the label (Table 8)")

    epochs: int = _about(300, "passes over the training images")
    all_cells_share: float = _about(2 / 3, "share of the epochs, the first ones, in which all cells are split")
    batch_size: int = _about(128, "images per process and step, before accumulation")
    accumulate: int = _about(1, "batches whose gradients are added up for one step")
    drop_path_rate: float = _about(0.1, "stochastic depth")

    optimizer: str = _about("adamw", "timm's name of the optimiser")
    lr_base: float = _about(5e-4, "learning rate for lr_base_size images a step; scaled in proportion")
    lr_base_size: int = _about(512, "images a step for which lr_base is meant")
    min_lr: float = _about(1e-5, "learning rate at the end")
    warmup_lr: float = _about(1e-6, "learning rate at the start of the warm-up")
    warmup_epochs: float = _about(5, "epochs of linear warm-up")
    weight_decay: float = _about(0.05, "weight decay; none on positions, class token, norms and biases")
    clip_grad: float = _about(0.0, "largest norm of the gradient; 0 for no limit")
    ema_decay: float = _about(0.9999, "decay of the averaged weights, warmed up; 0 for no averaging")

    crop_scale_min: float = _about(0.08, "least share of the image in a training crop")
    auto_augment: str = _about("rand-m9-mstd0.5-inc1", "timm's augmentation policy, or none")
    color_jitter: float = _about(0.3, "colour jitter, used where there is no policy")
    hflip: float = _about(0.5, "probability of a horizontal flip")
    crop_pct: float | None = _about(None, "share of the image that evaluation sees; by default the backbone's")
    train_interpolation: str = _about("bicubic", "how training crops are resized")
    random_erasing: float = _about(0.25, "probability of random erasing")
    mixup: float = _about(0.8, "alpha of mixup; 0 for none")
    cutmix: float = _about(1.0, "alpha of cutmix; 0 for none")
    label_smoothing: float = _about(0.1, "label smoothing")
    repeated_augmentation: int = _about(3, "times that an image stands in an epoch, of which as many fewer are seen")

    token_labels: str | None = _about(None, "folder of label maps by which an lvvit learns at each token")
    teacher: str | None = _about(None, "timm model to ask for such labels during training, in place of token_labels")
    teacher_weights: str | None = _about(None, "the teacher's weights, a file; by default timm's own")
    token_label_weight: float = _about(1.0, "weight of the tokens' loss; 0.5 in the LV-ViT paper, 1 in CF-ViT's runs")
    mix_token: bool = _about(False, "with token labels: exchange a box of tokens between images (MixToken)")

    threshold_max_drop: float = _about(0.5, "points of accuracy that the chosen eta may lose on the hold-out")
    precision: Precision = _about("auto", "auto: bfloat16 on GPUs that have it, float32 elsewhere")
    compile: bool = _about(False, "torch.compile the network")
    seed: int = _about(0, "fixes every random choice")
    workers: int = _about(2, "processes that load images")
    hold_decoded: bool = _about(False, "decode each image once and hold its pixels, in a temporary file")
    eval_batch_size: int = _about(128, "images per batch in evaluation")
    eval_interval: int = _about(1, "epochs between evaluations")
    log_interval: int = _about(50, "steps between lines of the log")
    checkpoint_interval: int = _about(500, "steps between checkpoints, besides one after each epoch")

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                allowed = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
                raise UsageError(f"{name} is {value}: give {allowed}")
        taken = {"drop_path_rate", "num_classes", "img_size", "pretrained"} & set(self.timm_kwargs or {})
        if taken:
            raise UsageError(f"timm_kwargs has {taken.pop()!r}: a recipe sets it by a field of its own or by the data")
        if self.batch_size % 2 and (self.mixup or self.cutmix):
            raise UsageError(
                f"batch_size is {self.batch_size}: mixup and cutmix pair the images, "
                "give an even number or set both to 0"
            )
        _ = self.grid
        self._check_token_labels()

    def _check_token_labels(self) -> None:
        if self.teacher_weights and not self.teacher:
            raise UsageError("teacher_weights are given without a teacher: add --teacher NAME")
        if self.mix_token and not self.learns_from_tokens:
            raise UsageError(
                "mix_token is on without token labels: add --token-labels FOLDER or --teacher NAME, "
                "or give --no-mix-token"
            )
        if not self.learns_from_tokens:
            return
        if self.token_labels and self.teacher:
            raise UsageError("token_labels and teacher are both given: labels come from one of them")
        if self.mixup or self.cutmix:
            raise UsageError("mixup and cutmix move pixels away from their token labels: set both to 0, use mix_token")
        if self.stages != "both" or self.coarse_loss != "kl":
            raise UsageError(
                f"token labels train both stages by their own loss and stages is {self.stages}, coarse_loss "
                f"{self.coarse_loss}: leave both as they are, or leave out token_labels and teacher"
            )

    @property
    def learns_from_tokens(self) -> bool:
        """Whether each token has a label of its own."""
        return bool(self.token_labels or self.teacher)

    @property
    def grid(self) -> int | tuple[int, int]:
        """The coarse grid as `cfvit.create_model` takes it.

        Raises:
            UsageError: neither a number nor ``ROWSxCOLUMNS``.
        """
        sides = str(self.coarse_grid).split("x")
        if len(sides) > 2 or not all(side.isdecimal() and int(side) >= 1 for side in sides):
            raise UsageError(f"coarse_grid is {self.coarse_grid!r}: give at least 1, or ROWSxCOLUMNS such as 5x8")
        return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))

    def replace(self, changes: Mapping[str, Any]) -> Recipe:
        """The recipe with some fields changed, converted to their types.

        Raises:
            UsageError: an unknown field, with the nearest known one; a value of another type or out of range.
        """
        types_ = typing.get_type_hints(type(self))
        for name in changes:
            if name not in types_:
                near = difflib.get_close_matches(str(name), types_, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"choose among {', '.join(types_)}"
                raise UsageError(f"a recipe has no field {name!r}: {hint}")
        return dataclasses.replace(self, **{name: _convert(name, v, types_[name]) for name, v in changes.items()})

    def to_yaml(self) -> str:
        """All fields, each with what it is for."""
        return "".join(
            f"{f.name}: {_yaml_on_one_line(getattr(self, f.name))}  # {f.metadata['help']}\n" for f in fields(self)
        )


def _yaml_on_one_line(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("...\n").strip()


_INFINITY = float("inf")
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("holdout", 0, 0.99),
    ("informative_ratio", 0, 1),
    ("attention_momentum", 0, 0.999999),
    ("epochs", 1, _INFINITY),
    ("all_cells_share", 0, 1),
    ("batch_size", 1, _INFINITY),
    ("accumulate", 1, _INFINITY),
    ("drop_path_rate", 0, 0.99),
    ("lr_base", 0, _INFINITY),
    ("lr_base_size", 1, _INFINITY),
    ("min_lr", 0, _INFINITY),
    ("warmup_lr", 0, _INFINITY),
    ("warmup_epochs", 0, _INFINITY),
    ("weight_decay", 0, _INFINITY),
    ("clip_grad", 0, _INFINITY),
    ("ema_decay", 0, 1),
    ("crop_scale_min", 0.001, 1),
    ("color_jitter", 0, _INFINITY),
    ("hflip", 0, 1),
    ("crop_pct", 0.01, 1),
    ("random_erasing", 0, 1),
    ("mixup", 0, _INFINITY),
    ("cutmix", 0, _INFINITY),
    ("label_smoothing", 0, 0.99),
    ("repeated_augmentation", 1, _INFINITY),
    ("token_label_weight", 0, _INFINITY),
    ("threshold_max_drop", 0, 100),
    ("seed", 0, 2**32 - 1),
    ("workers", 0, _INFINITY),
    ("eval_batch_size", 1, _INFINITY),
    ("eval_interval", 1, _INFINITY),
    ("log_interval", 1, _INFINITY),
    ("checkpoint_interval", 1, _INFINITY),
)


def _convert(name: str, value: Any, target: Any) -> Any:
    options: tuple[Any, ...] = typing.get_args(target) if isinstance(target, types.UnionType) else (target,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if typing.get_origin(option) is dict:
            if isinstance(value, dict):
                return value
        elif typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return value
        elif option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        elif option is float and isinstance(value, str) and _is_number(value):
            return float(value)  # YAML reads 1e-3, without a point, as text
        elif isinstance(value, option) and (option is bool) == isinstance(value, bool):
            return value
    allowed = [
        ", ".join(typing.get_args(option)) if typing.get_origin(option) is Literal else option.__name__
        for option in options
    ]
    raise UsageError(f"{name} is {value!r}: give {' or '.join(allowed).replace('NoneType', 'null')}")


def read_value(text: str) -> Any:
    """A word of the command line as YAML would read it: a number, true, false, null, or the word itself."""
    return float(text) if _is_number(text) and not text.lstrip("+-").isdecimal() else yaml.safe_load(text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


DEIT = Recipe()
"""The paper's recipe for DeiT on ImageNet: 300 epochs, batch 1024 over all processes.

Command: ``torchrun --nproc-per-node 8 -m cfvit train --data IMAGENET --out RUN --recipe deit``.
The paper reports 80.8% top-1 at eta 1 for DeiT-S (Table 2). Reproduced: no, not yet run here.
"""

FINETUNE = Recipe(
    initial_weights="timm",
    epochs=30,
    all_cells_share=1 / 3,
    lr_base=1e-4,
    warmup_epochs=1,
    crop_scale_min=0.25,
    mixup=0.2,
    cutmix=0.5,
    ema_decay=0.999,
    repeated_augmentation=1,
)
"""A trained ViT made coarse-to-fine, on its own or on new data, in a tenth of the epochs.

Command: ``cfvit train --recipe finetune --data DATA --out RUN --backbone deit_small_patch16_224``
(``--initial-weights FILE`` for weights at hand). Reproduced: no score on ImageNet yet.
"""

LVVIT = Recipe(
    backbone="lvvit_small_patch16_224",
    lr_base=1.6e-3,
    lr_base_size=1024,
    ema_decay=0.99992,
    mixup=0.0,
    cutmix=0.0,
    repeated_augmentation=1,
)
"""LV-ViT with token labels on ImageNet: 300 epochs, batch 1024 over all processes.

Command: ``torchrun --nproc-per-node 8 -m cfvit train --data IMAGENET --out RUN --recipe lvvit
--token-labels MAPS --mix-token`` (or ``--teacher NAME``). The paper reports 83.6% top-1 at eta 1 for LV-ViT-S
(Table 2). Reproduced: no, not yet run at that scale; ``results/`` has a short run on Imagenette.
"""

IMAGENETTE = Recipe(
    backbone="deit_tiny_patch16_224",
    coarse_grid=4,
    epochs=24,
    all_cells_share=0.25,
    batch_size=64,
    optimizer="muon",
    lr_base=1e-3,
    lr_base_size=64,
    warmup_epochs=1,
    clip_grad=1.0,
    drop_path_rate=0.0,
    ema_decay=0.999,
    crop_scale_min=0.3,
    auto_augment="none",
    train_interpolation="bilinear",
    random_erasing=0.0,
    repeated_augmentation=1,
    mixup=0.2,
    cutmix=0.5,
)
"""Imagenette (ten classes, 9,469 images) from scratch on a CPU: small images, Muon, light augmentation.

Begun on small images and ended at 224 pixels, 49 epochs and some three hours of two cores; the bundled model's
card has the commands. Scores on ``val.tar`` beside the plain DeiT-T of the same training, 83.2% top-1: 83.8% with 64%
fewer MACs, and 84.8% at eta 1 (the paper's DeiT-S on ImageNet: even with 61% fewer, and a point gained). Learnt: 10
epochs on 3 x 3 cells of 96-pixel images leave the coarse stage sure of few images, and save 23%. ``results/`` has the
table, and the command for a GPU, which was not run. Reproduced: yes on ten classes, by one run each.
"""

DIGITS = Recipe(
    backbone="test_vit",
    timm_kwargs={"patch_size": 8},
    coarse_grid=3,
    epochs=24,
    all_cells_share=0.25,
    batch_size=32,
    optimizer="muon",
    lr_base=4e-3,
    lr_base_size=32,
    warmup_epochs=1,
    drop_path_rate=0.0,
    ema_decay=0.99,
    crop_scale_min=0.7,
    hflip=0.0,
    crop_pct=1.0,
    auto_augment="none",
    train_interpolation="bilinear",
    random_erasing=0.0,
    repeated_augmentation=1,
    mixup=0.0,
    cutmix=0.0,
    label_smoothing=0.05,
    holdout=0.2,
    workers=0,
)
"""scikit-learn's handwritten digits, for ``cfvit demo`` and the tests: about a minute on two CPU cores."""

RECIPES: dict[str, Recipe] = {
    "deit": DEIT,
    "finetune": FINETUNE,
    "lvvit": LVVIT,
    "imagenette": IMAGENETTE,
    "digits": DIGITS,
}


def load_recipe(name: str, config: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe ``name``, changed by a YAML file, then by ``overrides``.

    Raises:
        UsageError: unknown recipe, unreadable file, unknown field or bad value.
    """
    if name not in RECIPES:
        raise UsageError(f"no recipe {name!r}: choose among {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    if config is not None:
        recipe = recipe.replace(_read_yaml(config))
    return recipe.replace(overrides or {})


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path} is not YAML ({reason}): write one 'field: value' per line") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}: write one 'field: value' per line")
    return content
