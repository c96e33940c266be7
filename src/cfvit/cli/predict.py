"""``cfvit predict``: images to answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from cfvit.cli.application import app
from cfvit.cli.output import eta_text, print_json, print_line, saving_text, say
from cfvit.cli.parameters import DEFAULT_MODEL, BatchSize, CalibrationFile, Json, Model, Threshold, load_predictor
from cfvit.errors import CfvitError, UsageError

if TYPE_CHECKING:
    from cfvit.inference.files import FileAnswer, Tally
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
    output: Annotated[
        Path | None, Parameter(help="write all answers to this .jsonl or .parquet file; a run that was stopped goes on")
    ] = None,
    shard: Annotated[str | None, Parameter(help="i/n: the share of the i-th of n machines, with --output")] = None,
    part_size: Annotated[
        int | None,
        Parameter(validator=Number(gte=1), help="images in a partition file, with --output (default: 256)"),
    ] = None,
    ray: Annotated[
        str | None, Parameter(help="answer on a Ray cluster: its address, or local for this machine, with --output")
    ] = None,
    ray_workers: Annotated[
        int | None, Parameter(validator=Number(gte=1), help="workers that answer (default: as many as there are GPUs)")
    ] = None,
) -> int:
    """Classify images: label, confidence, the stage that answered and what it cost.

    A file that cannot be read is reported; the others still get their answers, and the exit
    status is 1 at the end.
    """
    from cfvit.data import find_images
    from cfvit.inference.engines.exported import is_exported
    from cfvit.inference.files import FileAnswer, Tally, as_row, classify_files

    if explain is not None and scaled_decode:
        raise UsageError("--explain draws whole images and --scaled-decode does not decode them: leave one out")
    if scaled_decode and is_exported(model):
        raise UsageError(f"--scaled-decode is for models in torch, and {model} is an exported one: leave it out")
    if output is None and (shard or part_size or ray):
        raise UsageError("--shard, --part-size and --ray are for answers in a file: add --output")
    if ray is not None and scaled_decode:
        raise UsageError("--ray decodes whole images, and --scaled-decode does not: leave one out")
    if output is not None and (json or explain is not None):
        raise UsageError("with --output all answers go to its file: leave out --json and --explain")
    predictor = load_predictor(model, threshold, calibration)
    if output is not None:
        return _predict_into(output, paths, predictor, batch_size, scaled_decode, shard, part_size, ray, ray_workers)
    files = find_images(paths)
    watch: dict[str, Any] = {} if explain is None else {"watch": _pictures(explain, files, predictor)}
    width = max(len(str(path)) for path in files)
    tally = Tally()
    for result in classify_files(files, predictor, batch_size, scaled_decode=scaled_decode, **watch):
        row = tally.count(as_row(result))
        if not isinstance(result, FileAnswer):
            say(f"cfvit: {result.path}: {result.error}")
        elif not json:
            _print_answer(result, width, predictor.model.exit.measure)
        if json:
            print_json(**row)
    return _sum_up(tally, predictor)


def _predict_into(
    output: Path,
    paths: Sequence[Path],
    predictor: Predictor,
    batch_size: int,
    scaled_decode: bool,
    shard: str | None,
    part_size: int | None,
    ray: str | None,
    ray_workers: int | None,
) -> int:
    """All answers in one file, see `cfvit.deploy.batch`."""
    from cfvit.data import iter_images, progress_bar
    from cfvit.deploy.batch import PART_SIZE, deal, model_digest, open_job, parse_shard
    from cfvit.inference.files import as_row, classify_files

    answer: Callable[[Iterator[tuple[int, list[Path]]]], Iterator[tuple[int, Iterable[dict[str, Any]]]]]
    if ray is not None:
        try:
            from cfvit.deploy.ray_data import answers
        except ImportError as error:
            raise CfvitError(f"a Ray cluster needs {error.name}: install cfvit[ray]") from error
        answer = partial(answers, predictor=predictor, batch_size=batch_size, address=ray, workers=ray_workers)
    else:
        classify = partial(classify_files, predictor=predictor, batch_size=batch_size, scaled_decode=scaled_decode)
        answer = lambda parts: ((number, map(as_row, classify(part))) for number, part in parts)  # noqa: E731

    dealt = None if shard is None else parse_shard(shard)
    settings = {
        "photos": [str(path.absolute()) for path in paths],
        "model": model_digest(predictor.model),
        "threshold": predictor.threshold,
        "scaled_decode": scaled_decode,
        "shard": shard,
    }
    images = iter_images(paths) if dealt is None else deal(iter_images(sorted(set(paths))), dealt)
    with open_job(output, settings, images, part_size or PART_SIZE) as job:
        say(f"{job.total:,} images, {job.done:,} of them answered before" if job.done else f"{job.total:,} images")
        with progress_bar(job.total, done=job.done) as advance:
            for number, rows in answer(job.unanswered()):
                advance(job.write(number, rows))
        tally = job.join()
    if tally.failed:
        say(f"cfvit: {tally.failed:,} of {job.total:,} images have no answer: see their error in {output}")
    return _sum_up(tally, predictor)


def _pictures(folder: Path, files: Sequence[Path], predictor: Predictor) -> PictureFolder:
    """A folder for pictures, which is none that the files come from."""
    from cfvit.plots.explain import PictureFolder

    if any(file.resolve().parent == folder.resolve() for file in files):
        raise UsageError(f"--explain {folder} holds images that are to be read: choose another folder for the pictures")
    return PictureFolder(folder, predictor.engine, predictor.threshold)


def _print_answer(answer: FileAnswer, width: int, measure: Measure) -> None:
    from cfvit.evaluation.breakdown import shown_confidence

    sure = shown_confidence(answer.confidence, measure)
    told = f"{answer.label:24} {sure:>6}  {STAGES[answer.stage]:6}  {answer.gmacs:.3f} GMACs"
    print_line(f"{answer.path!s:{width}}  {told}")


def _sum_up(tally: Tally, predictor: Predictor) -> int:
    """Says what it cost; returns the exit status."""
    if tally.answered:
        mean, plain = tally.gmacs / tally.answered, predictor.macs.backbone / 1e9
        say(
            f"{tally.answered} image{'s' * (tally.answered > 1)}: {tally.easy} answered at the coarse stage "
            f"(eta {eta_text(predictor.threshold)}), {mean:.3f} GMACs each, plain backbone {plain:.3f}: "
            f"{saving_text(mean, plain)}"
        )
    return int(tally.failed > 0)
