"""The backbone and the predictor on real images at the model's own eta, from pixels on the device to encoded files."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cfvit.benchmark.contenders import BACKBONE, PREDICTOR, STREAM, predictor_of, prepare
from cfvit.benchmark.measure import COMPUTING, REAL, Batch, Entry, Plan, relate
from cfvit.data import DataSource, ImageError, eval_transform, open_image
from cfvit.errors import CfvitError
from cfvit.evaluation.timing import Call
from cfvit.inference.acceleration import copied_ahead, placed
from cfvit.inference.files import READERS, classify_files
from cfvit.inference.predictor import FINE, Predictor
from cfvit.modeling.cost import StageMacs, count_macs
from cfvit.modeling.model import CoarseToFineViT
from cfvit.modeling.variants import Mode

COPYING, RESIZING, DECODING = "with host copies", "with resizing", "with decoding"
SCOPES = (COMPUTING, COPYING, RESIZING, DECODING)
"""Each holds the one before it: pixels on the device, pixels in host memory, decoded images, encoded files."""
FILES, SCALED = "from files", "from files, scaled decoding"
"""`cfvit.inference.files.classify_files` with all that it does, without and with ``scaled_decode``."""
FEWEST_IMAGES, FEWEST_BATCHES = 16, 2
"""A round answers at least so many, in several calls; a stream of one batch would be none."""
NO_JPEG = "none of the images is a JPEG: scaled decoding changes nothing and was not timed"


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

    @property
    def hold_jpegs(self) -> bool:
        """Whether scaled decoding changes anything."""
        return any(_is_jpeg(content) for content in chain.from_iterable(self.files))

    def write(self, folder: Path) -> list[Path]:
        """All images of a round as files, in order."""
        paths = [folder / str(place) for place in range(self.count)]
        for path, content in zip(paths, chain.from_iterable(self.files), strict=True):
            path.write_bytes(content)
        return paths


def _is_jpeg(content: bytes) -> bool:
    with Image.open(io.BytesIO(content)) as image:
        return image.format == "JPEG"


def read_images(source: DataSource, model: CoarseToFineViT, batch_size: int) -> RealImages:
    """Takes images from all over the data, some of them more than once if there are too few.

    Raises:
        CfvitError: no image can be read from its stored form.
    """
    batches = max(FEWEST_BATCHES, math.ceil(FEWEST_IMAGES / batch_size))
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
    """Times backbone, predictor and stream on real images in all `SCOPES`, and the stream from files as well.

    A round answers all images, in calls of one batch or by one stream.

    Raises:
        CfvitError: a model without a calibrated threshold, images that cannot be read.
    """
    images = read_images(source, model, batch_size)
    calls: dict[str, Call | Sequence[Call]] = {}
    entries: list[Entry] = []
    with ThreadPoolExecutor(READERS) as pool, TemporaryDirectory() as folder:
        inputs = {scope: _inputs(scope, images, model, pool) for scope in SCOPES}
        paths = images.write(Path(folder))
        for answerer in _answerers(model, images, plan.modes):
            scopes = {scope: answerer.calls(inputs[scope], scope) for scope in SCOPES}
            for scope, made in {**scopes, **answerer.from_files(paths, batch_size, images.hold_jpegs)}.items():
                key = f"{answerer.name}, {answerer.mode}, {scope}"
                calls[key] = made
                share, macs, beside = answerer.fine_share, answerer.macs, None if scope in SCOPES else DECODING
                count, parts = images.count, {key: 1.0}
                entries.append(Entry(answerer.name, answerer.mode, REAL, scope, share, macs, count, parts, beside))
        batch = relate(entries, calls, batch_size, model, plan)
    return batch if images.hold_jpegs else replace(batch, notes=(f"{batch.title}: {NO_JPEG}",))


@dataclass(frozen=True, eq=False)
class Answerer:
    """What answers real images.

    Attributes:
        name, mode: as of `cfvit.benchmark.measure.Row`.
        network: from pixels on the device to logits.
        weight: where the network lies, and in which precision.
        fine_share: of the images of a round that go on.
        macs: mean cost of an image.
    """

    name: str
    mode: Mode
    network: Callable[[Tensor], Tensor]
    weight: Tensor
    fine_share: float | None
    macs: float

    def calls(self, inputs: Sequence[Callable[[], Tensor]], scope: str) -> Call | Sequence[Call]:
        """The calls of a round, one for each batch that the inputs make."""
        return [_answering(self.network, give, self.weight, scope) for give in inputs]

    def from_files(self, paths: Sequence[Path], batch_size: int, jpegs: bool) -> dict[str, Call]:
        """By scope, calls that answer files; only a stream has some."""
        return {}


@dataclass(frozen=True, eq=False)
class StreamAnswerer(Answerer):
    """A stream that answers all batches of a round.

    Attributes:
        predictor: what streams.
        stage_macs: as `cfvit.count_macs` counts them.
    """

    predictor: Predictor
    stage_macs: StageMacs

    def calls(self, inputs: Sequence[Callable[[], Tensor]], scope: str) -> Call:
        """One call that answers all batches and brings the classes to the host but where pixels lie on the device."""

        def answer() -> list[Tensor]:
            batches = copied_ahead((give() for give in inputs), self.weight)
            answers = self.predictor.stream(batches, ordered=True)
            return [each.logits for each in answers]

        return answer if scope == COMPUTING else lambda: [each.argmax(dim=-1).tolist() for each in answer()]

    def from_files(self, paths: Sequence[Path], batch_size: int, jpegs: bool) -> dict[str, Call]:
        def reading(scaled_decode: bool) -> Call:
            given: dict[str, Any] = {"macs": self.stage_macs, "scaled_decode": scaled_decode}
            return lambda: list(classify_files(paths, self.predictor, batch_size, **given))

        return {FILES: reading(False)} | ({SCALED: reading(True)} if jpegs else {})


def _answerers(model: CoarseToFineViT, images: RealImages, modes: Sequence[Mode]) -> Iterator[Answerer]:
    """The backbone in eager mode and in all others, the predictor in those asked for."""
    macs, weight = count_macs(model), next(model.parameters())
    asked: tuple[Mode, ...] = ("eager", *modes)
    for mode in dict.fromkeys(asked):
        yield Answerer(BACKBONE, mode, prepare(model.backbone, mode), weight, None, macs.backbone)
    for mode in dict.fromkeys(modes):
        predictor = predictor_of(model, mode)
        share = _fine_share(predictor, images)
        logits, cost = _logits_of(predictor), macs.expected(share)
        yield Answerer(PREDICTOR, mode, logits, weight, share, cost)
        yield StreamAnswerer(STREAM, mode, logits, weight, share, cost, predictor, macs)


def _logits_of(predictor: Predictor) -> Callable[[Tensor], Tensor]:
    return lambda pixels: predictor(pixels).logits


def _fine_share(predictor: Predictor, images: RealImages) -> float:
    """Of the images of a round, how many go on at the model's eta."""
    return float(torch.cat([predictor(batch).stage == FINE for batch in images.resident]).float().mean())


def _inputs(
    scope: str, images: RealImages, model: CoarseToFineViT, pool: ThreadPoolExecutor
) -> list[Callable[[], Tensor]]:
    """For each batch, what makes normalised pixels from what the scope begins with, where it begins."""
    transform = eval_transform(model.data_config)

    def join(tensors: Any) -> Tensor:
        return torch.stack(list(tensors))

    if scope in (COMPUTING, COPYING):
        return [lambda batch=batch: batch for batch in (images.resident if scope == COMPUTING else images.pixels)]
    if scope == RESIZING:
        return [lambda batch=batch: join(pool.map(transform, batch)) for batch in images.decoded]
    return [lambda b=batch: join(pool.map(lambda file: transform(open_image(file)), b)) for batch in images.files]


def _answering(network: Callable[[Tensor], Tensor], give: Callable[[], Tensor], weight: Tensor, scope: str) -> Call:
    if scope == COMPUTING:
        return lambda: network(give())
    return lambda: network(placed(give(), weight)).argmax(dim=-1).tolist()
