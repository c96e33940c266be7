"""A threshold with what it promises: `calibrate` makes a `Calibration` from logits, labels and a target."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, get_args

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from cfvit.calibration.binomial import Estimate, images_needed, paired_difference, share_estimate
from cfvit.calibration.choice import STARTS, choose_eta
from cfvit.calibration.targets import (
    Drop,
    Promise,
    SelectiveRisk,
    StageLatency,
    Target,
    count_images,
)
from cfvit.calibration.tradeoff import TradeOff, rank_images
from cfvit.errors import CfvitError
from cfvit.modeling.cost import StageMacs
from cfvit.modeling.exit import Exit, Measure, is_number

ADD_CLASSES = "add some, or pass allow_missing_classes=True (--allow-missing-classes)"
NO_PROMISE = "none for other images: eta was chosen on the very images that the figures are of"
_NAMED_CLASSES = 5
_QUANTILES = 101


@dataclass(frozen=True)
class ConfidenceProfile:
    """How the coarse stage's confidence was distributed, for `check_drift`."""

    values: tuple[float, ...]  # its quantiles from 0 to 100%, each once, rising
    shares: tuple[float, ...]  # of the images with at most that confidence, in (0, 1]

    def __post_init__(self) -> None:
        rising = all(sorted(set(column)) == list(column) for column in (self.values, self.shares))
        paired = 0 < len(self.values) == len(self.shares)
        if not (rising and paired and self.shares[0] > 0 and self.shares[-1] == 1):
            raise CfvitError(
                "a confidence profile needs as many rising values as rising shares up to 1: calibrate again"
            )

    @classmethod
    def of(cls, ranked: Tensor) -> ConfidenceProfile:
        """The profile of confidences in rising order, ``[n]``."""
        places = np.linspace(0, len(ranked) - 1, _QUANTILES).round().astype(int)
        values = np.unique(ranked.numpy()[places])
        shares = np.searchsorted(ranked.numpy(), values, side="right") / len(ranked)
        return cls(tuple(values.tolist()), tuple(shares.tolist()))

    @property
    def median(self) -> float:
        """The lowest of the values that half of the images do not exceed."""
        return next(value for value, share in zip(self.values, self.shares, strict=True) if share >= 0.5)


@dataclass(frozen=True)
class Origin:
    """Where a stored calibration comes from."""

    data: str  # the calibration images, as they were given
    date: str  # when it was made, in ISO 8601
    cfvit: str  # version of this package
    temperature_images: int  # on how many other images the temperatures were fitted, 0 if they were not
    weights: str = ""  # digest of the model's, see `cfvit.checkpoints.weights_digest`; empty if it was not kept


@dataclass(frozen=True)
class Calibration:
    """A threshold, what it is expected to do, and what is promised.

    An `Estimate` is a figure of the calibration images and its interval. The intervals hold at the
    given level for a threshold that did not depend on the images; one that was chosen on them looks
    a little better than it is. `Risk` and `SelectiveRisk` alone give a promise that accounts for the choice.

    Attributes:
        target: what was asked for.
        threshold: eta in [0, 1].
        measure, coarse_temperature: of the confidence that eta is compared with.
        fine_temperature: for the confidence of answers to images that go on; it changes no decision.
        promise: a sentence on what holds for images yet unseen.
        warnings: sentences on what a user should know before relying on it.
        images, classes: of the calibration set.
        level: probability with which each interval holds.
        accuracy: top-1 in percent.
        drop: points below always going on; negative where it is above.
        worse: share of all answers that are wrong where the fine stage is right, in [0, 1].
        fine_share: share of images that go on, in [0, 1].
        gmacs: mean cost of an image, in 1e9 multiply-accumulates.
        saving: of the plain backbone's MACs, in percent.
        latency: mean time of an image in milliseconds, or None if none was measured.
        coarse_accuracy, fine_accuracy: top-1 in percent of each stage for all images.
        profile: the distribution of the coarse confidence.
        origin: where it comes from, or None if it was never stored.
        coarse_weight: of the coarse logits in the answer to an image that goes on, which is what "fine" means here.
        wrong_exits: share of wrong answers among those that the coarse stage gives, in [0, 1]; None without any.
    """

    target: Target
    threshold: float
    measure: Measure
    coarse_temperature: float
    fine_temperature: float
    promise: str
    warnings: tuple[str, ...]
    images: Annotated[int, Field(ge=1)]
    classes: Annotated[int, Field(ge=1)]
    level: Annotated[float, Field(gt=0, lt=1)]
    accuracy: Estimate
    drop: Estimate
    worse: Estimate
    fine_share: Estimate
    gmacs: Estimate
    saving: Estimate
    latency: Estimate | None
    coarse_accuracy: Estimate
    fine_accuracy: Estimate
    profile: ConfidenceProfile
    origin: Origin | None = None
    coarse_weight: float = 0.0
    wrong_exits: Estimate | None = None

    def __post_init__(self) -> None:
        _ = self.exit  # which checks eta, measure and temperatures
        if not 0 <= self.fine_share.value <= 1:
            raise CfvitError(f"fine_share is {self.fine_share.value}: give a share between 0 and 1, or calibrate again")

    @property
    def exit(self) -> Exit:
        """What a model needs to know of it: ``model.exit = calibration.exit``."""
        return Exit(self.measure, self.coarse_temperature, self.fine_temperature, self.threshold, self.coarse_weight)

    @property
    def exit_share(self) -> float:
        """Share of images that exit at the coarse stage, in [0, 1]."""
        return 1 - self.fine_share.value


