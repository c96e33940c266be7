"""From a model to a service: what is needed to run it elsewhere. This file is read without torch, for ``--help``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import PositiveFloat, PositiveInt


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

    @property
    def most_bytes(self) -> int:
        """Of a request."""
        return round(self.max_body * 2**20)
