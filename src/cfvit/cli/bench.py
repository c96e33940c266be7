"""``cfvit bench``: speed beside the plain backbone and its peers."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from cfvit.benchmark import Plan
from cfvit.cli.application import app, print_json, print_table, say
from cfvit.cli.parameters import DEFAULT_MODEL, Json
from cfvit.errors import UsageError
from cfvit.modeling.config import read_grid

if TYPE_CHECKING:
    from cfvit.benchmark.measure import TimedBatch
    from cfvit.benchmark.report import Bench


@app.command
def bench(
    *,
    model: str | None = None,
    backbone: str | None = None,
    coarse_grid: str | None = None,
    batch_sizes: tuple[PositiveInt, ...] = (1, 8, 32),
    plan: Annotated[Plan | None, Parameter(name="*")] = None,
    peers: bool = True,
    data: str | None = None,
    precision: Literal["float32", "bfloat16"] = "float32",
    out: Path | None = None,
    json: Json = False,
) -> None:
    """Time the plain backbone, both stages, the predictor and its peers in turn, on random and on real images.

    Each ratio has its interval from paired rounds, and beside it the ratio of the MACs. A ratio is marked ? if the
    machine was too noisy.

    Args:
        model: saved folder, authors' .pth, or a bundled name; by default deit_tiny_imagenet
        backbone: instead of --model: a model on this timm ViT with random weights
        coarse_grid: with --backbone, side of the coarse grid, or ROWSxCOLUMNS; by default 7
        batch_sizes: images per call
        peers: time the other methods of cfvit train as well, with random weights
        data: time real images as well, at the model's own eta, with and without decoding
        precision: precision of weights and images
        out: folder for bench.json, bench.md and bench.png
    """
    if backbone is None and coarse_grid is not None:
        raise UsageError("--coarse-grid is a model's own: give it with --backbone")
    if backbone is not None and (model is not None or data is not None):
        raise UsageError("--backbone has random weights: give it without --model and --data")
    import torch

    from cfvit.benchmark.report import write_report
    from cfvit.benchmark.run import run_bench
    from cfvit.checkpoints import load
    from cfvit.data import open_images
    from cfvit.files import require_writable
    from cfvit.modeling.model import create_model
    from cfvit.plots.style import require_matplotlib
    from cfvit.processes import join_processes

    if out is not None:  # now, so that nobody waits for what cannot be drawn or written
        require_matplotlib()
        require_writable(out / "bench.json")
    if backbone is None:
        network = load(model or DEFAULT_MODEL)
    else:
        network = create_model(backbone, coarse_grid=read_grid(coarse_grid or 7))
    measured: Bench | None = None
    try:
        with join_processes() as process:
            for measured, batch in run_bench(
                network.to(process.device, getattr(torch, precision)),
                batch_sizes,
                plan or Plan(),
                name=backbone or model or DEFAULT_MODEL,
                command=shlex.join(["cfvit", *sys.argv[1:]]),
                random_weights=backbone is not None,
                peers=peers,
                source=None if data is None else open_images(data),
            ):
                if out is not None:
                    write_report(measured, out)
                if batch is not None and not json:
                    _print_batch(batch)
    finally:  # after a failure as well
        if measured is not None:
            _print_end(measured, json)
            if out is not None:
                say(f"written to {out}")


def _print_batch(batch: TimedBatch) -> None:
    from cfvit.benchmark.report import COLUMNS, PEERS_COLUMNS, PEERS_TITLE, cells, heading, peers_comparison

    print_table(COLUMNS, map(cells, batch.rows), heading(batch))
    if beside := peers_comparison(batch):
        print_table(PEERS_COLUMNS, beside, PEERS_TITLE)


def _print_end(measured: Bench, json: bool) -> None:
    """What a reader has to know besides the rows; as JSON with them."""
    from cfvit.benchmark.report import summary

    if json:
        print_json(**summary(measured))
        for row in (row for batch in measured.measured for row in batch.rows):
            print_json(**row.to_dict())
    for sentence in measured.sentences:
        say(sentence)
