"""What a folder or a tar holds: its images by their paths, found by the same rules in both."""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import re
import tarfile
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from cfvit.data.images import IMAGE_SUFFIXES
from cfvit.errors import CfvitError, first_line

FOREIGN_FOLDERS = frozenset(
    ["@eadir", "__macosx", "__pycache__", "#recycle", "$recycle.bin", "lost+found", "system volume information"]
)
"""Folders that systems add by themselves, in lower case. They are skipped, as is all that begins with a dot."""

UNREAD_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("arw", "cr2", "cr3", "dng", "heic", "heif", "ico", "j2k", "jpe", "jxl"),
        *("jxr", "nef", "pbm", "pnm", "psd", "raw", "svg", "tar", "tga"),
    )
)
"""Suffixes of pictures that are not looked for; where they are skipped, they are counted."""

MOST_LINKS = 40
"""So many links are followed one after the other, as by Linux."""


def natural_key(name: str) -> tuple[Any, ...]:
    """Sorts names as people do: numbers by their value, case ignored; names that are equal then by their characters.

    The order of timm's ``natural_key`` where that orders names at all. It depends on the names alone.
    """
    name = unicodedata.normalize("NFC", name)
    parts = re.split(r"(\d+)", name.lower())
    numbers = ("".join(str(int(digit)) for digit in part).lstrip("0") for part in parts[1::2])
    values = [(len(digits), digits) for digits in numbers]
    return [*chain.from_iterable(zip(parts[::2], values, strict=False)), parts[-1]], name


class StoredImage(NamedTuple):
    """Where an image lies: a file, or so many bytes from a place of a tar on."""

    file: str
    start: int = 0
    size: int | None = None

    def content(self) -> Path | bytes:
        """The file, or what the tar holds. A tar is opened at each call, so that threads and processes share nothing.

        Raises:
            OSError: the tar cannot be opened.
        """
        if self.size is None:
            return Path(self.file)
        with open(self.file, "rb") as tar:  # noqa: PTH123 - quicker
            tar.seek(self.start)
            return tar.read(self.size)


@dataclass
class Tree:
    """Images and folders by their paths below a root, ``/`` between the names."""

    # what is found by its suffix; nothing hidden, nothing in `FOREIGN_FOLDERS`
    images: dict[str, StoredImage] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)  # all that are not skipped, a tar within being one
    skipped: Counter[str] = field(default_factory=Counter)  # how many pictures of other suffixes there are
    broken: list[str] = field(default_factory=list)  # links that lead nowhere
    unreadable: list[str] = field(default_factory=list)  # folders that cannot be opened

    def names(self, folder: str = "") -> list[str]:
        """The names of the folders right below one, in natural order."""
        return sorted((posixpath.basename(f) for f in self.folders if posixpath.dirname(f) == folder), key=natural_key)

    def has_images(self, folder: str = "") -> bool:
        """Whether images lie right in a folder."""
        return any(posixpath.dirname(path) == folder for path in self.images)

    def below(self, folder: str) -> Tree:
        """One of the folders as a tree of its own."""
        start = len(folder) + 1
        inside = f"{folder}/"
        images = {path[start:]: image for path, image in self.images.items() if path.startswith(inside)}
        return Tree(images, {path[start:] for path in self.folders if path.startswith(inside)})

    def take(self, path: str, entry: _Entry | OSError, tars: bool = True) -> None:
        """Adds one thing that `_walk` has found; a tar counts as a folder of its images, if tars do."""
        suffix = posixpath.splitext(path)[1].lower()
        if isinstance(entry, OSError):
            self.unreadable.append(path)
        elif entry.open_folder is not None:
            self._add_name(path)
        elif entry.image is None:
            self.broken.append(path)
        elif suffix in IMAGE_SUFFIXES:
            self.images[path] = entry.image
        elif suffix == ".tar" and tars:
            self._add_tar(path[: -len(suffix)], entry.image)
        elif suffix in UNREAD_SUFFIXES:
            self.skipped[suffix] += 1

    def _add_name(self, path: str) -> None:
        if path in self.folders:
            raise CfvitError(f"{path} is there as a folder and as {path}.tar: remove one of them")
        self.folders.add(path)

    def _add_tar(self, path: str, tar: StoredImage) -> None:
        """A tar as the folder of its name; if it holds but one folder, as that folder."""
        self._add_name(path)
        inner = _scan(tar)
        self.skipped += inner.skipped
        self.broken += [f"{path}/{link}" for link in inner.broken]
        while len(inner.names()) == 1 and not inner.has_images():
            inner = inner.below(inner.names()[0])
        self.folders |= {f"{path}/{folder}" for folder in inner.folders}
        self.images |= {f"{path}/{name}": image for name, image in inner.images.items()}


