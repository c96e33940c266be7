"""The training loop: resumable at any step, on one process or many.

Every random choice is a function of the recipe's seed and of the place in the run (epoch, step,
rank, image), never of what came before. A resumed run therefore needs only weights, optimiser
and step to continue as if nothing had happened.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import distribute_bn, reduce_tensor
from torch import Tensor

from cfvit.calibration.calibrated import FEW_IMAGES
from cfvit.checkpoints import WEIGHTS_FILE
from cfvit.data import TrainSampler, eval_loader, train_loader
from cfvit.errors import CfvitError, first_line
from cfvit.evaluation.metrics import collect, top_k_accuracy
from cfvit.files import atomic_write, require_writable
from cfvit.inference.engines.exported import is_exported
from cfvit.modeling.model import CoarseToFineViT
from cfvit.processes import Process, join_processes
from cfvit.training.log import Pace, Reporter
from cfvit.training.recipe import Recipe
from cfvit.training.setup import (
    CLASSES_FILE,
    RECIPE_FILE,
    RunImages,
    TrainState,
    assemble,
    autocast,
    dtype_of,
    prepare,
    steps_per_epoch,
    with_preprocessing,
)
from cfvit.training.step import take_step

CHECKPOINT_FILE = "checkpoint.pt"
ALL_CELLS_FILE = "all_cells.pt"
TEACHER = "teacher"
"""The name under which the teacher's answers stand among those of the operating points."""


def train(
    recipe: Recipe, out: Path, *, resume: bool = False, fork: Path | None = None, stop: Callable[[], bool] = bool
) -> dict[str, float]:
    """Trains by a recipe into a folder, from the start or from its last checkpoint.

    The folder receives ``recipe.yaml``, ``class_names.json``, ``log.jsonl``, tensorboard's files, ``checkpoint.pt``
    and, after each evaluation, the model itself (`cfvit.load` reads it; of the plain backbone timm does,
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
        recipe = with_preprocessing(recipe)
        checkpoint = _where_to_begin(recipe, out, resume, fork, process)
        images, model = prepare(recipe, process)
        _require_same_data(images, model.class_names, checkpoint, out, process)
        state = assemble(recipe, model, len(images.train), process)
        if checkpoint is not None:
            try:
                state.load_state_dict(checkpoint)
            except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
                raise CfvitError(f"{out} has a damaged {CHECKPOINT_FILE} ({first_line(error)}): train anew") from error
        if process.leads and not resume:
            with atomic_write(out / CLASSES_FILE) as file:
                file.write_text(json.dumps(model.class_names) + "\n")
            with atomic_write(out / RECIPE_FILE) as file:
                file.write_text(recipe.to_yaml())
        with Reporter(out, process.leads, state.step) as reporter:
            dtype = dtype_of(recipe, process.device)
            reporter.say(
                f"training {recipe.method} on {recipe.backbone}: {process.device.type.upper()}, "
                f"{process.world} process{'es' * (process.world > 1)}, {str(dtype).removeprefix('torch.')}, "
                f"{len(images.train):,} images, {steps_per_epoch(recipe, len(images.train), process.world):,} steps an "
                f"epoch, {recipe.epochs} epochs, from step {state.step:,}"
            )
            height, width = model.data_config["input_size"][1:]
            mean, std = (", ".join(f"{value:.4g}" for value in model.data_config[name]) for name in ("mean", "std"))
            reporter.say(f"images are read at {height} x {width} pixels, normalised by mean {mean} and std {std}")
            if (
                process.device.type == "cpu"
                and dtype is torch.bfloat16
                and not getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)()
            ):
                reporter.say("this processor emulates bfloat16, which takes many times as long as --precision float32")
            with _stop_signal(process, stop, reporter) as stopping:
                return _Run(recipe, out, images, state, process, reporter).train(stopping)


def _require_same_data(
    images: RunImages, class_names: list[str], checkpoint: dict[str, Any] | None, out: Path, process: Process
) -> None:
    """Refuses a run whose processes, or whose checkpoint, number the classes otherwise or have other images."""
    others: list[tuple[list[str], str]] = [(class_names, images.fingerprint)] * process.world
    if process.world > 1:
        dist.all_gather_object(others, others[0])
    compared = [(f"process {rank}", *data) for rank, data in enumerate(others)]
    if checkpoint is not None:
        names, trained_on = checkpoint.get("class_names"), checkpoint.get("images")
        if not (isinstance(names, list) and isinstance(trained_on, str)):
            wrong = "images is no digest" if isinstance(names, list) else "class_names is no list"
            raise CfvitError(f"{out} has a damaged {CHECKPOINT_FILE} ({wrong}): train anew")
        compared.append((f"the checkpoint in {out}", names, trained_on))
    for where, names, fingerprint in compared:
        for index, (here, there) in enumerate(zip_longest(class_names, names)):
            if here != there:
                ours, theirs = ("missing" if name is None else repr(name) for name in (here, there))
                raise CfvitError(
                    f"class {index} of the data is {ours}, and {theirs} for {where}: "
                    "give the data with the same class folders"
                )
        if fingerprint != images.fingerprint:
            raise CfvitError(
                f"the {len(images.train.source):,} training images are not those of {where}, by their names, so others "
                "would be held out: give the same images"
            )


def _where_to_begin(
    recipe: Recipe, out: Path, resume: bool, fork: Path | None, process: Process
) -> dict[str, Any] | None:
    """The checkpoint of the run to resume or to fork; None for a new run, whose folder is checked."""
    path = out / CHECKPOINT_FILE
    if resume and not path.exists():
        raise CfvitError(f"{out} holds no run to resume: leave out --resume to start one")
    if ((out / WEIGHTS_FILE).exists() or is_exported(out)) and not path.exists():
        raise CfvitError(f"{out} already holds a model: choose another --out")
    if path.exists() and not resume:
        raise CfvitError(f"{out} already holds a run: add --resume to continue it, or choose another --out")
    free, mend = FREE_TO_CHANGE, "resume with the same recipe, or choose another --out"
    if not path.exists():
        require_writable(out / RECIPE_FILE)
        if fork is None:
            return None
        path, free = fork / ALL_CELLS_FILE, FREE_TO_FORK
        mend = f"give that; a fork may change {', '.join(sorted(FREE_TO_FORK - FREE_TO_CHANGE))}"
        if not path.exists():
            raise CfvitError(
                f"{fork} holds no {ALL_CELLS_FILE}: fork a run that is through the epochs that split all cells"
            )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        was, world = checkpoint["recipe"], checkpoint["world"]
    except Exception as error:
        raise CfvitError(f"{path} is damaged ({first_line(error)}): choose another folder") from error
    run = f"the run in {path.parent}"
    if world != process.world:
        raise CfvitError(f"{run} has {world} processes, not {process.world}: start as many")
    now = recipe.to_dict()
    changed = [name for name, value in was.items() if value != now.get(name) and name not in free]
    if changed:
        name = changed[0]
        raise CfvitError(f"{run} has {name} {was[name]!r}, not {now.get(name)!r}: {mend}")
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
def _stop_signal(process: Process, stop: Callable[[], bool], reporter: Reporter) -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C and SIGTERM into a wish to stop after the step; not across processes, which must agree."""
    received: list[int] = []
    if process.world > 1:
        yield lambda: False
        return

    def receive(number: int, _: object) -> None:
        received.append(number)
        what = "step" if reporter.unit == "step" else "evaluation"
        reporter.say(f"stopping after this {what}, which is then saved")

    previous = {s: signal.signal(s, receive) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received) or stop()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass
