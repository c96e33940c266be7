"""What a run starts from: its images, its model, and all that changes during training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from timm.data import create_transform
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from cfvit import data as datasets
from cfvit.checkpoints import initialise
from cfvit.data.cache import hold
from cfvit.errors import CfvitError, UsageError, first_line
from cfvit.inference.engines.packing import accelerate_training
from cfvit.modeling.model import CoarseToFineViT, TokenOutput, create_model
from cfvit.processes import Process
from cfvit.training.optimizers import create_optimizer, resume_optimizer
from cfvit.training.recipe import Recipe
from cfvit.training.tokens.label_maps import LabelledImages, LabelledTransform
from cfvit.training.tokens.teacher import Teacher, load_teacher


@dataclass(frozen=True)
class Data:
    """The images of a run. ``holdout`` are indices of the training source, kept out of training."""

    train: datasets.TrainImages
    holdout: datasets.EvalImages | None
    validation: datasets.EvalImages | None


@dataclass
class Trained:
    """All that changes during training.

    ``model`` holds the weights; ``network`` is what runs (the model, its backbone or a `TokenNetwork`,
    perhaps compiled and distributed); ``step`` counts optimiser steps.
    """

    model: CoarseToFineViT
    network: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    average: ModelEmaV3 | None
    teacher: Teacher | None = None
    step: int = 0

    def best_weights(self) -> CoarseToFineViT:
        """The averaged model, or the model itself where nothing is averaged."""
        return self.model if self.average is None else cast(CoarseToFineViT, self.average.module)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        resume_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


class CoarseNetwork(nn.Module):
    """The coarse stage as it runs where nothing else is trained: images to logits. The rest gets no gradients."""

    def __init__(self, model: CoarseToFineViT) -> None:
        super().__init__()
        self.model = model
        for part in (model.feature_reuse, model.backbone.pos_embed):
            if part is not None:
                part.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model.coarse(images).logits


class TokenNetwork(nn.Module):
    """The model as it runs where each token has a label: ``forward`` is its ``forward_tokens``."""

    def __init__(self, model: CoarseToFineViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, informative_ratio: float, mixed: Tensor | None) -> TokenOutput:
        return self.model.forward_tokens(images, informative_ratio=informative_ratio, mixed=mixed)


def prepare(recipe: Recipe, process: Process) -> tuple[Data, CoarseToFineViT]:
    """Opens the images of a run and builds its model, on the process's device.

    Raises:
        CfvitError: data, a backbone or weights that cannot be had or do not go together.
    """
    if not recipe.data:
        raise UsageError("no data: name what to train on with --data")
    source = datasets.open_data(recipe.data, "train")
    torch.manual_seed(recipe.seed)
    model = create_model(
        recipe.backbone,
        num_classes=len(source.class_names),
        coarse_grid=recipe.grid,
        informative_ratio=recipe.informative_ratio,
        attention_momentum=recipe.attention_momentum,
        selection=recipe.selection,
        feature_reuse=recipe.feature_reuse,
        drop_path_rate=recipe.drop_path_rate,
        **cast(dict[str, Any], recipe.timm_kwargs or {}),
    )
    if recipe.learns_from_tokens and not hasattr(model.backbone, "token_logits"):
        raise UsageError(f"{recipe.backbone} has no auxiliary head to learn token labels: give --backbone lvvit_...")
    model.class_names = source.class_names
    if recipe.initial_weights is not None:
        initialise(model, recipe.initial_weights)
    if recipe.crop_pct is not None:
        model.data_config["crop_pct"] = recipe.crop_pct
    kept, held = datasets.split_holdout(source, recipe.holdout, recipe.seed)
    rank, world = process.rank, process.world
    if recipe.hold_decoded:
        source = hold(source, recipe.workers, process.leads)
    validation = None
    if recipe.val_data or datasets.has_validation_split(recipe.data):
        chosen = datasets.open_data(recipe.val_data or recipe.data, "validation").aligned(source.class_names)
        if recipe.hold_decoded:
            chosen = hold(chosen, recipe.workers, process.leads)
        validation = datasets.EvalImages(chosen, model.data_config, rank=rank, world=world)
    holdout = datasets.EvalImages(source, model.data_config, held, rank, world) if held else None
    return Data(_train_images(recipe, source, kept, model), holdout, validation), model.to(process.device)


def _train_images(
    recipe: Recipe, source: datasets.DataSource, kept: Sequence[int], model: CoarseToFineViT
) -> datasets.TrainImages:
    if recipe.token_labels is None:
        create = partial(create_transform, is_training=True)
        return datasets.TrainImages(source, kept, _train_transform(recipe, model.data_config, create))
    transform = _train_transform(recipe, model.data_config, LabelledTransform)
    return LabelledImages(source, kept, transform, Path(recipe.token_labels))


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


def assemble(recipe: Recipe, model: CoarseToFineViT, num_images: int, process: Process) -> Trained:
    """Optimiser, schedule, averaged weights and teacher around a model; ``num_images`` are those of an epoch.

    Raises:
        CfvitError: no such optimiser or teacher, too few images for one step.
    """
    network: Any = accelerate_training(_network(recipe, model))
    trainable: nn.Module = model.backbone if recipe.stages == "backbone" else model
    images_per_step = recipe.batch_size * recipe.accumulate * process.world
    optimizer = create_optimizer(recipe, trainable, recipe.lr_base * images_per_step / recipe.lr_base_size)
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
    average = None
    if recipe.ema_decay > 0:
        average = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True)
    if process.world > 1:
        cuda = process.device.type == "cuda"
        network = DistributedDataParallel(network, device_ids=[process.device] if cuda else None)
    if recipe.compile:
        network = torch.compile(network)
    scaler = torch.amp.GradScaler(process.device.type, enabled=dtype_of(recipe, process.device) is torch.float16)
    return Trained(model, network, optimizer, scheduler, scaler, average, _teacher(recipe, model, process.device))


def _network(recipe: Recipe, model: CoarseToFineViT) -> nn.Module:
    """What runs in a step, by what is trained and what it learns from."""
    if recipe.learns_from_tokens:
        return TokenNetwork(model)
    if recipe.stages == "coarse":
        return CoarseNetwork(model)
    return model.backbone if recipe.stages == "backbone" else model


def _teacher(recipe: Recipe, model: CoarseToFineViT, device: torch.device) -> Teacher | None:
    if recipe.teacher is None:
        return None
    weights = None if recipe.teacher_weights is None else Path(recipe.teacher_weights)
    teacher = load_teacher(recipe.teacher, model.config.num_classes, weights, device, student=model.data_config)
    teacher.require_classes(model.class_names or [])
    return teacher


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