def calibrate(
    coarse: Tensor,
    fine: Tensor,
    labels: Tensor,
    macs: StageMacs,
    target: Target,
    *,
    measure: Measure = "max_probability",
    coarse_temperature: float = 1.0,
    fine_temperature: float = 1.0,
    coarse_weight: float = 0.0,
    latency: StageLatency | None = None,
    level: float = 0.95,
    allow_missing_classes: bool = False,
    class_names: Sequence[str] | None = None,
) -> Calibration:
    """Chooses eta for a target, on images on which the model was not trained and will not be scored.

    Args:
        coarse, fine: logits ``[n, classes]``.
        labels: class indices ``[n]``.
        macs: cost of each stage.
        target: one of `GmacsBudget`, `Saving`, `LatencyBudget`, `Accuracy`, `Drop`, `Risk` and `SelectiveRisk`.
        measure: how confidence is measured; the paper's is the maximum probability.
        coarse_temperature, fine_temperature: logits are divided by these, see `fit_temperature`.
        coarse_weight: of the coarse logits in the answer to an image that goes on, see `fit_mixture`.
        latency: measured times, which `LatencyBudget` needs.
        level: of the intervals.
        allow_missing_classes: calibrate although some class has no image, with a warning.
        class_names: to name such a class by, in place of its number.

    Raises:
        CfvitError: input that cannot be used, or a target out of reach, with the nearest value that is not.
    """
    check_images(coarse, fine, labels)
    count = len(labels)
    missing = missing_classes(labels.tolist(), class_names or range(coarse.shape[1]), count)
    if missing and not allow_missing_classes:
        raise CfvitError(f"{missing}: {ADD_CLASSES}")
    rule = Exit(measure, coarse_temperature, fine_temperature, coarse_weight=coarse_weight)
    fine = rule.answer(coarse, fine)
    if not isinstance(target, get_args(get_args(Target)[0])):
        kinds = ", ".join(kind.__name__ for kind in get_args(get_args(Target)[0]))
        raise CfvitError(f"target is {target!r}: give one of {kinds}")
    if not (is_number(level) and 0 < level < 1):
        raise CfvitError(f"level is {level!r}: give a probability between 0 and 1, such as 0.95")
    trade = rank_images(coarse, fine, labels, rule.measure, rule.coarse_temperature)
    eta = choose_eta(target, trade, macs, latency)
    operation, go_on = trade.operate(eta, macs, level), trade.gone_on(eta)
    worse, better = int(trade.worse[go_on]), int(trade.better[go_on])
    exits, wrong = count - go_on, int(trade.wrong_exits[go_on])
    nothing = Estimate(0.0, 0.0, 0.0)  # at eta 1 the fine stage is compared with itself
    return Calibration(
        target=target,
        threshold=eta,
        measure=rule.measure,
        coarse_temperature=rule.coarse_temperature,
        fine_temperature=rule.fine_temperature,
        promise=target.promise(count) if isinstance(target, Promise) else NO_PROMISE,
        warnings=tuple(_warnings(target, trade, eta, macs, missing)),
        images=count,
        classes=coarse.shape[1],
        level=float(level),
        drop=nothing if eta >= 1 else paired_difference(worse, better, count, level).mapped(lambda v: 100 * v),
        worse=nothing if eta >= 1 else share_estimate(worse, count, level),
        latency=None if latency is None else operation.fine_share.mapped(latency.expected),
        coarse_accuracy=trade.accuracy(0, level),
        fine_accuracy=trade.accuracy(count, level),
        profile=ConfidenceProfile.of(trade.ranked),
        coarse_weight=rule.coarse_weight,
        wrong_exits=share_estimate(wrong, exits, level) if exits else None,
        **vars(operation),
    )


