"""The training loop: resumable at any step, on one process or many.

Every random choice is a function of the recipe's seed and of the place in the run (epoch, step,
rank, image), never of what came before. A resumed run therefore needs only weights, optimiser
and step to continue as if nothing had happened.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor
from torch.utils.data import DataLoader

from cfvit import data as datasets
from cfvit.calibration import choose_threshold
from cfvit.checkpoints import CONFIG_FILE, WEIGHTS_FILE, save
from cfvit.errors import CfvitError, first_line
from cfvit.evaluation.metrics import collect, top_k_accuracy
from cfvit.files import atomic_write
from cfvit.modeling.model import CoarseToFineViT
from cfvit.processes import Process, average_buffers, join_processes, mean_over_processes
from cfvit.training.log import Reporter
from cfvit.training.pace import pace_of
from cfvit.training.recipe import Recipe
from cfvit.training.setup import CoarseNetwork, Data, Trained, assemble, autocast, prepare, steps_per_epoch
from cfvit.training.step import take_step

CHECKPOINT_FILE = "checkpoint.pt"
ALL_CELLS_FILE = "all_cells.pt"
RECIPE_FILE = "recipe.yaml"


def train(
    recipe: Recipe, out: Path, *, resume: bool = False, fork: Path | None = None, stop: Callable[[], bool] = bool
) -> dict[str, float]:
    """Trains by a recipe into a folder, from the start or from its last checkpoint.

    The folder receives ``recipe.yaml``, ``log.jsonl``, tensorboard's files, ``checkpoint.pt`` and,
    after each evaluation, the model itself (`cfvit.load` reads it; of the plain backbone timm does,
    as ``local-dir:FOLDER``). ``all_cells.pt`` is the checkpoint at the end of the epochs that split all cells.

    Args:
        resume: continue the run in ``out`` from its last checkpoint.
        fork: another run's folder: begin where it had split all cells for the last time. Its recipe may differ
            in what matters from then on, such as ``informative_ratio``, and in nothing else.
        stop: asked after each step; True ends the run with `Stopped`, to be resumed. Not asked where there are
            several processes, which must agree.

    Returns:
        The last evaluation's figures, top-1 and top-5 in percent.

    Raises:
        Stopped: by ``stop``, by Ctrl-C or by SIGTERM.
        CfvitError: bad data or recipe, a folder that cannot be written or holds another run, a fork that cannot be.
    """
    with join_processes() as process:
        checkpoint = _open_run(recipe, out, resume, process)
        if checkpoint is None and fork is not None:
            checkpoint = _open_fork(recipe, fork, process)
        images, model = prepare(recipe, process)
        trained = assemble(recipe, model, len(images.train), process)
        if checkpoint is not None:
            trained.load_state_dict(checkpoint)
        with Reporter(out, process.leads, trained.step) as reporter, _stop_signal(process, stop) as stopping:
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
    again = "resume with the same recipe, or choose another --out"
    return _read_checkpoint(path, recipe, process, FREE_TO_CHANGE, again)


def _open_fork(recipe: Recipe, fork: Path, process: Process) -> dict[str, Any]:
    """Reads the checkpoint of a run to fork."""
    path = fork / ALL_CELLS_FILE
    if not path.exists():
        raise CfvitError(
            f"{fork} holds no {ALL_CELLS_FILE}: fork a run that is through the epochs that split all cells"
        )
    allowed = f"give that; a fork may change {', '.join(sorted(FREE_TO_FORK - FREE_TO_CHANGE))}"
    return _read_checkpoint(path, recipe, process, FREE_TO_FORK, allowed)


def _read_checkpoint(path: Path, recipe: Recipe, process: Process, free: frozenset[str], mend: str) -> dict[str, Any]:
    """A run's checkpoint, if its recipe differs from ``recipe`` in ``free`` fields alone; ``mend`` says what to do."""
    out = path.parent
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        was = checkpoint["recipe"]
    except Exception as error:
        raise CfvitError(f"{path} is damaged ({first_line(error)}): choose another folder") from error
    if checkpoint.get("world", process.world) != process.world:
        raise CfvitError(f"the run in {out} has {checkpoint['world']} processes, not {process.world}: start as many")
    changed = [k for k, v in was.items() if v != getattr(recipe, k, None) and k not in free]
    if changed:
        name = changed[0]
        raise CfvitError(f"the run in {out} has {name} {was[name]!r}, not {getattr(recipe, name, None)!r}: {mend}")
    return checkpoint


FREE_TO_CHANGE = frozenset(
    {"workers", "hold_decoded", "eval_batch_size", "log_interval", "checkpoint_interval", "compile"}
)
"""Fields that do not change what is computed."""

FREE_TO_FORK = FREE_TO_CHANGE | {"informative_ratio", "attention_momentum", "selection"}
"""Fields that do not matter while all cells are split."""


class Stopped(CfvitError):  # noqa: N818 - no error: it was asked for
    """A run was asked to stop, kept its checkpoint and can be resumed."""


