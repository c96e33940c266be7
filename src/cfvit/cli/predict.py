"""``cfvit predict``: images to answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from cfvit.cli.application import app, eta_text, print_json, print_line, saving_text, say
from cfvit.cli.parameters import (
    DEFAULT_MODEL,
    BatchSize,
    CalibrationFile,
    Flag,
    Json,
    Model,
    Threshold,
    is_exported,
    load_predictor,
)
from cfvit.errors import CfvitError, UsageError

if TYPE_CHECKING:
    from cfvit.inference.files import Tally
    from cfvit.inference.predictor import Predictor

STAGES = ("coarse", "fine")


class InFile(TypedDict, total=False):
    """What `predict` can be told of answers that go into a file.

    Attributes:
        output: write all answers to this .jsonl or .parquet file; a run that was stopped goes on
        shard: i/n: the share of the i-th of n machines, with --output
        part_size: images in a partition file, with --output (default: 256)
        ray: answer on a Ray cluster: its address, or local for this machine, with --output
        ray_workers: workers that answer (default: as many as there are GPUs)
    """

    output: Path
    shard: str
    part_size: PositiveInt
    ray: str
    ray_workers: PositiveInt


@app.command
def predict(
    paths: list[Path],
    /,
    *,
    model: Model = DEFAULT_MODEL,
    threshold: Threshold = None,
    calibration: CalibrationFile = None,
    json: Json = False,
    explain: Path | None = None,
    scaled_decode: Flag = False,
    batch_size: BatchSize = 32,
    in_file: Annotated[InFile | None, Parameter(name="*")] = None,
) -> int:
    """Classify images: label, confidence, the stage that answered and what it cost.

    A file that cannot be read is reported; the others still get their answers, and the exit
    status is 1 at the end.

    Args:
        paths: image files, and folders of them
        explain: write a picture per image to this folder
        scaled_decode: decode large JPEGs at reduced size for the coarse stage: faster, slightly other pixels
    """
    from cfvit.data import find_images
    from cfvit.inference.files import FileAnswer, Tally, as_row, classify_files
    from cfvit.plots.explain import PictureFolder, shown_confidence

    if explain is not None and scaled_decode:
        raise UsageError("--explain draws whole images and --scaled-decode does not decode them: leave one out")
    is_exported(model, scaled_decode=scaled_decode)
    output = (in_file or {}).get("output")
    if in_file and output is None:
        raise UsageError("--shard, --part-size and --ray are for answers in a file: add --output")
    if in_file and "ray_workers" in in_file and "ray" not in in_file:
        raise UsageError("--ray-workers are those of a cluster: add --ray, or leave them out")
    if in_file and "ray" in in_file and scaled_decode:
        raise UsageError("--ray decodes whole images, and --scaled-decode does not: leave one out")
    if output is not None and (json or explain is not None):
        raise UsageError("with --output all answers go to its file: leave out --json and --explain")
    predictor = load_predictor(model, threshold, calibration)
    if in_file and output is not None:
        return _sum_up(_predict_into(output, in_file, paths, predictor, batch_size, scaled_decode), predictor)
    files = find_images(paths)
    options: dict[str, Any] = {"scaled_decode": scaled_decode}
    if explain is not None:
        if any(file.resolve().parent == explain.resolve() for file in files):
            raise UsageError(
                f"--explain {explain} holds images that are to be read: choose another folder for the pictures"
            )
        options["watch"] = PictureFolder(explain, predictor.engine, predictor.threshold)
    width, tally = max(len(str(path)) for path in files), Tally()
    for result in classify_files(files, predictor, batch_size, **options):
        row = tally.count(as_row(result))
        if not isinstance(result, FileAnswer):
            say(f"cfvit: {result.path}: {result.error}")
        elif not json:
            sure = shown_confidence(result.confidence, predictor.model.exit.measure)
            answer = f"{result.label:24} {sure:>6}  {STAGES[result.stage]:6}  {result.gmacs:.3f} GMACs"
            print_line(f"{result.path!s:{width}}  {answer}")
        if json:
            print_json(**row)
    return _sum_up(tally, predictor)


def _predict_into(
    output: Path, options: InFile, paths: Sequence[Path], predictor: Predictor, batch_size: int, scaled_decode: bool
) -> Tally:
    """All answers in one file, see `cfvit.deploy.batch`."""
    from cfvit.data import iter_images, progress_bar
    from cfvit.deploy.batch import PART_SIZE, model_digest, open_job, shard_of
    from cfvit.inference.files import as_row, classify_files

    answer: Callable[[Iterator[tuple[int, list[Path]]]], Iterator[tuple[int, Iterable[dict[str, Any]]]]]
    if "ray" in options:
        try:
            from cfvit.deploy.ray_data import answers
        except ImportError as error:
            raise CfvitError(f"a Ray cluster needs {error.name}: install cfvit[ray]") from error
        cluster = {"address": options["ray"], "workers": options.get("ray_workers")}
        answer = partial(answers, predictor=predictor, batch_size=batch_size, **cluster)
    else:
        classify = partial(classify_files, predictor=predictor, batch_size=batch_size, scaled_decode=scaled_decode)
        answer = lambda parts: ((number, map(as_row, classify(part))) for number, part in parts)  # noqa: E731

    shard = options.get("shard")
    settings = {
        "photos": [str(path) for path in paths],
        "working_folder": None if all(path.is_absolute() for path in paths) else str(Path.cwd()),
        "model": model_digest(predictor.model),
        "threshold": predictor.threshold,
        "scaled_decode": scaled_decode,
        "shard": shard,
    }
    images = iter_images(paths) if shard is None else shard_of(iter_images(sorted(set(paths))), shard)
    with open_job(output, settings, images, options.get("part_size", PART_SIZE)) as job:
        say(f"{job.total:,} images, {job.done:,} of them answered before" if job.done else f"{job.total:,} images")
        with progress_bar(job.total, done=job.done) as advance:
            for number, rows in answer(job.unanswered()):
                advance(job.write(number, rows))
        tally = job.join()
    if tally.failed:
        say(f"cfvit: {tally.failed:,} of {job.total:,} images have no answer: see their error in {output}")
    return tally


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
