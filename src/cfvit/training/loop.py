"""The training loop: resumable at any step, on one process or many.

Every random choice is a function of the recipe's seed and of the place in the run (epoch, step,
rank, image), never of what came before. A resumed run therefore needs only weights, optimiser
and step to continue as if nothing had happened.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from timm.data import create_transform
from timm.models._hub import save_config_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from cfvit import data as datasets
from cfvit.calibration import choose_threshold
from cfvit.checkpoints import CONFIG_FILE, WEIGHTS_FILE, atomic_write, initialise, save
from cfvit.errors import CfvitError, UsageError, first_line
from cfvit.evaluation.metrics import collect, top_k_accuracy
from cfvit.model import CoarseToFineViT, TokenOutput, create_model
from cfvit.processes import Process, join_processes, mean_over_processes
from cfvit.training.losses import classification_loss, coarse_to_fine_loss, token_label_loss
from cfvit.training.mixing import class_target, draw_mixed_cells, mix_images, token_target
from cfvit.training.recipes import Recipe
from cfvit.training.reporting import Reporter
from cfvit.training.teacher import Teacher, load_teacher
from cfvit.training.token_labels import LabelledImages, LabelledTransform, pool_labels, pool_scores

CHECKPOINT_FILE = "checkpoint.pt"
RECIPE_FILE = "recipe.yaml"


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
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


class TokenNetwork(nn.Module):
    """The model as it runs where each token has a label: ``forward`` is its ``forward_tokens``."""

    def __init__(self, model: CoarseToFineViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, informative_ratio: float, mixed: Tensor | None) -> TokenOutput:
        return self.model.forward_tokens(images, informative_ratio=informative_ratio, mixed=mixed)


def train(recipe: Recipe, out: Path, *, resume: bool = False) -> dict[str, float]:
    """Trains by a recipe into a folder, from the start or from its last checkpoint.

    The folder receives ``recipe.yaml``, ``log.jsonl``, tensorboard's files, ``checkpoint.pt`` and,
    after each evaluation, the model itself (`cfvit.load` reads it; for ``backbone_only`` timm does,
    as ``local-dir:FOLDER``).

    Returns:
        The last evaluation's figures, top-1 and top-5 in percent.

    Raises:
        CfvitError: bad data or recipe, a folder that cannot be written or holds another run.
    """
    with join_processes() as process:
        checkpoint = _open_run(recipe, out, resume, process)
        images, model = _prepare(recipe, process)
        trained = _assemble(recipe, model, len(images.train), process)
        if checkpoint is not None:
            trained.load_state_dict(checkpoint)
        with Reporter(out, process.leads, trained.step) as reporter, _stop_signal(process) as stopping:
            return _run(recipe, out, images, trained, process, reporter, stopping)


def _open_run(recipe: Recipe, out: Path, resume: bool, process: Process) -> dict[str, Any] | None:
    """Writes the recipe of a new run, or reads the checkpoint of one to resume."""
    path = out / CHECKPOINT_FILE
    if resume and not path.exists():
        raise CfvitError(f"{out} holds no run to resume: leave out --resume to start one")
    if (out / WEIGHTS_FILE).exists() and not path.exists():
        raise CfvitError(f"{out} already holds a model: choose another --out")
    if path.exists() and not resume:
        raise CfvitError(f"{out} already holds a run: add --resume to continue it, or choose another --out")
    if not path.exists():
        if process.leads:
            with atomic_write(out / RECIPE_FILE) as file:
                file.write_text(recipe.to_yaml())
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        was = checkpoint["recipe"]
    except Exception as error:
        raise CfvitError(f"{path} is damaged ({first_line(error)}): choose another --out") from error
    if checkpoint.get("world", process.world) != process.world:
        raise CfvitError(
            f"the run in {out} has {checkpoint['world']} processes, not {process.world}: resume with as many, "
            "or choose another --out"
        )
    changed = [k for k, v in was.items() if v != getattr(recipe, k, None) and k not in _FREE_TO_CHANGE]
    if changed:
        name = changed[0]
        raise CfvitError(
            f"the run in {out} has {name} {was[name]!r}, not {getattr(recipe, name, None)!r}: "
            "resume with the same recipe, or choose another --out"
        )
    return checkpoint


_FREE_TO_CHANGE = frozenset({"workers", "eval_batch_size", "log_interval", "checkpoint_interval", "compile"})
"""Fields that do not change what is computed."""


def _prepare(recipe: Recipe, process: Process) -> tuple[Data, CoarseToFineViT]:
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
        drop_path_rate=recipe.drop_path_rate,
        **cast(dict[str, Any], recipe.timm_kwargs or {}),
    )
    if recipe.learns_from_tokens and not hasattr(model.backbone, "aux_head"):
        raise UsageError(f"{recipe.backbone} has no auxiliary head to learn token labels: give --backbone lvvit_...")
    if recipe.initial_weights is not None:
        initialise(model, recipe.initial_weights)
    model.class_names = source.class_names
    if recipe.crop_pct is not None:
        model.data_config["crop_pct"] = recipe.crop_pct
    kept, held = datasets.split_holdout(source, recipe.holdout, recipe.seed)
    rank, world = process.rank, process.world
    validation = None
    if recipe.val_data or datasets.has_validation_split(recipe.data):
        chosen = datasets.open_data(recipe.val_data or recipe.data, "validation").aligned(source.class_names)
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


def _assemble(recipe: Recipe, model: CoarseToFineViT, num_images: int, process: Process) -> Trained:
    trainable: nn.Module = model.backbone if recipe.backbone_only else model
    images_per_step = recipe.batch_size * recipe.accumulate * process.world
    optimizer = _optimizer(recipe, trainable, recipe.lr_base * images_per_step / recipe.lr_base_size)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=recipe.epochs,
        min_lr=recipe.min_lr,
        warmup_lr=recipe.warmup_lr,
        warmup_epochs=recipe.warmup_epochs,  # pyright: ignore[reportArgumentType] - counted in steps
        step_on_epochs=False,
        updates_per_epoch=_steps_per_epoch(recipe, num_images, process.world),
    )
    average = None
    if recipe.ema_decay > 0:
        average = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True)
    network: Any = TokenNetwork(model) if recipe.learns_from_tokens else trainable
    if process.world > 1:
        cuda = process.device.type == "cuda"
        network = DistributedDataParallel(network, device_ids=[process.device] if cuda else None)
    if recipe.compile:
        network = torch.compile(network)
    scaler = torch.amp.GradScaler(process.device.type, enabled=_dtype(recipe, process.device) is torch.float16)
    return Trained(model, network, optimizer, scheduler, scaler, average, _teacher(recipe, model, process.device))


def _teacher(recipe: Recipe, model: CoarseToFineViT, device: torch.device) -> Teacher | None:
    if recipe.teacher is None:
        return None
    weights = None if recipe.teacher_weights is None else Path(recipe.teacher_weights)
    teacher = load_teacher(recipe.teacher, model.config.num_classes, weights, device, student=model.data_config)
    teacher.require_classes(model.class_names or [])
    return teacher


def _optimizer(recipe: Recipe, trainable: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Timm's optimiser; of a hybrid one such as Muon, AdamW takes the embeddings and the head."""
    try:
        return create_optimizer_v2(
            trainable,
            opt=recipe.optimizer,
            lr=lr,
            weight_decay=recipe.weight_decay,
            fallback_no_weight_decay=True,
            fallback_list=("*head.weight", "*patch_embed.*"),
        )
    except ValueError as error:
        raise CfvitError(
            f"optimizer {recipe.optimizer!r}: {first_line(error)}; give one of timm's, such as adamw"
        ) from error


