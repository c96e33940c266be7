"""``cfvit eval``: how good a model is on images with labels, and whether images have changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from cfvit.cli.application import app
from cfvit.cli.output import eta_text, print_json, print_line, report_unreadable, saving_text, say, show
from cfvit.cli.parameters import DEFAULT_MODEL, BatchSize, CalibrationFile, Json, Workers, load_model
from cfvit.errors import CfvitError, UsageError

if TYPE_CHECKING:
    from cfvit.calibration import Calibration
    from cfvit.evaluation.metrics import Evaluation
    from cfvit.modeling.model import CoarseToFineViT

DEFAULT_THRESHOLDS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
REPORT_FILE = "report.html"
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
    if against is not None and (report is not None or calibration is not None):
        raise UsageError(
            "--against needs neither labels nor eta: give --report and --calibration in a call of their own"
        )
    if against is not None:
        chosen = model or (str(against) if against.is_dir() else DEFAULT_MODEL)
        return _check_drift(load_model(chosen, calibration), data, against, batch_size, workers, json)
    from cfvit.evaluation.metrics import evaluate_model, labelled_images
    from cfvit.inference.engines.exported import ExportedEngine, ExportedModel, is_exported
    from cfvit.plots.report import require_report, write_report
    from cfvit.processes import join_processes

    name = model or DEFAULT_MODEL
    if is_exported(name):
        if report is not None or calibration is not None:
            option = "--report" if report is not None else "--calibration"
            raise UsageError(f"{option} is for models in torch, and {name} is an exported one: leave it out")
        engine = ExportedEngine(name)
        network = engine.model
    else:
        engine = network = load_model(name, calibration)
    eta = network.threshold
    if report is not None and eta is None:
        raise CfvitError("a report is about one eta and the model has none: cfvit calibrate chooses it")
    source = labelled_images(network, data)
    with join_processes() as process:
        if report is not None and process.leads:
            require_report(report / REPORT_FILE)
        result = evaluate_model(engine, source, thresholds, batch_size, workers, process)
        if process.leads:
            _print_evaluation(result, as_json=json)
            report_unreadable(result.unreadable)
            for stage in (stage for stage in result.stages if stage.not_finite):
                say(
                    f"cfvit: {stage.not_finite} of {result.images} answers of the {stage.stage} stage are not finite "
                    "numbers and count as wrong: check the weights"
                )
            if report is not None and eta is not None and not isinstance(network, ExportedModel):
                write_report(
                    report / REPORT_FILE,
                    model=network,
                    collected=result.collected,
                    source=source,
                    macs=result.macs,
                    threshold=eta,
                    model_name=name,
                    data_name=data,
                    calibration=_record_in_use(network, calibration or Path(name)),
                )
                say(f"the report is {report / REPORT_FILE}")
    return int(bool(result.unreadable) or any(stage.not_finite for stage in result.stages))


def _record_in_use(network: CoarseToFineViT, path: Path) -> Calibration | None:
    """The record of the model's eta in a file or folder; None if there is none, or it is of another eta."""
    from cfvit.calibration.records import CALIBRATION_FILE, read_calibration

    if not path.is_file() and not (path / CALIBRATION_FILE).is_file():
        return None
    record = read_calibration(path)
    return record if record.exit == network.exit else None


def _check_drift(
    network: CoarseToFineViT, data: str, against: Path, batch_size: int, workers: int, as_json: bool
) -> int:
    from rich.table import Table

    from cfvit.calibration.records import read_calibration
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


def _print_evaluation(result: Evaluation, as_json: bool) -> None:
    if as_json:
        for stage in result.stages:
            values = dataclasses.asdict(stage)
            print_json(**{name: value for name, value in values.items() if name != "not_finite" or value})
        for point in result.sweep:
            print_json(**dataclasses.asdict(point))
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
        cost = saving_text(point.gmacs, result.backbone_gmacs)
        trade.add_row(
            f"{eta_text(point.threshold)}{mark}",
            f"{point.accuracy:.2f}",
            f"{point.exit_share:.1%}",
            f"{point.gmacs:.3f}",
            cost,
        )
    show(stages)
    print_line("")
    show(trade)
