"""The command line. Each command is a thin layer over the library; torch is loaded when needed."""

from __future__ import annotations

import dataclasses
import json as _json
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number

import cfvit
from cfvit.errors import CfvitError, UsageError
from cfvit.training.recipes import RECIPES, Recipe, load_recipe

if TYPE_CHECKING:
    from rich.table import Table

    from cfvit.evaluation.metrics import Evaluation
    from cfvit.prediction import FileAnswer

app = App(
    name="cfvit",
    help="Coarse-to-fine vision transformers: easy images at a glance, hard ones re-read where it matters.\n\n"
    "Any command takes --debug, which shows the traceback of an error.",
    version=cfvit.__version__,
    print_error=False,
    exit_on_error=False,
)

Threshold = Annotated[
    float | None,
    Parameter(
        validator=Number(gte=0, lte=1),
        help="eta, the confidence at which the coarse answer is given; by default the model's",
    ),
]
Model = Annotated[str, Parameter(help="saved folder, authors' .pth, or a bundled name (see cfvit models)")]
Json = Annotated[bool, Parameter(negative="", help="one JSON object per line on stdout, nothing else there")]
BatchSize = Annotated[int, Parameter(validator=Number(gte=1), help="images per batch")]
Share = Annotated[float, Parameter(validator=Number(gte=0, lte=1))]

DEFAULT_MODEL = "deit_tiny_imagenette"
COSTED_BACKBONES = (
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "deit_small_distilled_patch16_224",
    "deit3_small_patch16_224",
    "lvvit_tiny_patch16_224",
    "lvvit_small_patch16_224",
    "lvvit_medium_patch16_224",
    "vit_small_patch32_224",
    "vit_base_patch8_224",
    "vit_large_patch16_224",
    "vit_base_patch16_clip_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "eva02_small_patch14_224",
    "vit_base_patch16_rope_224",
)
DEFAULT_THRESHOLDS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 1 failed on the data or the model, 2 wrong usage."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        status = app([word for word in words if word != "--debug"], result_action="return_value")
        sys.stdout.flush()
    except (CycloptsError, UsageError) as error:
        _fail(error, 2, debug)
    except BrokenPipeError:  # whoever read the output has seen enough, as in `cfvit predict ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (CfvitError, OSError) as error:
        _fail(error, 1, debug)
    except Exception as error:
        _fail(CfvitError(f"unexpected {type(error).__name__}: {error}; add --debug to see where"), 1, debug, error)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(error: Exception, status: int, debug: bool, cause: Exception | None = None) -> typing.NoReturn:
    if debug:
        raise cause or error
    _say(f"cfvit: {' '.join(str(error).split())}")
    sys.exit(status)


def _say(text: str) -> None:
    """A line on standard error, which leaves standard output to the answers."""
    sys.stderr.write(text + "\n")


