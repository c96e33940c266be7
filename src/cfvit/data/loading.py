"""Loading images in batches: items for training and evaluation, their order, loading processes, images held decoded."""

from __future__ import annotations

import io
import os
import random
import re
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import reduction
from typing import IO, Any, cast

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from cfvit.data.datasets import DataSource, StoredImages
from cfvit.data.images import ImageError, eval_transform
from cfvit.errors import CfvitError

UNREADABLE = -1
"""The target that stands for an image that could not be read."""

SECONDS_BETWEEN_LINES = 60.0
"""Between plain lines of progress, where there is no terminal for a bar."""

FAILURES_IN_A_ROW = 100
"""So many unreadable training images one after the other end the run."""


class TrainImages(Dataset):
    """Augmented training images. An item is asked for by ``(position, seed)``.

    All random choices of the transform follow from the seed, whatever worker makes the item. An
    unreadable file is replaced by the next readable one, with a warning that names it; where there
    is none, the target is `UNREADABLE`, which the run refuses.
    """

    def __init__(self, source: DataSource, indices: Sequence[int], transform: Any) -> None:
        self.source, self.indices, self.transform = source, indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, ...]:
        position, seed = key
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes longer than an augmentation, for GPUs' sake
        return self.augment(*self._read(position))

    def augment(self, image: Image.Image, target: int, index: int) -> tuple[Any, ...]:
        """The item of an image, given also its number in the source: ``(tensor, target)``."""
        return self.transform(image), target

    def _read(self, position: int) -> tuple[Image.Image, int, int]:
        index = self.indices[position]
        for offset in range(min(len(self), FAILURES_IN_A_ROW)):
            index = self.indices[(position + offset) % len(self)]
            try:
                return *self.source.read(index), index
            except ImageError as error:
                warnings.warn(f"skipped {self.source.name(index)}: {error}", stacklevel=2)
        return Image.new("RGB", (8, 8)), UNREADABLE, index


class TrainSampler(Sampler):
    """The order of one rank's training images, as ``(position, seed)``, fixed by seed and epoch."""

    def __init__(self, dataset: TrainImages, repeats: int, seed: int, rank: int, world: int) -> None:
        self.seed, self.rank, self.epoch, self.start = seed, rank, 0, 0
        self.order: Any
        if repeats > 1:
            self.order = RepeatAugSampler(dataset, num_replicas=world, rank=rank, num_repeats=repeats)
        else:
            self.order = DistributedSampler(dataset, num_replicas=world, rank=rank, seed=seed)

    def set_position(self, epoch: int, start: int) -> None:
        """To be called before each epoch, with its number and how many of this rank's images are done already."""
        self.epoch, self.start = epoch, start
        self.order.set_epoch(epoch if self.order.__class__ is DistributedSampler else self.seed * 100_003 + epoch)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for place, position in enumerate(self.order):
            if place >= self.start:
                yield position, combine_seeds(self.seed, self.epoch, self.rank, place)

    def __len__(self) -> int:
        return len(self.order) - self.start


def next_batch(batches: Iterator[Any]) -> Any:
    """The next batch of a loader; an error in a loading process says what it said there, in one line.

    Raises:
        CfvitError: as raised by the data set; for anything else, that images cannot be loaded, and why.
    """
    try:
        return next(batches)
    except StopIteration:
        raise
    except Exception as error:  # torch has put the loading process's traceback in front
        said = [type(error).__name__, *str(error).strip().splitlines()][-1]
        if isinstance(error, CfvitError):
            raise CfvitError(re.sub(r"^cfvit\.[\w.]+: ", "", said)) from error
        raise CfvitError(f"images cannot be loaded ({said}): check the data, or give fewer --workers") from error


def leave_signals_to_the_run(worker: int) -> None:
    """For loading processes: Ctrl-C and SIGTERM reach the whole group, but the run alone decides what to do.

    A SIGTERM that the run itself sends does end the process: multiprocessing sends one at exit, and waits.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS lacks it and keeps torch's handler, which ends on any SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        run = os.getppid()

        def end_with_the_run() -> None:
            while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run:
                pass
            os._exit(0)

        threading.Thread(target=end_with_the_run, daemon=True).start()


def combine_seeds(*parts: int) -> int:
    """One 32-bit seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class EvalImages(Dataset):
    """Images in their order under the evaluation transform, a share of them for each rank.

    An item is ``(image, target, index)``; an unreadable file has target -1 and a black image.
    """

    def __init__(
        self,
        source: DataSource,
        data_config: dict[str, Any],
        indices: Sequence[int] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        chosen = range(len(source)) if indices is None else indices
        self.source, self.indices = source, list(chosen)[rank::world]
        self.transform, self.shape = eval_transform(data_config), data_config["input_size"]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Tensor, int, int]:
        index = self.indices[item]
        try:
            image, target = self.source.read(index)
        except ImageError:
            return torch.zeros(self.shape), UNREADABLE, index
        return self.transform(image), target, index


