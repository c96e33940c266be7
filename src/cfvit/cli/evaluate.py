"""``cfvit eval``: how good a model is on images with labels, and whether images have changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from cyclopts import Parameter
from cyclopts.validators import Number

from cfvit.cli.application import app
from cfvit.cli.output import eta_text, print_json, print_line, report_unreadable, saving_text, say, show
from cfvit.cli.parameters import DEFAULT_MODEL, BatchSize, CalibrationFile, Json, Workers, is_exported, load_model
from cfvit.errors import CfvitError, UsageError

if TYPE_CHECKING:
    from cfvit.data import DataSource
    from cfvit.evaluation.metrics import Evaluation, Scores
    from cfvit.modeling.model import CoarseToFineViT

DEFAULT_THRESHOLDS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
REPORT_FILE = "report.html"
Data = Annotated[str, Parameter(help="image folder, tar, or timm data set (hfds/..., torch/...)")]


@app.command(name="eval")
def evaluate(
    *,
    data: Data,
    model: Annotated[
        str | None,
        Parameter(
            help=f"as of predict, or a run of any --method of train; by default a folder given as --against, or "
            f"{DEFAULT_MODEL}"
        ),
    ] = None,
    calibration: CalibrationFile = None,
    against: Annotated[
        Path | None,
        Parameter(help="compare with the images of this calibration.json, or of this model's; needs no labels"),
    ] = None,
    plain: Annotated[
        str | None,
        Parameter(help="the plain ViT, a file of weights or 'timm' for timm's: tells how often answers are its own"),
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

    Of a run of another method: accuracy and GMACs at each of its operating points, and with its own exits.
    With --against: whether images in use, with or without classes, still look like those that eta was
    chosen on; the exit status is 0 in both cases. Under torchrun the images are shared among the
    processes, each counted once.
    """
    if against is not None:
        if report is not None or calibration is not None or plain is not None:
            raise UsageError(
                "--against needs neither labels nor eta: give --report, --calibration, --plain in a call of their own"
            )
        chosen = model or (str(against) if against.is_dir() else DEFAULT_MODEL)
        return _check_drift(load_model(chosen, calibration), data, against, batch_size, workers, json)
    from cfvit.evaluation.metrics import Evaluation, evaluate_method, evaluate_model, labelled_images
    from cfvit.inference.engines.exported import ExportedEngine
    from cfvit.inference.engines.packing import accelerate
    from cfvit.methods.base import create_method
    from cfvit.modeling.model import CoarseToFineViT
    from cfvit.plots.report import require_report
    from cfvit.processes import join_processes
    from cfvit.training.setup import CLASSES_FILE, open_run

    name = model or DEFAULT_MODEL
    engine: Any
    method, config = None, cast(Any, None)
    if is_exported(name, report=report, calibration=calibration, plain=plain):
        engine = ExportedEngine(name)
        network = engine.model
    elif calibration is None and report is None and (Path(name) / CLASSES_FILE).is_file():
        recipe, method, network = open_run(Path(name))
        engine, config = network, recipe.model_config(len(network.class_names))
    else:
        engine = network = load_model(name, calibration)
        config = network.config
    if report is not None and network.threshold is None:
        raise CfvitError("a report is about one eta and the model has none: cfvit calibrate chooses it")
    source = labelled_images(network, data)
    base: Any = None if plain is None else create_method("plain").build(config, plain, network.class_names).eval()
    with join_processes() as process:
        if report is not None and process.leads:
            require_report(report / REPORT_FILE)
        base = base and accelerate(base.to(process.device))
        if method is None or isinstance(network, CoarseToFineViT):
            result = evaluate_model(engine, source, thresholds, batch_size, workers, process, base)
        else:
            result = evaluate_method(method, network, source, batch_size, workers, process, base)
        if process.leads:
            _print_evaluation(result, as_json=json)
            report_unreadable(result.unreadable)
            for stage in (stage for stage in result.stages if stage.not_finite):
                say(
                    f"cfvit: {stage.not_finite} of {result.images} answers of the {stage.stage} stage are not finite "
                    "numbers and count as wrong: check the weights"
                )
            if report is not None and isinstance(result, Evaluation):
                _write_report(report / REPORT_FILE, engine, result, source, name, data, calibration)
    return int(bool(result.unreadable) or any(stage.not_finite for stage in result.stages))


