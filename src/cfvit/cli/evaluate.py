"""``cfvit eval``: how good a model is on images with labels, and whether images have changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts.types import NormFloat

from cfvit.cli.application import (
    app,
    eta_text,
    print_json,
    print_line,
    print_table,
    report_unreadable,
    saving_text,
    say,
)
from cfvit.cli.parameters import DEFAULT_MODEL, BatchSize, CalibrationFile, Json, Workers, is_exported, load_model
from cfvit.errors import CfvitError, UsageError

if TYPE_CHECKING:
    from cfvit.evaluation.metrics import Scores

DEFAULT_THRESHOLDS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


@app.command(name="eval")
def evaluate(
    *,
    data: str,
    model: str | None = None,
    calibration: CalibrationFile = None,
    against: Path | None = None,
    plain: str | None = None,
    report: Path | None = None,
    thresholds: tuple[NormFloat, ...] | None = None,
    json: Json = False,
    batch_size: BatchSize = 64,
    workers: Workers = 2,
) -> int:
    """Accuracy of both stages, and accuracy, exit share and expected GMACs over a sweep of eta.

    Of a run of another method: accuracy and GMACs at each of its operating points, and with its own exits.
    With --against: whether images in use, with or without classes, still look like those that eta was
    chosen on; the exit status is 0 in both cases. Under torchrun the images are shared among the
    processes, each counted once.

    Args:
        data: image folder, tar, or timm data set (hfds/..., torch/...)
        model: saved folder, exported folder, authors' .pth, bundled name, or a run of cfvit train by any --method; by
            default the folder of --against, or deit_tiny_imagenet
        against: compare with the images of this calibration.json, or of this model's; needs no labels
        plain: the plain ViT, a file of weights or 'timm' for timm's: tells how often answers are its own
        report: folder for report.html: curve, reliability, classes and examples on one page
        thresholds: values of eta to report (default: 0 to 1 in eleven steps)
    """
    name = model or (str(against) if against is not None and against.is_dir() else DEFAULT_MODEL)
    if against is not None:
        if any(given is not None for given in (report, calibration, plain, thresholds)):
            raise UsageError(
                "--against needs neither labels nor eta: "
                "give --report, --calibration, --plain, --thresholds in a call of their own"
            )
        return _check_drift(name, data, against, batch_size, workers, json)
    from cfvit.calibration.calibrated import CALIBRATION_FILE, read_calibration
    from cfvit.evaluation.metrics import Evaluation, evaluate_method, evaluate_model, labelled_images
    from cfvit.inference.engines.packing import accelerate
    from cfvit.plots.report import require_report, write_report
    from cfvit.processes import join_processes

    network, about, method, base = _open_scored(name, calibration, report, plain)
    if method is not None and thresholds is not None:
        raise UsageError(
            f"--thresholds are for a CF-ViT, and {name} is a run of --method {method.name}, which is scored at its own "
            "operating points: leave them out"
        )
    if report is not None and about.threshold is None:
        raise CfvitError("a report is about one eta and the model has none: cfvit calibrate chooses it")
    source, page = labelled_images(about, data), report and report / "report.html"
    with join_processes() as process:
        if page and process.leads:
            require_report(page)
        base = base and accelerate(base.to(process.device))
        if method is None:
            etas = DEFAULT_THRESHOLDS if thresholds is None else thresholds
            result = evaluate_model(network, source, etas, batch_size, workers, process, base)
        else:
            result = evaluate_method(method, network, source, batch_size, workers, process, base)
        if process.leads:
            _print_evaluation(result, json)
        if page and process.leads and isinstance(result, Evaluation):
            kept = calibration or Path(name)
            record = read_calibration(kept) if kept.is_file() or (kept / CALIBRATION_FILE).is_file() else None
            own = record if record is not None and record.exit == network.exit else None  # of this very eta
            write_report(page, result, model=network, source=source, model_name=name, data_name=data, calibration=own)
            say(f"the report is {page}")
    return int(bool(result.unreadable) or any(stage.not_finite for stage in result.stages))


def _open_scored(
    name: str, calibration: Path | None, report: Path | None, plain: str | None
) -> tuple[Any, Any, Any, Any]:
    """A model, a network of a run or an exported engine; what is known of it; its method, unless it has two stages.

    And the plain ViT to compare with, if there is one.
    """
    from cfvit.inference.engines.exported import ExportedEngine
    from cfvit.methods.base import create_method
    from cfvit.modeling.model import CoarseToFineViT
    from cfvit.training.setup import CLASSES_FILE, open_run

    if is_exported(name, report=report, calibration=calibration, plain=plain):
        engine = ExportedEngine(name)
        return engine, engine.model, None, None
    if calibration is None and report is None and (Path(name) / CLASSES_FILE).is_file():
        recipe, method, network = open_run(Path(name))
        config = recipe.model_config(len(network.class_names))
    else:
        network, method = load_model(name, calibration), None
        config = network.config
    base = None if plain is None else create_method("plain").build(config, plain, network.class_names).eval()
    staged = isinstance(network, CoarseToFineViT) and (method is None or network.trained is not None)
    return network, network, None if staged else method, base


def _print_evaluation(result: Scores, json: bool) -> None:
    from cfvit.evaluation.metrics import Evaluation

    sweep = result.sweep if isinstance(result, Evaluation) else []
    if json:
        for stage in result.stages:
            values = {name: value for name, value in dataclasses.asdict(stage).items() if value is not None}
            print_json(**{name: value for name, value in values.items() if name != "not_finite" or value})
        for point in sweep:
            print_json(**dataclasses.asdict(point))
    else:
        compared = any(stage.agreement is not None for stage in result.stages)
        rows = []
        for stage in result.stages:
            agreement = [] if stage.agreement is None else [f"{stage.agreement:.1f}"]
            rows.append([stage.stage, f"{stage.top1:.2f}", f"{stage.top5:.2f}", f"{stage.gmacs:.3f}", *agreement])
        columns = ("stage", "top-1 %", "top-5 %", "GMACs", *["answers as the plain ViT %"] * compared)
        print_table(columns, rows, f"{result.images} images")
        if isinstance(result, Evaluation):
            rows = []
            for point in sweep:
                mark = " (the model's)" if point.threshold == result.calibrated else ""
                cost = (f"{point.gmacs:.3f}", saving_text(point.gmacs, result.macs.backbone / 1e9))
                name = f"{eta_text(point.threshold)}{mark}"
                rows.append([name, f"{point.accuracy:.2f}", f"{point.exit_share:.1%}", *cost])
            print_line("")
            print_table(("eta", "top-1 %", "exit share", "GMACs", "against plain"), rows)
    report_unreadable(result.unreadable)
    for stage in (stage for stage in result.stages if stage.not_finite):
        say(
            f"cfvit: {stage.not_finite} of {result.images} answers of the {stage.stage} stage are not finite "
            "numbers and count as wrong: check the weights"
        )


def _check_drift(name: str, data: str, against: Path, batch_size: int, workers: int, json: bool) -> int:
    """`cfvit.calibration.check_drift` on images without labels, by the coarse stage alone."""
    from cfvit.calibration import check_drift
    from cfvit.calibration.calibrated import read_calibration
    from cfvit.checkpoints import warn_of_other_weights
    from cfvit.data import EvalImages, open_images
    from cfvit.evaluation.metrics import collect_with_progress
    from cfvit.inference.engines.packing import accelerate
    from cfvit.processes import join_processes

    network, before = load_model(name, None), read_calibration(against)
    source = open_images(data)
    with join_processes() as process:
        coarse = accelerate(network.eval().to(process.device)).coarse
        images = EvalImages(source, network.data_config, rank=process.rank, world=process.world)
        collected, unreadable = collect_with_progress(
            lambda batch: {"coarse": coarse(batch).logits}, images, batch_size, workers, process
        )
        drift = check_drift(before, collected.logits["coarse"])
        if not process.leads:
            return int(bool(unreadable))
    if json:
        print_json(**dataclasses.asdict(drift))
    else:
        shares = (f"{1 - share:.1%}" for share in (drift.expected_fine_share, drift.fine_share))
        medians = (f"{value:.3f}" for value in (drift.expected_confidence, drift.confidence))
        rows = [
            ("images", str(before.images), str(drift.images), ""),
            ("exit share", *shares, f"{drift.fine_share_p:.2g}"),
            ("median confidence", *medians, f"{drift.distance_p:.2g}"),
        ]
        print_table((f"eta {eta_text(before.threshold)}", "calibration", "now", "p"), rows)
        print_line(drift.sentence)
    report_unreadable(unreadable)
    if not against.is_dir():  # a folder's record was checked when the model was loaded
        warn_of_other_weights(network, before, against)
    return int(bool(unreadable))
