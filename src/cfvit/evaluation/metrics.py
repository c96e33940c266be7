"""Accuracy of both stages and of every trade-off between them, from one pass over the data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from cfvit.calibration.tradeoff import NO_ANSWER, answers_of, rank_images
from cfvit.data import DataSource, EvalImages, eval_loader, have_one_order, open_data, progress_bar
from cfvit.errors import CfvitError
from cfvit.inference.engines.exported import ExportedEngine
from cfvit.inference.engines.packing import accelerate
from cfvit.inference.engines.pytorch import TorchEngine
from cfvit.inference.stream import placed
from cfvit.modeling.cost import StageMacs, count_macs
from cfvit.modeling.exit import Exit
from cfvit.modeling.model import CoarseToFineViT
from cfvit.processes import Process

PAPERS_EXIT = Exit()
PLAIN = "the plain ViT"
"""The name under which the plain ViT's answers stand among those of the operating points."""
OWN_EXITS = "its own exits"


@dataclass(frozen=True, eq=False)
class Collected:
    """Logits of every readable image, in the order of the data set, on the CPU."""

    logits: dict[str, Tensor]  # ``[n, classes]`` by stage or operating point
    labels: Tensor  # class indices ``[n]``
    indices: Tensor  # where each image stands in the data set, ``[n]``
    unreadable: list[int]  # data set indices of images that could not be read


@torch.inference_mode()
def collect(
    forward: Callable[[Tensor], Mapping[str, Tensor]],
    loader: DataLoader,
    device: torch.device,
    on_batch: Callable[[int], None] = lambda images: None,
) -> Collected:
    """Runs a model over a loader of `cfvit.data.EvalImages`, on every rank its own share; all get all answers.

    Args:
        forward: images ``[B, 3, S, S]`` to logits ``[B, classes]`` by stage or operating point.
        on_batch: called with the number of images done, for a progress bar.
    """
    batches: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
    for images, labels, indices in loader:
        answers = forward(images.to(device, non_blocking=True))
        batches.append((labels, indices, {name: logits.float().cpu() for name, logits in answers.items()}))
        on_batch(len(images))
    if dist.is_initialized():
        of_ranks: list[list[tuple[Tensor, Tensor, dict[str, Tensor]]]] = [[]] * dist.get_world_size()
        dist.all_gather_object(of_ranks, batches)
        batches = [batch for rank in of_ranks for batch in rank]
    if not batches:
        raise ValueError("the loader gave no images")
    labels, indices = torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches])
    order = indices.argsort()
    readable = order[labels[order] >= 0]
    logits = {name: torch.cat([answers[name] for _, _, answers in batches])[readable] for name in batches[0][2]}
    return Collected(logits, labels[readable], indices[readable], indices[order[labels[order] < 0]].tolist())


def labelled_images(model: Any, data: str) -> DataSource:
    """Opens data to score a model on, its validation split where it has one, with the model's class indices.

    Args:
        model: a `CoarseToFineViT`, an `ExportedModel`, or any network with ``class_names``.

    Raises:
        CfvitError: data that cannot be read, or of other classes.
    """
    source = open_data(data, "validation", getattr(model, "class_order", None) or "natural")
    if model.class_names is not None:
        return source.aligned(model.class_names)
    if len(source.class_names) != model.config.num_classes:
        raise CfvitError(
            f"{data} has {len(source.class_names)} classes, the model has {model.config.num_classes} without names: "
            "give data with all of its classes"
        )
    if model.class_order is None and not have_one_order(source.class_names):
        warnings.warn(
            "the model does not say how its classes are numbered: they are taken in natural order, 2 before 10, and "
            "torchvision has another; if the accuracy is near chance, name the model's classes",
            stacklevel=2,
        )
    return source


def collect_with_progress(
    forward: Callable[[Tensor], Mapping[str, Tensor]],
    images: EvalImages,
    batch_size: int,
    workers: int,
    process: Process,
    plain: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Collected, list[str]]:
    """`collect` of images over all processes, with progress; and the names of those that could not be read.

    Args:
        plain: from images to the plain ViT's logits, which then stand among the others as `PLAIN`.

    Raises:
        CfvitError: not one image could be read.
    """

    def answers(batch: Tensor) -> dict[str, Tensor]:
        return {**forward(batch), **({} if plain is None else {PLAIN: plain(batch)})}

    loader = eval_loader(images, batch_size, workers, process.device)
    with progress_bar(len(images), process.leads) as advance:
        collected = collect(answers, loader, process.device, advance)
    unreadable = [images.source.name(index) for index in collected.unreadable]
    if len(collected.labels) == 0:
        raise CfvitError(f"none of the {len(unreadable)} images can be read, {unreadable[0]} first: check the data")
    return collected, unreadable


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Percentage of images whose label is among the ``k`` highest logits (or all, if fewer classes).

    An image with a logit that is not finite is not among them.
    """
    k = min(k, logits.shape[-1])
    hits = (logits.topk(k, dim=-1).indices == labels[:, None]).any(dim=-1)
    return 100 * (hits & logits.isfinite().all(dim=-1)).double().mean().item()


@dataclass(frozen=True)
class SweepPoint:
    """One threshold: what it answers and what it costs."""

    threshold: float  # eta
    accuracy: float  # top-1 in percent
    exit_share: float  # share of images that exit at the coarse stage, in [0, 1]
    gmacs: float  # expected cost of an image, in 1e9 multiply-accumulates


def sweep(
    coarse: Tensor,
    fine: Tensor,
    labels: Tensor,
    macs: StageMacs,
    thresholds: Sequence[float],
    exit: Exit = PAPERS_EXIT,
) -> list[SweepPoint]:
    """Accuracy and expected cost at each eta, from both stages' logits ``[n, classes]``; no model is run."""
    trade = rank_images(coarse, fine, labels, exit.measure, exit.coarse_temperature)
    points = []
    for eta in thresholds:
        hard = trade.gone_on(eta)
        share = hard / trade.images
        accuracy = 100 * int(trade.right[hard]) / trade.images
        points.append(SweepPoint(eta, accuracy, 1 - share, macs.expected(share) / 1e9))
    return points


