"""``cfvit calibrate``: eta for a target."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from cfvit.cli.application import app
from cfvit.cli.output import print_json, print_line, report_unreadable, say, show
from cfvit.cli.parameters import DEFAULT_MODEL, BatchSize, Json, Model, Workers, load_model
from cfvit.errors import CfvitError, UsageError
from cfvit.training.recipe import load_recipe

if TYPE_CHECKING:
    from cfvit.calibration import Calibration, Target
    from cfvit.data import DataSource

Made = typing.TypeVar("Made")


def _percent(hint: Any, tokens: Sequence[Any]) -> float:
    text = tokens[0].value
    try:
        return float(text.removesuffix("%"))
    except ValueError:
        raise ValueError(f"{text!r} is no number: give one such as 10%") from None


def _share(hint: Any, tokens: Sequence[Any]) -> float:
    number = _percent(hint, tokens)
    return number / 100 if tokens[0].value.endswith("%") else number


Percent = Parameter(converter=_percent)
Share = Parameter(converter=_share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetFlags:
    """What `calibrate` can be asked for: one target, and the details of the two risks."""

    gmacs: Annotated[float | None, Parameter(help="target: a mean cost of at most this many GMACs an image")] = None
    saving: Annotated[
        float | None,
        Percent,
        Parameter(help="target: save at least this share of the plain ViT's MACs, for example 60%"),
    ] = None
    latency_ms: Annotated[
        float | None, Parameter(help="target: a mean time of at most this an image, measured on this machine")
    ] = None
    accuracy: Annotated[
        float | None, Percent, Parameter(help="target: at least this top-1 accuracy at the lowest cost")
    ] = None
    max_drop: Annotated[
        float | None, Percent, Parameter(help="target: lose at most these points of accuracy against the fine stage")
    ] = None
    risk: Annotated[
        float | None,
        Share,
        Parameter(help="target: promise that at most this share of answers gets worse, for example 0.01 or 1%"),
    ] = None
    selective_risk: Annotated[
        float | None,
        Share,
        Parameter(help="target: promise that at most this share of the coarse stage's answers is wrong, as in 10%"),
    ] = None
    confidence: Annotated[
        float | None, Share, Parameter(help="for both risks: probability that the promise is kept; by default 95%")
    ] = None
    method: Annotated[
        str | None, Parameter(help="for --risk: upper_bound or fixed_sequence; by default upper_bound")
    ] = None

    def chosen(self) -> Target:
        """The one target that is given.

        Raises:
            UsageError: none or several, or a value that is never allowed.
        """
        from cfvit import calibration

        details = {name: getattr(self, name) for name in ("confidence", "method") if getattr(self, name) is not None}
        kinds: dict[str, tuple[float | None, Callable[[Any], Target]]] = {
            "--gmacs": (self.gmacs, calibration.GmacsBudget),
            "--saving": (self.saving, calibration.Saving),
            "--latency-ms": (self.latency_ms, calibration.LatencyBudget),
            "--accuracy": (self.accuracy, calibration.Accuracy),
            "--max-drop": (self.max_drop, calibration.Drop),
            "--risk": (self.risk, lambda share: calibration.Risk(share, **details)),
            "--selective-risk": (self.selective_risk, lambda share: calibration.SelectiveRisk(share, **details)),
        }
        given = [name for name, (value, _) in kinds.items() if value is not None]
        if len(given) != 1:
            problem = f"{' and '.join(given)} are given" if given else "no target is given"
            raise UsageError(f"{problem}: give one of {', '.join(kinds)}")
        taken = {"--risk": ("confidence", "method"), "--selective-risk": ("confidence",)}.get(given[0], ())
        if foreign := [name for name in details if name not in taken]:
            raise UsageError(f"--{foreign[0]} belongs to --risk and {given[0]} is given: leave it out")
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
        str | None, Parameter(help="of confidence: max_probability, the default, margin, entropy or energy")
    ] = None,
    best: Annotated[
        bool,
        Parameter(
            negative="",
            help="the best that the model can: fit a mixture of both stages' answers, choose the "
            "measure and, in a model's folder, perhaps a cheaper fine stage",
        ),
    ] = False,
    temperature_scaling: Annotated[
        bool, Parameter(negative="", help="fit temperatures on a random half, choose eta on the other")
    ] = False,
    out: Annotated[Path | None, Parameter(help="write this .json file, and not into the model's folder")] = None,
    allow_missing_classes: Annotated[
        bool, Parameter(negative="", help="go on if some class has no image, with a warning")
    ] = False,
    train_data: Annotated[
        str | None, Parameter(help="data that the model was trained on; by default from its recipe.yaml")
    ] = None,
    json: Json = False,
    batch_size: BatchSize = 64,
    workers: Workers = 2,
) -> int:
    """Choose eta for a target, which predict, eval and the Predictor then use. Give exactly one target.

    Writes eta into the config.json of the model's folder, and a record of what was asked and found beside it, as
    calibration.json. Training images among the images are refused. If a target is out of reach, the message
    names the nearest value that is not.
    """
    wanted = target.chosen()
    path = _calibration_path(model, out)
    from cfvit.calibration.calibrated import write_calibration
    from cfvit.checkpoints import save_exit, trained_config
    from cfvit.evaluation.calibrate import calibrate_model, fine_stages_of
    from cfvit.evaluation.metrics import labelled_images
    from cfvit.files import require_writable
    from cfvit.modeling.exit import Exit
    from cfvit.processes import Process, best_device

    checked: Any = measure
    _as_usage(lambda: Exit(checked or "max_probability"))
    require_writable(path)
    network = load_model(model, None)
    source = labelled_images(network, data)
    calibration, config, unreadable = calibrate_model(
        network,
        source,
        data,
        wanted,
        Process(0, 1, best_device()),
        batch_size=batch_size,
        workers=workers,
        measure=checked,
        scale_temperatures=temperature_scaling,
        best=best,
        fine_stages=fine_stages_of(network, trained_config(network, path.parent)) if best and out is None else (),
        allow_missing_classes=allow_missing_classes,
        training=_training_images(model, train_data),
    )
    try:
        write_calibration(calibration, path)
        if out is None:
            save_exit(calibration.exit, path.parent, config)
    finally:  # a full disk does not cost what was found
        _print_calibration(calibration, json)
    report_unreadable(unreadable)
    if config != network.config:
        say(f"fine stage: informative_ratio {config.informative_ratio:g}, fine_merged {config.fine_merged}")
    say(f"written to {path}" + ("" if out is None else f": give it to predict and eval with --calibration {out}"))
    return int(bool(unreadable))


def _as_usage(make: Callable[[], Made]) -> Made:
    """The value, with a `CfvitError` turned into a `UsageError`: it was given on the command line."""
    try:
        return make()
    except CfvitError as error:
        raise UsageError(str(error)) from error


def _calibration_path(model: str, out: Path | None) -> Path:
    """Where to write, which is a new file or a former calibration."""
    from cfvit.calibration.calibrated import CALIBRATION_FILE, read_calibration

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
    if not recipe.data or not recipe.uses_labels or not Path(recipe.data[0]).exists():
        return None
    source = open_data(recipe.data[0], "train")
    return source, split_holdout(source, recipe.holdout, recipe.seed)[0]


def _print_calibration(calibration: Calibration, as_json: bool) -> None:
    if as_json:
        print_json(**dataclasses.asdict(calibration))
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
        *([] if calibration.wrong_exits is None else [("wrong exits", calibration.wrong_exits, ".1%")]),
    ]
    for name, figure, form in rows:
        table.add_row(name, f"{figure.value:{form}}", f"{figure.low:{form}} to {figure.high:{form}}")
    show(table)
    temperatures = (calibration.coarse_temperature, calibration.fine_temperature)
    if temperatures != (1, 1):
        others = calibration.origin.temperature_images if calibration.origin else 0
        print_line(
            f"temperatures: {temperatures[0]:.3g} coarse, {temperatures[1]:.3g} fine, fitted on "
            + (f"{others} other images of the data" if others else "the same images")
        )
    if calibration.coarse_weight:
        print_line(
            f"answers of images that go on: {calibration.coarse_weight:.1%} of the coarse logits in the fine ones"
        )
    print_line(f"promise: {calibration.promise}")
    for warning in calibration.warnings:
        print_line(f"warning: {warning}")
