"""What is timed: ways of answering images, each prepared alike in a mode and with its cost counted."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cfvit.benchmark.modes import Mode
from cfvit.benchmark.peers import Cascade, EViT, LiteralPort, ToMe
from cfvit.evaluation.timing import Call
from cfvit.inference.engines.compiling import compiled
from cfvit.inference.engines.packing import accelerate
from cfvit.inference.predictor import FINE_BATCH, Predictor
from cfvit.modeling import backbones
from cfvit.modeling.cost import count_macs, macs_of
from cfvit.modeling.exit import goes_on
from cfvit.modeling.model import CoarseState, CoarseToFineViT
from cfvit.modeling.tokens import coarse_image

BACKBONE, COARSE_STAGE, FINE_STAGE, BOTH_STAGES = "backbone", "coarse stage", "fine stage", "both stages"
PREDICTOR, STREAM, LITERAL_PORT = "predictor", "stream", "literal port"
OWN = (BACKBONE, COARSE_STAGE, FINE_STAGE, BOTH_STAGES, PREDICTOR, STREAM)
"""All others are peers."""
NEAR = 0.02
"""A share of a batch counts as met if whole images come as near as this."""

STREAM_GATHERS = 8
"""A stream gathers fine batches of so many times the batch size, and of no more than it does by itself."""

Runner = Callable[[Tensor, Sequence[int]], Call]
"""From images ``[B, 3, S, S]`` and how many of them go on, to a call that answers them.

There is one number but for a stream: that answers the images as often as there are numbers.
"""


@dataclass(frozen=True)
class Contender:
    """A way of answering images.

    Attributes:
        name: for tables.
        macs: cost of an image; of one that exits, where some do.
        fine_macs: what an image costs on top if it goes on; None where all images are treated alike.
        build: prepares it in a mode.
        modes: the only modes that it is timed in, or None for all that are asked for.
        share_out: from the batch size and the share that goes on to the numbers of a call, ``{numbers: weight}``.
    """

    name: str
    macs: int
    fine_macs: int | None
    build: Callable[[Mode], Runner]
    modes: tuple[Mode, ...] | None = None
    share_out: Callable[[int, float], dict[tuple[int, ...], float]] = lambda count, share: whole_images(count, share)


def prepare(network: Any, mode: Mode, run: Callable[[Any], Callable[..., Any]] = lambda network: network) -> Any:
    """The one place where networks are made ready, so that the backbone and its rivals are treated alike.

    Args:
        run: from the network, made ready, to the function that is called, and that is compiled if any is.
    """
    fast = run(network if mode == "eager" else accelerate(network))
    return compiled(fast) if mode == "compiled" else fast


def contenders_of(model: CoarseToFineViT, peers: bool) -> list[Contender]:
    """The plain backbone, the stages, the predictor, and with ``peers`` its rivals on the same backbone.

    Args:
        model: in evaluation mode, on its device and in its precision.

    Raises:
        CfvitError: peers of a backbone that they are not written for.
    """
    macs = count_macs(model)

    @cache  # each stage is compiled once for all
    def coarse(mode: Mode) -> Callable[[Tensor], CoarseState]:
        return prepare(model, mode, lambda network: network.coarse)

    @cache
    def fine(mode: Mode) -> Callable[[Tensor, CoarseState], Tensor]:
        return prepare(model, mode, lambda network: network.fine)

    def fine_alone(mode: Mode) -> Runner:
        def prepare_call(images: Tensor, goings: Sequence[int]) -> Call:
            state = coarse(mode)(images)
            return lambda: fine(mode)(images, state)

        return prepare_call

    def both(mode: Mode) -> Runner:
        return _runs(lambda images: fine(mode)(images, coarse(mode)(images)))

    own = [
        Contender(BACKBONE, macs.backbone, None, lambda mode: _runs(prepare(model.backbone, mode))),
        Contender(COARSE_STAGE, macs.coarse, None, lambda mode: _runs(coarse(mode))),
        Contender(FINE_STAGE, macs.fine, None, fine_alone),
        Contender(BOTH_STAGES, macs.both, None, both),
        Contender(PREDICTOR, macs.coarse, macs.fine, lambda mode: _predicts(model, mode)),
        Contender(
            STREAM,
            macs.coarse,
            macs.fine,
            lambda mode: _streams(model, mode),
            share_out=lambda count, share: {whole_fine_batches(count, share, fine_batch_of(model, count)): 1.0},
        ),
    ]
    methods = own + (_peers(model) if peers else [])
    return [replace(method, build=cache(method.build)) for method in methods]  # one compilation for all batch sizes


def _runs(network: Callable[[Tensor], Any]) -> Runner:
    return lambda images, goings: lambda: network(images)


def predictor_of(model: CoarseToFineViT, mode: Mode) -> Predictor:
    """The predictor in a mode, at the model's own threshold."""
    return Predictor(model, compile=_COMPILE[mode])


_COMPILE: dict[Mode, bool | None] = {"eager": False, "accelerated": None, "compiled": True}


class ForcedPredictor(Predictor):
    """A predictor that is told which images of a batch go on.

    Attributes:
        exits: for the next batch.
    """

    exits: ForcedExits

    def _goes_on(self, confidence: Tensor) -> Tensor:
        return self.exits(confidence)


