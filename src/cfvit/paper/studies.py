"""What `cfvit reproduce` can make: each table and figure, the runs that it compares, and how a run differs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cfvit.errors import UsageError
from cfvit.training.recipe import Recipe

PAPERS_METHOD: Mapping[str, Any] = {
    "informative_ratio": 0.5,
    "attention_momentum": 0.99,
    "selection": "attention",
    "feature_reuse": "mlp",
    "coarse_loss": "kl",
    "stages": "both",
}
"""The fields that the studies set themselves, as the paper's own method has them."""


@dataclass(frozen=True)
class RunSpec:
    """A run by what it changes in the recipe.

    Attributes:
        name: of its folder.
        changes: fields of the recipe.
        grid_scale: by how much each side of the coarse grid is multiplied, and rounded.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    grid_scale: float = 1.0

    def recipe(self, base: Recipe, seed: int) -> Recipe:
        """The recipe of this run, scored once at the end of its training.

        Raises:
            UsageError: the changes do not go together with the recipe.
        """
        grid = base.grid if isinstance(base.grid, tuple) else (base.grid,)
        scaled = [max(1, round(self.grid_scale * side)) for side in grid]
        sides = scaled[0] if len(scaled) == 1 else "x".join(map(str, scaled))
        given = {"coarse_grid": sides, "seed": seed, "eval_interval": base.epochs}
        return base.replace({**PAPERS_METHOD, **given, **self.changes})


DEFAULT, PLAIN, COARSE_GRID, LARGER_GRID = "default", "plain", "plain-coarse-grid", "larger-grid"

RUNS: Mapping[str, RunSpec] = {
    spec.name: spec
    for spec in (
        RunSpec(DEFAULT),
        RunSpec(PLAIN, {"stages": "backbone"}),
        RunSpec(COARSE_GRID, {"stages": "coarse"}),
        RunSpec("select-random", {"selection": "random"}),
        RunSpec("select-negative", {"selection": "negative"}),
        *(RunSpec(f"beta-{beta:g}", {"attention_momentum": beta}) for beta in (0.0, 0.5, 0.9, 0.999)),
        *(RunSpec(f"alpha-{alpha:g}", {"informative_ratio": alpha}) for alpha in (0.4, 0.6, 0.7, 0.8, 0.9, 1.0)),
        RunSpec("reuse-none", {"feature_reuse": "none"}),
        RunSpec("reuse-linear", {"feature_reuse": "linear"}),
        RunSpec("reuse-class-token", {"feature_reuse": "class_token"}),
        RunSpec("reuse-uninformative", {"feature_reuse": "uninformative"}),
        RunSpec("loss-ce", {"coarse_loss": "ce"}),
        RunSpec(LARGER_GRID, grid_scale=9 / 7),
    )
}
"""By name, in the order in which they are wanted: shared ones first, dear ones last."""


@dataclass(frozen=True)
class Variant:
    """A line of a study.

    Attributes:
        label: what a reader sees.
        run: name of the run, see `RUNS`.
        published: name of the paper's row, None if the paper prints none.
    """

    label: str
    run: str
    published: str | None = None


Kind = Literal["ablation", "operating_points", "curves", "patches", "attention", "counts", "examples"]


@dataclass(frozen=True)
class Study:
    """A table or figure of the paper.

    Attributes:
        name: on the command line.
        title: what it shows.
        kind: how its rows are made from the runs.
        variants: what is compared.
        measures: columns of an ablation, names of `cfvit.paper.rows.MEASURES`.
    """

    name: str
    title: str
    kind: Kind
    variants: tuple[Variant, ...]
    measures: tuple[str, ...] = ()

    @property
    def runs(self) -> tuple[str, ...]:
        """Names of the runs that it needs, each once."""
        return tuple(dict.fromkeys(variant.run for variant in self.variants))


_STAGES = ("coarse", "fine")
_OURS, _BOTH = Variant("CF-ViT", DEFAULT), (Variant("plain ViT", PLAIN), Variant("CF-ViT", DEFAULT))

STUDIES: Mapping[str, Study] = {
    study.name: study
    for study in (
        Study(
            "table1",
            "Table 1: the plain ViT on the full and on the coarse grid",
            "ablation",
            (
                Variant("plain ViT, full grid", PLAIN, "full grid"),
                Variant("plain ViT, coarse grid", COARSE_GRID, "coarse grid"),
            ),
            ("accuracy", "gmacs"),
        ),
        Study(
            "table2",
            "Table 2: CF-ViT against its backbone",
            "operating_points",
            (*_BOTH, Variant("CF-ViT, larger grid", LARGER_GRID)),
        ),
        Study("table3", "Table 3: CF-ViT beside compressed ViTs as published", "operating_points", _BOTH),
        Study(
            "table4",
            "Table 4: which regions are split",
            "ablation",
            (
                Variant("lowest global class attention", "select-negative", "negative"),
                Variant("random", "select-random", "random"),
                Variant("last block's class attention", "beta-0", "last block"),
                Variant("global class attention", DEFAULT, "global"),
            ),
            _STAGES,
        ),
        Study(
            "table5",
            "Table 5: what the fine stage reuses of the coarse features",
            "ablation",
            (
                Variant("nothing", "reuse-none", "none"),
                Variant("with the class token", "reuse-class-token", "class token"),
                Variant("with uninformative tokens", "reuse-uninformative", "uninformative"),
                Variant("linear instead of MLP", "reuse-linear", "linear"),
                Variant("MLP", DEFAULT, "mlp"),
            ),
            _STAGES,
        ),
        Study(
            "table6",
            "Table 6: alpha, the share of cells that are split",
            "ablation",
            tuple(
                Variant(f"alpha {alpha}", DEFAULT if alpha == "0.5" else f"alpha-{alpha}", alpha)
                for alpha in ("0.4", "0.5", "0.6", "0.7", "0.8", "0.9")
            ),
            ("fine", "gmacs", "gmacs_as_paper"),
        ),
        Study(
            "table7",
            "Table 7: beta of the global class attention",
            "ablation",
            tuple(
                Variant(f"beta {beta}", DEFAULT if beta == "0.99" else f"beta-{beta}", beta)
                for beta in ("0", "0.5", "0.9", "0.99", "0.999")
            ),
            ("fine",),
        ),
        Study(
            "table8",
            "Table 8: what the coarse stage learns from",
            "ablation",
            (Variant("CE + CE", "loss-ce", "ce"), Variant("CE + KL", DEFAULT, "kl")),
            _STAGES,
        ),
        Study(
            "fig1a",
            "Fig. 1(a): the patches of highest and of lowest class attention",
            "patches",
            (Variant("plain ViT", PLAIN),),
        ),
        Study(
            "fig1b",
            "Fig. 1(b): class attention on the coarse and on the full grid",
            "attention",
            (Variant("plain ViT, coarse grid", COARSE_GRID), Variant("plain ViT, full grid", PLAIN)),
        ),
        Study("fig5", "Fig. 5: accuracy against cost over eta", "curves", (_OURS,)),
        Study("fig6", "Fig. 6: accuracy against cost beside popular ViTs", "curves", (_OURS,)),
        Study(
            "fig7",
            "Fig. 7: each design removed",
            "curves",
            (
                _OURS,
                Variant("without informative regions", "alpha-1"),
                Variant("without feature reuse", "reuse-none"),
            ),
        ),
        Study("fig8", "Fig. 8: images right at the coarse and at the fine stage over eta", "counts", (_OURS,)),
        Study("fig9", "Fig. 9: examples right at the coarse and at the fine stage", "examples", (_OURS,)),
    )
}
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
