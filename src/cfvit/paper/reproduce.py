"""Makes tables and figures of the paper from runs that it trains, resumes or finds, within a budget."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from cfvit.benchmark.conditions import Conditions, conditions_of
from cfvit.errors import CfvitError, UsageError
from cfvit.files import atomic_write
from cfvit.paper.budget import Budget, duration
from cfvit.paper.given import as_finished, names_plain_vit, open_given, require_suitable, suits_a_model
from cfvit.paper.making import Made, Network, Sources, make
from cfvit.paper.records import Finished
from cfvit.paper.rows import Row
from cfvit.paper.runs import Missing, Runs, require_splits, restore
from cfvit.paper.studies import ALL, COARSE_GRID, DEFAULT, PAPERS_METHOD, PLAIN, Study, find_studies, runs_needed
from cfvit.paper.writing import Account, describe_recipe, write_csv, write_markdown, write_runs
from cfvit.plots.style import require_matplotlib
from cfvit.processes import best_device
from cfvit.training.recipe import RECIPES, Recipe
from cfvit.training.setup import dtype_of

RUNS_FOLDER, RUNS_FILE = "runs", "runs.csv"
_BACKBONE_ALONE = "In place of a plain ViT stands the backbone of the given CF-ViT, which was trained for both stages."


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be reproduced.

    Attributes:
        name: of a study, or ``all``.
        recipe: of all runs, with its data.
        recipe_name: of the recipe that it was made from.
        out: receives ``NAME.csv``, ``NAME.png``, ``NAME.md``, ``runs.csv`` and the runs.
        seeds: every run is repeated with each.
        budget: seconds in which to train; None for no limit.
        model: a trained model to use instead of runs, or None.
        speed: whether table 2 measures images per second.
        command: as it was given, for the record.
    """

    name: str
    recipe: Recipe
    recipe_name: str
    out: Path
    seeds: tuple[int, ...]
    budget: float | None = None
    model: str | None = None
    speed: bool = True
    command: str = ""


Show = Callable[[Study, Sequence[Row], Sequence[str]], object]
Say = Callable[[str], object]


def reproduce(request: Request, show: Show, say: Say) -> list[Missing]:
    """Makes what is asked for; what does not fit into the budget is left out and told.

    Args:
        show: given each study as it is made, its rows and its notes.
        say: told a line at each step.

    Returns:
        The runs that are not there.

    Raises:
        UsageError: no such study, a model that does not suit it.
        CfvitError: data, models or folders that cannot be used, or matplotlib is not installed.
    """
    require_matplotlib()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError(
            "cfvit reproduce is one process: train single runs by torchrun -m cfvit train into "
            f"{request.out / RUNS_FOLDER}/NAME-seedK, which are then found"
        )
    if not request.recipe.data:
        raise UsageError("no data: name what to train and to score on with --data")
    studies = find_studies(request.name)
    _require_papers_method(request.recipe)
    _require_writable(request.out)
    conditions = conditions_of(dtype_of(request.recipe, best_device()), request.command)
    if request.model is not None:
        _from_model(request, studies, conditions, show)
        return []
    return _Reproduction(request, studies, conditions, show, say).run()


def _require_papers_method(recipe: Recipe) -> None:
    for name, value in PAPERS_METHOD.items():
        given = getattr(recipe, name)
        if given != value:
            raise UsageError(f"{name} is {given!r}: the studies set it themselves, from {value!r} on; leave it out")


def _require_writable(out: Path) -> None:
    """Before the training, so that nobody waits for what cannot be written."""
    trial = out / ".writable"
    with atomic_write(trial) as file:
        file.write_text("")
    trial.unlink(missing_ok=True)


def _from_model(request: Request, studies: Sequence[Study], conditions: Conditions, show: Show) -> None:
    """Studies that need no more than one trained model."""
    assert request.model is not None
    is_plain = names_plain_vit(request.model)
    if request.name == ALL:
        studies = [study for study in studies if suits_a_model(study, is_plain)]
    require_suitable(list(studies), is_plain)
    given = open_given(request.model, request.recipe)
    finished = as_finished(given, request.recipe, conditions)
    sources = Sources(
        results={run: [finished] for run in (DEFAULT, PLAIN, COARSE_GRID)},  # it stands for each run of these studies
        missing={},
        network=lambda _: (given.model, given.images),
        backbone=given.model.config.backbone,
        class_names=given.images.source.class_names,
        speed=False,
        plain="A plain ViT" if is_plain else "The backbone of a CF-ViT, run alone,",
    )
    for study in studies:
        made = make(study, sources)
        if PLAIN in study.runs and not is_plain:
            made = replace(made, notes=(*made.notes, _BACKBONE_ALONE))
        _write(study, made, request.out, _account_of_model(request, conditions, finished))
        show(study, made.rows, made.notes)


def _account_of_model(request: Request, conditions: Conditions, finished: Finished) -> Account:
    return Account(
        data=request.recipe.val_data or request.recipe.data,
        images=f"{len(finished.validation.labels):,} scored",
        recipe=f"none, the model {request.model} as it was given",
        epochs="0",
        seeds="none",
        conditions=conditions,
        trained_on="",
    )


