"""A threshold with what it promises: made from logits, kept in ``calibration.json``, compared with images in use."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import scipy
import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from cfvit.calibration.checks import check_logits, check_logits_and_labels, require_classes
from cfvit.calibration.targets import (
    STARTS,
    Drop,
    Promise,
    SelectiveRisk,
    StageLatency,
    Target,
    choose_eta,
    count_images,
)
from cfvit.calibration.tradeoff import Estimate, TradeOff, images_needed, paired_difference, rank_images, share_estimate
from cfvit.errors import CfvitError, first_line
from cfvit.files import atomic_write
from cfvit.modeling.cost import StageMacs
from cfvit.modeling.exit import Exit, Measure, goes_on, require_number

CALIBRATION_FILE = "calibration.json"
"""The record of a calibration beside a model's weights."""

NO_PROMISE = "none for other images: eta was chosen on the very images that the figures are of"
FEW_IMAGES = 100
"""With fewer images there is a warning that the result may be chance."""

_SHOWN, _QUANTILES = 40, 101

Record = TypeVar("Record")


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
    class_names: Sequence[object] | None = None,
) -> Calibration:
    """Chooses eta for a target, on images on which the model was not trained and will not be scored.

    Args:
        coarse, fine: logits ``[n, classes]`` of each stage alone, as a model gives them whose ``exit`` is ``Exit()``.
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
    check_logits_and_labels(coarse, fine, labels)
    count = len(labels)
    missing = require_classes(labels.tolist(), class_names or range(coarse.shape[1]), count, allow_missing_classes)
    rule = Exit(measure, coarse_temperature, fine_temperature, coarse_weight=coarse_weight)
    fine = rule.answer(coarse, fine)
    require_number("level", level, lambda p: 0 < p < 1, "a probability between 0 and 1, such as 0.95")
    trade = rank_images(coarse, fine, labels, rule.measure, rule.coarse_temperature)
    eta = choose_eta(target, trade, macs, latency)
    operation, go_on = trade.operate(eta, macs, level), trade.gone_on(eta)
    worse = int(trade.worse[go_on])
    drop = paired_difference(worse, int(trade.better[go_on]), count, level).mapped(lambda share: 100 * share)
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
        drop=drop if eta < 1 else nothing,
        worse=share_estimate(worse, count, level) if eta < 1 else nothing,
        latency=None if latency is None else operation.fine_share.mapped(latency.expected),
        coarse_accuracy=trade.accuracy(0, level),
        fine_accuracy=trade.accuracy(count, level),
        profile=ConfidenceProfile.of(trade.ranked),
        coarse_weight=rule.coarse_weight,
        wrong_exits=share_estimate(int(trade.wrong_exits[go_on]), count - go_on, level) if go_on < count else None,
        **vars(operation),
    )


def _warnings(target: Target, trade: TradeOff, eta: float, macs: StageMacs, missing: str) -> list[str]:
    found, images = [], count_images(trade.images)
    if isinstance(target, Promise):
        sequences = len(STARTS) if isinstance(target, SelectiveRisk) else 1
        needed = images_needed(target.share, 1 - (1 - target.confidence) / sequences)
        if trade.images < needed:
            few = f"{images} are too few to promise this of a threshold below 1"
            found.append(f"{few}: at least {needed} are needed")
    if isinstance(target, Drop) and 0 < target.points < 100 / trade.images:
        found.append(
            f"one of {images} is {100 / trade.images:.2g} points, "
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


@dataclass(frozen=True)
class Drift:
    """Images in use against the calibration images, by the coarse stage alone."""

    drifted: bool  # whether one of the two tests rejects "drawn alike" at half of ``alpha``
    sentence: str  # what was found and what to do
    images: int  # how many were compared
    alpha: float  # how often an alarm is false, at most
    expected_fine_share: float  # share that goes on, in calibration and now, in [0, 1]
    fine_share: float  # share that goes on, in calibration and now, in [0, 1]
    fine_share_p: float  # p-value of Fisher's exact test that the two are of one kind
    expected_confidence: float  # the coarse stage's median, in calibration (at the stored quantiles) and now
    confidence: float  # the coarse stage's median, in calibration (at the stored quantiles) and now
    # between both distributions of the confidence, in [0, 1] (Kolmogorov and Smirnov, at the stored quantiles)
    distance: float
    distance_p: float  # its p-value, too high rather than too low


@torch.no_grad()
def check_drift(calibration: Calibration, coarse_logits: Tensor, alpha: float = 0.01) -> Drift:
    """Compares images in use with the calibration images: do as many go on, and is the confidence alike?

    That both are alike is no proof that accuracy is. Ask once for a batch of images, or divide
    ``alpha`` by the number of times that you will ask.

    Args:
        coarse_logits: of images in use, ``[m, classes]``.
        alpha: how often an alarm may be false, in (0, 1).

    Raises:
        CfvitError: logits that are not finite, of no image, or of other classes; alpha out of range.
    """
    check_logits(coarse_logits, "coarse")
    if coarse_logits.shape[1] != calibration.classes:
        raise CfvitError(
            f"logits of {coarse_logits.shape[1]} classes, calibrated on {calibration.classes}: give the same model's"
        )
    require_number("alpha", alpha, lambda p: 0 < p < 1, "a probability between 0 and 1, such as 0.01")
    confidence = calibration.exit.coarse(coarse_logits).cpu()
    count, before = len(confidence), calibration.images
    gone_on = int(goes_on(confidence, calibration.threshold).sum())
    expected = round(calibration.fine_share.value * before)
    table = [[expected, before - expected], [gone_on, count - gone_on]]
    share_p = float(min(1.0, *(2 * scipy.stats.fisher_exact(table, side).pvalue for side in ("less", "greater"))))
    values = np.array(calibration.profile.values, dtype=np.float32)
    shares = np.searchsorted(confidence.sort().values.numpy(), values, side="right") / count
    distance = float(np.abs(shares - np.array(calibration.profile.shares)).max())
    root = math.sqrt(before * count / (before + count))
    corrected = (root + 0.12 + 0.11 / root) * distance  # for few images (Stephens, 1970)
    distance_p = float(scipy.stats.kstwobign.sf(corrected))
    usual, now, lower_p = calibration.fine_share.value, gone_on / count, min(share_p, distance_p)

    def rounded(p_value: float) -> str:
        return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"

    if share_p < alpha / 2:
        how = f"{now / usual:.2g} times as many images go on as in" if usual else "images go on, unlike in"
        change = f"{100 * now:.3g}% instead of {100 * usual:.3g}%"
        sentence = f"{how} the calibration set ({change}, {rounded(share_p)}): recalibrate"
    elif distance_p < alpha / 2:
        sentence = (
            "about as many images go on, but confidence is distributed otherwise than in the calibration set "
            f"(distance {distance:.2f}, {rounded(distance_p)}): recalibrate"
        )
    else:
        few = f", as far as {count} can tell" if count < FEW_IMAGES else ""
        sentence = f"looks like the calibration set ({rounded(lower_p)}){few}"
    return Drift(
        drifted=lower_p < alpha / 2,
        sentence=sentence,
        images=count,
        alpha=alpha,
        expected_fine_share=usual,
        fine_share=now,
        fine_share_p=share_p,
        expected_confidence=calibration.profile.median,
        confidence=float(confidence.median()),
        distance=distance,
        distance_p=distance_p,
    )


def parse_record(kind: type[Record], text: str, name: str) -> Record:
    """A dataclass from the JSON of its fields.

    Args:
        name: what to call it in an error.

    Raises:
        CfvitError: no JSON, a missing or unknown key, a value of another type or out of range.
    """
    try:
        return TypeAdapter(kind).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors()[0]
    cause = first.get("ctx", {}).get("error", "")
    where = ".".join(map(str, (name, *first["loc"])))
    match first["type"]:
        case "missing":
            problem = f"{where} is missing"
        case "unexpected_keyword_argument":
            problem = f"{where} is unknown"
        case "value_error":
            problem = f"{where}: {cause}"
        case "json_invalid":
            problem = f"{name} is no JSON ({cause})"
        case _:
            got = " ".join(repr(first["input"]).split())
            problem = f"{where} is {got if len(got) <= _SHOWN else f'{got[: _SHOWN - 3]}...'}: {first['msg']}"
    raise CfvitError(problem)


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Writes a calibration as JSON, for `read_calibration`.

    Raises:
        CfvitError: the file cannot be written; it is then as it was.
    """
    with atomic_write(path) as file:
        file.write_text(json.dumps(asdict(calibration), indent=2, allow_nan=False) + "\n")


def read_calibration(path: Path) -> Calibration:
    """A stored calibration, by its file or by the folder of a calibrated model.

    Raises:
        CfvitError: no such file, not JSON, or a key that is missing, unknown or of a wrong value.
    """
    path = path / CALIBRATION_FILE if path.is_dir() else path
    mend = "remove it and calibrate again" if path.name == CALIBRATION_FILE else "name a file of cfvit calibrate"
    try:
        return parse_record(Calibration, path.read_text(), "calibration")
    except FileNotFoundError as error:
        raise CfvitError(f"no calibration at {path}: make one with cfvit calibrate") from error
    except (OSError, ValueError) as error:
        raise CfvitError(f"{path} cannot be used ({first_line(error)}): {mend}") from error
