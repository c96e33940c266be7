"""A model calibrated on images: their logits, its temperatures, its speed, and the choice of eta."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from torch import Tensor

import cfvit
from cfvit.calibration import Calibration, Drift, LatencyBudget, Origin, Target, calibrate, check_drift
from cfvit.calibration.calibrated import ADD_CLASSES, check_logits, missing_classes
from cfvit.confidence import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE, Measure, fit_temperature
from cfvit.data import DataSource
from cfvit.errors import CfvitError
from cfvit.evaluation.bench import time_stages
from cfvit.evaluation.metrics import collect_with_progress
from cfvit.flops import count_macs
from cfvit.model import CoarseToFineViT
from cfvit.processes import Process

Images = tuple[Tensor, Tensor, Tensor]
_SEED = 0
FEW_IMAGES = 100
"""Below so many there is a warning that a fitted temperature may be chance."""


@dataclass(frozen=True)
class Wish:
    """What eta is chosen for, and by which confidence.

    Attributes:
        target: one of `cfvit.calibration`.
        measure: of the confidence.
        scale_temperatures: fit both temperatures on a random half of the images, the same in every
            run, and choose eta on the other half: a promise of `Risk` allows no image to serve both.
        allow_missing_classes: go on with a warning if some class has no image.
    """

    target: Target
    measure: Measure = "max_probability"
    scale_temperatures: bool = False
    allow_missing_classes: bool = False


def calibrate_model(
    model: CoarseToFineViT, source: DataSource, data: str, wish: Wish, batch_size: int, workers: int, process: Process
) -> tuple[Calibration, list[str]]:
    """Runs both stages on every image and chooses eta, with a progress bar. The model is left as it is.

    Args:
        source: images with the model's class indices.
        data: what the images are called, for `Origin`.

    Returns:
        The calibration, and the names of images that could not be read and do not count.

    Raises:
        CfvitError: a class without images, logits that are not finite, a wish out of reach.
    """
    _require_classes(model, source, wish)
    model = model.eval().to(process.device)
    collected, unreadable = collect_with_progress(model, model.data_config, source, batch_size, workers, process)
    coarse, fine = collected.logits
    check_logits(coarse, "coarse")
    check_logits(fine, "fine")
    images = (coarse, fine, collected.labels)
    fitted, chosen = _halves(images) if wish.scale_temperatures else (None, images)
    temperatures = (1.0, 1.0) if fitted is None else [fit_temperature(logits, fitted[2]) for logits in fitted[:2]]
    latency = None
    if isinstance(wish.target, LatencyBudget):
        latency = time_stages(model, torch.randn(batch_size, 3, *model.image_size, device=process.device))
    calibration = calibrate(
        *chosen,
        count_macs(model),
        wish.target,
        measure=wish.measure,
        coarse_temperature=temperatures[0],
        fine_temperature=temperatures[1],
        latency=latency,
        allow_missing_classes=wish.allow_missing_classes,
        class_names=model.class_names,
    )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    origin = Origin(data, now, cfvit.__version__, 0 if fitted is None else len(fitted[2]))
    warnings = calibration.warnings if fitted is None else (*calibration.warnings, *_doubts(temperatures, fitted))
    return dataclasses.replace(calibration, origin=origin, warnings=warnings), unreadable


def _doubts(temperatures: Sequence[float], fitted: Images) -> list[str]:
    """What speaks against temperatures that were fitted."""
    count = len(fitted[2])
    said = [f"{count} images are few to fit a temperature on: use more"] if count < FEW_IMAGES else []
    at_bound = any(not 1.01 * LOWEST_TEMPERATURE < t < 0.99 * HIGHEST_TEMPERATURE for t in temperatures)
    return said + (["a temperature is at the bound of its range: do not rely on it"] if at_bound else [])


def _require_classes(model: CoarseToFineViT, source: DataSource, wish: Wish) -> None:
    """Before the model runs, which may take long; images that cannot be read are not yet known."""
    names = model.class_names or range(model.config.num_classes)
    present = range(len(names)) if source.targets is None else source.targets
    missing = missing_classes(present, names, len(source))
    if missing and not wish.allow_missing_classes:
        raise CfvitError(f"{missing}: {ADD_CLASSES}")


def _halves(images: Images) -> tuple[Images, Images]:
    """Logits of both stages and labels, parted at random, the second half the larger if they are odd."""
    count = len(images[2])
    if count < 2:
        raise CfvitError("1 image cannot be halved to fit temperatures on: give at least 2")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_SEED))
    coarse, fine, labels = (column[order] for column in images)
    middle = count // 2
    return (coarse[:middle], fine[:middle], labels[:middle]), (coarse[middle:], fine[middle:], labels[middle:])


def check_drift_of(
    model: CoarseToFineViT,
    source: DataSource,
    calibration: Calibration,
    batch_size: int,
    workers: int,
    process: Process,
) -> tuple[Drift, list[str]]:
    """`cfvit.calibration.check_drift` on images without labels, by the coarse stage alone, with a progress bar.

    Returns:
        What was found, and the names of images that could not be read and do not count.
    """
    model = model.eval().to(process.device)
    collected, unreadable = collect_with_progress(
        lambda images: (model.coarse(images).logits,), model.data_config, source, batch_size, workers, process
    )
    return check_drift(calibration, collected.logits[0]), unreadable