def _print(text: str) -> None:
    """A line on standard output; characters that it cannot show, as in odd file names, are escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")


STAGES = ("coarse", "fine")


def _print_json(**values: Any) -> None:
    _print(_json.dumps(values))


@app.command
def predict(
    paths: Annotated[list[Path], Parameter(help="image files, and folders of them", consume_multiple=True)],
    /,
    *,
    model: Model = DEFAULT_MODEL,
    threshold: Threshold = None,
    json: Json = False,
    explain: Annotated[Path | None, Parameter(help="write a picture per image to this folder")] = None,
    batch_size: BatchSize = 32,
) -> int:
    """Classify images: label, confidence, the stage that answered and what it cost.

    A file that cannot be read is reported; the others still get their answers, and the exit
    status is 1 at the end.
    """
    from cfvit.checkpoints import load
    from cfvit.data import find_images
    from cfvit.flops import count_macs
    from cfvit.inference import Predictor
    from cfvit.prediction import FileFailure, classify_files
    from cfvit.processes import best_device

    predictor = Predictor(load(model).to(best_device()), threshold)
    files = find_images(paths)
    if explain is not None and any(file.resolve().parent == explain.resolve() for file in files):
        raise UsageError(
            f"--explain {explain} holds images that are to be read: choose another folder for the pictures"
        )
    macs = count_macs(predictor.model)
    watch = {}
    if explain is not None:
        from cfvit.evaluation.explain import PictureFolder

        watch["watch"] = PictureFolder(explain, predictor.model, predictor.threshold)
    width = max(len(str(path)) for path in files)
    answers: list[FileAnswer] = []
    for result in classify_files(files, predictor, batch_size, macs=macs, **watch):
        if isinstance(result, FileFailure):
            _say(f"cfvit: {result.path}: {result.error}")
            if json:
                _print_json(path=str(result.path), error=result.error)
            continue
        answers.append(result)
        if json:
            _print_json(**{**dataclasses.asdict(result), "path": str(result.path)})
        else:
            stage = STAGES[result.stage]
            answer = f"{result.label:24} {result.confidence:6.1%}  {stage:6}  {result.gmacs:.3f} GMACs"
            _print(f"{result.path!s:{width}}  {answer}")
    if answers:
        _say(_summary(answers, macs.backbone / 1e9, predictor.threshold))
    return int(len(answers) < len(files))


def _summary(answers: Sequence[FileAnswer], plain: float, threshold: float) -> str:
    easy = sum(answer.stage == 0 for answer in answers)
    mean = sum(answer.gmacs for answer in answers) / len(answers)
    return (
        f"{len(answers)} image{'s' * (len(answers) > 1)}: {easy} answered at the coarse stage (eta {threshold:.2f}), "
        f"{mean:.3f} GMACs each, plain backbone {plain:.3f}: {_saving(mean, plain)}"
    )


def _saving(spent: float, plain: float) -> str:
    return f"{1 - spent / plain:.0%} saved" if spent <= plain else f"{spent / plain - 1:.0%} more"


@app.command(name="eval")
def evaluate(
    *,
    data: Annotated[str, Parameter(help="image folder, tar, or timm data set (hfds/..., torch/...)")],
    model: Model = DEFAULT_MODEL,
    thresholds: Annotated[
        tuple[float, ...],
        Parameter(validator=Number(gte=0, lte=1), help="values of eta to report", consume_multiple=True, negative=""),
    ] = DEFAULT_THRESHOLDS,
    json: Json = False,
    batch_size: BatchSize = 64,
    workers: Annotated[int, Parameter(validator=Number(gte=0), help="processes that load images")] = 2,
) -> int:
    """Accuracy of both stages, and accuracy, exit share and expected GMACs over a sweep of eta.

    Under torchrun the images are shared among the processes, each counted once.
    """
    from cfvit.checkpoints import load
    from cfvit.data import open_data
    from cfvit.evaluation.metrics import evaluate_model
    from cfvit.processes import join_processes

    network = load(model)
    source = open_data(data, "validation")
    if network.class_names is not None:
        source = source.aligned(network.class_names)
    elif len(source.class_names) != network.config.num_classes:
        raise CfvitError(
            f"{data} has {len(source.class_names)} classes, the model has {network.config.num_classes} without names: "
            "give data with all of its classes"
        )
    with join_processes() as process:
        result = evaluate_model(network, source, thresholds, batch_size, workers, process)
        if process.leads:
            _print_evaluation(result, as_json=json)
    for name in result.unreadable:
        if process.leads:
            _say(f"cfvit: {name} cannot be read and is not counted")
    return int(bool(result.unreadable))


def _print_evaluation(result: Evaluation, as_json: bool) -> None:
    if as_json:
        for stage in result.stages:
            _print_json(**dataclasses.asdict(stage))
        for point in result.sweep:
            _print_json(**dataclasses.asdict(point))
        return
    from rich.table import Table

    stages = Table(
        "stage", "top-1 %", "top-5 %", "GMACs", title=f"{result.images} images", box=None, title_justify="left"
    )
    for stage in result.stages:
        stages.add_row(stage.stage, f"{stage.top1:.2f}", f"{stage.top5:.2f}", f"{stage.gmacs:.3f}")
    trade = Table("eta", "top-1 %", "exit share", "GMACs", "against plain", box=None)
    for point in result.sweep:
        mark = " (the model's)" if point.threshold == result.calibrated else ""
        cost = _saving(point.gmacs, result.backbone_gmacs)
        trade.add_row(
            f"{point.threshold:.3g}{mark}",
            f"{point.accuracy:.2f}",
            f"{point.exit_share:.1%}",
            f"{point.gmacs:.3f}",
            cost,
        )
    _show(stages)
    _print("")
    _show(trade)


def _overrides_class() -> type:
    """All fields of a recipe as optional flags, so that only those given override it."""
    hints = typing.get_type_hints(Recipe)
    return dataclasses.make_dataclass(
        "Overrides",
        [
            (f.name, Annotated[hints[f.name] | None, Parameter(help=f.metadata["help"], show_default=False)], None)
            for f in dataclasses.fields(Recipe)
        ],
        kw_only=True,
        frozen=True,
        namespace={"__module__": __name__},  # cyclopts takes a class of module "types" for a built-in
    )


if TYPE_CHECKING:
    Overrides = Recipe
else:
    Overrides = _overrides_class()
NO_OVERRIDES = Overrides()


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
    """Train a coarse-to-fine model, or with --backbone-only the plain ViT, by a recipe.

    Needs --data and --out. The recipe is overridden by --config, and that by the flags below;
    --print-recipe shows what results. Run it under torchrun for several GPUs or machines.
    """
    given = {name: value for name, value in dataclasses.asdict(overrides).items() if value is not None}
    if "timm_kwargs" in given:
        given["timm_kwargs"] = {name.replace("-", "_"): value for name, value in given["timm_kwargs"].items()}
    final = load_recipe(recipe, config, given)
    if print_recipe:
        sys.stdout.write(final.to_yaml())
        return
    if out is None:
        raise UsageError("no --out: name a folder for the model, its log and its checkpoint")
    from cfvit.training.loop import train as run

    run(final, out, resume=resume)
    _say(f"the model is in {out}")


@app.command
def token_labels(
    *,
    data: Annotated[str, Parameter(help="training images: image folder or tar")],
    teacher: Annotated[str, Parameter(help="timm model trained on the same classes, or local-dir:FOLDER")],
    out: Annotated[Path, Parameter(help="folder for the label maps, one sub-folder per class")],
    weights: Annotated[Path | None, Parameter(help="the teacher's weights, a file; by default timm's own")] = None,
    size: Annotated[int, Parameter(validator=Number(gte=1), help="places on a side of a label map")] = 18,
    batch_size: BatchSize = 32,
    workers: Annotated[int, Parameter(validator=Number(gte=0), help="processes that load images")] = 2,
    json: Json = False,
) -> int:
    """Make label maps for token labelling: what a trained teacher sees at each place of each training image.

    Maps that are there are kept, so that a run that was stopped can be called again. A file that
    cannot be read is reported; the others still get their maps, and the exit status is 1 at the end.
    """
    from cfvit.data import open_data
    from cfvit.processes import best_device
    from cfvit.training.labelling import make_token_labels
    from cfvit.training.teacher import load_teacher

    source = open_data(data, "train")
    trained = load_teacher(teacher, len(source.class_names), weights, best_device())
    counts = make_token_labels(source, trained, out, size=size, batch_size=batch_size, workers=workers)
    for name, reason in counts.unreadable:
        _say(f"cfvit: {name} has no label map: {reason}")
        if json:
            _print_json(path=name, error=reason)
    if json:
        _print_json(made=counts.made, there=counts.there, unreadable=len(counts.unreadable), out=str(out))
    _say(
        f"{counts.made} label map{'s' * (counts.made != 1)} made, {counts.there} were there: "
        f"cfvit train --recipe lvvit --token-labels {out} ... learns from them"
    )
    return int(bool(counts.unreadable))


@app.command
def convert(
    source: Annotated[Path, Parameter(help="one of the authors' .pth files; it is only read")],
    folder: Annotated[Path, Parameter(help="where to write config.json and model.safetensors")],
    /,
    *,
    overwrite: Annotated[bool, Parameter(negative="", help="replace a model that is there")] = False,
) -> None:
    """Turn one of the authors' checkpoints into a saved folder."""
    from cfvit.checkpoints import CONFIG_FILE, load_authors_checkpoint, save

    if not source.is_file():
        raise CfvitError(f"no file {source}: name one of the authors' .pth files")
    if (folder / CONFIG_FILE).exists() and not overwrite:
        raise CfvitError(f"{folder} already holds a model: choose another folder or add --overwrite")
    model = load_authors_checkpoint(source)
    save(model, folder)
    _say(f"{model.config.backbone}, coarse grid {model.config.coarse_grid}, is in {folder}")