def _steps_per_epoch(recipe: Recipe, num_images: int, world: int) -> int:
    if recipe.repeated_augmentation > 1 and num_images >= 256:
        num_images = num_images // 256 * 256  # timm's RepeatAugSampler rounds an epoch so
    steps = num_images // world // (recipe.batch_size * recipe.accumulate)
    if steps == 0:
        raise CfvitError(
            f"{num_images} training images do not fill one step of {recipe.batch_size} x {recipe.accumulate} "
            f"images on {world} process(es): give a smaller --batch-size"
        )
    return steps


def _dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    if recipe.precision == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if bf16 else torch.float32
    return getattr(torch, recipe.precision)


def _autocast(recipe: Recipe, device: torch.device) -> Any:
    dtype = _dtype(recipe, device)
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)


@contextmanager
def _stop_signal(process: Process) -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C and SIGTERM into a wish to stop after the step; not across processes, which must agree."""
    received: list[int] = []
    if process.world > 1:
        yield lambda: False
        return
    previous = {s: signal.signal(s, lambda number, _: received.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _run(
    recipe: Recipe,
    out: Path,
    images: Data,
    trained: Trained,
    process: Process,
    reporter: Reporter,
    stopping: Callable[[], bool],
) -> dict[str, float]:
    steps = _steps_per_epoch(recipe, len(images.train), process.world)
    sampler = datasets.TrainSampler(
        images.train, recipe.repeated_augmentation, recipe.seed, process.rank, process.world
    )
    loader = DataLoader(
        images.train,
        recipe.batch_size,
        sampler=sampler,
        num_workers=recipe.workers,
        pin_memory=process.device.type == "cuda",
        drop_last=True,
        persistent_workers=recipe.workers > 0,
        worker_init_fn=datasets.leave_signals_to_the_run,
    )
    figures: dict[str, float] = {}
    while trained.step < recipe.epochs * steps:
        epoch, done = divmod(trained.step, steps)
        sampler.set_position(epoch, done * recipe.accumulate * recipe.batch_size)
        batches = iter(loader)
        ratio = 1.0 if epoch < round(recipe.all_cells_share * recipe.epochs) else recipe.informative_ratio
        reporter.start_epoch(epoch, recipe.epochs, done, steps)
        started, first = time.monotonic(), trained.step
        for _ in range(done, steps):
            loss = _step(recipe, trained, batches, ratio, process)
            ends = trained.step % steps == 0  # then the checkpoint waits for the evaluation
            saves = trained.step % recipe.checkpoint_interval == 0 and not ends
            if saves or ends or trained.step % 10 == 0:  # a GPU is not waited for at each step
                _require_finite(loss, trained.step, out)
            if trained.step % recipe.log_interval == 0:
                speed = (trained.step - first) * recipe.batch_size * recipe.accumulate / (time.monotonic() - started)
                reporter.log_step(
                    epoch=epoch,
                    step=trained.step,
                    loss=mean_over_processes(loss),
                    lr=trained.optimizer.param_groups[0]["lr"],
                    images_per_second=round(speed * process.world, 1),
                )
            reporter.advance(loss)
            stops = not ends and stopping()
            if saves or stops:
                _require_finite(loss, trained.step, out)
                _save_checkpoint(recipe, out, trained, process)
            if stops:
                raise _stopped(trained)
        if (epoch + 1) % recipe.eval_interval == 0 or epoch + 1 == recipe.epochs:
            figures = _evaluate_and_save(recipe, out, images, trained, process)
            reporter.log_evaluation(epoch=epoch, step=trained.step, **figures)
        _save_checkpoint(recipe, out, trained, process)
        if epoch + 1 < recipe.epochs and stopping():
            raise _stopped(trained)
    return figures or _evaluate_and_save(recipe, out, images, trained, process)


def _stopped(trained: Trained) -> CfvitError:
    return CfvitError(f"stopped at step {trained.step}: add --resume to continue")


def _step(
    recipe: Recipe, trained: Trained, batches: Iterator[Sequence[Tensor]], ratio: float, process: Process
) -> Tensor:
    """One optimiser step on ``accumulate`` batches; returns their mean loss."""
    trained.network.train()
    trained.scheduler.step_update(trained.step)
    total = torch.zeros((), device=process.device)
    for micro in range(recipe.accumulate):
        batch = datasets.next_batch(batches)
        if (batch[1] == datasets.UNREADABLE).any():
            raise CfvitError(
                f"{datasets.FAILURES_IN_A_ROW} or all training images in a row cannot be read: check the data"
            )
        seed = datasets.combine_seeds(recipe.seed, trained.step, micro, process.rank)
        torch.manual_seed(seed)
        last = micro + 1 == recipe.accumulate
        with nullcontext() if last or process.world == 1 else trained.network.no_sync():
            with _autocast(recipe, process.device):
                loss = _batch_loss(recipe, trained, batch, ratio, seed, process.device) / recipe.accumulate
            trained.scaler.scale(loss).backward()
        total += loss.detach()
    if recipe.clip_grad > 0:
        trained.scaler.unscale_(trained.optimizer)
        nn.utils.clip_grad_norm_(trained.model.parameters(), recipe.clip_grad)
    trained.scaler.step(trained.optimizer)
    trained.scaler.update()
    trained.optimizer.zero_grad(set_to_none=True)
    trained.step += 1
    if trained.average is not None:
        trained.average.update(trained.model, step=trained.step)
    return total


def _batch_loss(
    recipe: Recipe, trained: Trained, batch: Sequence[Tensor], ratio: float, seed: int, device: torch.device
) -> Tensor:
    """The loss of one batch of the loader: images, classes and, if they are on disk, label maps and windows."""
    if recipe.learns_from_tokens:
        return _token_loss(recipe, trained, [part.to(device, non_blocking=True) for part in batch], ratio, seed)
    images, targets = mix_images(recipe, batch[0], batch[1], seed, trained.model.config.num_classes)
    images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
    return _loss(recipe, trained.network, images, targets, ratio)


def _token_loss(recipe: Recipe, trained: Trained, batch: Sequence[Tensor], ratio: float, seed: int) -> Tensor:
    images, targets, *stored = batch
    model, classes = trained.model, trained.model.config.num_classes
    mixed = draw_mixed_cells(model.grid, seed, images.device) if recipe.mix_token else None
    if trained.teacher is None:
        pool = partial(pool_labels, *stored, num_classes=classes)
    else:
        pool = partial(pool_scores, trained.teacher(images))
    rows, columns = model.grid
    fine, coarse = pool(grid=(2 * rows, 2 * columns)), pool(grid=model.grid)
    output = trained.network(images, informative_ratio=ratio, mixed=mixed)
    target = class_target(targets, mixed, recipe.label_smoothing, classes)
    return token_label_loss(
        output, target, token_target(fine, coarse, output, mixed, columns), recipe.token_label_weight
    )


def _loss(recipe: Recipe, network: Any, images: Tensor, targets: Tensor, ratio: float) -> Tensor:
    if recipe.backbone_only:
        return classification_loss(network(images), targets, recipe.label_smoothing)
    return coarse_to_fine_loss(network(images, informative_ratio=ratio), targets, recipe.label_smoothing)


def _require_finite(loss: Tensor, step: int, out: Path) -> None:
    if not math.isfinite(loss.item()):
        raise CfvitError(f"the loss is {loss.item()} at step {step}: lower --lr-base; {out} keeps the last checkpoint")


def _save_checkpoint(recipe: Recipe, out: Path, trained: Trained, process: Process) -> None:
    if process.leads:
        with atomic_write(out / CHECKPOINT_FILE) as file:
            torch.save({"recipe": asdict(recipe), "world": process.world, **trained.state_dict()}, file)


def _evaluate_and_save(recipe: Recipe, out: Path, images: Data, trained: Trained, process: Process) -> dict[str, float]:
    """Scores the best weights, chooses eta on the hold-out, and writes the model."""
    model = trained.best_weights().eval()
    figures: dict[str, float] = {}
    for name, dataset in (("holdout", images.holdout), ("validation", images.validation)):
        if dataset is None:
            continue
        loader = datasets.eval_loader(dataset, recipe.eval_batch_size, recipe.workers, process.device)
        forward = (lambda x: (model.backbone(x),)) if recipe.backbone_only else model
        with _autocast(recipe, process.device):
            collected = collect(forward, loader, process.device)
        stages = ("backbone",) if recipe.backbone_only else ("coarse", "fine")
        for stage, logits in zip(stages, collected.logits, strict=True):
            for k in (1, 5):
                figures[f"{name}_{stage}_top{k}"] = round(top_k_accuracy(logits, collected.labels, k), 3)
        if name == "holdout" and not recipe.backbone_only:
            coarse, fine = collected.logits
            figures["threshold"] = choose_threshold(coarse, fine, collected.labels, recipe.threshold_max_drop)
            model.threshold = figures["threshold"]
    if process.leads and recipe.backbone_only:
        _save_backbone(model, out)
    elif process.leads:
        model.data_config, model.class_names = trained.model.data_config, trained.model.class_names
        save(model, out)
    return figures


def _save_backbone(model: CoarseToFineViT, out: Path) -> None:
    """The plain ViT in timm's own format."""
    from safetensors.torch import save_file

    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.backbone.state_dict().items()}
    elsewhere = ("url", "file", "hf_hub_id", "source")
    origin: Any = model.backbone.pretrained_cfg
    described = {k: v for k, v in origin.items() if k not in elsewhere} | model.data_config
    with atomic_write(out / WEIGHTS_FILE) as file:
        save_file(weights, file, metadata={"format": "pt"})
    with atomic_write(out / CONFIG_FILE) as file:
        save_config_for_hf(
            model.backbone,
            str(file),
            model_config={"label_names": model.class_names, "pretrained_cfg": described},
            model_args={"img_size": model.image_size, **model.config.timm_kwargs},
        )
