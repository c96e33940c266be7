"""``cfvit reproduce``: the paper's tables and figures."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from cfvit.cli.application import app
from cfvit.cli.output import print_json, say
from cfvit.cli.parameters import NO_OVERRIDES, Json, Overrides, given_fields
from cfvit.errors import UsageError
from cfvit.training.recipe import RECIPES, load_recipe

if TYPE_CHECKING:
    from cfvit.paper.rows import Made
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
    runs: Annotated[
        Path | None,
        Parameter(
            help="for table3, fig5 or all: train nothing, set the runs in this folder, of any methods, side by side"
        ),
    ] = None,
    plain: Annotated[
        str | None,
        Parameter(
            help="for table2 of a model, or with --runs: the plain ViT to compare with, a file of weights or a timm ViT"
        ),
    ] = None,
    calibration_data: Annotated[
        str | None, Parameter(help="with --plain: images that eta is chosen on; --data is only scored")
    ] = None,
    part: Annotated[
        tuple[Path, ...],
        Parameter(help="with --plain: file that names a class on each line, for rows of these classes alone"),
    ] = (),
    out: Annotated[Path, Parameter(help="folder for tables, pictures and runs")] = Path("reproduction"),
    seeds: Annotated[
        tuple[int, ...] | None,
        Parameter(help="repeat each run with these; by default the recipe's", consume_multiple=True, negative=""),
    ] = None,
    budget: Annotated[str | None, Parameter(help="time for training, such as 2h, 90m or 300s")] = None,
    speed: Annotated[bool, Parameter(help="whether table2, or --runs, measures images per second")] = True,
    json: Json = False,
    overrides: Annotated[Overrides, Parameter(name="*", group="Recipe fields")] = NO_OVERRIDES,
) -> None:
    """Make a table or figure of the paper on your own data, beside the paper's own figures.

    Needs --data. Trains the runs that are not there yet, each once; writes NAME.csv, NAME.png and NAME.md with what
    was run. The same command goes on where it was stopped. Runs that do not fit into the budget are left out and named.
    """
    from cfvit.paper.studies import find_studies

    find_studies(name)
    final = load_recipe(recipe, config, given_fields(overrides))
    chosen = (final.seed,) if seeds is None else tuple(dict.fromkeys(seeds))
    if not chosen or min(chosen) < 0:
        problem = "--seeds has no number" if not chosen else f"seed {min(chosen)} is below 0"
        raise UsageError(f"{problem}: give numbers from 0, as in --seeds 0 1 2")
    from cfvit.paper.runs import parse_budget
    from cfvit.paper.write import Request, as_json, print_table, reproduce

    def show(study: Study, made: Made) -> None:
        for row in made.rows if json else ():
            print_json(**as_json(study, row))
        if not json:
            print_table(study, made)

    request = Request(
        name=name,
        recipe=final,
        recipe_name=recipe,
        out=out,
        seeds=chosen,
        budget=None if budget is None else parse_budget(budget),
        model=model,
        runs=runs,
        plain=plain,
        calibration_data=calibration_data,
        parts=part,
        speed=speed,
        command=shlex.join(["cfvit", *sys.argv[1:]]),
    )
    reproduce(request, show, say)
