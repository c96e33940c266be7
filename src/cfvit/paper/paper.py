"""The paper's own figures, each with its place in the paper, from ``paper.yaml``."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

import yaml


@dataclass(frozen=True)
class Published:
    """A row of one of the paper's tables.

    Attributes:
        name: of the row, unique in its table.
        place: where it stands in the paper.
        values: by measure: ``accuracy``, ``coarse`` and ``fine`` (top-1 in percent), ``gmacs``, ``eta``,
            ``images_per_second`` and ``speedup``; only what is printed.
    """

    name: str
    place: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class PaperTable:
    """What the paper prints for one table or figure, and what has to be said about it."""

    rows: tuple[Published, ...]
    notes: tuple[str, ...]

    def row(self, name: str | None) -> Published | None:
        """The row of that name, None where the paper prints none."""
        return next((row for row in self.rows if row.name == name), None)


@dataclass(frozen=True)
class Paper:
    """All tables and figures by the names that `cfvit reproduce` gives them."""

    title: str
    setting: str
    tables: Mapping[str, PaperTable]


@functools.cache
def read_paper() -> Paper:
    """The published figures that come with the package."""
    text = resources.files("cfvit.paper").joinpath("paper.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    tables = {
        name: PaperTable(tuple(map(_published, table.get("rows", ()))), tuple(table.get("notes", ())))
        for name, table in content["tables"].items()
    }
    return Paper(content["title"], content["setting"], tables)


def _published(row: Mapping[str, str | float]) -> Published:
    values = {name: float(value) for name, value in row.items() if name not in ("row", "place")}
    return Published(str(row["row"]), str(row["place"]), values)
