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

    def answers(logits: Tensor, temperature: float) -> StageAnswers:
        answer = answers_of(logits)
        return StageAnswers(
            answer=answer.numpy(),
            right=(answer == collected.labels).numpy(),
            confidence=confidence_of(logits, exit.measure, temperature).numpy(),
            probability=confidence_of(logits, temperature=temperature).clamp(min=0).numpy(),
        )

    return Answers(
        labels=collected.labels.numpy(),
        coarse=answers(coarse, exit.coarse_temperature),
        fine=answers(fine, exit.fine_temperature),
        gone_on=goes_on(exit.coarse(coarse), threshold).numpy(),
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
    """Whether answers are right as often as their probability says, by bins of equal width."""

    counts: np.ndarray  # images in each bin, ``[bins]``
    hits: np.ndarray  # of them, the right answers
    # expected calibration error in percentage points, the mean distance between accuracy and mean probability of a bin,
    # weighted by images (Naeini et al., AAAI 2015)
    error: float


def reliability_of(stage: StageAnswers) -> Reliability:
    """Counts right answers by bins of the highest softmax probability."""
    places = np.minimum((stage.probability * RELIABILITY_BINS).astype(int), RELIABILITY_BINS - 1)
    counts = np.bincount(places, minlength=RELIABILITY_BINS)
    hits = np.bincount(places, weights=stage.right, minlength=RELIABILITY_BINS)
    sums = np.bincount(places, weights=stage.probability.astype(np.float64), minlength=RELIABILITY_BINS)
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