class _Entry(NamedTuple):
    """A name in a folder: a file, or a folder that can be opened, by what it is beyond all links (but not in a tar)."""

    name: str
    image: StoredImage | None  # None of a link that leads nowhere
    identity: str | None = None
    open_folder: Callable[[], Iterator[_Entry]] | None = None


def _walk(
    name: str, listing: Iterable[_Entry], parents: frozenset[str | None] = frozenset()
) -> Iterator[tuple[str, _Entry | OSError]]:
    """What a folder of this path holds, by paths, in the order of names: each folder, then what it holds in turn.

    Links are followed, unless they lead to a folder they lie in. After a folder that cannot be opened comes the error.
    """
    for entry in sorted(listing):
        path = f"{name}/{entry.name}" if name else entry.name
        if is_foreign(entry.name) or entry.identity in parents:
            continue
        yield path, entry
        if entry.open_folder is not None:
            try:
                yield from _walk(path, entry.open_folder(), parents | {entry.identity})
            except OSError as error:
                yield path, error


def scan(root: Path) -> Tree:
    """All images of a folder or a tar, a tar within it counting as a folder.

    Raises:
        CfvitError: neither a folder nor a tar that can be read.
    """
    if not root.is_dir():
        status = root.stat()
        return _scan_once(StoredImage(str(root)), (status.st_mtime_ns, status.st_size))
    tree = Tree()
    for path, entry in _walk("", _open_root(root), _around(root)):
        tree.take(path, entry)
    return tree


def _open_root(root: Path) -> list[_Entry]:
    try:
        return list(_list_folder(str(root)))
    except OSError as error:
        raise CfvitError(f"{root} cannot be read ({error.strerror or error})") from error


def _around(folder: Path) -> frozenset[str | None]:
    """The folder and those it lies in, which a link in it must not lead to."""
    return frozenset(map(str, [folder.resolve(), *folder.resolve().parents]))


def holds_folders(folder: Path) -> bool:
    """Whether a folder holds others, or tars, that are not skipped."""
    around = _around(folder)
    return any(
        (entry.open_folder is not None or (entry.image is not None and entry.name.lower().endswith(".tar")))
        and not (is_foreign(entry.name) or entry.identity in around)
        for entry in _list_folder(str(folder))
    )


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """All that `iter_images` finds."""
    return list(iter_images(paths))


def iter_images(paths: Sequence[str | Path]) -> Iterator[Path]:
    """The files named, and all images in the folders named, sorted within each folder, each file once.

    A path that does not exist and a folder without images, or that cannot be opened, stand for themselves:
    `open_image` will say what is wrong with each, and the others still get their answers. They come while the folders
    are read; what is kept of each is a digest.

    Raises:
        CfvitError: a folder that was named cannot be opened.
    """
    seen: set[bytes] = set()

    def is_new(file: str) -> bool:
        before = len(seen)
        seen.add(hashlib.blake2b(os.fsencode(file), digest_size=16).digest())
        return len(seen) > before

    for path in map(Path, paths):
        if not path.is_dir():
            if is_new(os.path.realpath(path)):
                yield path
            continue
        tree, empty = Tree(), True
        for name, entry in _walk("", _open_root(path), _around(path)):
            tree.take(name, entry, tars=False)
            if isinstance(entry, _Entry) and name in tree.images:
                del tree.images[name]
                empty = False
                if is_new(str(entry.identity)):
                    yield path / name
        tell_skipped(tree, path)
        yield from (path / name for name in tree.unreadable)
        if empty and not tree.unreadable:
            yield path


def tell_skipped(tree: Tree, root: Path) -> None:
    """Warns of pictures below a root that are not read for their suffix, and of links that lead nowhere."""
    if tree.broken:
        links = "1 broken link is" if len(tree.broken) == 1 else f"{len(tree.broken)} broken links are"
        warnings.warn(f"{root}: {links} skipped, {tree.broken[0]} first: mend or remove what is broken", stacklevel=3)
    if tree.skipped:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(tree.skipped.items()))
        count = tree.skipped.total()
        files = "1 file is" if count == 1 else f"{count} files are"
        warnings.warn(
            f"{root}: {files} skipped for the suffix ({kinds}): convert pictures to .jpg or .png to have them read",
            stacklevel=3,
        )


