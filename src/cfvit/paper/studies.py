"""The paper's tables and figures as data: what each compares, what the paper prints, and how each run differs.

``studies.yaml`` beside this file lists the studies and the paper's own figures.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import field
from importlib import resources
from typing import Any

import yaml
from pydantic.dataclasses import dataclass

from cfvit.errors import UsageError
from cfvit.training.recipe import Recipe

FAMILIES = ("DeiT-S", "LV-ViT-S")
"""The backbones of the paper's Tables 2 and 3."""

PAPERS_MODEL: Mapping[str, Any] = {
    "informative_ratio": 0.5,
    "attention_momentum": 0.99,
    "selection": "attention",
    "feature_reuse": "mlp",
    "fine_merged": 0,
    "method": "cf_vit",
}
PAPERS_LOSS: Mapping[str, Any] = {"coarse_label_weight": 0.0, "coarse_fine_weight": 1.0}


def papers_method(base: Recipe) -> dict[str, Any]:
    """The fields that the studies set themselves, as the paper has them. A recipe without labels keeps its own loss."""
    return {**PAPERS_MODEL, **(PAPERS_LOSS if base.uses_labels else {})}


@dataclass(frozen=True)
class RunSpec:
    """A run, by what it changes in the recipe."""

    name: str  # of its folder, before the seed
    changes: Mapping[str, Any] = field(default_factory=dict)  # fields of the recipe
    grid_scale: float = 1.0  # each side of the coarse grid is multiplied by it and rounded

    def recipe(self, base: Recipe, seed: int) -> Recipe:
        """The recipe of this run, scored once at the end of its training.

        Raises:
            UsageError: the changes contradict the recipe.
        """
        if not base.uses_labels and self.changes.keys() & PAPERS_LOSS.keys():
            raise UsageError(f"{self.name} learns from labels, and the recipe has none: choose another recipe")
        sides = [max(1, round(self.grid_scale * side)) for side in base.grid]
        grid = sides[0] if sides[0] == sides[1] else tuple(sides)
        given = {"coarse_grid": grid, "seed": seed, "eval_interval": base.epochs}
        return base.replace({**papers_method(base), **given, **self.changes})


DEFAULT, PLAIN, COARSE_GRID, LARGER_GRID = "default", "plain", "plain-coarse-grid", "larger-grid"

RUNS: Mapping[str, RunSpec] = {
    spec.name: spec
    for spec in (
        RunSpec(DEFAULT),
        RunSpec(PLAIN, {"method": "plain"}),
        RunSpec(COARSE_GRID, {"method": "coarse_only"}),
        RunSpec("select-random", {"selection": "random"}),
        RunSpec("select-negative", {"selection": "negative"}),
        *(RunSpec(f"beta-{beta:g}", {"attention_momentum": beta}) for beta in (0.0, 0.5, 0.9, 0.999)),
        *(RunSpec(f"alpha-{alpha:g}", {"informative_ratio": alpha}) for alpha in (0.4, 0.6, 0.7, 0.8, 0.9, 1.0)),
        RunSpec("reuse-none", {"feature_reuse": "none"}),
        RunSpec("reuse-linear", {"feature_reuse": "linear"}),
        RunSpec("reuse-class-token", {"feature_reuse": "class_token"}),
        RunSpec("reuse-uninformative", {"feature_reuse": "uninformative"}),
        RunSpec("loss-ce", {"coarse_label_weight": 1.0, "coarse_fine_weight": 0.0}),
        RunSpec(LARGER_GRID, grid_scale=9 / 7),
    )
}
"""By name. Runs that several studies share come before others, cheap ones before expensive ones."""


@dataclass(frozen=True)
class Published:
    """A row that the paper prints."""

    place: str  # where it stands in the paper
    values: dict[str, float]  # what is printed, by measure: see `cfvit.paper.rows.HEADINGS`
    name: str = ""  # in Tables 2 and 3 the method, or CF-ViT's eta
    family: str = ""  # one of `FAMILIES` in Tables 2 and 3


@dataclass(frozen=True)
class Variant:
    """One of the things that a study compares: its label for the reader, its run, and the paper's row, if any."""

    label: str
    run: str
    published: Published | None = None


@dataclass(frozen=True)
class Study:
    """A table or figure of the paper."""

    name: str  # on the command line
    title: str
    kind: str  # how its rows are made from the runs, see `cfvit.paper.write.KINDS`
    variants: tuple[Variant, ...]  # what is compared
    measures: tuple[str, ...] = ()  # columns of an ablation, see `cfvit.paper.rows.MEASURES`
    etas: tuple[float | str, ...] = ()  # of the operating points: numbers, "parity", or "near parity"
    published: tuple[Published, ...] = ()  # the paper's rows of Tables 2 and 3
    notes: tuple[str, ...] = ()  # what a reader of the paper's figures has to know

    @property
    def runs(self) -> tuple[str, ...]:
        """Names of the runs that it needs, each once."""
        return tuple(dict.fromkeys(variant.run for variant in self.variants))

    def row(self, family: str, name: str) -> Published | None:
        """The paper's row of a family, None if the paper prints none."""
        return next((row for row in self.published if (row.family, row.name) == (family, name)), None)


_CONTENT: Mapping[str, Any] = yaml.safe_load(resources.files("cfvit.paper").joinpath("studies.yaml").read_text("utf-8"))
PAPER, SETTING = str(_CONTENT["title"]), str(_CONTENT["setting"])
STUDIES: Mapping[str, Study] = {name: Study(name=name, **entry) for name, entry in _CONTENT["studies"].items()}
ALL = "all"


def find_studies(name: str) -> list[Study]:
    """The study of that name, or all of them for ``all``.

    Raises:
        UsageError: there is none, with the nearest name.
    """
    if name == ALL:
        return list(STUDIES.values())
    if name in STUDIES:
        return [STUDIES[name]]
    near = difflib.get_close_matches(name, [*STUDIES, ALL], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose among {', '.join(STUDIES)}, {ALL}"
    raise UsageError(f"the paper has no {name!r} to reproduce: {hint}")


def runs_needed(studies: Sequence[Study]) -> list[RunSpec]:
    """The runs of some studies, each once, in the order of `RUNS`."""
    wanted = {run for study in studies for run in study.runs}
    return [spec for name, spec in RUNS.items() if name in wanted]
