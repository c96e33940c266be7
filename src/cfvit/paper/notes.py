"""What a reader has to know of a study's figures besides the figures: how sure they are, and of what they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cfvit.calibration.binomial import share_estimate
from cfvit.calibration.calibrated import missing_classes
from cfvit.paper.records import Finished, Scored
from cfvit.paper.rows import top1

FAMILIES = ("DeiT-S", "LV-ViT-S")
"""The backbones of the paper's Tables 2 and 3."""

_LEVEL = 0.95


def family_of(backbone: str) -> str:
    """Whose rows of Tables 2 and 3 stand beside a backbone of ours."""
    return "LV-ViT-S" if backbone.startswith("lvvit") else "DeiT-S"


def notes_of_family(notes: Sequence[str], family: str) -> list[str]:
    """The notes without those that are of another family of the paper's alone."""
    others = [other for other in FAMILIES if other != family]
    return [note for note in notes if family in note or not any(other in note for other in others)]


def uncertainty(scored: Scored) -> str:
    """By how much an accuracy of one run may differ by the choice of the validation images."""
    count, accuracy = len(scored.labels), top1(scored, -1)
    interval = share_estimate(round(accuracy / 100 * count), count, _LEVEL)
    half = 50 * (interval.high - interval.low)
    return (
        f"An accuracy of {accuracy:.1f}% on {count:,} images is sure to {half:.2g} points either way (half of Clopper "
        f"and Pearson's {_LEVEL:.0%} interval): of one run each, smaller differences between rows may be chance."
    )


def classes_without_images(scored: Scored, class_names: Sequence[str]) -> Iterator[str]:
    """A note where the validation images lack some of the classes."""
    if missing := missing_classes(scored.labels.tolist(), class_names, len(scored.labels)):
        yield f"Of the validation data, {missing}: nothing is known of them."


def seed_of_picture(*runs: Sequence[Finished]) -> Iterator[str]:
    """A note where only the first of several seeds is drawn of some run."""
    drawn = dict.fromkeys(str(seeds[0].recipe.seed) for seeds in runs)
    if len(drawn) > 1 or any(len(seeds) > 1 for seeds in runs):
        yield f"The picture is of seed {' and '.join(drawn)}."
