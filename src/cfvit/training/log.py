"""What a run tells: a progress bar, JSON lines, tensorboard. Only the leading process speaks."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from cfvit.errors import CfvitError
from cfvit.files import atomic_write

LOG_FILE = "log.jsonl"


class Reporter:
    """Writes ``log.jsonl`` and tensorboard's files, and shows progress on standard error.

    A resumed run drops the lines that its checkpoint does not know of, so that the log reads as
    if the run had never stopped.
    """

    def __init__(self, out: Path, active: bool, step: int) -> None:
        self.active = active
        self.log: IO[str] | None = None
        self.task: TaskID | None = None
        self.board: Any = None
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]}"),
            console=self.console,
            disable=not active or not self.console.is_terminal,
        )
        if active:
            _forget_later_lines(out / LOG_FILE, step)
            try:
                self.log = (out / LOG_FILE).open("a")
            except OSError as error:
                raise CfvitError(f"cannot write {out / LOG_FILE}: {error.strerror}") from error
            self.board = _tensorboard(out, step)

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

    def start_epoch(self, epoch: int, epochs: int, done: int, steps: int) -> None:
        """A bar for the epoch, ``done`` of its ``steps`` behind it."""
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.progress.add_task(f"epoch {epoch + 1}/{epochs}", total=steps, completed=done, loss="")

    def advance(self, loss: Tensor) -> None:
        """One step further."""
        if self.task is not None and not self.progress.disable:
            self.progress.update(self.task, advance=1, loss=f"{loss.item():.3f}")

    def log_step(self, **values: float) -> None:
        """A line of the log on a training step."""
        self._write("train", values)

    def log_evaluation(self, **values: float) -> None:
        """A line of the log, and one on the screen, on an evaluation."""
        self._write("eval", values)
        if self.active and len(values) > 2:
            scores = "  ".join(f"{k} {v:.2f}" for k, v in values.items() if k.endswith("top1") or k == "threshold")
            self.console.print(f"epoch {int(values['epoch']) + 1}: {scores}", highlight=False)

    def _write(self, event: str, values: dict[str, float]) -> None:
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


def _forget_later_lines(path: Path, step: int) -> None:
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        with atomic_write(path) as file:
            file.write_text("".join(line + "\n" for line in lines))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # a line that a kill cut short


def _tensorboard(out: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)
