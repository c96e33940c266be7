"""``cfvit reproduce``: the paper's tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from cfvit.cli.application import app
from cfvit.cli.output import print_json, say
from cfvit.cli.parameters import NO_OVERRIDES, Json, Overrides, given_fields
from cfvit.errors import UsageError
from cfvit.training.recipe import RECIPES, load_recipe

if TYPE_CHECKING:
    from cfvit.paper.rows import Row
    from cfvit.paper.studies import Study


@app.command
def reproduce(
    name: Annotated[str, Parameter(help="table1 ... table8, fig1a, fig1b, fig5 ... fig9, or all")],
    /,
    *,
    recipe: Annotated[str, Parameter(help=f"by which all runs are trained: {', '.join(RECIPES)}")] = "deit",
    config: Annotated[Path | None, Parameter(help="YAML of recipe fields, such as a run's recipe.yaml")] = None,
    model: Annotated[
        str | None,
        Parameter(help="train nothing: a saved folder, .pth or bundled name; for fig1a and fig1b also a timm ViT"),
    ] = None,
    out: Annotated[Path, Parameter(help="folder for tables, pictures and runs")] = Path("reproduction"),
    seeds: Annotated[
        tuple[int, ...] | None,
        Parameter(help="repeat each run with these; by default the recipe's", consume_multiple=True, negative=""),
    ] = None,
    budget: Annotated[str | None, Parameter(help="time for training, such as 2h, 90m or 300s")] = None,
    speed: Annotated[bool, Parameter(help="whether table2 measures images per second")] = True,
    json: Json = False,
    overrides: Annotated[Overrides, Parameter(name="*", group="Recipe fields")] = NO_OVERRIDES,
) -> None:
    """Make a table or figure of the paper on your own data, the paper's own figures beside it.

    Needs --data. Trains what is not there yet, each run once whatever needs it; writes NAME.csv, NAME.png and
    NAME.md with what was run. The same command goes on where it was stopped; what does not fit into the
    budget is left out and told.
    """
    from cfvit.paper.budget import parse_budget
    from cfvit.paper.studies import find_studies

    find_studies(name)
    given = given_fields(overrides)
    final = load_recipe(recipe, config, given)
    chosen = _seeds((final.seed,) if seeds is None else seeds)
    seconds = None if budget is None else parse_budget(budget)
    from cfvit.paper.command import command_line
    from cfvit.paper.reproduce import Request, reproduce

    start = None if model is not None and recipe == "deit" else recipe  # a model that is given has none
    flags = {"recipe": start, "config": config, "model": model, "out": out, "seeds": seeds, "budget": budget}
    request = Request(
        name=name,
        recipe=final,
        recipe_name=recipe,
        out=out,
        seeds=chosen,
        budget=seconds,
        model=model,
        speed=speed,
        command=command_line(name, {**flags, "speed": None if speed else False, **given}),
    )

    reproduce(request, partial(_print_study, json=json), say)


def _print_study(study: Study, rows: Sequence[Row], notes: Sequence[str], json: bool) -> None:
    from cfvit.paper.writing import as_json, print_table

    if json:
        for row in rows:
            print_json(**as_json(study, row))
    else:
        print_table(study, rows, notes)


def _seeds(given: tuple[int, ...]) -> tuple[int, ...]:
    """Seeds as given, each once; those of a generator are whole numbers from 0."""
    if not given or min(given) < 0:
        said = "--seeds has no number" if not given else f"seed {min(given)} is below 0"
        raise UsageError(f"{said}: give numbers from 0, as in --seeds 0 1 2")
    return tuple(dict.fromkeys(given))
