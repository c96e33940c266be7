"""The command line. Each command is a thin layer over the library; torch is loaded when needed."""

from __future__ import annotations

import contextlib
import dataclasses
import json as _json
import os
import shlex
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from cyclopts.validators import Number

import cfvit
from cfvit.errors import CfvitError, UsageError
from cfvit.training.recipes import RECIPES, Recipe, load_recipe, read_value
from cfvit.variants import Mode

if TYPE_CHECKING:
    from rich.table import Table

    from cfvit.benchmark.measure import Batch
    from cfvit.benchmark.report import Bench
    from cfvit.calibration import Calibration, Drift, Target
    from cfvit.confidence import Measure
    from cfvit.data import DataSource
    from cfvit.evaluation.explain import PictureFolder
    from cfvit.evaluation.metrics import Evaluation
    from cfvit.inference import Predictor
    from cfvit.model import CoarseToFineViT
    from cfvit.prediction import FileAnswer, FileFailure
    from cfvit.reproduction.rows import Row
    from cfvit.reproduction.studies import Study

    BenchWatch = Callable[[Batch, Bench], None]

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
CalibrationFile = Annotated[
    Path | None, Parameter(name="--calibration", help="use this calibration.json instead of the model's own eta")
]
Json = Annotated[bool, Parameter(negative="", help="one JSON object per line on stdout, nothing else there")]
BatchSize = Annotated[int, Parameter(validator=Number(gte=1), help="images per batch")]
Workers = Annotated[int, Parameter(validator=Number(gte=0), help="processes that load images")]
Share = Annotated[float, Parameter(validator=Number(gte=0, lte=1))]

Made = typing.TypeVar("Made")

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
REPORT_FILE = "report.html"


def _print_json(**values: Any) -> None:
    _print(_json.dumps(values))


@app.command
def predict(
    paths: Annotated[list[Path], Parameter(help="image files, and folders of them", consume_multiple=True)],
    /,
    *,
    model: Model = DEFAULT_MODEL,
    threshold: Threshold = None,
    calibration: CalibrationFile = None,
    json: Json = False,
    explain: Annotated[Path | None, Parameter(help="write a picture per image to this folder")] = None,
    scaled_decode: Annotated[
        bool, Parameter(negative="", help="decode large JPEGs in part for the coarse stage: quicker, other pixels")
    ] = False,
    batch_size: BatchSize = 32,
) -> int:
    """Classify images: label, confidence, the stage that answered and what it cost.

    A file that cannot be read is reported; the others still get their answers, and the exit
    status is 1 at the end.
    """
    from cfvit.data import find_images
    from cfvit.flops import count_macs
    from cfvit.inference import Predictor
    from cfvit.prediction import FileAnswer, classify_files
    from cfvit.processes import best_device

    if explain is not None and scaled_decode:
        raise UsageError("--explain draws whole images and --scaled-decode does not decode them: leave one out")
    predictor = Predictor(_load(model, calibration).to(best_device()), threshold)
    files = find_images(paths)
    watch = {} if explain is None else {"watch": _pictures(explain, files, predictor)}
    macs = count_macs(predictor.model)
    width = max(len(str(path)) for path in files)
    answers: list[FileAnswer] = []
    for result in classify_files(files, predictor, batch_size, macs=macs, scaled_decode=scaled_decode, **watch):
        if isinstance(result, FileAnswer):
            answers.append(result)
            _print_answer(result, width, predictor.model.exit_rule.measure, json)
        else:
            _tell_failure(result, json)
    if answers:
        _say(_summary(answers, macs.backbone / 1e9, predictor.threshold))
    return int(len(answers) < len(files))


def _pictures(folder: Path, files: Sequence[Path], predictor: Predictor) -> PictureFolder:
    """A folder for pictures, which is none that the files come from."""
    from cfvit.evaluation.explain import PictureFolder

    if any(file.resolve().parent == folder.resolve() for file in files):
        raise UsageError(f"--explain {folder} holds images that are to be read: choose another folder for the pictures")
    return PictureFolder(folder, predictor.model, predictor.threshold)


def _print_answer(answer: FileAnswer, width: int, measure: Measure, as_json: bool) -> None:
    if as_json:
        _print_json(**{**dataclasses.asdict(answer), "path": str(answer.path)})
        return
    from cfvit.evaluation.breakdown import shown_confidence

    sure = shown_confidence(answer.confidence, measure)
    told = f"{answer.label:24} {sure:>6}  {STAGES[answer.stage]:6}  {answer.gmacs:.3f} GMACs"
    _print(f"{answer.path!s:{width}}  {told}")


