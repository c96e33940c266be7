"""``cfvit bench``: speed beside the plain backbone and its peers."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from cfvit.cli.application import app
from cfvit.cli.output import print_json, say, show
from cfvit.cli.parameters import DEFAULT_MODEL, Json, Share
from cfvit.errors import UsageError
from cfvit.modeling.variants import Mode
from cfvit.training.recipe import Recipe

if TYPE_CHECKING:
    from cfvit.benchmark.measure import Batch
    from cfvit.benchmark.report import Bench
    from cfvit.modeling.model import CoarseToFineViT

    BenchWatch = Callable[[Batch, Bench], None]


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
    from cfvit.benchmark.measure import Plan
    from cfvit.data import open_images

    _require_bench_folder(out)
    run = partial(
        _run,
        _network_to_time(model, backbone, coarse_grid),
        precision,
        batch_sizes=batch_sizes,
        plan=Plan(mode, fine_share, rounds, seconds),
        name=backbone or model or DEFAULT_MODEL,
        random_weights=backbone is not None,
        peers=peers,
        source=None if data is None else open_images(data),
    )
    _follow_bench(run, out, json)


def _run(network: CoarseToFineViT, precision: str, *, watch: BenchWatch, **details: Any) -> Bench:
    """The benchmark on this process's device; ``details`` as of `run_bench`."""
    import torch

    from cfvit.benchmark.run import run_bench
    from cfvit.processes import join_processes

    command = shlex.join(["cfvit", *sys.argv[1:]])
    with join_processes() as process:
        placed = network.to(process.device, getattr(torch, precision))
        return run_bench(placed, command=command, watch=watch, **details)


def _require_bench_folder(out: Path | None) -> None:
    """Before the timing, so that nobody waits for what cannot be drawn or written."""
    from cfvit.files import require_writable
    from cfvit.plots.explain import require_matplotlib

    if out is not None:
        require_matplotlib()
        require_writable(out / "bench.json")


def _network_to_time(model: str | None, backbone: str | None, coarse_grid: str | None) -> CoarseToFineViT:
    """The named model, or one on a backbone with random weights."""
    from cfvit.checkpoints import load
    from cfvit.modeling.model import create_model

    if backbone is None:
        return load(model or DEFAULT_MODEL)
    return create_model(backbone, coarse_grid=Recipe(coarse_grid=coarse_grid or 7).grid)


def _follow_bench(run: Callable[..., Bench], out: Path | None, json: bool) -> None:
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
        found[:] = [run(watch=keep)]
    finally:
        for measured in found:
            _tell_bench(measured, out, json)


def _tell_bench(bench: Bench, out: Path | None, json: bool) -> None:
    from cfvit.benchmark.report import summary, write_report

    if json:
        print_json(**summary(bench))
        for row in (row for batch in (*bench.batches, *bench.real) for row in batch.rows):
            print_json(**row.to_dict())
    for sentence in bench.sentences:
        say(sentence)
    if out is not None:
        write_report(bench, out)
        say(f"written to {out}")


def _print_batch(batch: Batch) -> None:
    from rich.table import Table

    from cfvit.benchmark.report import COLUMNS, PEERS_COLUMNS, PEERS_TITLE, cells, heading, peers_comparison

    beside = peers_comparison(batch)
    tables = [(COLUMNS, heading(batch), [cells(row) for row in batch.rows]), (PEERS_COLUMNS, PEERS_TITLE, beside)]
    for columns, title, rows in tables[: 1 + bool(beside)]:
        table = Table(*columns, title=title, box=None, title_justify="left")
        for row in rows:
            table.add_row(*row)
        show(table)
