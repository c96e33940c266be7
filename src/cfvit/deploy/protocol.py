"""What goes over the wire: the messages of `cfvit.deploy.server`, and tensors of the Open Inference Protocol."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from cfvit.errors import CfvitError, first_problem


class Failure(BaseModel):
    """An error."""

    error: str = Field(description="what was got and what is allowed, in one line")


class PredictedImage(BaseModel):
    """The answer for one image."""

    label: str
    index: int = Field(description="number of the class")
    confidence: float
    stage: int = Field(description="0: the coarse stage answered; 1: the fine one")
    gmacs: float = Field(description="1e9 multiply-accumulates that were spent")
    eta: float = Field(description="what the coarse stage's confidence was compared with")
    milliseconds_waiting: float = Field(description="in the queues of the stages")
    milliseconds_computing: float = Field(description="of the batches in which the image was")


class Predictions(BaseModel):
    """Answers for the images of a request."""

    predictions: list[PredictedImage] = Field(description="in the order of the images")
    milliseconds: float = Field(description="from the request to the answer")


class Guess(BaseModel):
    """A class that an image may show."""

    label: str
    probability: float


class Explained(BaseModel):
    """What both stages make of one image."""

    grid: list[int] = Field(description="rows and columns of the coarse stage's cells")
    class_attention: list[float] = Field(description="of each cell, row by row")
    split: list[bool] = Field(description="whether the fine stage splits a cell, row by row")
    view: str = Field(description="the image as the model sees it, a PNG in base64")
    coarse: list[Guess] = Field(description="the coarse answer, most probable first, at most 5")
    fine: list[Guess] = Field(description="the fine answer, most probable first, at most 5")
    coarse_confidence: float
    fine_confidence: float
    eta: float
    stage: int = Field(description="whose answer counts at eta; here both were computed")
    gmacs: float = Field(description="what that answer costs, in 1e9 multiply-accumulates")
    gmacs_coarse: float
    gmacs_both: float
    gmacs_plain: float = Field(description="what the plain backbone costs")
    milliseconds_coarse: float = Field(description="of the coarse stage's batch")
    milliseconds_fine: float = Field(description="of the fine stage's batch")


class Stats(BaseModel):
    """The server at a glance."""

    model: str
    images: dict[str, int] = Field(description="answered since the start, by stage")
    queues: dict[str, int] = Field(description="images that wait, by stage")
    waiting: int = Field(description="images without an answer")
    eta: float = Field(description="as it was set")
    eta_now: float = Field(description="of the last batch; lower than eta under load, where that is allowed")
    requests_per_second: float = Field(description="answered in the last minute")
    p50_ms: float | None = Field(description="median time of these requests")
    p95_ms: float | None = Field(description="95% of these requests took less")
    ready: bool
    browser: bool = Field(description="whether the page can run the model in the browser")


class Parameters(BaseModel):
    """What may be changed while the server runs."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    eta: float = Field(ge=0, le=1, description="confidence at which the coarse answer is given")


