"""``cfvit export``: a model as graphs for ONNX Runtime or OpenVINO."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from cfvit.cli.application import app
from cfvit.cli.output import eta_text, say
from cfvit.cli.parameters import CalibrationFile, load_model
from cfvit.errors import CfvitError, UsageError
from cfvit.files import require_writable


@app.command
def export(
    model: Annotated[str, Parameter(help="saved folder, authors' .pth, or a bundled name (see cfvit models)")],
    folder: Annotated[Path, Parameter(help="where to write the graphs, cfvit.json and example.py")],
    /,
    *,
    format: Annotated[Literal["onnx", "openvino"], Parameter(help="of the graphs")] = "onnx",
    int8: Annotated[bool, Parameter(negative="", help="quantise to eight-bit integers, by images of --data")] = False,
    data: Annotated[
        str | None, Parameter(help="for --int8: images in use, with or without classes, not of the training")
    ] = None,
    calibration: CalibrationFile = None,
) -> None:
    """Write a model as graphs that run without torch, and compare them with torch.

    Both stages are written as a graph each, and together in a third one with eta as an input. Then predict and eval
    take the folder as --model. Graphs that do not agree with torch are not written.

    With --int8, at most 300 images of DATA serve to quantise. On the others both stages are scored before and after,
    and eta is chosen anew.
    """
    if int8 != (data is not None):
        raise UsageError("--int8 quantises by the images of --data: give both, or neither")
    require_writable(folder / "cfvit.json")

    from cfvit.data import open_images
    from cfvit.deploy.export import TOLERANCE
    from cfvit.deploy.export import export as write
    from cfvit.evaluation.metrics import labelled_images

    network, images = load_model(model, calibration), None
    if data is not None:
        try:
            images = labelled_images(network, data)
        except CfvitError as error:
            images = open_images(data)
            say(f"cfvit: scored by agreement with the fine stage in torch, not by labels: {error}")
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was begun is cleaned up
    try:
        about = write(network, folder, format=format, int8=images)
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