def _write(study: Study, made: Made, out: Path, account: Account) -> None:
    """``NAME.csv``, ``NAME.png`` and ``NAME.md``; a former picture goes where there is nothing to draw."""
    write_csv(out / f"{study.name}.csv", made.rows)
    picture = out / f"{study.name}.png"
    if made.draw is None:
        picture.unlink(missing_ok=True)
    else:
        made.draw(picture, account.caption())
    write_markdown(out / f"{study.name}.md", study, made.rows, made.notes, account, made.draw is not None)


@dataclass
class _Reproduction:
    """The course of one call: which runs are there by now, which are not, and what was published."""

    request: Request
    studies: Sequence[Study]
    conditions: Conditions
    show: Show
    say: Say
    results: dict[str, list[Finished]] = field(default_factory=dict)
    missing: list[tuple[str, Missing]] = field(default_factory=list)
    class_names: Sequence[str] = ()

    def run(self) -> list[Missing]:
        """Makes run after run, seed by seed, and publishes each study as soon as its runs are there."""
        request = self.request
        images = require_splits(request.recipe)
        self.class_names = images.train.source.class_names
        runs = Runs(
            request.recipe,
            request.out / RUNS_FOLDER,
            Budget.of(request.budget),
            len(images.train),
            self.conditions,
            self.say,
        )
        waiting = list(self.studies)
        for seed in request.seeds:
            for spec in runs_needed(self.studies):
                made = runs.make(spec, seed)
                if isinstance(made, Missing):
                    self.missing.append((spec.name, made))
                else:
                    self.results.setdefault(spec.name, []).append(made)
                for study in [study for study in waiting if self._is_complete(study)]:
                    self._publish(study)
                    waiting.remove(study)
        for study in waiting:
            self._publish(study)
        write_runs(request.out / RUNS_FILE, runs.finished())
        self._sum_up()
        return [missing for _, missing in self.missing]

    def _is_complete(self, study: Study) -> bool:
        return all(len(self.results.get(run, ())) == len(self.request.seeds) for run in study.runs)

    def _publish(self, study: Study) -> None:
        sources = Sources(
            results=self.results,
            missing=self._reasons(study),
            network=_network_of_run,
            backbone=self.request.recipe.backbone,
            class_names=self.class_names,
            speed=self.request.speed,
        )
        made = make(study, sources)
        _write(study, made, self.request.out, self._account(study))
        self.show(study, made.rows, made.notes)

    def _reasons(self, study: Study) -> dict[str, str]:
        reasons: dict[str, list[str]] = {}
        for name, missing in self.missing:
            if name in study.runs:
                reasons.setdefault(name, []).append(f"{missing.name} {missing.reason}")
        return {name: "; ".join(told) for name, told in reasons.items()}

    def _account(self, study: Study) -> Account:
        recipe, records = self.request.recipe, [r.record for run in study.runs for r in self.results.get(run, ())]
        elsewhere = {_where(r.conditions) for r in records} - {_where(asdict(self.conditions))}
        return Account(
            data=recipe.data if recipe.val_data is None else f"{recipe.data}, validated on {recipe.val_data}",
            images=_told_images(records[0].images) if records else "none, no run is there",
            recipe=describe_recipe(self.request.recipe_name, RECIPES[self.request.recipe_name], recipe),
            epochs=str(recipe.epochs),
            seeds=", ".join(map(str, self.request.seeds)),
            conditions=self.conditions,
            trained_on="; ".join(sorted(elsewhere)),
        )

    def _sum_up(self) -> None:
        self.say(f"written to {self.request.out}: {', '.join(study.name for study in self.studies)}")
        for _, missing in self.missing:
            time_needed = "" if missing.seconds is None else f", about {duration(missing.seconds)} more"
            self.say(f"not run: {missing.name} {missing.reason}{time_needed}")
        known = [missing.seconds for _, missing in self.missing if missing.seconds is not None]
        if known:
            self.say(f"the same command goes on from here; about {duration(sum(known))} are left")
        elif self.missing:
            self.say("the same command goes on from here")


def _where(conditions: Mapping[str, str]) -> str:
    """By what trainings are told apart, see `Conditions`."""
    known = {name: conditions[name] for name in ("hardware", "dtype", "versions", "commit")}
    return "{hardware}, {dtype}, {versions}, commit {commit}".format(**known)


def _told_images(counts: Mapping[str, int]) -> str:
    resolution = 100 / counts["validation"]
    return (
        f"{counts['train']:,} to train on, {counts['holdout']:,} held out, "
        f"{counts['validation']:,} to validate on (one is {resolution:.2g} points)"
    )


def _network_of_run(run: Finished) -> Network:
    images, model = restore(run.recipe, run.folder)
    if images.validation is None:
        raise CfvitError(f"{run.recipe.data} has no validation images any more: name some with --val-data")
    return model, images.validation
