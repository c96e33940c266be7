"""``cfvit predict``: images to answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from cfvit.cli.application import app
from cfvit.cli.output import eta_text, print_json, print_line, saving_text, say
from cfvit.cli.parameters import DEFAULT_MODEL, BatchSize, CalibrationFile, Json, Model, Threshold, load_predictor
from cfvit.errors import UsageError

if TYPE_CHECKING:
    from cfvit.inference.files import FileAnswer, FileFailure
    from cfvit.inference.predictor import Predictor
    from cfvit.modeling.exit import Measure
    from cfvit.plots.explain import PictureFolder

STAGES = ("coarse", "fine")


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
    from cfvit.inference.engines.exported import is_exported
    from cfvit.inference.files import FileAnswer, classify_files

    if explain is not None and scaled_decode:
        raise UsageError("--explain draws whole images and --scaled-decode does not decode them: leave one out")
    if scaled_decode and is_exported(model):
        raise UsageError(f"--scaled-decode is for models in torch, and {model} is an exported one: leave it out")
    predictor = load_predictor(model, threshold, calibration)
    files = find_images(paths)
    watch = {} if explain is None else {"watch": _pictures(explain, files, predictor)}
    width = max(len(str(path)) for path in files)
    answers: list[FileAnswer] = []
    for result in classify_files(files, predictor, batch_size, scaled_decode=scaled_decode, **watch):
        if isinstance(result, FileAnswer):
            answers.append(result)
            _print_answer(result, width, predictor.model.exit.measure, json)
        else:
            _tell_failure(result, json)
    if answers:
        say(_summary(answers, predictor.macs.backbone / 1e9, predictor.threshold))
    return int(len(answers) < len(files))


def _pictures(folder: Path, files: Sequence[Path], predictor: Predictor) -> PictureFolder:
    """A folder for pictures, which is none that the files come from."""
    from cfvit.plots.explain import PictureFolder

    if any(file.resolve().parent == folder.resolve() for file in files):
        raise UsageError(f"--explain {folder} holds images that are to be read: choose another folder for the pictures")
    return PictureFolder(folder, predictor.engine, predictor.threshold)


def _print_answer(answer: FileAnswer, width: int, measure: Measure, as_json: bool) -> None:
    if as_json:
        print_json(**{**dataclasses.asdict(answer), "path": str(answer.path)})
        return
    from cfvit.evaluation.breakdown import shown_confidence

    sure = shown_confidence(answer.confidence, measure)
    told = f"{answer.label:24} {sure:>6}  {STAGES[answer.stage]:6}  {answer.gmacs:.3f} GMACs"
    print_line(f"{answer.path!s:{width}}  {told}")


def _tell_failure(failure: FileFailure, as_json: bool) -> None:
    say(f"cfvit: {failure.path}: {failure.error}")
    if as_json:
        print_json(path=str(failure.path), error=failure.error)


def _summary(answers: Sequence[FileAnswer], plain: float, threshold: float) -> str:
    easy = sum(answer.stage == 0 for answer in answers)
    mean = sum(answer.gmacs for answer in answers) / len(answers)
    return (
        f"{len(answers)} image{'s' * (len(answers) > 1)}: {easy} answered at the coarse stage "
        f"(eta {eta_text(threshold)}), {mean:.3f} GMACs each, plain backbone {plain:.3f}: {saving_text(mean, plain)}"
    )