def eval_loader(dataset: Dataset, batch_size: int, workers: int, device: torch.device) -> DataLoader:
    """Batches in order, the last one short."""
    return DataLoader(
        dataset,
        batch_size,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_the_run,
    )


def train_loader(
    dataset: TrainImages, batch_size: int, sampler: TrainSampler, workers: int, device: torch.device
) -> DataLoader:
    """Whole batches in the sampler's order. The loading processes stay from epoch to epoch."""
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        drop_last=True,
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals_to_the_run,
    )


@contextmanager
def progress_bar(total: int, leads: bool = True, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar on standard error where someone watches, and a plain line a minute where it goes to a file.

    Gives a function to call with the number of images that were just done; ``done`` were so before the first call.
    """
    console = Console(stderr=True)
    start = spoken = time.monotonic()
    before = done

    def advance(count: int) -> None:
        """So many more images are done."""
        nonlocal done, spoken
        done += count
        progress.advance(task, count)
        now = time.monotonic()
        if leads and not console.is_terminal and now - spoken >= SECONDS_BETWEEN_LINES:
            spoken = now
            rate = (done - before) / (now - start)
            console.print(f"{done:,} of {total:,} images, {rate:.3g} a second", highlight=False, soft_wrap=True)

    with Progress(console=console, transient=True, disable=not (leads and console.is_terminal)) as progress:
        task = progress.add_task("images", total=total, completed=done)
        yield advance


class HeldImages(StoredImages):
    """A data set's images in a temporary file without a name, which is gone once no process has it open.

    A file, so that the system holds it in memory while there is room, and processes that inherit no memory get it too.

    Attributes:
        places: where each image starts and ends in the file; or why it cannot be read.
    """

    def __init__(
        self, names: Sequence[str], places: Sequence[tuple[int, int] | str], targets: Sequence[int], file: IO[bytes]
    ) -> None:
        super().__init__(names, [], targets)
        self.places, self.file = places, file

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        place = self.places[index]
        if isinstance(place, str):
            raise ImageError(place)
        start, end = place
        return os.pread(self.file.fileno(), end - start, start), self.targets[index]

    def __len__(self) -> int:
        return len(self.places)

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (self.names, self.places, self.targets, reduction.DupFd(self.file.fileno()))


def _receive(names: Sequence[str], places: Any, targets: Sequence[int], handle: Any) -> HeldImages:
    """In a process that did not inherit the file."""
    return HeldImages(names, places, targets, os.fdopen(handle.detach(), "rb"))


def _decode(source: DataSource, index: int) -> tuple[bytes | str, int]:
    """An image as a PPM, which is its pixels behind a line, and its class index; or why it cannot be read."""
    content = io.BytesIO()
    try:
        image, target = source.read(index)
    except ImageError as error:
        return str(error), UNREADABLE
    image.save(content, "PPM")
    return content.getvalue(), target


def hold(source: DataSource, workers: int, leads: bool = True) -> DataSource:
    """A source of the same images, all of them decoded now by ``workers`` processes, which needs no decoding again.

    They take ``3 * height * width`` bytes each in the folder for temporary files (``TMPDIR``), for each process
    of a distributed run anew. Raises `CfvitError` if there is no room.
    """
    loader = DataLoader(
        cast(Any, range(len(source))),
        batch_size=None,
        num_workers=workers,
        collate_fn=cast(Any, partial(_decode, source)),
        worker_init_fn=leave_signals_to_the_run,
    )
    places: list[tuple[int, int] | str] = []
    targets: list[int] = []
    decoded = iter(loader)
    try:
        file = cast(IO[bytes], tempfile.TemporaryFile())  # noqa: SIM115 - it outlives this function
        with progress_bar(len(source), leads) as advance:
            for _ in range(len(source)):
                content, target = next_batch(decoded)
                targets.append(target)
                start = file.tell()
                places.append(content if isinstance(content, str) else (start, start + file.write(content)))
                advance(1)
        file.flush()
    except OSError as error:
        raise CfvitError(
            f"the decoded images cannot be held ({error.strerror or error}; {len(places)} of {len(source)} were): "
            "make room for temporary files, set TMPDIR to a folder that has some, or leave out --hold-decoded"
        ) from error
    names = [source.name(index) for index in range(len(source))]
    return DataSource(HeldImages(names, places, targets, file), source.class_names)