class TensorInfo(BaseModel):
    """Name, kind and shape of a tensor; -1 stands for the number of images."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """Metadata of a model, by the Open Inference Protocol. One of the inputs is to be given."""

    name: str
    platform: str
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]


class OutputTensor(TensorInfo):
    """An output: its values in row-major order."""

    data: list[Any]


class Inferred(BaseModel):
    """The answer to an `InferRequest`."""

    model_name: str
    id: str | None = None
    parameters: dict[str, Any] = Field(description="eta: what confidences were compared with, lowest of the request")
    outputs: list[OutputTensor]


class InputTensor(TensorInfo):
    """An input: `images`, FP32, normalised; or `files`, BYTES, image files in base64."""

    data: list[Any] | None = None
    parameters: dict[str, Any] = {}


class RequestedOutput(BaseModel):
    """An output that is asked for."""

    name: str


class InferRequest(BaseModel):
    """A request for inference, by the Open Inference Protocol."""

    id: str | None = None
    parameters: dict[str, Any] = {}
    inputs: list[InputTensor] = Field(min_length=1, max_length=1)
    outputs: list[RequestedOutput] | None = None


def infer_schema() -> dict[str, Any]:
    """The schema of an `InferRequest`, without references."""
    schema = InferRequest.model_json_schema()
    text = json.dumps({name: part for name, part in schema.items() if name != "$defs"})
    for name, part in schema["$defs"].items():
        text = text.replace(json.dumps({"$ref": f"#/$defs/{name}"}), json.dumps(part))
    return json.loads(text)


def read_request(
    body: bytes, json_length: str | None, size: tuple[int, int], most: int
) -> tuple[InferRequest, list[Tensor] | list[bytes]]:
    """What is asked for, and the images: normalised ``[3, H, W]``, or files that are still to be decoded.

    Args:
        body: JSON, which by the protocol's binary extension is followed by the input's values.
        json_length: the header ``Inference-Header-Content-Length``: how many bytes the JSON has; None if it is all.
        size: height and width of the model's images.
        most: images that are allowed.

    Raises:
        CfvitError: no such request; an input of another name, datatype, shape or number of values; values that are not
            numbers.
    """
    length = str(len(body)) if json_length is None else json_length
    if not (length.isdecimal() and len(length) < 12 and int(length) <= len(body)):
        raise CfvitError(f"Inference-Header-Content-Length is {length!r}: give the bytes of the JSON")
    end = int(length)
    try:
        asked = InferRequest.model_validate_json(body[:end])
    except ValidationError as error:
        what = first_problem(error.errors())
        raise CfvitError(f"not a request of the Open Inference Protocol ({what})") from error
    given, binary = asked.inputs[0], body[end:]
    kinds = {("images", "FP32"): [3, *size], ("files", "BYTES"): []}
    if (given.name, given.datatype) not in kinds:
        raise CfvitError(f"input {given.name!r} of {given.datatype!r}: give 'images' of FP32 or 'files' of BYTES")
    each = kinds[given.name, given.datatype]
    if not given.shape or given.shape[1:] != each or not 1 <= given.shape[0] <= most:
        raise CfvitError(f"input {given.name!r} of shape {given.shape}: give {['n', *each]}, n from 1 to {most}")
    if "binary_data_size" in given.parameters:
        if given.data is not None or given.parameters["binary_data_size"] != len(binary):
            raise CfvitError(f"{len(binary)} bytes follow the JSON: give as many as binary_data_size says, and no data")
    elif given.data is None or binary:
        raise CfvitError(f"input {given.name!r} has no data, or bytes too many: give data, or binary_data_size")
    return asked, _images(given, binary) if each else _files(given, binary)


def _images(given: InputTensor, binary: bytes) -> list[Tensor]:
    try:
        values = np.frombuffer(binary, "<f4") if given.data is None else np.asarray(given.data)
    except ValueError as error:
        raise CfvitError(
            "input 'images' has rows of different lengths, or bytes in part: give float32 numbers"
        ) from error
    if values.dtype.kind not in "fiu" or values.size != math.prod(given.shape):
        raise CfvitError(
            f"input 'images' has {values.size} values for the shape {given.shape}: give as many, all numbers"
        )
    with np.errstate(over="ignore"):
        images = torch.from_numpy(values.astype(np.float32).reshape(given.shape))
    if not images.isfinite().all():
        raise CfvitError("input 'images' has values that are infinite or not a number: give normalised pixels")
    return list(images)


def _files(given: InputTensor, binary: bytes) -> list[bytes]:
    """Files from base64; or from bytes, each with its length in front, in 4 bytes, the lowest first."""
    count = given.shape[0]
    if given.data is not None:
        try:
            files = [base64.b64decode(text, validate=True) for text in given.data]
        except (TypeError, ValueError) as error:
            raise CfvitError("input 'files' has a value that is not base64: give image files as base64 text") from error
        if len(files) != count:
            raise CfvitError(f"input 'files' has {len(files)} values for the shape {given.shape}: give as many")
        return files
    files, place = [], 0
    while place + 4 <= len(binary) and len(files) < count:
        end = place + 4 + int.from_bytes(binary[place : place + 4], "little")
        files.append(binary[place + 4 : end])
        place = end
    if place != len(binary) or len(files) != count:
        raise CfvitError(f"the bytes of 'files' are not {count} files with their lengths in front")
    return files
