"""From a model to a service: what is needed to run it elsewhere. This file is read without torch, for ``--help``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import NormFloat, PositiveInt
from cyclopts.validators import Number

from cfvit.errors import CfvitError, UsageError

PositiveFloat = Annotated[float, Parameter(validator=Number(gt=0, lte=1e6))]  # clocks and counts take no infinity
NonNegativeFloat = Annotated[float, Parameter(validator=Number(gte=0, lte=1e6))]


@dataclass(frozen=True, kw_only=True)
class Queues:
    """How images wait for the stages. A batch that is not full begins when its first image has waited long enough.

    By default batches and waits are what suits the device, see `cfvit.deploy.scheduler.DEFAULTS`.

    Attributes:
        coarse_batch: images in a batch of the coarse stage, at most
        coarse_wait: milliseconds that an image waits for a full batch, at most
        fine_batch: images in a batch of the fine stage, at most
        fine_wait: the same as --coarse-wait, for the fine stage
        least_eta: under load eta falls to this, for cheaper answers; by default never
        target_wait: with --least-eta, milliseconds of waiting from which eta falls (default: 500)
        max_waiting: images, and requests, that may wait; others get status 503

    Raises:
        CfvitError: an empty batch, or a wait below 0.
    """

    coarse_batch: PositiveInt | None = None
    coarse_wait: NonNegativeFloat | None = None
    fine_batch: PositiveInt | None = None
    fine_wait: NonNegativeFloat | None = None
    least_eta: NormFloat | None = None
    target_wait: PositiveFloat | None = None
    max_waiting: PositiveInt = 128

    def __post_init__(self) -> None:
        for batch, wait in ((self.coarse_batch, self.coarse_wait), (self.fine_batch, self.fine_wait)):
            if (batch is not None and batch < 1) or not (wait is None or wait >= 0):
                raise CfvitError(f"a batch of {batch} after {wait} ms: give at least 1 image, and 0 ms or more")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a server allows. Health, schema and page need no key.

    Attributes:
        name: of the model, in addresses
        api_key: must be sent as ``Authorization: Bearer KEY``; None if all may ask
        max_images: images of a request
        max_body: megabytes of a request
        max_pixels: megapixels of an image, which are counted before it is decoded
        time_limit: seconds for a request, its body included
        decoders: threads that decode images
        allow_parameters: let clients change eta
        browser_runtime: dist/ of onnxruntime-web: the page can run an ONNX export in the browser

    Raises:
        UsageError: a key that no client could send.
    """

    name: Annotated[str, Parameter(parse=False)] = "cfvit"
    api_key: Annotated[str | None, Parameter(parse=False)] = None
    max_images: PositiveInt = 32
    max_body: PositiveFloat = 16
    max_pixels: PositiveFloat = 50
    time_limit: PositiveFloat = 30
    decoders: PositiveInt = 4
    allow_parameters: Annotated[bool, Parameter(negative="")] = False
    browser_runtime: Path | None = None

    def __post_init__(self) -> None:
        if self.api_key is not None and not re.fullmatch("[!-~]([ -~]*[!-~])?", self.api_key):
            raise UsageError("the API key is empty, or no header can carry it: give printable ASCII characters")

    @property
    def most_bytes(self) -> int:
        """Of a request."""
        return round(self.max_body * 2**20)