@contextmanager
def _stop_signal(process: Process, stop: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C and SIGTERM into a wish to stop after the step; not across processes, which must agree."""
    received: list[int] = []
    if process.world > 1:
        yield lambda: False
        return
    previous = {s: signal.signal(s, lambda number, _: received.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received) or stop()
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
    steps = steps_per_epoch(recipe, len(images.train), process.world)
    loader, sampler = _training_loader(recipe, images, process)
    pace = pace_of(recipe, trained.model, process)
    figures: dict[str, float] = {}
    all_cells_epochs = round(recipe.all_cells_share * recipe.epochs)
    while trained.step < recipe.epochs * steps:
        epoch, done = divmod(trained.step, steps)
        sampler.set_position(epoch, done * recipe.accumulate * recipe.batch_size)
        batches = iter(loader)
        ratio = 1.0 if epoch < all_cells_epochs else recipe.informative_ratio
        reporter.start_epoch(epoch, recipe.epochs, done, steps)
        pace.start(ratio)
        for _ in range(done, steps):
            loss = take_step(recipe, trained, batches, ratio, process)
            pace.advance()
            ends = trained.step % steps == 0  # then the checkpoint waits for the evaluation
            saves = trained.step % recipe.checkpoint_interval == 0 and not ends
            if saves or ends or trained.step % 10 == 0:  # a GPU is not waited for at each step
                _require_finite(loss, trained.step, out)
            if trained.step % recipe.log_interval == 0:
                lr = trained.optimizer.param_groups[0]["lr"]
                reporter.log_step(
                    epoch=epoch, step=trained.step, loss=mean_over_processes(loss), lr=lr, **pace.figures()
                )
            reporter.advance(loss)
            stops = not ends and stopping()
            if saves or stops:
                _require_finite(loss, trained.step, out)
                _save_checkpoint(recipe, out / CHECKPOINT_FILE, trained, process)
            if stops:
                raise _stopped(trained)
        if (epoch + 1) % recipe.eval_interval == 0 or epoch + 1 == recipe.epochs:
            figures = _evaluate_and_save(recipe, out, images, trained, process)
            reporter.log_evaluation(epoch=epoch, step=trained.step, **figures)
        if epoch + 1 == all_cells_epochs:
            _save_checkpoint(recipe, out / ALL_CELLS_FILE, trained, process)
        _save_checkpoint(recipe, out / CHECKPOINT_FILE, trained, process)
        if epoch + 1 < recipe.epochs and stopping():
            raise _stopped(trained)
    return figures or _evaluate_and_save(recipe, out, images, trained, process)


def _training_loader(recipe: Recipe, images: Data, process: Process) -> tuple[DataLoader[Any], datasets.TrainSampler]:
    """Augmented batches, and what decides their order."""
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
    return loader, sampler


def _stopped(trained: Trained) -> Stopped:
    return Stopped(f"stopped at step {trained.step}: add --resume to continue")


def _require_finite(loss: Tensor, step: int, out: Path) -> None:
    if not math.isfinite(loss.item()):
        raise CfvitError(f"the loss is {loss.item()} at step {step}: lower --lr-base; {out} keeps the last checkpoint")


def _save_checkpoint(recipe: Recipe, path: Path, trained: Trained, process: Process) -> None:
    if process.leads:
        with atomic_write(path) as file:
            torch.save({"recipe": asdict(recipe), "world": process.world, **trained.state_dict()}, file)


def _evaluate_and_save(recipe: Recipe, out: Path, images: Data, trained: Trained, process: Process) -> dict[str, float]:
    """Scores the best weights, chooses eta on the hold-out, and writes the model."""
    model = trained.best_weights().eval()
    average_buffers(model)
    figures: dict[str, float] = {}
    for name, dataset in (("holdout", images.holdout), ("validation", images.validation)):
        if dataset is None:
            continue
        loader = datasets.eval_loader(dataset, recipe.eval_batch_size, recipe.workers, process.device)
        forward, stages = _scored(recipe, model)
        with autocast(recipe, process.device):
            collected = collect(forward, loader, process.device)
        for stage, logits in zip(stages, collected.logits, strict=True):
            for k in (1, 5):
                figures[f"{name}_{stage}_top{k}"] = round(top_k_accuracy(logits, collected.labels, k), 3)
        if name == "holdout" and recipe.stages == "both":
            coarse, fine = collected.logits
            figures["threshold"] = choose_threshold(coarse, fine, collected.labels, recipe.threshold_max_drop)
            model.threshold = figures["threshold"]
    if recipe.stages == "coarse":
        model.threshold = 0.0  # the fine stage has learnt nothing
    if process.leads and recipe.stages == "backbone":
        _save_backbone(model, out)
    elif process.leads:
        model.data_config, model.class_names = trained.model.data_config, trained.model.class_names
        save(model, out)
    return figures


def _scored(recipe: Recipe, model: CoarseToFineViT) -> tuple[Callable[[Tensor], Sequence[Tensor]], tuple[str, ...]]:
    """What was trained, as images to logits of each of the named stages."""
    if recipe.stages == "both":
        return model, ("coarse", "fine")
    plain = model.backbone if recipe.stages == "backbone" else CoarseNetwork(model)
    return lambda images: (plain(images),), (recipe.stages,)


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
