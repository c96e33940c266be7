"""Whether images in use still look like those that the threshold was chosen on. No labels needed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import scipy
from torch import Tensor

from cfvit.calibration.calibrated import Calibration, check_logits
from cfvit.errors import CfvitError
from cfvit.modeling.exit import goes_on, is_number

_FEW = 100


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
    if not (is_number(alpha) and 0 < alpha < 1):
        raise CfvitError(f"alpha is {alpha!r}: give a probability between 0 and 1, such as 0.01")
    confidence = calibration.exit.coarse(coarse_logits).cpu()
    count, before = len(confidence), calibration.images
    gone_on = int(goes_on(confidence, calibration.threshold).sum())
    expected = round(calibration.fine_share.value * before)
    table = [[expected, before - expected], [gone_on, count - gone_on]]
    tails = [scipy.stats.fisher_exact(table, side).pvalue for side in ("less", "greater")]
    values = np.array(calibration.profile.values, dtype=np.float32)
    shares = np.searchsorted(confidence.sort().values.numpy(), values, side="right") / count
    distance = float(np.abs(shares - np.array(calibration.profile.shares)).max())
    root = math.sqrt(before * count / (before + count))
    corrected = (root + 0.12 + 0.11 / root) * distance  # for few images (Stephens, 1970)
    drift = Drift(
        drifted=False,
        sentence="",
        images=count,
        alpha=alpha,
        expected_fine_share=calibration.fine_share.value,
        fine_share=gone_on / count,
        fine_share_p=float(min(1.0, 2 * min(tails))),
        expected_confidence=calibration.profile.median,
        confidence=float(confidence.median()),
        distance=distance,
        distance_p=float(scipy.stats.kstwobign.sf(corrected)),
    )
    usual, now = drift.expected_fine_share, drift.fine_share
    if drift.fine_share_p < alpha / 2:
        how = f"{now / usual:.2g} times as many images go on as in" if usual else "images go on, unlike in"
        shares = f"{100 * now:.3g}% instead of {100 * usual:.3g}%"
        sentence = f"{how} the calibration set ({shares}, {_p(drift.fine_share_p)}): recalibrate"
    elif drift.distance_p < alpha / 2:
        sentence = (
            "about as many images go on, but confidence is distributed otherwise than in the calibration set "
            f"(distance {distance:.2f}, {_p(drift.distance_p)}): recalibrate"
        )
    else:
        few = f", as far as {count} can tell" if count < _FEW else ""
        sentence = f"looks like the calibration set ({_p(min(drift.fine_share_p, drift.distance_p))}){few}"
    return replace(drift, drifted=min(drift.fine_share_p, drift.distance_p) < alpha / 2, sentence=sentence)


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"
