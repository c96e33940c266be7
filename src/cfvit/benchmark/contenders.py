"""What is timed: the operating points of methods, each prepared alike for torch or as exported graphs, and its cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cfvit.benchmark import EngineName
from cfvit.data import DataSource
from cfvit.errors import CfvitError
from cfvit.evaluation.timing import Call
from cfvit.inference.engines import Engine
from cfvit.inference.engines.exported import ExportedEngine, Format, open_graph
from cfvit.inference.engines.packing import accelerate
from cfvit.inference.engines.pytorch import compiled, recorded
from cfvit.inference.predictor import FINE_BATCH, Predictor
from cfvit.methods.base import Method, create_method, known_methods
from cfvit.modeling.cost import count_macs
from cfvit.modeling.model import CoarseToFineViT

BACKBONE, COARSE_STAGE, FINE_STAGE, BOTH_STAGES = "backbone", "coarse stage", "fine stage", "both stages"
PREDICTOR, STREAM = "predictor", "stream"
OWN = (BACKBONE, COARSE_STAGE, FINE_STAGE, BOTH_STAGES, PREDICTOR, STREAM)
"""Rows of the model itself. All others are peers."""
OWN_METHODS = ("plain", "cf_vit", "coarse_only")
"""The methods whose networks are parts of the model itself."""
NEAR = 0.02
"""The share of images that go on, which are whole ones, may differ by this much from the share that is asked for."""
STREAM_GATHERS = 8
"""Fine batches of a timed stream have this many times the batch size, at most `FINE_BATCH`."""
Runner = Callable[[Tensor, Sequence[int]], Call]
"""Takes images ``[B, 3, S, S]`` and how many of them go on, and returns a call that answers them.

A stream takes several numbers and answers the images once for each. All others take one.
"""
IN_TORCH: dict[EngineName, bool | None] = {"eager": False, "torch": None, "compiled": True}
"""The argument ``compile`` of engines and predictors; all other engines run exported graphs."""


def prepare(
    network: Any, engine: EngineName, run: Callable[[Any], Callable[..., Any]] = lambda network: network
) -> Any:
    """Prepares a network without an exit for an engine in torch, so that the backbone and its rivals are treated alike.

    Args:
        run: from the prepared network to the function that is called, and that is compiled if any is.
    """
    fast = run(network if engine == "eager" else accelerate(network))
    return compiled(fast) if engine == "compiled" else recorded(fast) if engine == "torch" else fast


class Engines:
    """A model and its plain backbone, made ready once for each engine. They share the model's weights in torch.

    Args:
        model: in evaluation mode, on its device and in its precision; for exported engines in float32 on a CPU.
        source: images to quantise by; noise without any, which costs answers and not speed.
    """

    def __init__(self, model: CoarseToFineViT, source: DataSource | None = None) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (8, *model.image_size, 3), np.uint8)
        self.model = model
        self.source = source or DataSource(cast(Any, [(Image.fromarray(pixels), 0) for pixels in noise]), [])
        self.stages: Callable[[EngineName], Engine] = cache(self._stages)
        self.plain: Callable[[EngineName], Callable[[Tensor], Any]] = cache(self._plain)

    def _stages(self, name: EngineName) -> Engine:
        if name in IN_TORCH:
            return create_method("cf_vit").engine(self.model, IN_TORCH[name])
        from cfvit.deploy.export import export

        format, int8 = format_of(name)
        with TemporaryDirectory() as folder:
            export(self.model, folder, format=format, int8=self.source if int8 else None)
            return ExportedEngine(folder)

    def _plain(self, name: EngineName) -> Callable[[Tensor], Any]:
        if name in IN_TORCH:
            return prepare(self.model.backbone, name)
        from cfvit.deploy.graphs import trace, write_graphs
        from cfvit.deploy.quantising import calibration_images, quantise

        format, int8 = format_of(name)
        graph = trace(self.model.backbone, {"x": torch.zeros(2, 3, *self.model.image_size)}, ["logits"])
        if int8:
            images, _ = calibration_images(self.source, self.model.data_config)
            graph = quantise(graph, [{"x": image[None].numpy()} for image in images])
        with TemporaryDirectory() as folder:
            write_graphs({"plain": graph}, Path(folder), format)
            run = open_graph(Path(folder), "plain", format, torch.get_num_threads())
        return lambda images: torch.from_numpy(run({"x": images.numpy()})["logits"])


def format_of(name: EngineName) -> tuple[Format, bool]:
    """The format of an exported engine's graphs, and whether they are quantised."""
    format, _, int8 = name.partition("-")
    return cast(Format, format), bool(int8)