@app.command
def models() -> None:
    """List the bundled models with their size and cost."""
    from rich.table import Table

    from cfvit.checkpoints import bundled_models, load
    from cfvit.flops import count_macs

    table = Table("name", "backbone", "classes", "image", "eta", "GMACs coarse", "both", "plain", box=None)
    for name in bundled_models():
        model = load(name)
        macs = count_macs(model)
        eta = "-" if model.threshold is None else f"{model.threshold:.2f}"
        costs = (f"{cost / 1e9:.2f}" for cost in (macs.coarse, macs.both, macs.backbone))
        size = "x".join(map(str, model.image_size))
        table.add_row(name, model.config.backbone, str(model.config.num_classes), size, eta, *costs)
    _show(table)


@app.command
def cost(
    backbones: Annotated[
        tuple[str, ...], Parameter(help="timm's names, or lvvit_...; by default a selection", show_default=False)
    ] = COSTED_BACKBONES,
    /,
    *,
    coarse_grid: Annotated[str, Parameter(help="side of the coarse grid in cells, or ROWSxCOLUMNS")] = "7",
    fine_share: Annotated[
        tuple[Share, ...],
        Parameter(help="shares of images that go on, to give the mean cost for", consume_multiple=True),
    ] = (0.24, 0.5),
    json: Json = False,
) -> None:
    """Tell what backbones would cost in two stages, before any training: parameters and GMACs of an image.

    The output is a Markdown table; nothing is downloaded or computed, only counted.
    """
    import torch

    from cfvit.flops import count_macs
    from cfvit.model import create_model

    shares = [f"{share:.0%} hard" for share in fine_share]
    columns = ["backbone", "pixels", "parameters, M", "plain", "coarse", "both", *shares]
    rows = []
    for name in backbones:
        with torch.device("meta"):
            model = create_model(name, coarse_grid=Recipe(coarse_grid=coarse_grid).grid)
        macs, size = count_macs(model), "x".join(map(str, model.image_size))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        costs = [macs.backbone, macs.coarse, macs.both, *(macs.expected(share) for share in fine_share)]
        if json:
            figures = dict(zip(columns[3:], costs, strict=True))
            _print_json(backbone=name, pixels=model.image_size, parameters=parameters, macs=figures)
        rows.append([name, size, f"{parameters / 1e6:.1f}", *(f"{cost / 1e9:.2f}" for cost in costs)])
    if not json:
        for row in (columns, ["---"] * len(columns), *rows):
            sys.stdout.write(f"| {' | '.join(row)} |\n")


