"""``cfvit calibrate``: eta for a target."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from cyclopts import Parameter

from cfvit.cli.application import app, print_json, print_line, print_table, report_unreadable, say
from cfvit.cli.parameters import DEFAULT_MODEL, BatchSize, Flag, Json, Model, Workers, load_model
from cfvit.errors import CfvitError, UsageError

if TYPE_CHECKING:
    from cfvit.calibration import Calibration, Target


def _percent(hint: Any, tokens: Sequence[Any]) -> float:
    text = tokens[0].value
    try:
        return float(text.removesuffix("%"))
    except ValueError:
        raise ValueError(f"{text!r} is no number: give one such as 10%") from None


def _share(hint: Any, tokens: Sequence[Any]) -> float:
    number = _percent(hint, tokens)
    return number / 100 if tokens[0].value.endswith("%") else number


Percent = Annotated[float, Parameter(converter=_percent)]
ShareOrPercent = Annotated[float, Parameter(converter=_share)]


class TargetFlags(TypedDict, total=False):
    """What `calibrate` can be asked for: one target, and the details of the two risks.

    Attributes:
        gmacs: target: a mean cost of at most this many GMACs an image
        saving: target: save at least this share of the plain ViT's MACs, for example 60%
        latency_ms: target: a mean time of at most this an image, measured on this machine
        accuracy: target: at least this top-1 accuracy at the lowest cost
        max_drop: target: lose at most these points of accuracy against the fine stage
        risk: target: promise that at most this share of answers gets worse, for example 0.01 or 1%
        selective_risk: target: promise that at most this share of the coarse stage's answers is wrong, for example 10%
        confidence: for both risks: probability that the promise is kept; by default 95%
        method: for --risk: upper_bound or fixed_sequence; by default upper_bound
    """

    gmacs: float
    saving: Percent
    latency_ms: float
    accuracy: Percent
    max_drop: Percent
    risk: ShareOrPercent
    selective_risk: ShareOrPercent
    confidence: ShareOrPercent
    method: str


def _target_of(flags: TargetFlags) -> Target:
    """The one target that is given.

    Raises:
        UsageError: none or several.
        CfvitError: a value that is never allowed.
    """
    from cfvit import calibration

    kinds = {
        "gmacs": calibration.GmacsBudget,
        "saving": calibration.Saving,
        "latency_ms": calibration.LatencyBudget,
        "accuracy": calibration.Accuracy,
        "max_drop": calibration.Drop,
        "risk": calibration.Risk,
        "selective_risk": calibration.SelectiveRisk,
    }
    names = {kind: f"--{kind.replace('_', '-')}" for kind in kinds}
    given = [kind for kind in kinds if kind in flags]
    if len(given) != 1:
        problem = f"{' and '.join(names[kind] for kind in given)} are given" if given else "no target is given"
        raise UsageError(f"{problem}: give one of {', '.join(names.values())}")
    details = {name: value for name, value in flags.items() if name not in kinds}
    taken = {"risk": ("confidence", "method"), "selective_risk": ("confidence",)}.get(given[0], ())
    if foreign := [name for name in details if name not in taken]:
        raise UsageError(f"--{foreign[0]} belongs to --risk and {names[given[0]]} is given: leave it out")
    return kinds[given[0]](flags[given[0]], **details)


@app.command
def calibrate(
    *,
    data: str,
    model: Model = DEFAULT_MODEL,
    target: Annotated[TargetFlags | None, Parameter(name="*")] = None,
    measure: str | None = None,
    best: Flag = False,
    temperature_scaling: Flag = False,
    out: Path | None = None,
    allow_missing_classes: Flag = False,
    train_data: str | None = None,
    json: Json = False,
    batch_size: BatchSize = 64,
    workers: Workers = 2,
) -> int:
    """Choose eta for a target, which predict, eval and the Predictor then use. Give exactly one target.

    Writes eta into the config.json of the model's folder, and a record of what was asked and found beside it, as
    calibration.json. Training images among the images are refused. If a target is out of reach, the message
    names the nearest value that is not.

    Args:
        data: images that the model was not trained on and will not be scored on
        measure: how confidence is measured: max_probability (the default), margin, entropy or energy
        best: do the best that the model can: also fit a mixture of both stages' answers, choose the measure and, in a
            model's folder, perhaps a cheaper fine stage
        temperature_scaling: fit temperatures on a random half, choose eta on the other
        out: write this .json file, and not into the model's folder
        allow_missing_classes: go on if some class has no image, with a warning
        train_data: data that the model was trained on; by default from its recipe.yaml
    """
    from cfvit.calibration.calibrated import write_calibration
    from cfvit.checkpoints import save_exit
    from cfvit.data import open_images
    from cfvit.evaluation.calibrate import calibrate_model, fine_stages_of
    from cfvit.modeling.exit import Exit
    from cfvit.training.setup import training_images

    checked: Any = measure
    try:
        wanted = _target_of(target or {})
        Exit(checked or "max_probability")
    except CfvitError as error:  # it was given on the command line
        raise UsageError(str(error)) from error
    path = _calibration_path(model, out)
    others = None if train_data is None else open_images(train_data, "train")  # without labels, as `adapt` takes them
    network = load_model(model, None)
    calibration, config, unreadable = calibrate_model(
        network,
        data,
        wanted,
        batch_size=batch_size,
        workers=workers,
        measure=checked,
        scale_temperatures=temperature_scaling,
        best=best,
        fine_stages=fine_stages_of(network) if best and out is None else (),
        allow_missing_classes=allow_missing_classes,
        training=training_images(model) if others is None else (others, range(len(others))),
    )
    try:
        write_calibration(calibration, path)
        if out is None:
            save_exit(calibration.exit, path.parent, config)
    finally:  # a full disk does not cost what was found
        _print_calibration(calibration, json)
    report_unreadable(unreadable)
    if config != (trained := network.require_trained()):
        now, was = (
            f"informative_ratio {c.informative_ratio:g}, fine_merged {c.fine_merged}" for c in (config, trained)
        )
        say(f"fine stage: {now}, as --best chose; in training {was}")
    say(f"written to {path}" + ("" if out is None else f": give it to predict and eval with --calibration {out}"))
    return int(bool(unreadable))


def _calibration_path(model: str, out: Path | None) -> Path:
    """Where to write, which is a new file or a former calibration, and can be written."""
    from cfvit.calibration.calibrated import CALIBRATION_FILE, read_calibration
    from cfvit.files import require_writable

    if out is None and not Path(model).is_dir():
        raise UsageError(f"{model} is no folder to write to: name a file with --out FILE.json")
    if out is not None and out.suffix != ".json":
        raise UsageError(f"--out {out} does not end in .json: name a file such as {CALIBRATION_FILE}")
    if out is not None and out.exists():
        try:
            read_calibration(out)
        except CfvitError as error:
            raise UsageError(f"--out {out} is there and is no calibration: name a new file") from error
    path = out or Path(model) / CALIBRATION_FILE
    require_writable(path)
    return path


def _print_calibration(calibration: Calibration, as_json: bool) -> None:
    if as_json:
        print_json(**dataclasses.asdict(calibration))
        return
    on = calibration.fine_share
    exits = dataclasses.replace(on, value=1 - on.value, low=1 - on.high, high=1 - on.low)
    figures = [
        ("accuracy %", calibration.accuracy, ".2f"),
        ("drop, points", calibration.drop, ".2f"),
        ("exit share", exits, ".1%"),
        ("GMACs", calibration.gmacs, ".3f"),
        ("saving %", calibration.saving, ".1f"),
        ("ms an image", calibration.latency, ".2f"),
        ("wrong exits", calibration.wrong_exits, ".1%"),
    ]
    print_table(
        ("", "value", f"{calibration.level:.0%} interval"),
        [
            (name, f"{figure.value:{form}}", f"{figure.low:{form}} to {figure.high:{form}}")
            for name, figure, form in figures
            if figure is not None
        ],
        f"eta {calibration.threshold:.9g}, {calibration.measure}, {calibration.images} images",
    )
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
