"""Answers for many images in one file: part by part, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from cfvit.checkpoints import weights_digest
from cfvit.errors import CfvitError, UsageError
from cfvit.files import atomic_write, require_writable
from cfvit.inference.engines.exported import ExportedModel
from cfvit.inference.files import Tally
from cfvit.modeling.model import CoarseToFineViT

PART_SIZE = 256
"""Images in a partition file, unless another number is given: what a run that is killed loses at most."""

JOB_FILE, IMAGES_FILE, LOCK_FILE = "job.json", "images.jsonl", "lock"


def shard_of(paths: Iterable[Path], shard: str) -> Iterator[Path]:
    """The images of a shard ``i/n``: the i-th of n, counted from 1.

    A path alone decides whose it is, by a digest, and not its place in a list. So shards do not overlap and leave
    nothing out if machines list folders in another order, or if one of them sees a file that another does not see yet.

    Raises:
        UsageError: another text.
    """
    first, slash, second = shard.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise UsageError(f"--shard is {shard!r}: give i/n, such as 1/4 for the first of four, i from 1 to n")
    number, count = int(first), int(second)

    def is_ours(path: Path) -> bool:
        digest = hashlib.blake2b(os.fsencode(path.as_posix()), digest_size=8).digest()
        return int.from_bytes(digest, "big") % count == number - 1

    return filter(is_ours, paths)


def model_digest(model: CoarseToFineViT | ExportedModel) -> str:
    """16 hexadecimal digits that identify all that a model's answers depend on, except eta."""
    exported = isinstance(model, ExportedModel)
    source = (model.source, model.format, model.quantised) if exported else weights_digest(model)
    rule = dataclasses.replace(model.exit, eta=None)
    about = repr((source, model.config, rule, model.class_names, sorted(model.data_config.items())))
    return hashlib.blake2b(about.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Job:
    """Images on their way to one file of answers, see `open_job`."""

    output: Path  # what is written in the end
    folder: Path  # what is written until then: the settings, the paths of all images, a partition file for each part
    total: int  # how many images there are
    part_size: int  # how many are in each part; fewer in the last one

    def _part(self, number: int) -> Path:
        return self.folder / f"{number:06}.jsonl"

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return -(-self.total // self.part_size)

    @property
    def done(self) -> int:
        """How many images are in the partition files that there are."""
        sizes = (min(self.part_size, self.total - first) for first in range(0, self.total, self.part_size))
        return sum(size for number, size in enumerate(sizes) if self._part(number).exists())

    def unanswered(self) -> Iterator[tuple[int, list[Path]]]:
        """The parts without a partition file, by their numbers."""
        with (self.folder / IMAGES_FILE).open() as lines:
            for number, line in enumerate(lines):
                if not self._part(number).exists():
                    yield number, [Path(path) for path in json.loads(line)]

    def write(self, number: int, rows: Iterable[dict[str, Any]]) -> int:
        """Writes the partition file of a part; returns how many images it has."""
        lines = [json.dumps(row) + "\n" for row in rows]
        with atomic_write(self._part(number)) as file:
            file.write_text("".join(lines))
        return len(lines)

    def join(self) -> Tally:
        """Writes the output from all partition files, and removes them."""
        tally = Tally()
        parts = filter(Path.exists, map(self._part, range(self.parts)))
        rows = (tally.count(json.loads(line)) for part in parts for line in part.open())
        joined = self.folder / self.output.name
        with atomic_write(joined) as file:
            WRITERS[self.output.suffix](file, rows)
        if (count := tally.answered + tally.failed) != self.total:
            raise CfvitError(f"{self.folder} has {count} rows for {self.total} images: remove it to begin anew")
        try:
            joined.replace(self.output)
        except OSError as error:
            raise CfvitError(f"cannot write {self.output} ({error.strerror}): make room, then go on") from error
        (self.folder / JOB_FILE).unlink()  # first, so that what a kill leaves of the folder is known as rubbish
        shutil.rmtree(self.folder)
        return tally


@contextlib.contextmanager
def open_job(
    output: Path, settings: dict[str, Any], images: Iterable[Path], part_size: int = PART_SIZE
) -> Iterator[Job]:
    """Begins a job, or goes on with the one that was begun for the same output.

    Until it ends, the folder ``output.parts`` holds what is done. The images are listed once: those that come into
    their folders later are not answered, and those that are gone have an error.

    Args:
        output: a ``.jsonl`` or ``.parquet`` file.
        settings: what the answers depend on, as JSON has it.
        images: of a new job; not looked at where one goes on.
        part_size: images in a partition file.

    Raises:
        CfvitError: the output is there already, is being written by another run, or cannot be written; a job was begun
            for it with other settings, or its folder is damaged; pyarrow is needed and missing.
        UsageError: another kind of output.
    """
    if output.suffix not in WRITERS:
        raise UsageError(f"--output is {output}: give a file that ends with {' or '.join(WRITERS)}")
    if output.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise CfvitError("answers in parquet need pyarrow: install cfvit[parquet], or write .jsonl") from error
    folder = output.with_name(f"{output.name}.parts")
    record, settings = folder / JOB_FILE, {**settings, "part_size": part_size}
    if output.exists() and not record.exists():
        shutil.rmtree(folder, ignore_errors=True)
        raise CfvitError(f"{output} is there already: remove it, or choose another place for the answers")
    require_writable(folder / JOB_FILE)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CfvitError(f"another run is writing {output}: wait for it, or end it") from error
        if not record.exists():
            for rest in folder.glob("*.jsonl"):
                rest.unlink()
            total = 0
            with atomic_write(folder / IMAGES_FILE) as file, file.open("w") as lines:
                paths = map(str, images)
                while part := list(islice(paths, part_size)):
                    lines.write(json.dumps(part) + "\n")
                    total += len(part)
            with atomic_write(record) as file:
                file.write_text(json.dumps({"images": total, "settings": settings}, indent=2) + "\n")
        try:
            begun = json.loads(record.read_text())
            total, before = int(begun["images"]), dict(begun["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise CfvitError(f"{record} is damaged: remove {folder} to begin anew") from error
        for name, now in settings.items():
            if (then := before.get(name)) != now:
                raise CfvitError(
                    f"{output} was begun with {name.replace('_', ' ')} {then}, not {now}: "
                    f"give the same, or remove {folder} to begin anew"
                )
        try:
            yield Job(output, folder, total, part_size)
        except json.JSONDecodeError as error:  # of any other file in the folder
            raise CfvitError(f"{folder} is damaged ({error}): remove it to begin anew") from error


def _write_jsonl(file: Path, rows: Iterator[dict[str, Any]]) -> None:
    with file.open("w") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def _write_parquet(file: Path, rows: Iterator[dict[str, Any]]) -> None:
    """A column for each value, null where a row has none; odd bytes of file names are escaped."""
    import pyarrow
    from pyarrow import parquet

    texts = ("path", "label", "error")
    kinds = {"confidence": pyarrow.float64(), "stage": pyarrow.int8(), "gmacs": pyarrow.float64()}
    schema = pyarrow.schema({name: kinds.get(name, pyarrow.string()) for name in ("path", "label", *kinds, "error")})
    with parquet.ParquetWriter(file, schema) as writer:
        while part := list(islice(rows, 1 << 16)):
            for row in part:
                row |= {name: row[name].encode("utf-8", "backslashreplace").decode() for name in texts if name in row}
            writer.write_table(pyarrow.Table.from_pylist(part, schema))


WRITERS = {".jsonl": _write_jsonl, ".parquet": _write_parquet}