@dataclass(frozen=True)
class Contender:
    """A way of answering images."""

    name: str  # for tables
    macs: int  # cost of an image; of one that exits, where some do
    fine_macs: int | None  # what an image costs on top if it goes on; None where all images are treated alike
    build: Callable[[EngineName], Runner]  # prepares it for an engine
    # the only ones that it can be timed in, of which the first is used if none is asked for; None for all
    engines: tuple[EngineName, ...] | None = None
    streams: bool = False  # whether a call answers many batches, whose hard images go on together

    def counts_of(self, images: Tensor, fine_share: float) -> dict[tuple[int, ...], float]:
        """How many of the images go on in each batch of a call, so that the share is met: ``{counts: weight}``."""
        if self.streams:
            return {whole_fine_batches(len(images), fine_share, fine_batch_of(images)): 1.0}
        return whole_images(len(images), fine_share)


def own_contenders(engines: Engines) -> list[Contender]:
    """The plain backbone, the stages, the predictor and its stream."""
    macs, stages = count_macs(engines.model), engines.stages

    def fine_alone(engine: EngineName) -> Runner:
        def prepare_call(images: Tensor, counts: Sequence[int]) -> Call:
            state, _ = stages(engine).coarse(images)
            return lambda: stages(engine).fine(images, state)

        return prepare_call

    def both(engine: EngineName) -> Runner:
        return plain_calls(lambda images: stages(engine).fine(images, stages(engine).coarse(images)[0]))

    return [
        Contender(BACKBONE, macs.backbone, None, lambda engine: plain_calls(engines.plain(engine))),
        Contender(COARSE_STAGE, macs.coarse, None, lambda engine: plain_calls(stages(engine).coarse)),
        Contender(FINE_STAGE, macs.fine, None, fine_alone),
        Contender(BOTH_STAGES, macs.both, None, both),
        Contender(PREDICTOR, macs.coarse, macs.fine, lambda engine: predictor_calls(stages(engine))),
        Contender(STREAM, macs.coarse, macs.fine, lambda engine: predictor_calls(stages(engine), True), streams=True),
    ]


def peers_of(model: CoarseToFineViT) -> tuple[list[Contender], dict[str, str]]:
    """All methods besides the model's own, on the same backbone with random weights, in torch alone.

    Returns:
        Operating points of methods; where one has an exit, a contender that is told which images go on. And, by a
        method's title, why it cannot be built on this backbone.
    """
    contenders: list[Contender] = []
    refusals = {}
    weight = next(model.parameters())
    for name in [name for name in known_methods() if name not in OWN_METHODS]:
        method = create_method(name)
        timed = method.engines or tuple(IN_TORCH)
        try:
            network = method.build(model.config)
        except CfvitError as error:
            refusals[method.title] = str(error)
            continue
        network = network.eval().requires_grad_(False).to(weight.device, weight.dtype)
        macs = method.macs(network)
        if method.engine(network, False) is not None:
            first, last = min(macs.values()), max(macs.values())
            build = cache(lambda engine, of=method, net=network: predictor_calls(of.engine(net, IN_TORCH[engine])))
            contenders.append(Contender(method.title, first, last - first, build, timed))
            continue
        for point, cost in macs.items():

            def build_point(engine: EngineName, of: Method = method, net: Any = network, at: str = point) -> Runner:
                return plain_calls(prepare(net, engine, lambda fast: of.points(fast)[at]))

            contenders.append(Contender(f"{method.title}, {point}", cost, None, build_point, timed))
    return contenders, refusals


