"""Writing a file whole or not at all, and whether it can be written; texts by templates, and tables."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cfvit.errors import CfvitError, first_line


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` to write to, which takes its place once complete.

    Raises:
        CfvitError: the file cannot be written; ``path`` is then as it was.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise unwritable(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def unwritable(path: Path, error: Exception) -> CfvitError:
    """What to tell of a file or folder that could not be written."""
    reason, number = getattr(error, "strerror", None) or first_line(error), getattr(error, "errno", None)
    mend = "choose another place" if number not in (None, errno.ENOSPC, errno.EDQUOT) else "make room"
    return CfvitError(f"cannot write {path} ({reason}): {mend}; nothing was changed")


def require_writable(path: Path) -> None:
    """Finds out before long work whether `atomic_write` can begin, by a file that is gone at once.

    Raises:
        CfvitError: a folder is in its place, or its folder can be neither made nor written to.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=next(folder for folder in path.absolute().parents if folder.exists())):
            pass
    except OSError as error:
        raise unwritable(path, error) from error


def fill_template(path: str, /, filters: Mapping[str, Callable[..., str]] | None = None, **values: Any) -> str:
    """A text by a Jinja template, whose path is within this package. What goes into HTML is escaped.

    Args:
        filters: functions that the template calls, besides Jinja's own.
        values: what it shows; all that it names must be there.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    folder, _, file = path.rpartition("/")
    environment = Environment(
        loader=PackageLoader("cfvit", folder),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters or {}
    return environment.get_template(file).render(**values)


def markdown_table(columns: Collection[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown. What divides its cells is escaped within them."""
    every = (columns, ["---"] * len(columns), *rows)
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in every]
