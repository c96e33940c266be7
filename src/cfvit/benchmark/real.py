"""The backbone and the predictor on real images at the model's own eta, from pixels on the device to encoded files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cfvit.benchmark.contenders import BACKBONE, PREDICTOR, predictor_of, prepare
from cfvit.benchmark.measure import COMPUTING, REAL, Batch, Entry, Plan, relate
from cfvit.data import DataSource, ImageError, eval_transform, open_image
from cfvit.errors import CfvitError
from cfvit.evaluation.timing import Call
from cfvit.flops import StageMacs, count_macs
from cfvit.inference import FINE, Predictor
from cfvit.model import CoarseToFineViT
from cfvit.prediction import READERS
from cfvit.variants import Mode

COPYING, RESIZING, DECODING = "with host copies", "with resizing", "with decoding"
SCOPES = (COMPUTING, COPYING, RESIZING, DECODING)
"""Each holds the one before it: pixels on the device, pixels in host memory, decoded images, encoded files."""
FEWEST_IMAGES = 16
"""A round answers at least so many, in several calls if batches are smaller."""


@dataclass(frozen=True, eq=False)
class RealImages:
    """Images as each scope finds them, in batches of one size.

    Attributes:
        files: encoded, as stored.
        decoded: at their own sizes.
        pixels: normalised, in host memory, ``[B, 3, S, S]`` each.
        resident: the same on the device and in the model's precision.
    """

    files: list[list[bytes]]
    decoded: list[list[Image.Image]]
    pixels: list[Tensor]
    resident: list[Tensor]

    @property
    def count(self) -> int:
        """Images of a round."""
        return sum(map(len, self.files))


def read_images(source: DataSource, model: CoarseToFineViT, batch_size: int) -> RealImages:
    """Takes images from all over the data, some of them more than once if there are too few.

    Raises:
        CfvitError: no image can be read from its stored form.
    """
    batches = math.ceil(FEWEST_IMAGES / batch_size)
    wanted = batches * batch_size
    files: list[bytes] = []
    for place in range(min(wanted, len(source))):
        content = _stored(source, place * len(source) // min(wanted, len(source)))
        files += [] if content is None else [content]
    if not files:
        raise CfvitError("none of the images can be read as a file: give a folder or tar of images")
    files = [files[place % len(files)] for place in range(wanted)]
    in_batches = [files[start : start + batch_size] for start in range(0, wanted, batch_size)]
    decoded = [[open_image(content) for content in batch] for batch in in_batches]
    transform = eval_transform(model.data_config)
    pixels = [torch.stack([transform(image) for image in batch]) for batch in decoded]
    parameter = next(model.parameters())
    if parameter.device.type == "cuda":
        pixels = [batch.pin_memory() for batch in pixels]
    return RealImages(in_batches, decoded, pixels, [batch.to(parameter.device, parameter.dtype) for batch in pixels])


def _stored(source: DataSource, index: int) -> bytes | None:
    """An image file's bytes, or None if it is not one that can be decoded."""
    try:
        with source.stored(index) as file:
            content = file.read()
        open_image(content)
    except ImageError:
        return None
    return content


@torch.inference_mode()
def measure_real(model: CoarseToFineViT, source: DataSource, batch_size: int, plan: Plan) -> Batch:
    """Times backbone and predictor on real images in all `SCOPES`; a round answers all of them.

    Raises:
        CfvitError: a model without a calibrated threshold, images that cannot be read.
    """
    images = read_images(source, model, batch_size)
    calls: dict[str, Sequence[Call]] = {}
    entries: list[Entry] = []
    with ThreadPoolExecutor(READERS) as pool:
        inputs = {scope: _inputs(scope, images, model, pool) for scope in SCOPES}
        for answerer in _answerers(model, images, plan.modes):
            for scope in SCOPES:
                key = f"{answerer.name}, {answerer.mode}, {scope}"
                calls[key] = [_answering(answerer.network, give, scope) for give in inputs[scope]]
                share, macs = answerer.fine_share, answerer.macs
                entries.append(Entry(answerer.name, answerer.mode, REAL, scope, share, macs, images.count, {key: 1.0}))
        return relate(entries, calls, batch_size, model, plan)


@dataclass(frozen=True, eq=False)
class Answerer:
    """What answers real images.

    Attributes:
        name, mode: as of `cfvit.benchmark.measure.Row`.
        network: from pixels on the device to logits.
        fine_share: of the images of a round that go on.
        macs: mean cost of an image.
    """

    name: str
    mode: Mode
    network: Callable[[Tensor], Tensor]
    fine_share: float | None
    macs: float


def _answerers(model: CoarseToFineViT, images: RealImages, modes: Sequence[Mode]) -> Iterator[Answerer]:
    """The backbone in eager mode and in all others, the predictor in those asked for."""
    macs = count_macs(model)
    asked: tuple[Mode, ...] = ("eager", *modes)
    for mode in dict.fromkeys(asked):
        yield Answerer(BACKBONE, mode, prepare(model.backbone, mode), None, macs.backbone)
    for mode in dict.fromkeys(modes):
        yield _predicting(model, images, mode, macs)


def _predicting(model: CoarseToFineViT, images: RealImages, mode: Mode, macs: StageMacs) -> Answerer:
    predictor = predictor_of(model, mode)
    share = _fine_share(predictor, images)
    return Answerer(PREDICTOR, mode, lambda pixels: predictor(pixels).logits, share, macs.expected(share))


def _fine_share(predictor: Predictor, images: RealImages) -> float:
    """Of the images of a round, how many go on at the model's eta."""
    return float(torch.cat([predictor(batch).stage == FINE for batch in images.resident]).float().mean())


def _inputs(
    scope: str, images: RealImages, model: CoarseToFineViT, pool: ThreadPoolExecutor
) -> list[Callable[[], Tensor]]:
    """For each batch, what makes pixels on the device from what the scope begins with."""
    parameter, transform = next(model.parameters()), eval_transform(model.data_config)

    def place(pixels: Tensor) -> Tensor:
        return pixels.to(parameter.device, parameter.dtype, non_blocking=True)

    def join(tensors: Any) -> Tensor:
        return place(torch.stack(list(tensors)))

    if scope == COMPUTING:
        return [lambda batch=batch: batch for batch in images.resident]
    if scope == COPYING:
        return [lambda batch=batch: place(batch) for batch in images.pixels]
    if scope == RESIZING:
        return [lambda batch=batch: join(pool.map(transform, batch)) for batch in images.decoded]
    return [lambda b=batch: join(pool.map(lambda file: transform(open_image(file)), b)) for batch in images.files]


def _answering(network: Callable[[Tensor], Tensor], give: Callable[[], Tensor], scope: str) -> Call:
    if scope == COMPUTING:
        return lambda: network(give())
    return lambda: network(give()).argmax(dim=-1).tolist()
