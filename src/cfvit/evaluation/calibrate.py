"""A model calibrated on images: their logits, its temperatures, its speed, and the choice of eta."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor

from cfvit.calibration import Calibration, Drift, LatencyBudget, Origin, StageLatency, Target, calibrate, check_drift
from cfvit.calibration.calibrated import ADD_CLASSES, best_measure, check_images, missing_classes
from cfvit.calibration.choice import require_reachable
from cfvit.calibration.overlap import refuse_training_images
from cfvit.calibration.targets import Promise
from cfvit.calibration.temperature import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE, fit_mixture, fit_temperature
from cfvit.checkpoints import weights_digest
from cfvit.data import DataSource, open_data
from cfvit.errors import CfvitError
from cfvit.evaluation.metrics import collect_with_progress
from cfvit.evaluation.timing import lacks_memory, time_stages
from cfvit.inference.engines.packing import accelerate, frozen
from cfvit.modeling.cost import count_macs
from cfvit.modeling.exit import Exit, Measure
from cfvit.modeling.model import CoarseToFineViT
from cfvit.processes import Process

Images = tuple[Tensor, Tensor, Tensor]
_SEED = 0
FEW_IMAGES = 100
"""Below so many there is a warning that a fitted temperature may be chance."""

NOT_COMPARED = "the training images are not known and were not compared with these: name them with --train-data"
"""The warning where images on which the model was trained could not be looked for."""


def calibrate_model(
    model: CoarseToFineViT,
    source: DataSource,
    data: str,
    target: Target,
    process: Process,
    *,
    batch_size: int,
    workers: int,
    measure: Measure | None = None,
    scale_temperatures: bool = False,
    best: bool = False,
    allow_missing_classes: bool = False,
    training: tuple[DataSource, Sequence[int]] | None = None,
) -> tuple[Calibration, list[str]]:
    """Runs both stages on every image and chooses eta, with a progress bar. The model is left as it is.

    What can be refused without the images' logits is refused before the pass over them.

    Args:
        source: images with the model's class indices.
        data: where they are, to be opened again and for `Origin`.
        measure: of the confidence; None for the maximum probability, and with ``best`` for what serves the target best.
        scale_temperatures: fit both temperatures on a random half of the images, the same in every
            run, and choose eta on the other half. A class that only one half has is a warning.
        best: fit the temperatures and how both stages' answers are mixed, and choose the measure. Where the target is a
            promise, which allows no image to serve both, on such a half; else on the same images as eta.
        allow_missing_classes: go on with a warning if some class has no image.
        training: what the model was trained on, and which of it; None, which becomes a warning, if that is not known.

    Returns:
        The calibration, and the names of images that could not be read and do not count.

    Raises:
        CfvitError: a class without images, images of the training, logits that are not finite, a target out of reach.
    """
    names = model.class_names or range(model.config.num_classes)

    def require_classes(present: Collection[int], count: int) -> None:
        missing = missing_classes(present, names, count)
        if missing and not allow_missing_classes:
            raise CfvitError(f"{missing}: {ADD_CLASSES}")

    require_classes(range(len(names)) if source.targets is None else source.targets, len(source))
    macs = count_macs(model)
    model = model.eval().to(process.device)
    latency = measure_latency(model, batch_size) if isinstance(target, LatencyBudget) else None
    require_reachable(target, macs, latency)
    if training is not None:
        refuse_training_images(open_data(data, "validation"), *training)
    network = accelerate(frozen(model))
    network.exit = Exit()  # the stages' own answers
    collected, unreadable = collect_with_progress(
        lambda images: network(images)._asdict(), model.data_config, source, batch_size, workers, process
    )
    images = (collected.logits["coarse"], collected.logits["fine"], collected.labels)
    check_images(*images)
    require_classes(collected.labels.tolist(), len(collected.labels))
    rule, fitted, doubts = Exit(measure or "max_probability"), images, list[str]()
    if scale_temperatures or (best and isinstance(target, Promise)):
        fitted, images, doubts = _halved(images, names)
    if scale_temperatures or best:
        coarse, fine, labels = fitted
        rule = replace(
            rule, coarse_temperature=fit_temperature(coarse, labels), fine_temperature=fit_temperature(fine, labels)
        )
        if any(
            not 1.01 * LOWEST_TEMPERATURE < t < 0.99 * HIGHEST_TEMPERATURE
            for t in (rule.coarse_temperature, rule.fine_temperature)
        ):
            doubts.append("a temperature is at the bound of its range: do not rely on it")
    if best:
        weight, temperature = fit_mixture(*fitted)
        rule = replace(rule, coarse_weight=weight, fine_temperature=temperature)
        rule = replace(rule, measure=measure or best_measure(*fitted, macs, target, rule, latency))
    if training is None:
        doubts.append(NOT_COMPARED)
    calibration = calibrate(
        *images,
        macs,
        target,
        measure=rule.measure,
        coarse_temperature=rule.coarse_temperature,
        fine_temperature=rule.fine_temperature,
        coarse_weight=rule.coarse_weight,
        latency=latency,
        allow_missing_classes=True,  # the classes of all images were checked above
        class_names=model.class_names,
    )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    fitted_on = len(collected.labels) - len(images[-1])
    origin = Origin(data, now, version("cfvit"), fitted_on, weights_digest(model))
    return replace(calibration, origin=origin, warnings=(*calibration.warnings, *doubts)), unreadable


def _halved(images: Images, names: Sequence[object]) -> tuple[Images, Images, list[str]]:
    """A random half of the images to fit temperatures on, the other half, and what speaks against the former.

    The half is not taken within each class, though a rare class may then miss in it, which is a warning. The promise
    of `Risk` counts worse answers as a binomial number, which they are in a random half of images drawn
    independently. Halved within each class they are not, as the classes' shares vary less than in a
    draw: with one class that is always worse and one that never is, a promise at a low confidence
    would break more often than it may. Odd classes would also weigh more in one half.
    """
    total = len(images[-1])
    if total < 2:
        raise CfvitError("1 image cannot be halved to fit temperatures on: give at least 2")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(_SEED))
    count = total // 2
    coarse, fine, labels = (column[order] for column in images)
    fitted, kept = ((coarse[part], fine[part], labels[part]) for part in (slice(count), slice(count, None)))
    doubts = []
    if count < FEW_IMAGES:
        doubts.append(f"{count} images are few to fit a temperature on: use more")
    if missing := missing_classes(fitted[-1].tolist(), names, count):
        doubts.append(f"{missing} that temperatures were fitted on: give more of them")
    return fitted, kept, doubts


def measure_latency(model: CoarseToFineViT, batch_size: int) -> StageLatency:
    """Times random images on the model's device as a `cfvit.Predictor` runs it, all of a batch going on or only some.

    The fine stage is timed at four sizes, from one image to all of a batch, and taken to be linear in between.

    Raises:
        CfvitError: a batch that does not fit into memory.
    """
    sizes = sorted({1, -(-batch_size // 4), -(-batch_size // 2), batch_size})
    fast = accelerate(model)
    try:
        images = torch.randn(batch_size, 3, *model.image_size, device=next(model.parameters()).device)
        timed = [time_stages(fast, images[:size]) for size in sizes]
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        raise CfvitError(f"a batch of {batch_size} images does not fit into memory: lower --batch-size") from error
    seconds = [size * (each.both - each.coarse) for size, each in zip(sizes, timed, strict=True)]
    rising = np.maximum.accumulate([0.0, *seconds])  # a busy machine may time them otherwise
    extra = np.interp(np.arange(1, batch_size + 1), [0, *sizes], rising) / batch_size
    *between, both = (timed[-1].coarse + extra).tolist()
    return StageLatency(timed[-1].coarse, both, tuple(between))


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
    network = accelerate(model.eval().to(process.device))

    def answers(images: Tensor) -> dict[str, Tensor]:
        return {"coarse": network.coarse(images).logits}

    collected, unreadable = collect_with_progress(answers, model.data_config, source, batch_size, workers, process)
    return check_drift(calibration, collected.logits["coarse"]), unreadable