def _tell_failure(failure: FileFailure, as_json: bool) -> None:
    _say(f"cfvit: {failure.path}: {failure.error}")
    if as_json:
        _print_json(path=str(failure.path), error=failure.error)


def _load(model: str, calibration: Path | None) -> CoarseToFineViT:
    from cfvit.checkpoints import apply_calibration, load

    with _warnings_said():
        network = load(model)
        if calibration is not None:
            apply_calibration(network, calibration)
    return network


@contextlib.contextmanager
def _warnings_said() -> Iterator[None]:
    """Gives each warning a line on standard error, without the place in the code that Python adds."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        _say(f"cfvit: {' '.join(str(warning.message).split())}")


def _summary(answers: Sequence[FileAnswer], plain: float, threshold: float) -> str:
    easy = sum(answer.stage == 0 for answer in answers)
    mean = sum(answer.gmacs for answer in answers) / len(answers)
    return (
        f"{len(answers)} image{'s' * (len(answers) > 1)}: {easy} answered at the coarse stage (eta {_eta(threshold)}), "
        f"{mean:.3f} GMACs each, plain backbone {plain:.3f}: {_saving(mean, plain)}"
    )


def _eta(value: float) -> str:
    """Three digits, or as many more as tell it from 1, which no image would pass."""
    digits = 3
    while value < 1 == float(f"{value:.{digits}g}"):
        digits += 1
    return f"{value:.{digits}g}"


def _saving(spent: float, plain: float) -> str:
    return f"{1 - spent / plain:.0%} saved" if spent <= plain else f"{spent / plain - 1:.0%} more"


Data = Annotated[str, Parameter(help="image folder, tar, or timm data set (hfds/..., torch/...)")]


@app.command(name="eval")
def evaluate(
    *,
    data: Data,
    model: Annotated[
        str | None, Parameter(help=f"as of predict; by default a folder given as --against, or {DEFAULT_MODEL}")
    ] = None,
    calibration: CalibrationFile = None,
    against: Annotated[
        Path | None,
        Parameter(help="compare with the images of this calibration.json, or of this model's; needs no labels"),
    ] = None,
    report: Annotated[
        Path | None, Parameter(help="folder for report.html: curve, reliability, classes and examples on one page")
    ] = None,
    thresholds: Annotated[
        tuple[float, ...],
        Parameter(validator=Number(gte=0, lte=1), help="values of eta to report", consume_multiple=True, negative=""),
    ] = DEFAULT_THRESHOLDS,
    json: Json = False,
    batch_size: BatchSize = 64,
    workers: Workers = 2,
) -> int:
    """Accuracy of both stages, and accuracy, exit share and expected GMACs over a sweep of eta.

    With --against: whether images in use, with or without classes, still look like those that eta was
    chosen on; the exit status is 0 in both cases. Under torchrun the images are shared among the
    processes, each counted once.
    """
    from cfvit.evaluation.metrics import evaluate_model, labelled_images
    from cfvit.evaluation.report import require_report
    from cfvit.processes import join_processes

    if against is not None and (report is not None or calibration is not None):
        raise UsageError(
            "--against needs neither labels nor eta: give --report and --calibration in a call of their own"
        )
    if against is not None:
        chosen = model or (str(against) if against.is_dir() else DEFAULT_MODEL)
        return _tell_drift(_load(chosen, calibration), data, against, batch_size, workers, json)
    network = _load(model or DEFAULT_MODEL, calibration)
    if report is not None and network.threshold is None:
        raise CfvitError("a report is about one eta and the model has none: cfvit calibrate chooses it")
    source = labelled_images(network, data)
    with join_processes() as process:
        if report is not None and process.leads:
            require_report(report / REPORT_FILE)
        result = evaluate_model(network, source, thresholds, batch_size, workers, process)
        if process.leads:
            _print_evaluation(result, as_json=json)
            _report_unreadable(result.unreadable)
            if report is not None:
                _write_report(report / REPORT_FILE, network, source, result, model or DEFAULT_MODEL, data)
    return int(bool(result.unreadable))


def _write_report(
    path: Path, network: CoarseToFineViT, source: DataSource, result: Evaluation, model: str, data: str
) -> None:
    from cfvit.evaluation.report import write_report

    assert network.threshold is not None
    write_report(
        path,
        model=network,
        collected=result.collected,
        source=source,
        macs=result.macs,
        threshold=network.threshold,
        model_name=model,
        data_name=data,
    )
    _say(f"the report is {path}")


def _report_unreadable(names: Sequence[str]) -> None:
    for name in names:
        _say(f"cfvit: {name} cannot be read and is not counted")


def _tell_drift(
    network: CoarseToFineViT, data: str, against: Path, batch_size: int, workers: int, as_json: bool
) -> int:
    from cfvit.checkpoints import read_calibration, warn_of_other_weights
    from cfvit.data import open_images
    from cfvit.evaluation.calibrate import check_drift_of
    from cfvit.processes import join_processes

    before = read_calibration(against)
    source = open_images(data)
    with join_processes() as process:
        drift, unreadable = check_drift_of(network, source, before, batch_size, workers, process)
        if process.leads:
            _print_drift(drift, before, as_json)
            _report_unreadable(unreadable)
            if network.calibration != before:  # else it was said on loading
                with _warnings_said():
                    warn_of_other_weights(network, before, against)
    return int(bool(unreadable))


def _print_drift(drift: Drift, before: Calibration, as_json: bool) -> None:
    if as_json:
        _print_json(**dataclasses.asdict(drift))
        return
    from rich.table import Table

    table = Table(f"eta {_eta(before.threshold)}", "calibration", "now", "p", box=None)
    table.add_row("images", str(before.images), str(drift.images), "")
    exits = (f"{1 - share:.1%}" for share in (drift.expected_fine_share, drift.fine_share))
    table.add_row("exit share", *exits, f"{drift.fine_share_p:.2g}")
    medians = (f"{value:.3f}" for value in (drift.expected_confidence, drift.confidence))
    table.add_row("median confidence", *medians, f"{drift.distance_p:.2g}")
    _show(table)
    _print(drift.sentence)


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
            f"{_eta(point.threshold)}{mark}",
            f"{point.accuracy:.2f}",
            f"{point.exit_share:.1%}",
            f"{point.gmacs:.3f}",
            cost,
        )
    _show(stages)
    _print("")
    _show(trade)


def _percent(hint: Any, tokens: Sequence[Any]) -> float:
    return float(tokens[0].value.removesuffix("%"))


Percent = Parameter(converter=_percent)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetFlags:
    """What `calibrate` can be asked for: one target, and the details of a risk."""

    gmacs: Annotated[float | None, Parameter(help="target: the most accurate eta at this mean cost")] = None
    saving: Annotated[
        float | None, Percent, Parameter(help="target: the same at this saving of the plain backbone's, as in 60%")
    ] = None
    latency_ms: Annotated[
        float | None, Parameter(help="target: the same at this mean time of an image, measured here and now")
    ] = None
    accuracy: Annotated[float | None, Percent, Parameter(help="target: the cheapest eta of this accuracy")] = None
    max_drop: Annotated[
        float | None, Percent, Parameter(help="target: the lowest eta that loses at most these points")
    ] = None
    risk: Annotated[
        float | None, Parameter(help="target: the lowest eta that promises at most this share of worse answers")
    ] = None
    confidence: Annotated[
        float | None, Parameter(help="of a risk: how surely the promise is kept; by default 0.95")
    ] = None
    method: Annotated[
        str | None, Parameter(help="of a risk: upper_bound or fixed_sequence; by default upper_bound")
    ] = None

    def chosen(self) -> Target:
        """The one target that is given.

        Raises:
            UsageError: none or several, or a value that is never allowed.
        """
        from cfvit import calibration

        details: dict[str, Any] = {
            name: value
            for name, value in (("confidence", self.confidence), ("method", self.method))
            if value is not None
        }
        kinds: dict[str, tuple[float | None, Callable[[Any], Target]]] = {
            "--gmacs": (self.gmacs, calibration.GmacsBudget),
            "--saving": (self.saving, calibration.Saving),
            "--latency-ms": (self.latency_ms, calibration.LatencyBudget),
            "--accuracy": (self.accuracy, calibration.Accuracy),
            "--max-drop": (self.max_drop, calibration.Drop),
            "--risk": (self.risk, lambda share: calibration.Risk(share, **details)),
        }
        given = [name for name, (value, _) in kinds.items() if value is not None]
        if len(given) != 1:
            problem = f"{' and '.join(given)} are given" if given else "no target is given"
            raise UsageError(f"{problem}: give one of {', '.join(kinds)}")
        if details and self.risk is None:
            raise UsageError(f"--{next(iter(details))} belongs to --risk and {given[0]} is given: leave it out")
        value, make = kinds[given[0]]
        return _as_usage(lambda: make(value))


NO_TARGET = TargetFlags()


@app.command
def calibrate(
    *,
    data: Annotated[str, Parameter(help="images that the model was not trained on and will not be scored on")],
    model: Model = DEFAULT_MODEL,
    target: Annotated[TargetFlags, Parameter(name="*")] = NO_TARGET,
    measure: Annotated[
        str, Parameter(help="of confidence: max_probability, margin, entropy or energy")
    ] = "max_probability",
    temperature_scaling: Annotated[
        bool, Parameter(negative="", help="fit temperatures on a random half, choose eta on the other")
    ] = False,
    out: Annotated[Path | None, Parameter(help="write this .json file, and not into the model's folder")] = None,
    allow_missing_classes: Annotated[
        bool, Parameter(negative="", help="go on if some class has no image, with a warning")
    ] = False,
    train_data: Annotated[
        str | None, Parameter(help="what the model was trained on; by default as its recipe.yaml says")
    ] = None,
    json: Json = False,
    batch_size: BatchSize = 64,
    workers: Workers = 2,
) -> int:
    """Choose eta for a target, which predict, eval and the Predictor then use. Give exactly one target.

    Writes calibration.json into the model's folder and touches nothing else there. Images that are also
    among the training images are refused. A target out of reach is told with the nearest that is not.
    """
    wanted = target.chosen()
    path = _calibration_path(model, out)
    from cfvit.checkpoints import require_writable, write_calibration
    from cfvit.confidence import ExitRule
    from cfvit.evaluation.calibrate import Wish, calibrate_model
    from cfvit.evaluation.metrics import labelled_images
    from cfvit.processes import Process, best_device

    checked = _as_usage(lambda: ExitRule(typing.cast(typing.Any, measure))).measure
    require_writable(path)
    network = _load(model, None)
    source = labelled_images(network, data)
    training = _training_images(model, train_data)
    wish = Wish(wanted, checked, temperature_scaling, allow_missing_classes)
    process = Process(0, 1, best_device())
    calibration, unreadable = calibrate_model(network, source, data, wish, batch_size, workers, process, training)
    try:
        write_calibration(calibration, path)
    finally:  # a full disk does not cost what was found
        _print_calibration(calibration, json)
    _report_unreadable(unreadable)
    _say(f"written to {path}" + ("" if out is None else f": give it to predict and eval with --calibration {out}"))
    return int(bool(unreadable))


def _as_usage(make: Callable[[], Made]) -> Made:
    """What is refused here was given on the command line."""
    try:
        return make()
    except CfvitError as error:
        raise UsageError(str(error)) from error


def _calibration_path(model: str, out: Path | None) -> Path:
    """Where to write, which is a new file or a former calibration."""
    from cfvit.checkpoints import CALIBRATION_FILE, read_calibration

    if out is None:
        if Path(model).is_dir():
            return Path(model) / CALIBRATION_FILE
        raise UsageError(f"{model} is no folder to write to: name a file with --out FILE.json")
    if out.suffix != ".json":
        raise UsageError(f"--out {out} does not end in .json: name a file such as {CALIBRATION_FILE}")
    if out.exists():
        try:
            read_calibration(out)
        except CfvitError as error:
            raise UsageError(f"--out {out} is there and is no calibration: name a new file") from error
    return out


def _training_images(model: str, train_data: str | None) -> tuple[DataSource, Sequence[int]] | None:
    """What the model was trained on, and which of it; None if that is not known or not there."""
    from cfvit.data import open_data, split_holdout

    if train_data is not None:
        source = open_data(train_data, "train")
        return source, range(len(source))
    config = Path(model) / "recipe.yaml"
    if not config.is_file():
        return None
    try:
        recipe = load_recipe("deit", config)
    except UsageError as error:
        raise CfvitError(
            f"{config} does not tell the training images ({error}): name them with --train-data"
        ) from error
    if not recipe.data or not Path(recipe.data).exists():
        return None
    source = open_data(recipe.data, "train")
    return source, split_holdout(source, recipe.holdout, recipe.seed)[0]


def _print_calibration(calibration: Calibration, as_json: bool) -> None:
    if as_json:
        _print_json(**calibration.to_dict())
        return
    from rich.table import Table

    head = f"eta {calibration.threshold:.9g}, {calibration.measure}, {calibration.images} images"
    table = Table("", "value", f"{calibration.level:.0%} interval", title=head, box=None, title_justify="left")
    on = calibration.fine_share
    exits = dataclasses.replace(on, value=1 - on.value, low=1 - on.high, high=1 - on.low)
    rows = [
        ("accuracy %", calibration.accuracy, ".2f"),
        ("drop, points", calibration.drop, ".2f"),
        ("exit share", exits, ".1%"),
        ("GMACs", calibration.gmacs, ".3f"),
        ("saving %", calibration.saving, ".1f"),
        *([] if calibration.latency is None else [("ms an image", calibration.latency, ".2f")]),
    ]
    for name, figure, form in rows:
        table.add_row(name, f"{figure.value:{form}}", f"{figure.low:{form}} to {figure.high:{form}}")
    _show(table)
    if calibration.origin and calibration.origin.temperature_images:
        _print(
            f"temperatures: {calibration.coarse_temperature:.3g} coarse, {calibration.fine_temperature:.3g} fine, "
            f"fitted on {calibration.origin.temperature_images} other images of the data"
        )
    _print(f"promise: {calibration.promise}")
    for warning in calibration.warnings:
        _print(f"warning: {warning}")


def _overrides_class() -> type:
    """All fields of a recipe as optional flags, so that only those given override it."""
    hints = typing.get_type_hints(Recipe) | {"timm_kwargs": dict[str, str]}
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
    """Train a coarse-to-fine model, or with --stages backbone the plain ViT, by a recipe.

    Needs --data and --out. The recipe is overridden by --config, and that by the flags below;
    --print-recipe shows what results. Run it under torchrun for several GPUs or machines.
    """
    final = load_recipe(recipe, config, _given_fields(overrides))
    if print_recipe:
        sys.stdout.write(final.to_yaml())
        return
    if out is None:
        raise UsageError("no --out: name a folder for the model, its log and its checkpoint")
    from cfvit.training.loop import train as run

    run(final, out, resume=resume)
    _say(f"the model is in {out}")


def _given_fields(overrides: Overrides) -> dict[str, Any]:
    """The fields of a recipe that were given as flags."""
    given = {name: value for name, value in dataclasses.asdict(overrides).items() if value is not None}
    if "timm_kwargs" in given:
        given["timm_kwargs"] = {k.replace("-", "_"): read_value(text) for k, text in given["timm_kwargs"].items()}
    return given


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
    from cfvit.reproduction.budget import parse_budget
    from cfvit.reproduction.studies import find_studies

    find_studies(name)
    given = _given_fields(overrides)
    final = load_recipe(recipe, config, given)
    chosen = _seeds((final.seed,) if seeds is None else seeds)
    seconds = None if budget is None else parse_budget(budget)
    from cfvit.reproduction.command import command_line
    from cfvit.reproduction.reproduce import Request, reproduce

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

    reproduce(request, partial(_print_study, json=json), _say)


def _print_study(study: Study, rows: Sequence[Row], notes: Sequence[str], json: bool) -> None:
    from cfvit.reproduction.writing import as_json, print_table

    if json:
        for row in rows:
            _print_json(**as_json(study, row))
    else:
        print_table(study, rows, notes)


def _seeds(given: tuple[int, ...]) -> tuple[int, ...]:
    """Seeds as given, each once; those of a generator are whole numbers from 0."""
    if not given or min(given) < 0:
        said = "--seeds has no number" if not given else f"seed {min(given)} is below 0"
        raise UsageError(f"{said}: give numbers from 0, as in --seeds 0 1 2")
    return tuple(dict.fromkeys(given))


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
        _print_json(made=counts.made, there=counts.kept, unreadable=len(counts.unreadable), out=str(out))
    _say(
        f"{counts.made} label map{'s' * (counts.made != 1)} made, {counts.kept} were there: "
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
    model: Annotated[
        str | None, Parameter(help=f"as of predict; by default {DEFAULT_MODEL}", show_default=False)
    ] = None,
    backbone: Annotated[
        str | None, Parameter(help="instead of a model, one on this timm ViT with random weights")
    ] = None,
    coarse_grid: Annotated[
        str | None, Parameter(help="with --backbone, side of the coarse grid, or ROWSxCOLUMNS; by default 7")
    ] = None,
    batch_sizes: Annotated[
        tuple[int, ...], Parameter(validator=Number(gte=1), help="images per call", consume_multiple=True, negative="")
    ] = (1, 8, 32),
    fine_share: Annotated[
        tuple[Share, ...],
        Parameter(help="shares of images that go on to the fine stage, forced", consume_multiple=True, negative=""),
    ] = (0.24, 0.51),
    mode: Annotated[
        tuple[Mode, ...],
        Parameter(help="how all are prepared; timm's eager backbone always runs", consume_multiple=True, negative=""),
    ] = ("accelerated",),
    peers: Annotated[bool, Parameter(help="time ToMe, EViT, a cascade and the paper's early exit as well")] = True,
    data: Annotated[
        str | None, Parameter(help="real images as well, at the model's own eta, with and without decoding")
    ] = None,
    precision: Annotated[Literal["float32", "bfloat16"], Parameter(help="of weights and images")] = "float32",
    rounds: Annotated[int, Parameter(validator=Number(gte=1), help="timed calls of each, at most")] = 100,
    seconds: Annotated[float, Parameter(validator=Number(gt=0), help="for each batch size, about")] = 20,
    out: Annotated[Path | None, Parameter(help="folder for bench.json, bench.md and bench.png")] = None,
    json: Json = False,
) -> None:
    """Time the plain backbone, both stages, the predictor and its peers in turn, on random and on real images.

    Every ratio stands beside what the MACs promise, with its interval from paired rounds; where the
    machine was too noisy to tell, that is said.
    """
    if backbone is None and coarse_grid is not None:
        raise UsageError("--coarse-grid is a model's own: give it with --backbone")
    if backbone is not None and (model is not None or data is not None):
        raise UsageError("--backbone has random weights: give it without --model and --data")
    import torch

    from cfvit.benchmark.measure import Plan
    from cfvit.benchmark.run import run_bench
    from cfvit.data import open_images
    from cfvit.processes import join_processes

    _require_bench_folder(out)
    network = _network_to_time(model, backbone, coarse_grid)
    source = None if data is None else open_images(data)

    def run(watch: BenchWatch) -> Bench:
        with join_processes() as process:
            return run_bench(
                network.to(process.device, getattr(torch, precision)),
                batch_sizes,
                Plan(mode, fine_share, rounds, seconds),
                name=backbone or model or DEFAULT_MODEL,
                command=shlex.join(["cfvit", *sys.argv[1:]]),
                random_weights=backbone is not None,
                peers=peers,
                source=source,
                watch=watch,
            )

    _follow_bench(run, out, json)


def _require_bench_folder(out: Path | None) -> None:
    """Before the timing, so that nobody waits for what cannot be drawn or written."""
    from cfvit.checkpoints import require_writable
    from cfvit.evaluation.explain import require_matplotlib

    if out is not None:
        require_matplotlib()
        require_writable(out / "bench.json")


def _network_to_time(model: str | None, backbone: str | None, coarse_grid: str | None) -> CoarseToFineViT:
    """The named model, or one on a backbone with random weights."""
    from cfvit.checkpoints import load
    from cfvit.model import create_model

    if backbone is None:
        return load(model or DEFAULT_MODEL)
    return create_model(backbone, coarse_grid=Recipe(coarse_grid=coarse_grid or 7).grid)


def _follow_bench(run: Callable[[BenchWatch], Bench], out: Path | None, json: bool) -> None:
    """Tells each batch as it is measured, and in the end all that was, after a failure as well."""
    from cfvit.benchmark.report import write_report

    found: list[Bench] = []

    def keep(batch: Batch, so_far: Bench) -> None:
        found[:] = [so_far]
        if out is not None:
            write_report(so_far, out)
        if not json:
            _print_batch(batch)

    try:
        found[:] = [run(keep)]
    finally:
        for measured in found:
            _tell_bench(measured, out, json)


def _tell_bench(bench: Bench, out: Path | None, json: bool) -> None:
    from cfvit.benchmark.report import summary, write_report

    if json:
        _print_json(**summary(bench))
        for row in (row for batch in (*bench.batches, *bench.real) for row in batch.rows):
            _print_json(**row.to_dict())
    for sentence in bench.sentences:
        _say(sentence)
    if out is not None:
        write_report(bench, out)
        _say(f"written to {out}")


def _print_batch(batch: Batch) -> None:
    from rich.table import Table

    from cfvit.benchmark.report import COLUMNS, PEERS_COLUMNS, PEERS_TITLE, cells, heading, peers_comparison

    beside = peers_comparison(batch)
    tables = [(COLUMNS, heading(batch), [cells(row) for row in batch.rows]), (PEERS_COLUMNS, PEERS_TITLE, beside)]
    for columns, title, rows in tables[: 1 + bool(beside)]:
        table = Table(*columns, title=title, box=None, title_justify="left")
        for row in rows:
            table.add_row(*row)
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
