"""Accuracy of both stages and of every trade-off between them, from one pass over the data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from cfvit.calibration.tradeoff import NO_ANSWER, answers_of, rank_images
from cfvit.data import DataSource, EvalImages, eval_loader, open_data, progress_bar
from cfvit.data.labels import have_one_order
from cfvit.errors import CfvitError
from cfvit.inference.engines.exported import ExportedEngine, ExportedModel
from cfvit.inference.engines.packing import accelerate
from cfvit.inference.stream import placed
from cfvit.modeling.cost import StageMacs, count_macs
from cfvit.modeling.exit import Exit
from cfvit.modeling.model import CoarseToFineViT
from cfvit.processes import Process

PAPERS_EXIT = Exit()


@dataclass(frozen=True, eq=False)
class Collected:
    """Logits of every readable image, in the order of the data set, on the CPU.

    Attributes:
        logits: one ``[n, classes]`` per stage.
        labels: class indices ``[n]``.
        indices: where each image stands in the data set, ``[n]``.
        unreadable: data set indices of images that could not be read.
    """

    logits: tuple[Tensor, ...]
    labels: Tensor
    indices: Tensor
    unreadable: list[int]


@torch.inference_mode()
def collect(
    forward: Callable[[Tensor], Sequence[Tensor]],
    loader: DataLoader,
    device: torch.device,
    on_batch: Callable[[int], None] = lambda images: None,
) -> Collected:
    """Runs a model over a loader of `cfvit.data.EvalImages`, on every rank its own share.

    Args:
        forward: images ``[B, 3, S, S]`` to logits, one ``[B, classes]`` per stage.
        on_batch: called with the number of images done, for a progress bar.

    Returns:
        On every rank, all ranks' images, each once.
    """
    rows: list[tuple[Tensor, ...]] = []
    for images, labels, indices in loader:
        stages = forward(images.to(device, non_blocking=True))
        rows.append((labels, indices, *(stage.float().cpu() for stage in stages)))
        on_batch(len(images))
    columns = [torch.cat(column) for column in zip(*rows, strict=True)] if rows else None
    if dist.is_initialized():
        gathered: list[list[Tensor] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, columns)
        parts = [part for part in gathered if part is not None]
        columns = [torch.cat(column) for column in zip(*parts, strict=True)] if parts else None
    if columns is None:
        raise ValueError("the loader gave no images")
    labels, indices, *logits = columns
    order = indices.argsort()
    readable = order[labels[order] >= 0]
    unreadable = indices[order[labels[order] < 0]].tolist()
    return Collected(tuple(stage[readable] for stage in logits), labels[readable], indices[readable], unreadable)


def labelled_images(model: CoarseToFineViT | ExportedModel, data: str) -> DataSource:
    """Opens data to score a model on, its validation split where it has one, with the model's class indices.

    Raises:
        CfvitError: data that cannot be read, or of other classes.
    """
    source = open_data(data, "validation", model.class_order or "natural")
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
    forward: Callable[[Tensor], Sequence[Tensor]],
    data_config: dict[str, Any],
    source: DataSource,
    batch_size: int,
    workers: int,
    process: Process,
) -> tuple[Collected, list[str]]:
    """`collect` over all of a source and all processes, with a progress bar on the leading one.

    Returns:
        The logits, and the names of images that could not be read.

    Raises:
        CfvitError: not one image could be read.
    """
    images = EvalImages(source, data_config, rank=process.rank, world=process.world)
    loader = eval_loader(images, batch_size, workers, process.device)
    with progress_bar(len(images), process.leads) as advance:
        collected = collect(forward, loader, process.device, advance)
    unreadable = [source.name(index) for index in collected.unreadable]
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
    """One threshold: what it answers and what it costs.

    Attributes:
        threshold: eta.
        accuracy: top-1 in percent.
        exit_share: share of images that exit at the coarse stage, in [0, 1].
        gmacs: expected cost of an image, in 1e9 multiply-accumulates.
    """

    threshold: float
    accuracy: float
    exit_share: float
    gmacs: float


def sweep(
    coarse: Tensor,
    fine: Tensor,
    labels: Tensor,
    macs: StageMacs,
    thresholds: Sequence[float],
    exit: Exit = PAPERS_EXIT,
) -> list[SweepPoint]:
    """Accuracy and expected cost at each threshold, without running the model again.

    Args:
        coarse, fine: logits ``[n, classes]``.
        labels: class indices ``[n]``.
        thresholds: values of eta in [0, 1]; 1 sends every image on, 0 none.
        exit: how confidence is measured.
    """
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
    """How good a stage is, if it answers all images.

    Attributes:
        stage: its name.
        top1, top5: in percent.
        gmacs: cost of an image that this stage answers, in 1e9 multiply-accumulates.
        not_finite: images to which its answer is not a finite number, which counts as wrong.
    """

    stage: str
    top1: float
    top5: float
    gmacs: float
    not_finite: int


def score_points(logits: Mapping[str, Tensor], labels: Tensor, macs: Mapping[str, int]) -> list[StageScore]:
    """Scores each operating point of a method, by its name.

    Args:
        logits: ``[n, classes]`` of each point.
        labels: class indices ``[n]``.
        macs: cost of an image at each point.
    """
    return [
        StageScore(
            stage=name,
            top1=top_k_accuracy(answers, labels, 1),
            top5=top_k_accuracy(answers, labels, 5),
            gmacs=macs[name] / 1e9,
            not_finite=int((answers_of(answers) == NO_ANSWER).sum()),
        )
        for name, answers in logits.items()
    ]


@dataclass(frozen=True)
class Evaluation:
    """A model on a data set.

    Attributes:
        images: how many were scored.
        stages: the coarse stage for all images, and the fine stage for all images.
        sweep: the trade-off between them, by rising eta.
        calibrated: the model's own eta, which is among the sweep's, or None.
        backbone_gmacs: cost of the plain backbone.
        unreadable: names of images that could not be read and are not counted.
        collected: the logits and labels that all of it follows from.
        macs: cost of each stage.
    """

    images: int
    stages: list[StageScore]
    sweep: list[SweepPoint]
    calibrated: float | None
    backbone_gmacs: float
    unreadable: list[str]
    collected: Collected
    macs: StageMacs


def evaluate_model(
    model: CoarseToFineViT | ExportedEngine,
    source: DataSource,
    thresholds: Sequence[float],
    batch_size: int,
    workers: int,
    process: Process,
) -> Evaluation:
    """Scores both stages on every image once, over all processes, with a progress bar on the leading one.

    Raises:
        CfvitError: not one image could be read.
    """
    if isinstance(model, ExportedEngine):
        engine, about, macs = model, model.model, model.model.macs

        def network(images: Tensor) -> tuple[Tensor, Tensor]:
            images = placed(images, engine.weight)
            state, _ = engine.coarse(images)
            return state.logits, engine.fine(images, state)[0]
    else:
        about, network, macs = model, accelerate(model.eval().to(process.device)), count_macs(model)
    collected, unreadable = collect_with_progress(network, about.data_config, source, batch_size, workers, process)
    coarse, fine = collected.logits
    own = () if about.threshold is None else (about.threshold,)
    etas = sorted({*thresholds, *own})
    logits = {"coarse": coarse, "fine": fine}
    stages = score_points(logits, collected.labels, {"coarse": macs.coarse, "fine": macs.both})
    return Evaluation(
        images=len(collected.labels),
        stages=stages,
        sweep=sweep(coarse, fine, collected.labels, macs, etas, about.exit),
        calibrated=about.threshold,
        backbone_gmacs=macs.backbone / 1e9,
        unreadable=unreadable,
        collected=collected,
        macs=macs,
    )