class _Run:
    """A run under way."""

    recipe: Recipe
    out: Path
    images: RunImages
    state: TrainState
    process: Process
    reporter: Reporter

    def train(self, stopping: Callable[[], bool]) -> dict[str, float]:
        """All steps that are left, evaluations and checkpoints in between; returns the last evaluation's figures."""
        recipe, state, process, reporter = self.recipe, self.state, self.process, self.reporter
        images, repeats = self.images.train, recipe.repeated_augmentation
        steps = steps_per_epoch(recipe, len(images), process.world)
        sampler = TrainSampler(images, repeats, recipe.seed, process.rank, process.world)
        loader = train_loader(images, recipe.batch_size, sampler, recipe.workers, process.device)
        pace = Pace(recipe, state, process)
        figures: dict[str, float] = {}
        all_cells_epochs = round(recipe.all_cells_share * recipe.epochs)
        while state.step < recipe.epochs * steps:
            epoch, done = divmod(state.step, steps)
            sampler.set_position(epoch, done * recipe.accumulate * recipe.batch_size)
            batches = iter(loader)
            ratio = 1.0 if epoch < all_cells_epochs else recipe.informative_ratio
            place = f"epoch {epoch + 1}/{recipe.epochs}"
            for group in state.optimizer.param_groups:
                if not group.get("added", True):
                    group["lr_scale"] = float(epoch >= recipe.added_only_epochs)
            reporter.start(place, "step", steps, done)
            pace.start(ratio)
            for _ in range(done, steps):
                loss = take_step(recipe, state, batches, ratio, process)
                ends = state.step % steps == 0  # then the checkpoint waits for the evaluation
                saves = state.step % recipe.checkpoint_interval == 0 and not ends
                stops = not ends and stopping()
                if saves or stops or ends or state.step % 10 == 0:  # a GPU is not waited for at each step
                    self._require_finite("the loss", loss)
                if state.step % recipe.log_interval == 0:
                    lr = state.optimizer.param_groups[0]["lr"]
                    mean_loss = reduce_tensor(loss, process.world).item() if process.world > 1 else loss.item()
                    reporter.log_event("train", epoch=epoch, step=state.step, loss=mean_loss, lr=lr, **pace.figures())
                reporter.advance(loss=loss)
                if saves or stops:
                    self._save_checkpoint(CHECKPOINT_FILE)
                if stops:
                    raise Stopped(f"stopped at step {state.step}: add --resume to continue")
            if (epoch + 1) % recipe.eval_interval == 0 or epoch + 1 == recipe.epochs:
                figures = self._evaluate_and_save(place)
                reporter.log_evaluation(epoch=epoch, step=state.step, **figures)
            if epoch + 1 == all_cells_epochs:
                self._save_checkpoint(ALL_CELLS_FILE)
            self._save_checkpoint(CHECKPOINT_FILE)
            if epoch + 1 < recipe.epochs and stopping():
                raise Stopped(f"stopped at step {state.step}: add --resume to continue")
        figures = figures or self._evaluate_and_save("the end")
        held = 0 if self.images.holdout is None else len(self.images.holdout) * process.world
        if state.method.has_exits and held < FEW_IMAGES:
            few = f"eta was chosen on {held} held-out image{'s' * (held > 1)}, too few to rely on it"
            problem = few if held else "no image was held out, so no eta was chosen"
            more = ", or choose it with cfvit calibrate" if isinstance(state.model, CoarseToFineViT) else ""
            reporter.say(f"{problem}: give a larger --holdout{more}")
        return figures

    def _require_finite(self, name: str, values: Tensor) -> None:
        if not values.isfinite().all():
            path = self.out / CHECKPOINT_FILE
            kept = f"{self.out} keeps the last checkpoint" if path.exists() else "there is no checkpoint yet"
            what = f"{name} is {values.item()} at" if values.ndim == 0 else f"{name} is not finite after"
            raise CfvitError(f"{what} step {self.state.step}: lower --lr-base; {kept}")

    def _require_finite_weights(self) -> None:
        """The loss of a step is of the weights before it, so these are looked at too before anything is written."""
        for name, tensor in self.state.model.state_dict().items():
            if tensor.is_floating_point():
                self._require_finite(name, tensor)

    def _save_checkpoint(self, name: str) -> None:
        self._require_finite_weights()
        if self.process.leads:
            with atomic_write(self.out / name) as file:
                run = {"recipe": self.recipe.to_dict(), "world": self.process.world, "images": self.images.fingerprint}
                torch.save({**run, **self.state.state_dict()}, file)

    def _evaluate_and_save(self, place: str) -> dict[str, float]:
        """Scores the best weights, chooses eta on the hold-out, and writes the model.

        With a teacher the share of images that it answers alike is a score too, and without labels the one by which
        eta is chosen.
        """
        recipe, state, process, reporter = self.recipe, self.state, self.process, self.reporter
        self._require_finite_weights()
        reporter.say_without_bar(f"{place}: evaluating")
        method, model, teacher = state.method, state.best_weights(recipe.initial_share).eval(), state.teacher
        if process.world > 1:
            distribute_bn(model, process.world, reduce=True)

        def forward(batch: Tensor) -> dict[str, Tensor]:
            taught = {TEACHER: teacher.answer(batch)} if teacher and recipe.uses_teacher else {}
            return {**method.answers(model, batch), **taught}

        figures: dict[str, float] = {}
        for split, dataset, labelled in (
            ("holdout", self.images.holdout, recipe.uses_labels),
            ("validation", self.images.validation, True),
        ):
            if dataset is None:
                continue
            loader = eval_loader(dataset, recipe.eval_batch_size, recipe.workers, process.device)
            reporter.start(f"{place}, evaluating", "image", len(dataset))
            with autocast(recipe, process.device):
                collected = collect(forward, loader, process.device, reporter.advance)
            scored = dict(collected.logits)
            taught = scored.pop(TEACHER).argmax(dim=-1) if recipe.uses_teacher else None
            for point, logits in scored.items():
                if labelled:
                    for k in (1, 5):
                        figures[f"{split}_{point}_top{k}"] = round(top_k_accuracy(logits, collected.labels, k), 3)
                if taught is not None:
                    figures[f"{split}_{point}_agreement"] = round(top_k_accuracy(logits, taught, 1), 3)
            labels = collected.labels if labelled else taught
            if split == "holdout" and labels is not None:
                figures |= method.choose_exit(model, scored, labels, recipe.threshold_max_drop)
        if process.leads:
            model.data_config, model.class_names = state.model.data_config, state.model.class_names
            method.save(model, self.out)
        return figures
