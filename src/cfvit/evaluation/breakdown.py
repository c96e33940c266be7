"""What a report tells of logits: operating points with intervals, reliability, classes, images worth seeing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from cfvit.calibration import TradeOff
from cfvit.calibration.tradeoff import answers_of
from cfvit.evaluation.metrics import Collected
from cfvit.modeling.exit import Exit, Measure, confidence_of, goes_on

LEVEL = 0.95
"""Probability with which each interval holds."""

RELIABILITY_BINS = 15


@dataclass(frozen=True, eq=False)
class StageAnswers:
    """What one stage makes of n images."""

    answer: np.ndarray  # class indices ``[n]``, `NO_ANSWER` where the logits are not finite
    right: np.ndarray  # which of them are the label, ``[n]``
    confidence: np.ndarray  # by the model's `Exit`, ``[n]``
    probability: np.ndarray  # the highest softmax probability at the rule's temperature, ``[n]`` in [0, 1]


@dataclass(frozen=True, eq=False)
class Answers:
    """What both stages make of n images at one eta."""

    labels: np.ndarray  # class indices ``[n]``
    coarse: StageAnswers  # of all images, whether they need the stage or not
    fine: StageAnswers  # of all images, whether they need the stage or not
    gone_on: np.ndarray  # which images the fine stage answers, ``[n]``

    @property
    def right(self) -> np.ndarray:
        """Which images are answered rightly by the stage that answers, ``[n]``."""
        return np.where(self.gone_on, self.fine.right, self.coarse.right)


def judge(collected: Collected, exit: Exit, threshold: float) -> Answers:
    """Answers of both stages and who goes on at this eta, as `cfvit.Predictor` decides."""
    coarse, fine = collected.logits["coarse"], collected.logits["fine"]
    return Answers(
        labels=collected.labels.numpy(),
        coarse=_stage_answers(coarse, collected.labels, exit.measure, exit.coarse_temperature),
        fine=_stage_answers(fine, collected.labels, exit.measure, exit.fine_temperature),
        gone_on=goes_on(exit.coarse(coarse), threshold).numpy(),
    )


def _stage_answers(logits: Tensor, labels: Tensor, measure: Measure, temperature: float) -> StageAnswers:
    answer = answers_of(logits)
    return StageAnswers(
        answer=answer.numpy(),
        right=(answer == labels).numpy(),
        confidence=confidence_of(logits, measure, temperature).numpy(),
        probability=confidence_of(logits, temperature=temperature).clamp(min=0).numpy(),
    )


def shown_confidence(value: float, measure: Measure) -> str:
    """A probability or a difference of two in percent, another measure as the plain number that it is."""
    return f"{value:.1%}" if measure in ("max_probability", "margin") else f"{value:.4f}"


def spread(trade: TradeOff, most: int) -> np.ndarray:
    """At most this many of the numbers of images that can go on, both ends among them."""
    places = np.linspace(0, len(trade.reachable) - 1, min(most, len(trade.reachable)))
    return trade.reachable[places.round().astype(int)]


@dataclass(frozen=True, eq=False)
class Reliability:
    """Whether answers are right as often as their probability says, by bins of equal width.

    Attributes:
        counts: images in each bin, ``[bins]``.
        hits: of them, the right answers.
        error: expected calibration error in percentage points, the mean distance between accuracy
            and mean probability of a bin, weighted by images (Naeini et al., AAAI 2015).
    """

    counts: np.ndarray
    hits: np.ndarray
    error: float


def reliability_of(stage: StageAnswers, bins: int = RELIABILITY_BINS) -> Reliability:
    """Counts right answers by bins of the highest softmax probability."""
    places = np.minimum((stage.probability * bins).astype(int), bins - 1)
    counts = np.bincount(places, minlength=bins)
    hits = np.bincount(places, weights=stage.right, minlength=bins)
    sums = np.bincount(places, weights=stage.probability.astype(np.float64), minlength=bins)
    return Reliability(counts, hits.astype(int), float(100 * np.abs(hits - sums).sum() / len(places)))


@dataclass(frozen=True)
class ClassScore:
    """One class."""

    index: int
    images: int
    exits: int  # of these, answered at the coarse stage
    right: int  # of these, answered rightly by the stage that answers
    coarse_right: int  # of these, answered rightly by each stage for all
    fine_right: int  # of these, answered rightly by each stage for all

    @property
    def exit_share(self) -> float:
        """Share of the images that exit at the coarse stage, in [0, 1]."""
        return self.exits / self.images

    @property
    def gain(self) -> float:
        """Percentage points by which the fine stage is better than the coarse one."""
        return 100 * (self.fine_right - self.coarse_right) / self.images


def class_scores(answers: Answers, classes: int) -> list[ClassScore]:
    """Scores of all classes that have images, by index."""

    def count(which: np.ndarray) -> list[int]:
        return np.bincount(answers.labels[which], minlength=classes).tolist()

    columns = (
        count(np.ones(len(answers.labels), dtype=bool)),
        count(~answers.gone_on),
        count(answers.right),
        count(answers.coarse.right),
        count(answers.fine.right),
    )
    rows = enumerate(zip(*columns, strict=True))
    return [ClassScore(index, *row) for index, row in rows if row[0]]


def surest(which: np.ndarray, confidence: np.ndarray, most: int) -> list[int]:
    """The images of highest confidence among some, at most this many.

    Args:
        which: those to choose from, ``[n]`` of bool.
        confidence: ``[n]``.
    """
    places = np.flatnonzero(which)
    return places[np.argsort(-confidence[places], kind="stable")][:most].tolist()
