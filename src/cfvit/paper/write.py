"""Makes tables and figures of the paper and writes them: CSV, Markdown, PNG, JSON lines, and ``runs.csv``."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cfvit.benchmark.conditions import Conditions, conditions_of
from cfvit.calibration.checks import missing_classes
from cfvit.checkpoints import load
from cfvit.errors import CfvitError, UsageError
from cfvit.files import atomic_write, markdown_table, require_writable
from cfvit.methods.base import create_method
from cfvit.paper import Options, compare, figures, rows
from cfvit.paper.given import Contestant, compared, contestants_in, is_plain_vit, results_of_model
from cfvit.paper.rows import HEADINGS, MEASURES, Row, Sources, StudyResult
from cfvit.paper.runs import Missing, Run, Runs, duration, logged_speed
from cfvit.paper.studies import (
    ALL,
    COARSE_GRID,
    DEFAULT,
    FAMILIES,
    PAPER,
    PLAIN,
    SETTING,
    Study,
    Variant,
    find_studies,
    papers_method,
    runs_needed,
)
from cfvit.plots.style import require_matplotlib
from cfvit.processes import best_device
from cfvit.training.recipe import RECIPES, Recipe
from cfvit.training.setup import dtype_of, open_splits, training_images, with_preprocessing

RUNS_FOLDER, RUNS_FILE = "runs", "runs.csv"
OF_RUNS = {
    "table3": "Table 3 of own runs: methods side by side",
    "fig5": "Fig. 5 of own runs: accuracy against cost",
    ALL: "",
}
"""What can be made of trained runs of any methods, and its title."""

OF_IMAGES = {make.__name__: make for make in (figures.counts, figures.patches, figures.attention, figures.examples)}
KINDS: Mapping[str, Callable[[Study, Sources], StudyResult]] = OF_IMAGES | {
    make.__name__: make
    for make in (rows.ablation, rows.curves, compare.operating_points, compare.comparison, compare.methods)
}
"""How the rows and the picture of a study are made, by its kind. Those of images need each of their runs."""


@dataclass(frozen=True, kw_only=True)
class Request(Options):
    """What is to be reproduced."""

    name: str  # of a study, or "all"
    recipe: Recipe  # of all runs, with its data
    recipe_name: str  # of the recipe that it was made from
    seeds: tuple[int, ...]  # every run is repeated with each
    budget: float | None = None  # seconds in which to train
    command: str = ""  # as it was given, for the record


Show = Callable[[Study, StudyResult], object]


def reproduce(request: Request, show: Show, say: Callable[[str], object]) -> list[Missing]:
    """Makes what is asked for. Runs that do not fit into the budget are left out and named.

    Args:
        show: receives each study as it is made.
        say: receives a line at each step.

    Returns:
        The runs that are not there.

    Raises:
        UsageError: no such study, a model that does not suit it.
        CfvitError: data, models or folders that cannot be used, or matplotlib is not installed.
    """
    require_matplotlib()
    studies = find_studies(request.name)
    _require_sense(request)
    require_writable(request.out / RUNS_FILE)
    conditions = conditions_of(dtype_of(request.recipe, best_device()), request.command)
    if request.runs is None and request.model is None:
        return _reproduce_with_runs(request, studies, conditions, show, say)
    recipe, of_given = request.recipe, _of_model if request.runs is None else _of_runs
    suited, sources, given = of_given(request, studies)
    beside = f", beside the plain ViT {request.plain}; eta chosen on {request.calibration_data}"
    account = _account(
        conditions,
        data=recipe.val_data or recipe.data[0],
        images=f"{len(sources.of(PLAIN)[0].validation.labels):,} scored",
        recipe=f"none, {given}{beside if request.plain else ''}",
        epochs="0",
        seeds="none",
    )
    for study in suited:
        made = make(study, sources)
        if study.kind in ("patches", "attention") and DEFAULT in sources.results:
            note = "In place of a plain ViT stands the backbone of the given CF-ViT, which was trained for both stages."
            made = replace(made, notes=(*made.notes, note))
        write_study(study, made, request.out, account)
        show(study, made)
    return []


def _require_sense(request: Request) -> None:
    """Refuses what contradicts itself, before anything is read."""
    recipe = request.recipe
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError(
            "cfvit reproduce is one process: train single runs by torchrun -m cfvit train into "
            f"{request.out / RUNS_FOLDER}/NAME-seedK, where they are found"
        )
    if not any(recipe.data):
        raise UsageError("no data: name what to train and to score on with --data")
    for name, value in papers_method(recipe).items():
        if (given := getattr(recipe, name)) != value:
            raise UsageError(
                f"{name} is {given!r}: the studies set it themselves, starting from {value!r}; leave it out"
            )
    pair = [request.plain is not None, request.calibration_data is not None]
    if request.runs is not None and (not all(pair) or request.model is not None or request.name not in OF_RUNS):
        raise UsageError(f"--runs needs --plain and --calibration-data, no --model, and is for {', '.join(OF_RUNS)}")
    of_model = request.model is not None and request.name == "table2"
    if any(pair) and not (all(pair) and (of_model or request.runs)):
        raise UsageError("--plain and --calibration-data go together, with --model for table2 or with --runs")
    if request.part and not all(pair):
        raise UsageError("--part divides images that --plain and --calibration-data are given for: give these")


def make(study: Study, sources: Sources) -> StudyResult:
    """Rows and picture of a study from what is there."""
    if study.kind in OF_IMAGES and not all(map(sources.of, study.runs)):  # then there is nothing to draw
        runs = [(variant, len(sources.of(variant.run))) for variant in study.variants]
        made = StudyResult([Row(v.label, {}, seeds, "", sources.missing.get(v.run)) for v, seeds in runs], None)
    else:
        made = KINDS[study.kind](study, sources)
    others = [family for family in FAMILIES if family != sources.family]
    notes = [note for note in study.notes if sources.family in note or not any(other in note for other in others)]
    notes += made.notes
    scored = next((result.validation for run in study.runs for result in sources.of(run)), None)
    if scored is not None:  # the validation images are the same for all runs of a study
        if study.kind not in OF_IMAGES:
            notes.append(rows.uncertainty(scored))
        if missing := missing_classes(scored.labels.tolist(), sources.class_names, len(scored.labels)):
            notes.append(f"Of the validation data, {missing}: nothing is known of them.")
    return replace(made, notes=tuple(notes))


def _reproduce_with_runs(
    request: Request, studies: Sequence[Study], conditions: Conditions, show: Show, say: Callable[[str], object]
) -> list[Missing]:
    """Studies of runs that are trained where they are not there; each study is written as soon as its runs are."""
    recipe, out = with_preprocessing(request.recipe), request.out
    splits = open_splits(recipe)
    if not splits.held:
        raise UsageError(f"holdout is {recipe.holdout}: eta is chosen on the hold-out, give a share such as 0.05")
    if splits.validation is None:
        raise CfvitError(f"{recipe.data[0]} has no validation images: name some with --val-data")
    runs = Runs(recipe, out / RUNS_FOLDER, request.budget, len(splits.kept), conditions, say)
    results: dict[str, list[Run]] = {}
    missing: dict[str, list[Missing]] = {}

    def publish(study: Study) -> None:
        """Makes a study of the runs that are there, and writes and shows it."""
        reasons = {name: "; ".join(f"{run.name} {run.reason}" for run in those) for name, those in missing.items()}
        made = make(study, Sources(results, reasons, recipe, splits.class_names, request.speed))
        for name, speed in made.speeds.items():  # kept for `runs.csv`
            first = results[name][0]
            replace(first.record, images_per_second=speed).write(first.folder)
        used = [run for name in study.runs for run in results.get(name, ())]
        write_study(study, made, out, _account_of_runs(request, used, conditions))
        show(study, made)

    waiting = list(studies)
    for seed in request.seeds:
        for spec in runs_needed(studies):
            made = runs.make(spec, seed)
            if isinstance(made, Missing):
                missing.setdefault(spec.name, []).append(made)
            else:
                results.setdefault(spec.name, []).append(made)
            for study in [s for s in waiting if all(len(results.get(r, ())) == len(request.seeds) for r in s.runs)]:
                publish(study)
                waiting.remove(study)
    for study in waiting:
        publish(study)
    write_runs(out / RUNS_FILE, runs.finished())
    say(f"written to {out}: {', '.join(study.name for study in studies)}")
    left_out = [run for those in missing.values() for run in those]
    for run in left_out:
        more = "" if run.seconds is None else f", about {duration(run.seconds)} more"
        say(f"not run: {run.name} {run.reason}{more}")
    if left_out:
        known = [run.seconds for run in left_out if run.seconds is not None]
        about = "about" if len(known) == len(left_out) else "at least"  # of some nobody knows the time
        left = f"; {about} {duration(sum(known))} are left" if known else ""
        say(f"the same command goes on from here{left}")
    return left_out


def _of_model(request: Request, studies: Sequence[Study]) -> tuple[Sequence[Study], Sources, str]:
    """Studies that need no more than one trained model, or for Table 2 that and a plain ViT."""
    model, recipe = str(request.model), request.recipe
    of_plain, parts = is_plain_vit(model), {}
    if request.plain is None or request.calibration_data is None:
        suited = [
            study
            for study in studies
            if study.kind in ("patches", "attention") or (not of_plain and study.runs == (DEFAULT,))
        ]
        if request.name != ALL and not suited:
            needed = "a plain ViT" if of_plain else "one trained model"
            raise UsageError(f"{request.name} needs more than {needed}: leave out --model and its runs are trained")
        results = results_of_model(model, recipe)
    else:
        variants = tuple(variant for variant in studies[0].variants if variant.run in (PLAIN, DEFAULT))
        etas = (compare.NEAR_PARITY, *studies[0].etas)
        suited = [replace(studies[0], kind="comparison", etas=etas, variants=variants)]
        network = load(model)
        rival = Contestant(create_method("cf_vit"), network, network.config, training=training_images(model))
        results, parts = compared({DEFAULT: rival}, request.plain, request.calibration_data, recipe, request.part)
    shown = results.get(DEFAULT, results.get(COARSE_GRID, []))[0]
    network, images = shown.open()
    sources = Sources(
        results,
        {},
        replace(recipe, backbone=network.config.backbone),
        images.source.class_names,
        speed=request.speed,
        plain="A plain ViT" if of_plain else "The backbone of a CF-ViT, run alone,",
        parts=parts,
    )
    return suited, sources, f"the model {model} as it was given"


def _of_runs(request: Request, studies: Sequence[Study]) -> tuple[Sequence[Study], Sources, str]:
    """Studies that set trained runs of any methods side by side."""
    folder, plain, held = request.runs, request.plain, request.calibration_data
    assert folder is not None and plain is not None and held is not None  # `_require_sense` has seen to it
    results, parts = compared(contestants_in(folder), plain, held, request.recipe, request.part)
    settings = list(compare.settings_of(results, compare.DROPS))
    speeds = compare.measure_speed(settings, request.recipe, rows.BATCH_SIZES) if request.speed else {}
    class_names = results[PLAIN][0].open()[1].source.class_names
    variants = tuple(Variant(name, name) for name in results)
    suited = [
        replace(study, title=OF_RUNS[study.name], kind="methods", variants=variants, notes=(), published=())
        for study in studies
        if study.name in OF_RUNS
    ]
    sources = Sources(results, {}, request.recipe, class_names, parts=parts, speeds=speeds)
    return suited, sources, f"the runs in {folder} as they were given"


def _account(conditions: Conditions, **run: str) -> dict[str, str]:
    """What was run, by name, in the order of reading."""
    where = asdict(conditions)
    at_the_end = {name: where.pop(name) for name in ("versions", "commit", "date")}
    trained_on = {"trained on": run.pop("trained_on", "")}
    return {"command": f"`{where.pop('command')}`", **run, **where, **trained_on, **at_the_end}


def _account_of_runs(request: Request, runs: Sequence[Run], conditions: Conditions) -> dict[str, str]:
    """What was run for a study; where and by what code, if that differs from here and now."""
    recipe, named = request.recipe, RECIPES[request.recipe_name].to_dict()
    skipped = {"data", "val_data", "seed", "epochs", "eval_interval", "workers", "log_interval", "checkpoint_interval"}
    changes = [f"{k} {value}" for k, value in recipe.to_dict().items() if k not in skipped and value != named[k]]
    images = "{train:,} to train on, {holdout:,} held out, {validation:,} to validate on (one is {point:.2g} points)"
    counts = [{**run.record.images, "point": 100 / run.record.images["validation"]} for run in runs[:1]]
    place = "{hardware}, {dtype}, {versions}, commit {commit}"
    elsewhere = {place.format(**run.record.conditions) for run in runs} - {place.format(**asdict(conditions))}
    return _account(
        conditions,
        data=recipe.data[0] if recipe.val_data is None else f"{recipe.data[0]}, validated on {recipe.val_data}",
        images=images.format(**counts[0]) if counts else "none, no run is there",
        recipe=f"{request.recipe_name}, with {', '.join(changes)}" if changes else request.recipe_name,
        epochs=str(recipe.epochs),
        seeds=", ".join(map(str, request.seeds)),
        trained_on="; ".join(sorted(elsewhere)),
    )


# Files


def write_study(study: Study, made: StudyResult, out: Path, account: Mapping[str, str]) -> None:
    """``NAME.csv``, ``NAME.png`` and ``NAME.md``; a former picture is removed where there is nothing to draw.

    Args:
        account: what was run, by name.
    """
    write_csv(out / f"{study.name}.csv", made.rows)
    picture, text = out / f"{study.name}.png", [f"# {study.title}", ""]
    if made.draw is None:
        picture.unlink(missing_ok=True)
    else:
        caption = "Ours: {data}, {images}; recipe {recipe}; epochs {epochs}; seed {seeds}; {hardware}, {dtype}. "
        made.draw(picture, f"{caption.format(**account)}Paper: {SETTING}.")
        text += [f"![{study.title}]({study.name}.png)", ""]
    text += markdown_table(*table_of(made.rows))
    text += ["", f"Columns headed *paper* and places are of {PAPER} ({SETTING}).", ""]
    text += [*(f"- {note}" for note in made.notes), *([""] if made.notes else ()), "## What was run", ""]
    text += [*(f"- {name}: {value}" for name, value in account.items() if value), ""]
    with atomic_write(out / f"{study.name}.md") as file:
        file.write_text("\n".join(text), encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line for each row; of each measure ours, the spread over seeds, and the paper's."""
    measures = _measures_of(rows)
    with_interval = {name for name in measures if any(row.cell(name).interval for row in rows)}

    def line(row: Row) -> dict[str, str]:
        """The columns of a row; what is not known stays empty."""
        values: dict[str, float | None] = {}
        for name in measures:
            cell = row.cell(name)
            values[name] = cell.ours
            values[f"{name}_spread"] = None if cell.ours is None else cell.spread
            values[f"{name}_paper"] = cell.paper
            if name in with_interval:
                values[f"{name}_low"], values[f"{name}_high"] = cell.interval or (None, None)
        figures = {name: _plain(value) for name, value in values.items()}
        return {"row": row.name, **figures, "seeds": str(row.seeds), "place": row.place, "missing": row.missing or ""}

    _write_lines(path, list(line(Row("", {}))), map(line, rows))