def plain_calls(network: Callable[[Tensor], Any]) -> Runner:
    """Calls of a function that treats all images alike."""
    return lambda images, counts: lambda: network(images)


class ForcedExits:
    """An engine whose confidences are replaced, so that the chosen images of a batch go on at a threshold of 0.5."""

    confidence: Tensor  # of the next batch: 0 for images that go on, 1 for others, ``[B]``; made before timing begins

    def __init__(self, engine: Engine) -> None:
        self.engine, self.model, self.weight, self.fine = engine, engine.model, engine.weight, engine.fine

    def coarse(self, images: Tensor) -> tuple[Any, Tensor]:
        """The engine's coarse stage."""
        return self.engine.coarse(images)[0], self.confidence


def spread_evenly(count: int, going: int, device: torch.device) -> Tensor:
    """Which of ``count`` images go on if ``going`` of them do, evenly spread: ``[count]`` of bool."""
    places = torch.arange(1, count + 1, device=device) * going // count
    return places.diff(prepend=torch.zeros_like(places[:1])) > 0


def predictor_calls(engine: Engine, streams: bool = False) -> Runner:
    """Calls of a predictor. They share the engine, which may be compiled, so each sets its own exits anew.

    Args:
        streams: answer all batches of a call as one stream; by default a call has one batch.
    """
    forced = ForcedExits(engine)
    predictor = Predictor(forced, 0.5)

    def prepare_call(images: Tensor, counts: Sequence[int]) -> Call:
        """Answers the images again for each of the counts, so many of them going on."""
        confidences = [1 - spread_evenly(len(images), count, images.device).float() for count in counts]

        def batches() -> Iterator[Tensor]:
            for confidence in confidences:  # a stream looks at a batch before it asks for the next one
                forced.confidence = confidence
                yield images

        if streams:
            return lambda: list(predictor.stream(batches(), fine_batch=fine_batch_of(images)))
        return lambda: predictor(next(batches()))

    return prepare_call


def fine_batch_of(images: Tensor) -> int:
    """How many images of a timed stream the fine stage takes together, where these are one of its batches."""
    return min(STREAM_GATHERS * len(images), FINE_BATCH.get(images.device.type, FINE_BATCH["cuda"]))


def whole_images(count: int, fine_share: float) -> dict[tuple[int, ...], float]:
    """How many images of a batch go on, as ``{(images,): weight}``, so that the share of them is met.

    The nearest whole number where it is near enough (`NEAR`), else the two around it: of single
    images at a share of 0.24, 76 in 100 exit and 24 go on, and a mean over calls of both kinds is the answer.
    """
    exact = fine_share * count
    nearest = round(exact)
    if abs(nearest / count - fine_share) <= NEAR:
        return {(nearest,): 1.0}
    below = math.floor(exact)
    return {(below,): below + 1 - exact, (below + 1,): exact - below}


def whole_fine_batches(count: int, fine_share: float, fine_batch: int) -> tuple[int, ...]:
    """How many images of each batch of a stream go on, so that the share is met and no batch of the fine stage
    is in part empty: the end of a timed stream is not to count, as it does not in a long one.

    Of the streams that come near enough (`NEAR`) the shortest; as even as whole images allow.

    Args:
        count: images in each batch.
        fine_batch: images that the fine stage takes together.
    """
    going, batches = 0, 1
    while going > batches * count or abs(going / (batches * count) - fine_share) > NEAR:
        going += fine_batch
        batches = max(1, round(going / (fine_share * count)))
    places = [number * going // batches for number in range(batches + 1)]
    return tuple(after - before for before, after in pairwise(places))
