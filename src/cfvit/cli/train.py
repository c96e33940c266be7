"""``cfvit train``, ``token-labels``, ``reproduce`` and ``demo``: the commands that train, or learn from training."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from cfvit.cli.application import app, print_json, print_line, print_table, say
from cfvit.cli.parameters import BatchSize, Flag, Json, Overrides, RecipeFile, Workers, read_recipe
from cfvit.errors import UsageError
from cfvit.paper import Options
from cfvit.training.recipe import RECIPES

if TYPE_CHECKING:
    from cfvit.paper.rows import StudyResult
    from cfvit.paper.studies import Study

SCORED_BY = frozenset({"data", "val_data", "seed", "precision", "workers", "eval_batch_size"})
"""Fields of a recipe that matter where networks are scored and not trained."""


@app.command
def train(
    *,
    out: Path | None = None,
    recipe: Annotated[str, Parameter(help=f"where to start from: {', '.join(RECIPES)}")] = "deit",
    config: RecipeFile = None,
    resume: Flag = False,
    print_recipe: Flag = False,
    overrides: Overrides = None,
) -> None:
    """Train a coarse-to-fine model, or with --method the plain ViT or one made cheaper in another way, by a recipe.

    Needs --data and --out. The recipe is overridden by --config, and that by the flags below;
    --print-recipe shows what results. Run it under torchrun for several GPUs or machines.

    Args:
        out: folder for the model, its log and its checkpoint
        resume: continue the run in --out from its last checkpoint
        print_recipe: print the final recipe as YAML and stop
    """
    final = read_recipe(recipe, config, overrides)
    if print_recipe:
        sys.stdout.write(final.to_yaml())
        return
    if out is None:
        raise UsageError("no --out: name a folder for the model, its log and its checkpoint")
    from cfvit.training.loop import train as run

    run(final, out, resume=resume)
    say(f"the model is in {out}")


@app.command
def token_labels(
    *,
    data: str,
    teacher: str,
    out: Path,
    weights: Path | None = None,
    size: PositiveInt = 18,
    batch_size: BatchSize = 32,
    workers: Workers = 2,
    json: Json = False,
) -> int:
    """Make label maps for token labelling: what a trained teacher sees at each place of each training image.

    Maps that are there are kept, so that a run that was stopped can be called again. A file that
    cannot be read is reported; the others still get their maps, and the exit status is 1 at the end.

    Args:
        data: training images: image folder or tar
        teacher: timm model trained on the same classes, or local-dir:FOLDER
        out: folder for the label maps, one sub-folder per class
        weights: the teacher's weights, a file; by default timm's own
        size: places on a side of a label map
    """
    from cfvit.data import open_data
    from cfvit.processes import best_device
    from cfvit.training.teacher import load_teacher
    from cfvit.training.tokens import make_token_labels

    source = open_data(data, "train")
    trained = load_teacher(teacher, len(source.class_names), weights, best_device())
    trained.require_dense()
    counts = make_token_labels(source, trained, out, size=size, batch_size=batch_size, workers=workers)
    for name, reason in counts.unreadable:
        say(f"cfvit: {name} has no label map: {reason}")
        if json:
            print_json(path=name, error=reason)
    if json:
        print_json(made=counts.made, there=counts.kept, unreadable=len(counts.unreadable), out=str(out))
    say(
        f"{counts.made} label map{'s' * (counts.made != 1)} made, {counts.kept} were there: "
        f"cfvit train --recipe lvvit --token-labels {out} ... learns from them"
    )
    return int(bool(counts.unreadable))


@app.command
def reproduce(
    name: str,
    /,
    *,
    recipe: Annotated[str, Parameter(help=f"by which all runs are trained: {', '.join(RECIPES)}")] = "deit",
    config: RecipeFile = None,
    options: Annotated[Options | None, Parameter(name="*")] = None,
    seeds: tuple[int, ...] | None = None,
    budget: str | None = None,
    json: Json = False,
    overrides: Overrides = None,
) -> None:
    """Make a table or figure of the paper on your own data, beside the paper's own figures.

    Needs --data. Trains the runs that are not there yet, each once; writes NAME.csv, NAME.png and NAME.md with what
    was run. The same command goes on where it was stopped. Runs that do not fit into the budget are left out and named.

    Args:
        name: table1 ... table8, fig1a, fig1b, fig5 ... fig9, or all
        seeds: repeat each run with these; by default the recipe's
        budget: time for training, such as 2h, 90m or 300s
    """
    from cfvit.paper.studies import find_studies

    find_studies(name)
    final = read_recipe(recipe, config, overrides)
    chosen = (final.seed,) if seeds is None else tuple(dict.fromkeys(seeds))
    if not chosen or min(chosen) < 0:
        problem = "--seeds has no number" if not chosen else f"seed {min(chosen)} is below 0"
        raise UsageError(f"{problem}: give numbers from 0, as in --seeds 0 1 2")
    options = options or Options()
    if options.model is not None or options.runs is not None:
        given = {"recipe": recipe != "deit", "seeds": seeds is not None, "budget": budget is not None}
        given |= dict.fromkeys(overrides or (), True)
        if training := [name.replace("_", "-") for name, there in given.items() if there and name not in SCORED_BY]:
            raise UsageError(
                f"--{training[0]} is for training, and with --{'model' if options.model else 'runs'} nothing is "
                "trained: leave it out"
            )
    from cfvit.paper.runs import parse_budget
    from cfvit.paper.write import Request, as_json, reproduce, table_of

    def show(study: Study, made: StudyResult) -> None:
        """Prints the rows and notes of a study, or its rows as JSON."""
        if json:
            for row in made.rows:
                print_json(**as_json(study, row))
            return
        print_line(study.title)
        print_table(*table_of(made.rows))
        for line in (*(f"- {note}" for note in made.notes), ""):
            print_line(line)

    request = Request(
        **vars(options),
        name=name,
        recipe=final,
        recipe_name=recipe,
        seeds=chosen,
        budget=None if budget is None else parse_budget(budget),
        command=shlex.join(["cfvit", *sys.argv[1:]]),
    )
    reproduce(request, show, say)


@app.command
def demo(*, out: Path = Path("demo"), epochs: PositiveInt | None = None) -> None:
    """Train on handwritten digits, compare with the plain ViT, classify two photos: some minutes on a CPU.

    Args:
        out: folder for the pictures
        epochs: shorter or longer training
    """
    from cfvit.cli.digits_demo import run_demo

    run_demo(out, epochs)