def check_logits(logits: Tensor, stage: str) -> None:
    """Refuses logits that are not ``[n, classes]``, are of no image, or are not finite.

    Raises:
        CfvitError: says which image is the first that is not finite.
    """
    if not isinstance(logits, Tensor):
        raise CfvitError(f"{stage} logits are a {type(logits).__name__}: give a tensor of floats [images, classes]")
    if logits.ndim != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        kind = str(logits.dtype).removeprefix("torch.")
        raise CfvitError(f"{stage} logits are {kind} of shape {list(logits.shape)}: give floats [images, classes]")
    if len(logits) == 0:
        raise CfvitError(f"{stage} logits are of no image: give at least one")
    if not logits.isfinite().all():
        bad = (~logits.isfinite()).any(dim=1).nonzero().flatten()
        raise CfvitError(
            f"{stage} logits of {len(bad)} of {len(logits)} images are not finite, image {int(bad[0])} first: "
            "leave these out, or run the model in float32"
        )


def missing_classes(present: Collection[int], names: Sequence[object], images: int) -> str:
    """A clause that tells which classes, by ``names``, have none of the images; empty if there is none.

    ``present`` has the indices of those that have.
    """
    there = set(present)
    missing = [repr(name) for index, name in enumerate(names) if index not in there]
    if len(missing) < 2:
        return f"class {missing[0]} has none of the {count_images(images)}" if missing else ""
    others = len(missing) - _NAMED_CLASSES
    named = f"{', '.join(missing[:_NAMED_CLASSES])}{f' and {others} more' if others > 0 else ''}"
    return f"classes {named} have none of the {count_images(images)}"


def check_images(coarse: Tensor, fine: Tensor, labels: Tensor) -> None:
    """Refuses logits that cannot be used, and labels that do not fit them.

    Raises:
        CfvitError: says what is wrong with which of them.
    """
    check_logits(coarse, "coarse")
    check_logits(fine, "fine")
    if not isinstance(labels, Tensor):
        raise CfvitError(f"labels are a {type(labels).__name__}: give a tensor of class indices [images]")
    if coarse.shape != fine.shape or labels.shape != coarse.shape[:1]:
        shapes = f"{list(coarse.shape)}, {list(fine.shape)} and {list(labels.shape)}"
        raise CfvitError(f"coarse logits, fine logits and labels are {shapes}: give [n, classes] twice and [n]")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        kind = str(labels.dtype).removeprefix("torch.")
        raise CfvitError(f"labels are {kind}: give class indices as whole numbers")
    classes = coarse.shape[1]
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise CfvitError(f"a label is {int(outside[0])}: give class indices from 0 to {classes - 1}")


def _warnings(target: Target, trade: TradeOff, eta: float, macs: StageMacs, missing: str) -> list[str]:
    found = []
    sequences = len(STARTS) if isinstance(target, SelectiveRisk) else 1
    if isinstance(target, Promise) and trade.images < (
        needed := images_needed(target.share, 1 - (1 - target.confidence) / sequences)
    ):
        found.append(
            f"{count_images(trade.images)} are too few to promise this of a threshold below 1: "
            f"at least {needed} are needed"
        )
    if isinstance(target, Drop) and 0 < target.points < 100 / trade.images:
        found.append(
            f"one of {count_images(trade.images)} is {100 / trade.images:.2g} points, "
            f"so a drop of {target.points:g} cannot be told from 0: use more images"
        )
    if trade.ranked[0] == trade.ranked[-1] and trade.images > 1:
        found.append("all images have the same confidence: only all or none of them can exit")
    cost = macs.expected(trade.gone_on(eta) / trade.images)
    if cost > macs.backbone:
        found.append(
            f"{cost / 1e9:.3g} GMACs an image are more than the plain backbone's {macs.backbone / 1e9:.3g}: "
            "nothing is saved at this eta"
        )
    if eta >= 1 and trade.images > 1 and not found:
        found.append("no image exits early: more images, or a target that asks for less, would let some exit")
    if missing:
        found.append(f"{missing}, so nothing is known of them")
    return found
