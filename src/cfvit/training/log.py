"""What a run tells: a progress bar, JSON lines, tensorboard, its speed. Only the leading process speaks."""

from __future__ import annotations

import copy
import json
import math
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from cfvit.data.loading import SECONDS_BETWEEN_LINES
from cfvit.errors import CfvitError
from cfvit.evaluation.timing import MATRIX_SIDES, time_in_turn
from cfvit.files import atomic_write
from cfvit.inference.engines.packing import accelerate_training
from cfvit.methods.base import Batch, Method
from cfvit.modeling.cost import macs_of
from cfvit.processes import Process
from cfvit.training.recipe import Recipe
from cfvit.training.setup import TrainState, dtype_of

LOG_FILE = "log.jsonl"

PASSES = 3
"""A backward pass multiplies twice as often as the forward pass."""


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf  # a line that a kill cut short


class Reporter:
    """Writes ``log.jsonl`` and tensorboard's files, and shows progress on standard error.

    Where standard error is a file, a plain line a minute takes the place of the bar. A resumed run drops
    the lines that its checkpoint does not know of, so that the log reads as if the run had never stopped.
    """

    def __init__(self, out: Path, active: bool, step: int) -> None:
        self.active = active
        self.log: IO[str] | None = None
        self.board: Any = None
        self.unit, self.spoken = "step", time.monotonic()
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=self.console,
            disable=not active or not self.console.is_terminal,
        )
        self.task = self.progress.add_task("", visible=False, loss="")
        if active:
            if (out / LOG_FILE).exists():
                lines = [line for line in (out / LOG_FILE).read_text().splitlines() if _step_of(line) <= step]
                with atomic_write(out / LOG_FILE) as file:
                    file.write_text("".join(line + "\n" for line in lines))
            try:
                self.log = (out / LOG_FILE).open("a")
            except OSError as error:
                raise CfvitError(f"cannot write {out / LOG_FILE}: {error.strerror}") from error
            with suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)

    def __enter__(self) -> Reporter:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        if self.log is not None:
            self.log.close()
        if self.board is not None:
            self.board.close()

    def say(self, text: str) -> None:
        """A line on standard error."""
        if self.active:
            self.console.print(text, highlight=False, soft_wrap=True)

    def say_without_bar(self, text: str) -> None:
        """A line on standard error, where there is no terminal for a bar."""
        if self.progress.disable:
            self.say(text)

    def start(self, place: str, unit: str, total: int, done: int = 0) -> None:
        """A bar for what comes next, ``done`` of its ``total`` steps or images behind it."""
        self.progress.remove_task(self.task)
        self.unit = unit
        self.task = self.progress.add_task(place, total=total, completed=done, loss="")

    def advance(self, count: int = 1, loss: Tensor | None = None) -> None:
        """So many steps or images further. The loss is read, which waits for a GPU, only where it is shown."""
        task, shown = self.progress.tasks[-1], not self.progress.disable
        speaks = not shown and time.monotonic() - self.spoken >= SECONDS_BETWEEN_LINES
        text = "" if loss is None or not (shown or speaks) else f"loss {loss.item():.3f}"
        self.progress.update(self.task, advance=count, loss=text)
        if speaks:
            self.spoken = time.monotonic()
            behind = f"{task.description}: {self.unit} {task.completed:.0f} of {task.total:.0f}"
            self.say(", ".join(filter(None, (behind, text))))

    def log_evaluation(self, **values: float) -> None:
        """A line of the log, and one on the screen, on an evaluation."""
        self.log_event("eval", **values)
        if len(values) > 2:
            shown = ("top1", "agreement", "threshold")
            scores = "  ".join(f"{name} {value:.2f}" for name, value in values.items() if name.endswith(shown))
            self.say(f"epoch {int(values['epoch']) + 1}: {scores}")

    def log_event(self, event: str, **values: float) -> None:
        """A line of the log; among the values are the epoch and the step."""
        if self.log is None:
            return
        try:
            self.log.write(json.dumps({"event": event, **values}) + "\n")
            self.log.flush()
        except OSError as error:
            raise CfvitError(f"cannot write the log ({error.strerror}): make room, then add --resume") from error
        if self.board is not None:
            for name, value in values.items():
                if name not in ("step", "epoch"):
                    self.board.add_scalar(f"{event}/{name}", value, values["step"])


class Pace:
    """Images per second of all processes, and the share of their matrix rate that is reached (model FLOPs utilisation).

    The matrix rate is measured once, in less than a second. A teacher's products are not counted; its time is.
    """

    def __init__(self, recipe: Recipe, state: TrainState, process: Process) -> None:
        self.images_per_step, self.world = recipe.batch_size * recipe.accumulate, process.world
        self.state, self.macs = state, dict[float, int]()
        self.matrix_rate = matrix_rate(process.device, dtype_of(recipe, process.device))

    def start(self, split: float) -> None:
        """Counts anew, from now on with this share of cells split."""
        self.begun, self.first, self.split = time.monotonic(), self.state.step, split

    def figures(self) -> dict[str, float]:
        """``images_per_second`` and ``matrix_share`` since the start, without the time that the first count takes."""
        now = time.monotonic()
        own = (self.state.step - self.first) * self.images_per_step / (now - self.begun)
        if self.split not in self.macs:
            self.macs[self.split] = gradient_macs(self.state.method, self.state.model, self.split)
            self.begun += time.monotonic() - now
        share = own * self.macs[self.split] / self.matrix_rate
        return {"images_per_second": round(own * self.world, 1), "matrix_share": float(f"{share:.3g}")}


def gradient_macs(method: Method, model: Any, split: float) -> int:
    """MACs of an image in a training step, forwards and backwards; counted on a copy without data."""
    meta = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    images = torch.empty(1, 3, *meta.image_size, device="meta", dtype=next(meta.parameters()).dtype)
    teacher = torch.empty(1, len(model.class_names), device="meta")
    batch = Batch(images, torch.zeros(1, dtype=torch.long, device="meta"), teacher)
    return PASSES * macs_of(lambda: method.loss(method.training_module(meta), batch, split))


@cache
@torch.no_grad()
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """MACs per second of a large matrix product, by the layer that training multiplies by."""
    side = MATRIX_SIDES.get(device.type, MATRIX_SIDES["cuda"])
    generator = torch.Generator(device).manual_seed(0)  # of its own: a run's random choices follow from its seed
    layer = nn.Linear(side, side, bias=False, device="meta", dtype=dtype).to_empty(device=device)
    layer.weight.normal_(generator=generator)
    rows = torch.randn(side, side, device=device, dtype=dtype, generator=generator)
    layer = accelerate_training(layer)
    (timing,) = time_in_turn({"product": lambda: layer(rows)}, 4, device).values()
    return side**3 / min(timing.totals)
