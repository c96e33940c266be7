"""``cfvit serve``: a model behind HTTP."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from cfvit.cli.application import app
from cfvit.cli.parameters import DEFAULT_MODEL, CalibrationFile, Threshold, load_predictor
from cfvit.errors import CfvitError, UsageError

Count = Annotated[int, Parameter(validator=Number(gte=1))]
Seconds = Annotated[float, Parameter(validator=Number(gt=0))]
Eta = Annotated[float | None, Parameter(validator=Number(gte=0, lte=1))]


@app.command
def serve(
    *,
    model: Annotated[
        str, Parameter(help="saved folder, exported folder, authors' .pth, or a bundled name (see cfvit models)")
    ] = DEFAULT_MODEL,
    threshold: Threshold = None,
    calibration: CalibrationFile = None,
    host: Annotated[str, Parameter(help="address to listen on; 0.0.0.0 for all of this machine's")] = "127.0.0.1",
    port: Annotated[int, Parameter(validator=Number(gte=0, lte=65535))] = 8000,
    name: Annotated[str | None, Parameter(help="of the model in addresses; by default as --model is called")] = None,
    coarse_batch: Annotated[Count | None, Parameter(help="images in a batch of the coarse stage, at most")] = None,
    coarse_wait: Annotated[
        float | None, Parameter(validator=Number(gte=0), help="milliseconds that an image waits for others, at most")
    ] = None,
    fine_batch: Annotated[Count | None, Parameter(help="the same for the fine stage")] = None,
    fine_wait: Annotated[float | None, Parameter(validator=Number(gte=0), help="the same for the fine stage")] = None,
    least_eta: Annotated[
        Eta, Parameter(help="under load eta falls to this, for cheaper answers; by default never")
    ] = None,
    target_wait: Annotated[Seconds, Parameter(help="milliseconds of waiting from which eta falls")] = 500,
    gmacs: Annotated[
        float | None, Parameter(help="budget: eta follows the images, at most its own, to this mean cost of an image")
    ] = None,
    max_waiting: Annotated[Count, Parameter(help="images, and requests, that may wait; others get status 503")] = 128,
    max_images: Annotated[Count, Parameter(help="images of a request")] = 32,
    max_body: Annotated[Count, Parameter(help="megabytes of a request")] = 16,
    max_pixels: Annotated[Count, Parameter(help="megapixels of an image")] = 50,
    time_limit: Annotated[Seconds, Parameter(help="seconds for a request, its body included")] = 30,
    notice: Annotated[
        float, Parameter(validator=Number(gte=0), help="seconds from SIGTERM in which new requests get status 503")
    ] = 1,
    decoders: Annotated[Count, Parameter(help="threads that decode images")] = 4,
    api_key: Annotated[
        Path | None, Parameter(help="file of a key that clients must send; or put it in CFVIT_API_KEY")
    ] = None,
    allow_parameters: Annotated[bool, Parameter(negative="", help="let clients change eta")] = False,
    browser_runtime: Annotated[
        Path | None, Parameter(help="dist/ of onnxruntime-web: the page can run an ONNX export in the browser")
    ] = None,
) -> None:
    """Answer images over HTTP, until SIGTERM or Ctrl-C.

    POST an image to /predict, or a request of the Open Inference Protocol to /v2/models/NAME/infer.
    """
    try:
        from cfvit.deploy.scheduler import DEFAULTS, StageOptions
        from cfvit.deploy.server import Settings
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
    if key == "":
        raise UsageError("the API key is empty: put it into the file, or into CFVIT_API_KEY")
    predictor = load_predictor(model, threshold, calibration)
    defaults = DEFAULTS.get(predictor.engine.weight.device.type, DEFAULTS["cuda"])
    given = ((coarse_batch, coarse_wait), (fine_batch, fine_wait))
    coarse, fine = (
        StageOptions(batch or default.batch, default.wait if wait is None else wait / 1e3)
        for (batch, wait), default in zip(given, defaults, strict=True)
    )
    if least_eta is not None and least_eta > predictor.threshold:
        raise UsageError(f"least eta is {least_eta:g}, and eta {predictor.threshold:g}: give at most that")
    macs = predictor.macs
    if gmacs is not None and not macs.coarse <= 1e9 * gmacs <= macs.both:
        least, most = macs.coarse / 1e9, macs.both / 1e9
        raise UsageError(f"--gmacs is {gmacs:g}: an image costs between {least:.3f} and {most:.3f}, give one of these")
    settings = Settings(
        name=name,
        max_body=max_body * 2**20,
        max_pixels=max_pixels * 1_000_000,
        max_images=max_images,
        max_waiting=max_waiting,
        time_limit=time_limit,
        decoders=decoders,
        api_key=key,
        allow_parameters=allow_parameters,
        coarse=coarse,
        fine=fine,
        least_eta=least_eta,
        target_wait=target_wait / 1e3,
        gmacs=gmacs,
        browser_runtime=browser_runtime,
    )
    run(predictor, settings, host, port, notice)