def _write_report(
    path: Path,
    model: CoarseToFineViT,
    result: Evaluation,
    source: DataSource,
    name: str,
    data: str,
    calibration: Path | None,
) -> None:
    """The report of an evaluation, with the record of the model's eta where that is of this very eta."""
    from cfvit.calibration.calibrated import CALIBRATION_FILE, read_calibration
    from cfvit.plots.report import write_report

    kept = calibration or Path(name)
    record = read_calibration(kept) if kept.is_file() or (kept / CALIBRATION_FILE).is_file() else None
    write_report(
        path,
        model=model,
        collected=result.collected,
        source=source,
        macs=result.macs,
        threshold=cast(float, model.threshold),  # `evaluate` has refused a model without
        model_name=name,
        data_name=data,
        calibration=record if record is not None and record.exit == model.exit else None,
    )
    say(f"the report is {path}")


def _check_drift(
    network: CoarseToFineViT, data: str, against: Path, batch_size: int, workers: int, as_json: bool
) -> int:
    from rich.table import Table

    from cfvit.calibration.calibrated import read_calibration
    from cfvit.checkpoints import warn_of_other_weights
    from cfvit.data import open_images
    from cfvit.evaluation.calibrate import check_drift_of
    from cfvit.processes import join_processes

    before = read_calibration(against)
    source = open_images(data)
    with join_processes() as process:
        drift, unreadable = check_drift_of(network, source, before, batch_size, workers, process)
        if not process.leads:
            return int(bool(unreadable))
    if as_json:
        print_json(**dataclasses.asdict(drift))
    else:
        table = Table(f"eta {eta_text(before.threshold)}", "calibration", "now", "p", box=None)
        table.add_row("images", str(before.images), str(drift.images), "")
        exits = (f"{1 - share:.1%}" for share in (drift.expected_fine_share, drift.fine_share))
        table.add_row("exit share", *exits, f"{drift.fine_share_p:.2g}")
        medians = (f"{value:.3f}" for value in (drift.expected_confidence, drift.confidence))
        table.add_row("median confidence", *medians, f"{drift.distance_p:.2g}")
        show(table)
        print_line(drift.sentence)
    report_unreadable(unreadable)
    if not against.is_dir():  # a folder's record was checked when the model was loaded
        warn_of_other_weights(network, before, against)
    return int(bool(unreadable))


def _print_evaluation(result: Scores, as_json: bool) -> None:
    from rich.table import Table

    from cfvit.evaluation.metrics import Evaluation

    sweep = result.sweep if isinstance(result, Evaluation) else []
    if as_json:
        for stage in result.stages:
            values = {name: value for name, value in dataclasses.asdict(stage).items() if value is not None}
            print_json(**{name: value for name, value in values.items() if name != "not_finite" or value})
        for point in sweep:
            print_json(**dataclasses.asdict(point))
        return

    compared = any(stage.agreement is not None for stage in result.stages)
    columns = ("stage", "top-1 %", "top-5 %", "GMACs", *["answers as the plain ViT %"] * compared)
    stages = Table(*columns, title=f"{result.images} images", box=None, title_justify="left")
    for stage in result.stages:
        figures = [f"{stage.top1:.2f}", f"{stage.top5:.2f}", f"{stage.gmacs:.3f}"]
        stages.add_row(stage.stage, *figures, *([] if stage.agreement is None else [f"{stage.agreement:.1f}"]))
    show(stages)
    if not isinstance(result, Evaluation):
        return
    trade = Table("eta", "top-1 %", "exit share", "GMACs", "against plain", box=None)
    for point in result.sweep:
        mark = " (the model's)" if point.threshold == result.calibrated else ""
        cost = saving_text(point.gmacs, result.backbone_gmacs)
        trade.add_row(
            f"{eta_text(point.threshold)}{mark}",
            f"{point.accuracy:.2f}",
            f"{point.exit_share:.1%}",
            f"{point.gmacs:.3f}",
            cost,
        )
    print_line("")
    show(trade)