def is_foreign(name: str) -> bool:
    """Whether a file or folder is skipped for its name: hidden, or of a system."""
    return name.startswith(".") or name.lower() in FOREIGN_FOLDERS


def _list_folder(folder: str) -> Iterator[_Entry]:
    real = os.path.realpath(folder)
    with os.scandir(folder) as entries:
        for entry in entries:
            linked = Path(entry.path) if entry.is_symlink() else None  # of links without an end, entry itself raises
            where = f"{real.rstrip(os.sep)}{os.sep}{entry.name}" if linked is None else os.path.realpath(linked)
            if entry.is_dir() if linked is None else linked.is_dir():
                yield _Entry(entry.name, StoredImage(entry.path), where, partial(_list_folder, entry.path))
            elif entry.is_file() if linked is None else linked.is_file():
                yield _Entry(entry.name, StoredImage(entry.path), where)
            elif linked is not None and not linked.exists():
                yield _Entry(entry.name, None)


@lru_cache(maxsize=4)
def _scan_once(tar: StoredImage, version: tuple[int, int]) -> Tree:
    """A tar is scanned once in each ``version`` of its file, not for each question about its splits."""
    return _scan(tar)


def _scan(tar: StoredImage) -> Tree:
    tree = Tree()
    content = tar.content()
    try:
        with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
            members = _Members(tar, file)
        for path, entry in _walk("", members.list_folder(""), frozenset([""])):
            tree.take(path, entry)
    except (tarfile.TarError, OSError, UnicodeError, ValueError) as error:
        if isinstance(error, CfvitError):
            raise
        raise CfvitError(
            f"{tar.file} is damaged, compressed or no tar ({first_line(error)}): give an uncompressed tar or a folder"
        ) from error
    return tree


class _Members:
    """The members of a tar as folders: paths made plain, links followed, the last of equal names."""

    def __init__(self, tar: StoredImage, file: IO[bytes]) -> None:
        self.folders: dict[str, set[str]] = {"": set()}
        self.files: dict[str, StoredImage] = {}
        self.links: dict[str, str] = {}
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                path = posixpath.normpath(f"/{member.name}").lstrip("/")
                if not path:
                    continue
                self.links.pop(path, None)
                self.files.pop(path, None)
                if member.isreg():
                    self.files[path] = StoredImage(tar.file, tar.start + member.offset_data, member.size)
                elif member.issym():
                    self.links[path] = member.linkname
                elif member.islnk():
                    up = "../" * path.count("/")
                    self.links[path] = up + posixpath.normpath(f"/{member.linkname}").lstrip("/")
                elif member.isdir():
                    self.folders.setdefault(path, set())
                else:
                    continue
                while path:
                    folder, name = posixpath.split(path)
                    self.folders.setdefault(folder, set()).add(name)
                    path = folder
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # which tarfile itself takes for the end
                raise tarfile.ReadError(f"it breaks off after {len(self.files)} files")

    def list_folder(self, folder: str) -> Iterator[_Entry]:
        """As `_list_folder` does for one on a disk."""
        for name in self.folders[folder]:
            path = self._resolve(f"{folder}/{name}")
            if path in self.files:
                yield _Entry(name, self.files[path])
            elif path is not None and path in self.folders:
                yield _Entry(name, StoredImage(""), path, partial(self.list_folder, path))
            else:
                yield _Entry(name, None)

    def _resolve(self, path: str) -> str | None:
        """Where a path leads if all links are followed; None if that is outside, nowhere or without an end."""
        ahead, done, links = path.split("/"), "", 0
        while ahead:
            part = ahead.pop(0)
            if done not in self.folders or (part == ".." and not done):
                return None
            if part == "..":
                done = posixpath.dirname(done)
            elif part not in ("", "."):
                here = f"{done}/{part}".lstrip("/")
                target = self.links.get(here)
                links += target is not None
                if links > MOST_LINKS or (target is not None and target.startswith("/")):
                    return None
                if target is None:
                    done = here
                else:
                    ahead = target.split("/") + ahead
        return done
