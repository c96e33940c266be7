"""``cfvit export``: a model as graphs for ONNX Runtime or OpenVINO."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from cfvit.cli.application import app
from cfvit.cli.output import say
from cfvit.cli.parameters import CalibrationFile, load_model


@app.command
def export(
    model: Annotated[str, Parameter(help="saved folder, authors' .pth, or a bundled name (see cfvit models)")],
    folder: Annotated[Path, Parameter(help="where to write the graphs, cfvit.json and example.py")],
    /,
    *,
    format: Annotated[Literal["onnx", "openvino"], Parameter(help="of the graphs")] = "onnx",
    calibration: CalibrationFile = None,
) -> None:
    """Write a model as graphs that run without torch, and compare them with torch.

    Both stages are written as a graph each, and together in a third one with eta as an input. Then predict takes the
    folder as --model. Graphs that do not agree with torch are not written.
    """
    from cfvit.deploy.export import TOLERANCE
    from cfvit.deploy.export import export as write

    about = write(load_model(model, calibration), folder, format=format)
    say(f"{about.config.backbone} is in {folder}: differs from torch by {about.difference:.1e} (allowed {TOLERANCE:g})")