@app.command
def bench(
    *,
    model: Model = DEFAULT_MODEL,
    batch_sizes: Annotated[
        tuple[int, ...], Parameter(validator=Number(gte=1), help="images per call", consume_multiple=True, negative="")
    ] = (1, 8, 32),
    fine_share: Annotated[Share, Parameter(help="share of images that go on to the fine stage")] = 0.25,
    rounds: Annotated[int, Parameter(validator=Number(gte=1), help="timed calls of each")] = 10,
    json: Json = False,
) -> None:
    """Time the plain backbone, each stage and the predictor in turn, on random images."""
    import torch
    from rich.table import Table

    from cfvit.checkpoints import load
    from cfvit.evaluation.bench import bench as run
    from cfvit.processes import join_processes

    network = load(model)
    table = Table("batch", "what", "images/s", "speed-up", "by MACs", "slowest/fastest", box=None)
    with join_processes() as process:
        network.to(process.device)
        for size in batch_sizes:
            images = torch.randn(size, 3, *network.image_size, device=process.device)
            for row in run(network, images, fine_share, rounds):
                if json:
                    _print_json(**dataclasses.asdict(row))
                table.add_row(
                    str(size),
                    row.name,
                    f"{row.images_per_second:.1f}",
                    f"{row.speedup:.2f}",
                    f"{row.macs_ratio:.2f}",
                    f"{row.spread:.2f}",
                )
    if not json:
        _show(table)


@app.command
def demo(
    *,
    out: Annotated[Path, Parameter(help="folder for the pictures")] = Path("demo"),
    epochs: Annotated[int | None, Parameter(validator=Number(gte=1), help="shorter or longer training")] = None,
) -> None:
    """Train on handwritten digits, compare with the plain ViT, classify two photos: some minutes on a CPU."""
    from cfvit.demo import run_demo

    run_demo(out, epochs)


def _show(table: Table) -> None:
    """A table at its full width, however narrow the terminal: a shortened name is of no use."""
    from rich.console import Console

    Console(width=1000).print(table)


if __name__ == "__main__":
    main()
