"""The backbone and the predictor on real images at the model's own eta, from pixels on the device to encoded files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cfvit.benchmark.contenders import BACKBONE, PREDICTOR, STREAM
from cfvit.benchmark.engines import IN_TORCH, Engines
from cfvit.benchmark.measure import COMPUTING, REAL, Batch, Entry, Plan, measure
from cfvit.benchmark.names import EngineName
from cfvit.data import DataSource
from cfvit.data.images import ImageError, eval_transform, open_image
from cfvit.errors import CfvitError
from cfvit.evaluation.timing import Call
from cfvit.inference.files import READERS, classify_files
from cfvit.inference.predictor import Predictor
from cfvit.inference.stream import FINE, copied_ahead, placed
from cfvit.modeling.cost import count_macs
from cfvit.modeling.model import CoarseToFineViT

COPYING, RESIZING, DECODING = "with host copies", "with resizing", "with decoding"
SCOPES = (COMPUTING, COPYING, RESIZING, DECODING)
"""Each includes the one before it: pixels on the device, pixels in host memory, decoded images, encoded files."""
FILES, SCALED = "from files", "from files, scaled decoding"
"""All that `cfvit.inference.files.classify_files` does, without and with ``scaled_decode``."""
FEWEST_IMAGES, FEWEST_BATCHES = 16, 2
"""A round answers at least so many, in several calls; a stream of one batch would not be a stream."""

Inputs = Sequence[Callable[[], Tensor]]
"""For each batch, what gives its normalised images, from the form in which a scope begins."""


@dataclass(frozen=True, eq=False)
class RealImages:
    """Images in batches of one size, in the form in which each scope begins."""

    files: list[list[bytes]]  # encoded, as stored
    decoded: list[list[Image.Image]]  # at their own sizes
    pixels: list[Tensor]  # normalised, in host memory, ``[B, 3, S, S]`` each
    resident: list[Tensor]  # the same on the device and in the model's precision

    @property
    def count(self) -> int:
        """Images of a round."""
        return sum(map(len, self.files))

    def inputs(self, transform: Callable[[Image.Image], Any], pool: ThreadPoolExecutor) -> dict[str, Inputs]:
        """For each of `SCOPES`, what gives the batches; images are decoded and resized in the pool."""

        def decode(content: bytes) -> Any:
            return transform(open_image(content))

        return {
            COMPUTING: [lambda batch=batch: batch for batch in self.resident],
            COPYING: [lambda batch=batch: batch for batch in self.pixels],
            RESIZING: [lambda batch=batch: torch.stack([*pool.map(transform, batch)]) for batch in self.decoded],
            DECODING: [lambda batch=batch: torch.stack([*pool.map(decode, batch)]) for batch in self.files],
        }


def read_images(source: DataSource, model: CoarseToFineViT, batch_size: int) -> RealImages:
    """Takes images from all over the data, some of them more than once if there are too few.

    Raises:
        CfvitError: no image can be read from its stored form.
    """
    wanted = max(FEWEST_BATCHES, math.ceil(FEWEST_IMAGES / batch_size)) * batch_size
    files: list[bytes] = []
    for place in range(min(wanted, len(source))):
        try:
            with source.stored(place * len(source) // min(wanted, len(source))) as file:
                content = file.read()
            open_image(content)
        except ImageError:
            continue
        files.append(content)
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


@torch.inference_mode()
def measure_real(engines: Engines, source: DataSource, batch_size: int, plan: Plan) -> Batch:
    """Times backbone, predictor and stream on real images in all `SCOPES`, and the stream from files as well.

    A round answers all images, in calls of one batch or by one stream. Images that cannot be read and a model without
    a calibrated threshold raise `CfvitError`.
    """
    model, macs, weight = engines.model, count_macs(engines.model), next(engines.model.parameters())
    images = read_images(source, model, batch_size)
    calls: dict[str, Call | Sequence[Call]] = {}
    entries: list[Entry] = []

    def add(name: str, engine: EngineName, scope: str, call: Call | Sequence[Call], share: float | None) -> None:
        """A row, timed by a call or by several that make up a round."""
        key = f"{name}, {engine}, {scope}"
        calls[key] = call
        entry = Entry(
            name=name,
            engine=engine,
            images=REAL,
            scope=scope,
            reference=scope if scope in SCOPES else DECODING,
            fine_share=share,
            macs=macs.backbone if share is None else macs.expected(share),
            images_per_round=images.count,
            parts={key: 1.0},
        )
        entries.append(entry)

    with ThreadPoolExecutor(READERS) as pool, TemporaryDirectory() as folder:
        inputs = images.inputs(eval_transform(model.data_config), pool)
        paths = [Path(folder, str(place)) for place in range(images.count)]
        for path, content in zip(paths, chain.from_iterable(images.files), strict=True):
            path.write_bytes(content)
        for engine in dict.fromkeys(("eager", *plan.engines)):
            for scope, batches in inputs.items():
                add(BACKBONE, engine, scope, batch_calls(engines.plain(engine), scope, batches, weight), None)
            if engine in plan.engines:
                stages = engines.stages(engine)
                predictor = Predictor(stages, stages.model.threshold)
                share = float((torch.cat([predictor(batch).stage for batch in images.resident]) == FINE).float().mean())
                answer = partial(lambda predict, pixels: predict(pixels).logits, predictor)
                for scope, batches in inputs.items():
                    add(PREDICTOR, engine, scope, batch_calls(answer, scope, batches, weight), share)
                for scope, batches in inputs.items():
                    add(STREAM, engine, scope, stream_call(predictor, scope, batches, weight), share)
                for scope, scaled in ((FILES, False), (SCALED, True))[: 1 + (engine in IN_TORCH)]:
                    read = partial(classify_files, paths, predictor, batch_size, scaled_decode=scaled)
                    add(STREAM, engine, scope, partial(lambda answers: list(answers()), read), share)
        return measure(entries, calls, batch_size, model, plan)


def batch_calls(network: Callable[[Tensor], Tensor], scope: str, batches: Inputs, weight: Tensor) -> Sequence[Call]:
    """The calls of a round, one for each batch; where pixels begin on the host, classes are brought there."""
    if scope == COMPUTING:
        return [lambda give=give: network(give()) for give in batches]
    return [lambda give=give: network(placed(give(), weight)).argmax(dim=-1).tolist() for give in batches]


def stream_call(predictor: Predictor, scope: str, batches: Inputs, weight: Tensor) -> Call:
    """A call that answers all batches of a round as one stream."""

    def answer() -> list[Tensor]:
        copied = copied_ahead((give() for give in batches), weight)
        return [each.logits for each in predictor.stream(copied, ordered=True)]

    return answer if scope == COMPUTING else lambda: [each.argmax(dim=-1).tolist() for each in answer()]