def _predicts(model: CoarseToFineViT, mode: Mode) -> Runner:
    predictor = ForcedPredictor(model, 0, compile=_COMPILE[mode])

    def prepare_call(images: Tensor, goings: Sequence[int]) -> Call:
        """All calls share the predictor, which may be compiled: each sets its own exits anew."""
        (exits,) = ForcedExits.of_batches(images, goings)

        def call() -> object:
            predictor.exits = exits
            return predictor(images)

        return call

    return prepare_call


def fine_batch_of(model: CoarseToFineViT, batch_size: int) -> int:
    """How many images of a timed stream the fine stage takes together."""
    device = next(model.parameters()).device.type
    return min(STREAM_GATHERS * batch_size, FINE_BATCH.get(device, FINE_BATCH["cuda"]))


def _streams(model: CoarseToFineViT, mode: Mode) -> Runner:
    predictor = ForcedPredictor(model, 0, compile=_COMPILE[mode])

    def prepare_call(images: Tensor, goings: Sequence[int]) -> Call:
        """All calls share the predictor, which may be compiled: each batch sets its own exits anew."""
        in_turn = ForcedExits.of_batches(images, goings)

        def batches() -> Iterator[Tensor]:
            for exits in in_turn:  # a stream looks at a batch before it asks for the next one
                predictor.exits = exits
                yield images

        return lambda: list(predictor.stream(batches(), fine_batch=fine_batch_of(model, len(images))))

    return prepare_call


def _peers(model: CoarseToFineViT) -> list[Contender]:
    """Their costs are counted on copies without data."""
    meta = copy.deepcopy(model).to("meta").requires_grad_(False)
    images = torch.empty(1, 3, *model.image_size, device="meta", dtype=next(model.parameters()).dtype)

    def alike(name: str, make: Callable[[Any], nn.Module]) -> Contender:
        cost = macs_of(lambda: make(meta.backbone)(images))
        return Contender(name, cost, None, lambda mode: _runs(prepare(make(model.backbone), mode)))

    return [
        alike("ToMe, r=13", lambda backbone: ToMe(backbone, 13)),
        alike("ToMe, r=8", lambda backbone: ToMe(backbone, 8)),
        alike("EViT, keep 0.7", lambda backbone: EViT(backbone, 0.7)),
        _cascade(model, meta, images),
        _literal_port(model, meta, images),
    ]


def _cascade(model: CoarseToFineViT, meta: CoarseToFineViT, images: Tensor) -> Contender:
    small = small_backbone(model)
    small_macs = macs_of(lambda: copy.deepcopy(small).to("meta")(coarse_image(images)))
    large_macs = macs_of(lambda: meta.backbone(images))

    def look_first(network: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def look(images: Tensor) -> tuple[Tensor, Tensor]:
            logits = network(coarse_image(images))
            return logits, model.exit.coarse(logits)

        return look

    def build(mode: Mode) -> Runner:
        """Prepares both networks once for all calls."""
        networks = prepare(small, mode, look_first), prepare(model.backbone, mode)

        def prepare_call(images: Tensor, goings: Sequence[int]) -> Call:
            cascade = Cascade(*networks, *ForcedExits.of_batches(images, goings))
            return lambda: cascade(images)

        return prepare_call

    return Contender("cascade of two ViTs", small_macs, large_macs, build)


def small_backbone(model: CoarseToFineViT) -> nn.Module:
    """A plain ViT like the model's backbone for images at half the side, with weights of its own, at random."""
    config, parameter = model.config, next(model.parameters())
    with torch.device(parameter.device):
        small = backbones.create_backbone(
            config.backbone,
            img_size=model.coarse_size,
            num_classes=config.num_classes,
            pretrained=False,
            **config.timm_kwargs,
        )
    return small.eval().requires_grad_(False).to(parameter.dtype)


def _literal_port(model: CoarseToFineViT, meta: CoarseToFineViT, images: Tensor) -> Contender:
    literal = LiteralPort(meta, partial(goes_on, eta=0))
    coarse_macs = macs_of(lambda: literal.coarse(images))
    both_macs = macs_of(lambda: literal.fine(images, literal.coarse(images)))

    def prepare_call(images: Tensor, goings: Sequence[int]) -> Call:
        port = LiteralPort(model, *ForcedExits.of_batches(images, goings))
        return lambda: port(images)

    return Contender(LITERAL_PORT, coarse_macs, both_macs - coarse_macs, lambda mode: prepare_call, modes=("eager",))


@dataclass(frozen=True, eq=False)
class ForcedExits:
    """Moves measured confidences so that the chosen images of a batch fall below any eta, and then decides by one.

    Attributes:
        going: which images go on, ``[B]`` of bool.
    """

    going: Tensor

    @classmethod
    def of(cls, count: int, going: int, device: torch.device) -> ForcedExits:
        """For batches of ``count`` images of which ``going``, evenly spread, go on."""
        places = torch.arange(1, count + 1, device=device) * going // count
        return cls(places.diff(prepend=torch.zeros_like(places[:1])) > 0)

    @classmethod
    def of_batches(cls, images: Tensor, goings: Sequence[int]) -> list[ForcedExits]:
        """For each batch in turn, of which so many images go on."""
        made = {going: cls.of(len(images), going, images.device) for going in set(goings)}
        return [made[going] for going in goings]

    def __call__(self, confidence: Tensor) -> Tensor:
        """Which images go on; confidences lie between -1, where they are not numbers, and 1."""
        return goes_on(torch.where(self.going, confidence - 2, confidence + 2), eta=0.5)


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