def _measures_of(rows: Sequence[Row]) -> list[str]:
    """Measures that some row has a figure of, in the order of `HEADINGS`."""
    return [name for name in HEADINGS if any(row.cell(name).known for row in rows)]


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _write_lines(path: Path, columns: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def table_of(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and words of a table: ours with the spread over several seeds, beside the paper's; no empty columns."""
    rows = [row for row in rows if row.shown]
    columns: list[list[str]] = [["", *(row.name for row in rows)]]
    for measure in _measures_of(rows):
        text, digits = HEADINGS[measure]
        cells = [row.cell(measure) for row in rows]
        columns.append([text])
        for row, cell in zip(rows, cells, strict=True):
            spread = f" (spread {cell.spread:.{digits}f})" if row.seeds > 1 else ""
            if cell.interval:
                low, high = (f"{end:.{max(1, digits - 1)}f}" for end in cell.interval)
                spread = f" [{low}, {high}]{' ?' * (not cell.sure)}"
            columns[-1].append("-" if cell.ours is None else f"{cell.ours:.{digits}f}{spread}")
        if any(cell.paper is not None for cell in cells):
            columns.append(["paper", *("-" if cell.paper is None else f"{cell.paper:g}" for cell in cells)])
    columns.append(["place in the paper", *(row.place for row in rows)])
    columns.append(["missing", *(row.missing or "" for row in rows)])
    headings, *lines = zip(*[column for column in columns if any(column[1:])], strict=True)
    return list(headings), [list(line) for line in lines]


def as_json(study: Study, row: Row) -> dict[str, Any]:
    """A row as one JSON object."""
    usual = {"interval": None, "sure": True}  # left out
    measures = {
        name: {key: value for key, value in asdict(cell).items() if key not in usual or value != usual[key]}
        for name, cell in row.cells.items()
        if cell.known
    }
    named = {"study": study.name, "row": row.name, "seeds": row.seeds}
    return {**named, "measures": measures, "place": row.place or None, "missing": row.missing}


def write_runs(path: Path, runs: Sequence[Run]) -> None:
    """One line for each finished run.

    Accuracy, exit share in percent, GMACs, eta and images/s are at parity with the plain ViT, or of that itself. What
    begins with ``training`` is the median of the training's log.
    """
    plains = {run.seed: run for run in runs if "plain" in run.validation.logits}
    columns = ("run", "model", "grid", "seed", "epochs", "coarse", "fine", "accuracy", "exit_share", "gmacs", "eta")
    columns += ("images_per_second", "seconds", "training_images_per_second", "training_matrix_share")
    columns += ("hardware", "dtype", "versions", "commit", "command")
    lines = []
    for run in runs:
        record, staged = run.record, "fine" in run.macs
        figures: dict[str, float | None] = {"images_per_second": record.images_per_second}
        figures |= {f"training_{name}": value for name, value in logged_speed(run.folder).items()}
        figures |= {name: MEASURES[name](run) for name in (("coarse", "fine") if staged else ("accuracy", "gmacs"))}
        if staged and run.seed in plains and (eta := run.parity(plains[run.seed])) is not None:
            figures |= {name: value for name, (value,) in rows.values_of(run.at([eta])).items()}
        about = {"model": f"{run.recipe.backbone}, method {record.method}", "epochs": run.recipe.epochs}
        about |= {"run": record.name, "grid": record.grid, "seed": record.seed, "seconds": f"{record.seconds:.0f}"}
        lines.append({**{name: _plain(value) for name, value in figures.items()}, **about, **record.conditions})
    _write_lines(path, columns, lines)
