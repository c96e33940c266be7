"""``cfvit export`` and ``cfvit serve``: a model as graphs for other engines, and behind HTTP."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.types import UInt16

from cfvit.cli.application import app, eta_text, say
from cfvit.cli.parameters import DEFAULT_MODEL, CalibrationFile, Flag, Threshold, load_model, load_predictor
from cfvit.deploy import NonNegativeFloat, Queues, Settings
from cfvit.errors import CfvitError, UsageError
from cfvit.files import require_writable


@app.command
def export(
    model: str,
    folder: Path,
    /,
    *,
    format: Literal["onnx", "openvino"] = "onnx",
    int8: Flag = False,
    data: str | None = None,
    calibration: CalibrationFile = None,
) -> None:
    """Write a model as graphs that run without torch, and compare them with torch.

    Both stages are written as a graph each, and together in a third one with eta as an input. Then predict and eval
    take the folder as --model. Graphs that do not agree with torch, on random images and some of DATA, are not written.

    With --int8, at most 300 images of DATA serve to quantise. On the others both stages are scored before and after,
    and eta is chosen anew.

    Args:
        model: saved folder, authors' .pth, or a bundled name (see cfvit models)
        folder: where to write the graphs, cfvit.json and example.py
        format: of the graphs
        int8: quantise to eight-bit integers, by images of --data
        data: images in use, with or without classes; for --int8 not of the training
    """
    if int8 and data is None:
        raise UsageError("--int8 quantises by the images of --data: give them")
    require_writable(folder / "cfvit.json")

    import torch

    from cfvit.data import UNREADABLE, EvalImages, open_images
    from cfvit.deploy.export import BATCHES, TOLERANCE
    from cfvit.deploy.export import export as write
    from cfvit.evaluation.metrics import labelled_images

    network, images, compared = load_model(model, calibration), None, None
    if data is not None:
        try:
            images = labelled_images(network, data)
        except CfvitError as error:
            images = open_images(data)
            if int8:
                say(f"cfvit: scored by agreement with the fine stage in torch, not by labels: {error}")
        some = EvalImages(images, network.data_config, world=math.ceil(len(images) / max(BATCHES)))
        read = [image for image, target, _ in map(some.__getitem__, range(len(some))) if target != UNREADABLE]
        compared = torch.stack(read) if read else None
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was begun is cleaned up
    try:
        about = write(network, folder, format=format, images=compared, int8=images if int8 else None)
    finally:
        signal.signal(signal.SIGTERM, before)
    if found := about.quantised:
        say(f"int8, by {found.calibrated_on} images; {found.measure} in % on {found.scored_on} others:")
        for title, scores in (("in torch", found.before), ("in int8", found.after)):
            line = f"  {title:8}  coarse {scores.coarse:.2f}, fine {scores.fine:.2f}"
            if scores.eta is not None:
                line += f", at eta {eta_text(scores.eta)} {scores.answered:.2f} with {scores.fine_share:.1%} fine"
            say(line)
    agreed = f"{'before quantising ' if about.quantised else ''}differs from torch by {about.difference:.1e}"
    say(f"{about.config.backbone} is in {folder}: {agreed} (allowed {TOLERANCE:g})")


@app.command
def serve(
    *,
    model: str = DEFAULT_MODEL,
    threshold: Threshold = None,
    calibration: CalibrationFile = None,
    host: str = "127.0.0.1",
    port: UInt16 = 8000,
    name: str | None = None,
    queues: Annotated[Queues | None, Parameter(name="*")] = None,
    gmacs: float | None = None,
    notice: NonNegativeFloat = 1,
    api_key: Path | None = None,
    settings: Annotated[Settings | None, Parameter(name="*")] = None,
) -> None:
    """Answer images over HTTP, until SIGTERM or Ctrl-C.

    POST an image to /predict, or a request of the Open Inference Protocol to /v2/models/NAME/infer.

    Args:
        model: saved folder, exported folder, authors' .pth, or a bundled name (see cfvit models)
        host: address to listen on; 0.0.0.0 for all of this machine's
        port: port to listen on
        name: the model's name in addresses; by default that of --model
        gmacs: budget: eta is lowered as the images need it, so that an image costs this many GMACs on average
        notice: seconds after SIGTERM in which new requests still get status 503
        api_key: file of a key that clients must send; or put it in CFVIT_API_KEY
    """
    try:
        from cfvit.deploy.scheduler import Scheduler
        from cfvit.deploy.server import create_app
        from cfvit.deploy.server import serve as run
    except ImportError as error:
        raise CfvitError(f"serving needs {error.name}: install cfvit[serve]") from error

    name = name or Path(model).name or "cfvit"
    if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
        raise UsageError(f"--name {name!r} stands in addresses: give letters, digits, and . _ - between them")
    try:
        key = os.environ.get("CFVIT_API_KEY") if api_key is None else api_key.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key {api_key} cannot be read ({error}): give a text file") from error
    settings, queues = replace(settings or Settings(), name=name, api_key=key), queues or Queues()
    if queues.target_wait is not None and queues.least_eta is None:
        raise UsageError("--target-wait is when eta begins to fall to --least-eta: give both, or leave it out")
    predictor = load_predictor(model, threshold, calibration)
    if queues.least_eta is not None and queues.least_eta > predictor.threshold:
        raise UsageError(f"least eta is {queues.least_eta:g}, and eta {predictor.threshold:g}: give at most that")
    least, most = predictor.macs.coarse / 1e9, predictor.macs.both / 1e9
    if gmacs is not None and not least <= gmacs <= most:
        raise UsageError(f"--gmacs is {gmacs:g}: an image costs between {least:.3f} and {most:.3f}, give one of these")
    fine_share = None if gmacs is None else (gmacs - least) / (most - least)
    scheduler = Scheduler(predictor.engine, predictor.threshold, queues, fine_share)
    run(create_app(predictor, settings, scheduler), host, port, notice)
