"""``cfvit train`` and ``cfvit token-labels``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from cfvit.cli.application import app
from cfvit.cli.output import print_json, say
from cfvit.cli.parameters import NO_OVERRIDES, BatchSize, Json, Overrides, Workers, given_fields
from cfvit.errors import UsageError
from cfvit.training.recipe import RECIPES, load_recipe


@app.command
def train(
    *,
    out: Annotated[Path | None, Parameter(help="folder for the model, its log and its checkpoint")] = None,
    recipe: Annotated[str, Parameter(help=f"where to start from: {', '.join(RECIPES)}")] = "deit",
    config: Annotated[Path | None, Parameter(help="YAML of recipe fields, such as a run's recipe.yaml")] = None,
    resume: Annotated[bool, Parameter(negative="", help="continue the run in --out from its last checkpoint")] = False,
    print_recipe: Annotated[bool, Parameter(negative="", help="print the final recipe as YAML and stop")] = False,
    overrides: Annotated[Overrides, Parameter(name="*", group="Recipe fields")] = NO_OVERRIDES,
) -> None:
    """Train a coarse-to-fine model, or with --method plain the plain ViT, by a recipe.

    Needs --data and --out. The recipe is overridden by --config, and that by the flags below;
    --print-recipe shows what results. Run it under torchrun for several GPUs or machines.
    """
    final = load_recipe(recipe, config, given_fields(overrides))
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
    data: Annotated[str, Parameter(help="training images: image folder or tar")],
    teacher: Annotated[str, Parameter(help="timm model trained on the same classes, or local-dir:FOLDER")],
    out: Annotated[Path, Parameter(help="folder for the label maps, one sub-folder per class")],
    weights: Annotated[Path | None, Parameter(help="the teacher's weights, a file; by default timm's own")] = None,
    size: Annotated[int, Parameter(validator=Number(gte=1), help="places on a side of a label map")] = 18,
    batch_size: BatchSize = 32,
    workers: Workers = 2,
    json: Json = False,
) -> int:
    """Make label maps for token labelling: what a trained teacher sees at each place of each training image.

    Maps that are there are kept, so that a run that was stopped can be called again. A file that
    cannot be read is reported; the others still get their maps, and the exit status is 1 at the end.
    """
    from cfvit.data import open_data
    from cfvit.processes import best_device
    from cfvit.training.teacher import load_teacher
    from cfvit.training.tokens.labelling import make_token_labels

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