@dataclass(frozen=True)
class StageScore:
    """How good a stage is, if it answers all images."""

    stage: str  # its name
    top1: float  # in percent
    top5: float  # in percent
    gmacs: float  # cost of an image that this stage answers, in 1e9 multiply-accumulates
    not_finite: int  # images to which its answer is not a finite number, which counts as wrong
    agreement: float | None = None  # percentage of images that the plain ViT answers alike; None without one


def score_points(logits: Mapping[str, Tensor], labels: Tensor, macs: Mapping[str, float]) -> list[StageScore]:
    """Scores each operating point of a method, by its name.

    Args:
        logits: of each point and perhaps of the `PLAIN` ViT, ``[n, classes]``.
        macs: of each point, the cost of an image.
    """
    plain = logits[PLAIN].argmax(dim=-1) if PLAIN in logits else None
    return [
        StageScore(
            stage=name,
            top1=top_k_accuracy(logits[name], labels, 1),
            top5=top_k_accuracy(logits[name], labels, 5),
            gmacs=cost / 1e9,
            not_finite=int((answers_of(logits[name]) == NO_ANSWER).sum()),
            agreement=None if plain is None else top_k_accuracy(logits[name], plain, 1),
        )
        for name, cost in macs.items()
    ]


@dataclass(frozen=True)
class Scores:
    """A network on a data set."""

    images: int  # how many were scored
    stages: list[StageScore]  # each stage or operating point, if it answers all images
    unreadable: list[str]  # names of images that could not be read and are not counted
    collected: Collected  # the logits and labels that all of it follows from


@dataclass(frozen=True)
class Evaluation(Scores):
    """A coarse-to-fine model on a data set."""

    sweep: list[SweepPoint]  # the trade-off between the stages, by rising eta
    calibrated: float | None  # the model's own eta, which is among the sweep's, or None
    macs: StageMacs  # cost of each stage and of the plain backbone


def evaluate_method(
    method: Any,
    network: Any,
    source: DataSource,
    batch_size: int,
    workers: int,
    process: Process,
    plain: Callable[[Tensor], Tensor] | None = None,
) -> Scores:
    """Scores a network of a `cfvit.methods.base.Method` at its operating points and with its own exits, if it has any.

    All else is as of `evaluate_model`.
    """
    forward = partial(method.answers, accelerate(network.to(process.device)))
    images = EvalImages(source, network.data_config, rank=process.rank, world=process.world)
    collected, unreadable = collect_with_progress(forward, images, batch_size, workers, process, plain)
    macs = method.macs(network)  # of some methods, what the images cost that were just answered
    logits, answers = collected.logits, {name: collected.logits[name] for name in macs}
    if (exits := method.exits(network, answers)) is not None:
        costs = torch.tensor(list(macs.values()), dtype=torch.float64)
        at_exits = torch.stack(list(answers.values()), dim=1)[torch.arange(len(exits)), exits]
        logits, macs = {**logits, OWN_EXITS: at_exits}, {**macs, OWN_EXITS: int(costs[exits].mean())}
    return Scores(len(collected.labels), score_points(logits, collected.labels, macs), unreadable, collected)


def evaluate_model(
    model: CoarseToFineViT | ExportedEngine,
    source: DataSource,
    thresholds: Sequence[float],
    batch_size: int,
    workers: int,
    process: Process,
    plain: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Scores both stages on every image once, over all processes, with a progress bar on the leading one.

    Args:
        plain: from images to the plain ViT's logits, with which answers are compared.

    Raises:
        CfvitError: not one image could be read, or the model's fine stage was not trained.
    """
    if isinstance(model, ExportedEngine):
        engine, macs = model, model.model.macs
    else:
        model.require_trained()
        engine, macs = TorchEngine(model.eval().to(process.device)), count_macs(model)
    about: Any = engine.model

    def answers(images: Tensor) -> dict[str, Tensor]:
        images = placed(images, engine.weight)
        state, _ = engine.coarse(images)
        return {"coarse": state.logits, "fine": engine.fine(images, state)[0]}

    images = EvalImages(source, about.data_config, rank=process.rank, world=process.world)
    collected, unreadable = collect_with_progress(answers, images, batch_size, workers, process, plain)
    logits, labels = collected.logits, collected.labels
    etas = sorted({*thresholds, *(() if about.threshold is None else (about.threshold,))})
    return Evaluation(
        images=len(labels),
        stages=score_points(logits, labels, {"coarse": macs.coarse, "fine": macs.both}),
        unreadable=unreadable,
        collected=collected,
        sweep=sweep(logits["coarse"], logits["fine"], labels, macs, etas, about.exit),
        calibrated=about.threshold,
        macs=macs,
    )
