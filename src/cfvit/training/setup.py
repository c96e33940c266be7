"""What a run starts from: its images, its network, and all that changes during training."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import timm.optim.muon
import torch
from timm.data import ImageNetInfo, create_transform
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from cfvit.checkpoints import class_names_of, classes_of, is_coarse_to_fine, preprocessing_of
from cfvit.data import (
    DataSource,
    EvalImages,
    TrainImages,
    has_validation_split,
    hold,
    open_data,
    open_images,
    readable_class_names,
    split_holdout,
)
from cfvit.errors import CfvitError, UsageError, first_line
from cfvit.inference.engines.packing import accelerate, accelerate_training
from cfvit.methods.base import Method, create_method
from cfvit.modeling.backbones import preprocessing
from cfvit.processes import Process
from cfvit.training.recipe import Recipe, load_recipe
from cfvit.training.teacher import Teacher, load_teacher
from cfvit.training.tokens import LabelledImages, LabelledTransform

RECIPE_FILE, CLASSES_FILE = "recipe.yaml", "class_names.json"
"""What a run's folder holds beside the weights, so that the network can be built again."""


@dataclass(frozen=True)
class RunImages:
    """The images of a run."""

    train: TrainImages
    holdout: EvalImages | None  # images of the training source that are kept out of training
    validation: EvalImages | None  # always with labels

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 of the names of all training images, in their order, which decides what is held out."""
        source = self.train.source
        names = "\n".join(source.name(index) for index in range(len(source)))
        return hashlib.sha256(os.fsencode(unicodedata.normalize("NFC", names))).hexdigest()


@dataclass
class TrainState:
    """All that changes during training: weights, optimiser, step; and the method and the teacher."""

    method: Method
    model: Any  # holds the weights and is saved
    network: Any  # what runs in a step: what the method makes of the model, perhaps compiled and distributed
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    average: ModelEmaV3 | None  # the averaged weights, None where nothing is averaged
    teacher: Teacher | None
    initial: dict[str, torch.Tensor] | None = None  # the trained weights that it began with, where they have a share
    step: int = 0  # counts optimiser steps

    @torch.no_grad()
    def best_weights(self, initial_share: float) -> Any:
        """What is scored and saved: the averaged model, or the model itself, moved so far to where the run began."""
        best = self.model if self.average is None else self.average.module
        if self.initial is not None:
            best = copy.deepcopy(best)
            weights = best.state_dict()
            for name, begun in self.initial.items():
                if begun.is_floating_point():
                    weights[name].lerp_(begun, initial_share)
        return best

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, on any device, for `load_state_dict`."""
        return {
            "step": self.step,
            "class_names": self.model.class_names,
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


@dataclass(frozen=True)
class Splits:
    """The images of a run before any transform."""

    source: DataSource  # the training images, of which ``kept`` are trained on and ``held`` are kept out
    kept: list[int]
    held: list[int]
    validation: DataSource | None  # of another split, with labels
    class_names: list[str]  # by class index


def open_splits(recipe: Recipe) -> Splits:
    """Opens the images of a run; no network is built.

    Raises:
        CfvitError: no data, or data that cannot be read.
    """
    if not recipe.data:
        raise UsageError("no data: name what to train on with --data")
    if recipe.uses_labels:
        source = open_data(recipe.data[0], "train")
        known = recipe.initial_weights and class_names_of(recipe.initial_weights)
        if known and sorted(known) == sorted(source.class_names) and recipe.token_labels is None:
            source = source.aligned(known)  # label maps have the order of the data
        class_names = source.class_names
    else:
        source = open_images(recipe.data, "train", recipe.seed)
        class_names = _classes_without_labels(recipe)
    validation = None
    if recipe.val_data or (recipe.uses_labels and has_validation_split(recipe.data[0])):
        validation = open_data(recipe.val_data or recipe.data[0], "validation").aligned(class_names)
    return Splits(source, *split_holdout(source, recipe.holdout, recipe.seed), validation, class_names)


def training_images(model: str | Path) -> tuple[DataSource, list[int]] | None:
    """What a model's folder says that it was trained on, and which of it; None if that is not known or not there.

    Raises:
        CfvitError: a recipe in the folder that cannot be read.
    """
    config = Path(model) / RECIPE_FILE
    if not config.is_file():
        return None
    try:
        recipe = load_recipe("deit", config)
    except UsageError as error:
        raise CfvitError(
            f"{config} does not tell the training images ({error}): name them with --train-data"
        ) from error
    if recipe.uses_labels:
        if not recipe.data or not Path(recipe.data[0]).exists():
            return None
        source = open_data(recipe.data[0], "train")
    else:
        try:
            source = open_images(recipe.data, "train", recipe.seed)
        except CfvitError:  # one of them is gone
            return None
    return source, split_holdout(source, recipe.holdout, recipe.seed)[0]


def with_preprocessing(recipe: Recipe) -> Recipe:
    """The recipe with the preprocessing of the weights that the run starts from, where that is not timm's.

    It stands in ``timm_kwargs``, so that the teacher, the recipe that is written and all that reads it agree.
    """
    if recipe.initial_weights is None:
        return recipe
    kwargs, name = recipe.timm_kwargs, "pretrained_cfg_overlay"
    usual, theirs = preprocessing(recipe.backbone, **kwargs), preprocessing_of(recipe.initial_weights)
    differs = {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.items() if v != usual.get(k)}
    overlay = {**differs, **kwargs.get(name, {})}
    return recipe.replace({"timm_kwargs": {**kwargs, name: overlay}}) if overlay else recipe


def prepare(recipe: Recipe, process: Process) -> tuple[RunImages, Any]:
    """Opens the images of a run and builds its model, on the process's device.

    Raises:
        CfvitError: data, a backbone or weights that cannot be had or do not go together.
    """
    splits = open_splits(recipe)
    torch.manual_seed(recipe.seed)
    method = create_method(recipe.method, recipe, recipe.method_options)
    for name in sorted(method.ignored):
        if (given := getattr(recipe, name)) != (usual := getattr(Recipe(), name)):
            raise UsageError(f"{name} is {given!r}, without effect with --method {method.name}: leave it at {usual!r}")
    config = recipe.model_config(len(splits.class_names))
    model = method.build(config, recipe.initial_weights, splits.class_names)
    model.class_names = splits.class_names
    if recipe.learns_from_tokens and not hasattr(getattr(model, "backbone", model), "token_logits"):
        raise UsageError(f"{recipe.backbone} has no auxiliary head to learn token labels: give --backbone lvvit_...")
    if recipe.crop_pct is not None:
        model.data_config["crop_pct"] = recipe.crop_pct
    source, validation = splits.source, splits.validation
    if recipe.hold_decoded:
        source = hold(source, recipe.workers, process.leads)
        validation = validation and hold(validation, recipe.workers, process.leads)
    if recipe.token_labels is None:
        create = partial(create_transform, is_training=True)
        train = TrainImages(source, splits.kept, _train_transform(recipe, model.data_config, create))
    else:
        transform = _train_transform(recipe, model.data_config, LabelledTransform)
        train = LabelledImages(source, splits.kept, transform, Path(recipe.token_labels))
    evaluated = partial(EvalImages, data_config=model.data_config, rank=process.rank, world=process.world)
    images = RunImages(
        train=train,
        holdout=evaluated(source, indices=splits.held) if splits.held else None,
        validation=evaluated(validation) if validation else None,
    )
    return images, model.to(process.device)


def open_run(folder: Path) -> tuple[Recipe, Method, Any]:
    """What `cfvit train` left in a folder: the recipe, the method and, in evaluation mode on the CPU, the network.

    Raises:
        CfvitError: the folder is damaged, or holds no run.
    """
    try:
        class_names = json.loads((folder / CLASSES_FILE).read_text())  # names of folders need not be Unicode
        if not (isinstance(class_names, list) and all(isinstance(name, str) for name in class_names)):
            raise ValueError(f"{CLASSES_FILE} is no list of names")
    except (OSError, ValueError) as error:
        raise CfvitError(
            f"{folder} is no folder of cfvit train, or damaged ({first_line(error)}): give one with {RECIPE_FILE}, "
            f"{CLASSES_FILE} and weights"
        ) from error
    recipe = load_recipe("deit", folder / RECIPE_FILE)
    try:
        method = create_method(recipe.method, recipe, recipe.method_options)
    except UsageError as error:
        raise CfvitError(f"{folder} is a run that this cfvit does not know: {error}") from error
    network = method.build(recipe.model_config(len(class_names)), None, class_names)
    if recipe.crop_pct is not None:
        network.data_config["crop_pct"] = recipe.crop_pct
    network = method.load(network, folder)
    if network.class_names not in (None, class_names):
        raise CfvitError(
            f"{folder} names other classes in {CLASSES_FILE} than with the weights: name them alike in both"
        )
    network.class_names = class_names
    return recipe, method, network


def _classes_without_labels(recipe: Recipe) -> list[str]:
    """The class names of unlabelled data: those of the teacher, or of the network that the run starts from."""
    if not recipe.uses_teacher:
        raise UsageError(
            "a run without labels learns from a teacher: give --recipe adapt, or a weight of the teacher above 0"
        )
    if recipe.initial_weights is None:
        raise UsageError(
            "a run without labels starts from a trained ViT: give --initial-weights FILE, or 'timm' for timm's own"
        )
    names, count = classes_of(recipe.initial_weights, recipe.backbone)
    imagenet = ImageNetInfo().label_names()
    if names is None and count == len(imagenet):
        names = readable_class_names(imagenet)
    return [str(index) for index in range(count)] if names is None else names


def _train_transform(recipe: Recipe, data_config: dict[str, Any], create: Callable[..., Any]) -> Any:
    try:
        return create(
            data_config["input_size"],
            mean=data_config["mean"],
            std=data_config["std"],
            scale=(recipe.crop_scale_min, 1.0),
            hflip=recipe.hflip,
            auto_augment=None if recipe.auto_augment == "none" else recipe.auto_augment,
            color_jitter=recipe.color_jitter,
            interpolation=recipe.train_interpolation,
            re_prob=recipe.random_erasing,
            re_mode="pixel",
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise CfvitError(
            f"timm cannot augment so ({first_line(error)}): change auto_augment or train_interpolation"
        ) from error


def assemble(recipe: Recipe, model: Any, num_images: int, process: Process) -> TrainState:
    """Optimiser, schedule, averaged weights and teacher around a model; ``num_images`` are those of an epoch.

    Raises:
        CfvitError: no such optimiser or teacher, too few images for one step.
    """
    method = create_method(recipe.method, recipe, recipe.method_options)
    network: Any = accelerate_training(method.training_module(model))
    images_per_step = recipe.batch_size * recipe.accumulate * process.world
    optimizer = create_optimizer(recipe, model, recipe.lr_base * images_per_step / recipe.lr_base_size)
    if recipe.added_lr_scale != 1 or recipe.added_only_epochs:
        added = {weight for name, weight in model.named_parameters() if method.is_added(name)}
        if not added:
            raise UsageError(f"{recipe.method} adds no weights to the ViT: leave out added_lr_scale, added_only_epochs")
        optimizer.param_groups[:] = [
            {**group, "params": weights, "added": apart, "lr_scale": recipe.added_lr_scale if apart else 1.0}
            for group in optimizer.param_groups
            for apart in (False, True)
            if (weights := [weight for weight in group["params"] if (weight in added) == apart])
        ]
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=recipe.epochs,
        min_lr=recipe.min_lr,
        warmup_lr=recipe.warmup_lr,
        warmup_epochs=recipe.warmup_epochs,  # pyright: ignore[reportArgumentType] - counted in steps
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch(recipe, num_images, process.world),
    )
    average = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay > 0 else None
    if process.world > 1:
        cuda = process.device.type == "cuda"
        network = DistributedDataParallel(network, device_ids=[process.device] if cuda else None)
    if recipe.compile:
        network = torch.compile(network)
    scaler = torch.amp.GradScaler(process.device.type, enabled=dtype_of(recipe, process.device) is torch.float16)
    teacher = _teacher(recipe, model, process.device)
    initial = None
    if recipe.initial_share:
        if recipe.initial_weights is None:
            raise UsageError(
                f"initial_share is {recipe.initial_share:g} in a run from random weights: name trained ones with "
                "--initial-weights FILE, or give --initial-share 0"
            )
        began = model.state_dict().items()
        initial = {name: tensor.clone() for name, tensor in began if not method.is_added(name)}
    return TrainState(method, model, network, optimizer, scheduler, scaler, average, teacher, initial)


def create_optimizer(recipe: Recipe, trainable: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Timm's optimiser; of a hybrid one such as Muon, AdamW takes the embeddings and the head.

    Raises:
        CfvitError: timm has none of that name.
    """
    one_pass: dict[str, Any] = {"fused": True} if recipe.optimizer == "adamw" else {}
    try:
        return create_optimizer_v2(
            trainable,
            opt=recipe.optimizer,
            lr=lr,
            weight_decay=recipe.weight_decay,
            fallback_no_weight_decay=True,
            fallback_list=("*head.weight", "*patch_embed.*"),
            **one_pass,
        )
    except ValueError as error:
        raise CfvitError(
            f"optimizer {recipe.optimizer!r}: {first_line(error)}; give one of timm's, such as adamw"
        ) from error


def _teacher(recipe: Recipe, model: Any, device: torch.device) -> Teacher | None:
    """The teacher that is named or, to learn whole answers from, the plain ViT that the run starts from."""
    if recipe.teacher is not None:
        weights = None if recipe.teacher_weights is None else Path(recipe.teacher_weights)
        teacher = load_teacher(recipe.teacher, len(model.class_names), weights, device, student=model.data_config)
        teacher.require_classes(model.class_names)
        if recipe.learns_from_tokens:
            teacher.require_dense()
    elif recipe.uses_teacher:
        start = recipe.initial_weights
        if start is None or is_coarse_to_fine(start):
            was = "random weights" if start is None else f"the coarse-to-fine model {start}"
            raise UsageError(
                f"the run starts from {was}, which is no teacher: name a plain ViT with --teacher NAME, "
                "and its weights with --teacher-weights FILE"
            )
        names, count = classes_of(start, recipe.backbone)
        if count != len(model.class_names):
            raise CfvitError(
                f"{start} has {count} classes, the data {len(model.class_names)}, so it cannot teach them: name a "
                "teacher of the data's classes with --teacher"
            )
        config = replace(recipe, drop_path_rate=0.0).model_config(count)
        plain = create_method("plain").build(config, start, model.class_names)
        plain = plain.eval().requires_grad_(False).to(device)
        teacher = Teacher(start, plain, plain.data_config, model.data_config, names)
        if recipe.uses_labels:  # else the classes are those of the start
            teacher.require_classes(model.class_names)
    else:
        return None
    fast = accelerate(teacher.model) if dtype_of(recipe, device) is torch.float32 else teacher.model
    return replace(teacher, model=fast)


def steps_per_epoch(recipe: Recipe, num_images: int, world: int) -> int:
    """Optimiser steps in an epoch, the same on each of ``world`` processes.

    Raises:
        CfvitError: the images do not fill one step.
    """
    if recipe.repeated_augmentation > 1 and num_images >= 256:
        num_images = num_images // 256 * 256  # timm's RepeatAugSampler rounds an epoch so
    steps = num_images // world // (recipe.batch_size * recipe.accumulate)
    if steps == 0:
        raise CfvitError(
            f"{num_images} training images do not fill one step of {recipe.batch_size} x {recipe.accumulate} "
            f"images on {world} process(es): give a smaller --batch-size"
        )
    return steps


def dtype_of(recipe: Recipe, device: torch.device) -> torch.dtype:
    """The precision of matrix products on a device."""
    if recipe.precision == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if bf16 else torch.float32
    return getattr(torch, recipe.precision)


def autocast(recipe: Recipe, device: torch.device) -> Any:
    """The context in which a network runs in the recipe's precision."""
    dtype = dtype_of(recipe, device)
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)


def attention_for_gradients(recipe: Recipe, device: torch.device) -> Any:
    """The context in which attention has a fast backward pass: in half precision on a CPU it is computed step by step.

    torch's fused attention takes a third of a whole training step there for that pass.
    """
    halved = device.type == "cpu" and dtype_of(recipe, device) is not torch.float32
    return sdpa_kernel(SDPBackend.MATH) if halved else nullcontext()


@contextmanager
def orthogonalising_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Within it, Muon's matrix products on a CPU that trains in float32 are computed in that.

    timm computes them in bfloat16, as suits a GPU, and has no option for it. A CPU without instructions for
    that takes several times as long for Muon as for all the rest of a step. Not for threads that train side by
    side: timm's function is exchanged for all of them.
    """
    if device.type != "cpu" or dtype is not torch.float32:
        yield
        return
    usual = timm.optim.muon.zeropower_via_newtonschulz
    timm.optim.muon.zeropower_via_newtonschulz = partial(usual, dtype=torch.float32)
    try:
        yield
    finally:
        timm.optim.muon.zeropower_via_newtonschulz = usual
