"""A model calibrated on images that it was not trained on: logits, temperatures, speed, and the choice of eta."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor

from cfvit.calibration import Calibration, LatencyBudget, Origin, StageLatency, Target, calibrate
from cfvit.calibration.calibrated import FEW_IMAGES
from cfvit.calibration.checks import check_logits_and_labels, missing_classes, require_classes
from cfvit.calibration.targets import Budget, Promise, require_reachable
from cfvit.calibration.tradeoff import (
    HIGHEST_TEMPERATURE,
    LOWEST_TEMPERATURE,
    best_measure,
    fit_mixture,
    fit_temperature,
)
from cfvit.checkpoints import weights_digest
from cfvit.data import DataSource, EvalImages, ImageError, open_data, progress_bar
from cfvit.errors import CfvitError
from cfvit.evaluation.metrics import collect_with_progress, labelled_images
from cfvit.evaluation.timing import lacks_memory, time_stages
from cfvit.inference.engines.packing import accelerate, frozen
from cfvit.modeling import timm_vit
from cfvit.modeling.config import ModelConfig
from cfvit.modeling.cost import StageMacs, count_macs
from cfvit.modeling.exit import Exit, Measure
from cfvit.modeling.model import CoarseToFineViT
from cfvit.modeling.tokens import num_informative
from cfvit.processes import Process, best_device

MERGED_SHARE = 0.08
"""Of the fine sequence's patches, how many `fine_stages_of` merges before a block: 10 of 124 at alpha 0.5."""
_SEED = 0
NOT_COMPARED = "the training images are not known and were not compared with these: name them with --train-data"
"""The warning where images on which the model was trained could not be looked for."""


def calibrate_model(
    model: CoarseToFineViT,
    data: str,
    target: Target,
    *,
    batch_size: int,
    workers: int,
    measure: Measure | None = None,
    scale_temperatures: bool = False,
    best: bool = False,
    fine_stages: Sequence[ModelConfig] = (),
    allow_missing_classes: bool = False,
    training: tuple[DataSource, Sequence[int]] | None = None,
) -> tuple[Calibration, ModelConfig, list[str]]:
    """Runs both stages on every image and chooses eta, with a progress bar. The model is left as it is.

    What can be refused without the images' logits is refused before the pass over them.

    Args:
        data: where images of the model's classes are.
        measure: of the confidence; None for the maximum probability, and with ``best`` for the `best_measure`.
        scale_temperatures: fit both temperatures on a random half of the images, the same in every
            run, and choose eta on the other half. A class that only one half has is a warning.
        best: fit how both stages' answers are mixed, and choose the measure. Where the target is a promise, which
            allows no image to serve both, on such a half; else on the same images as eta.
        fine_stages: with ``best``, the model's configuration with other fine stages, to choose among as well.
        allow_missing_classes: go on with a warning if some class has no image.
        training: what the model was trained on, and which of it; None, which becomes a warning, if that is not known.

    Returns:
        The calibration, the configuration that it is of, and the names of images that could not be read and do not
        count.

    Raises:
        CfvitError: a fine stage that was not trained, a class without images, images of the training, logits that are
            not finite, a target out of reach.
    """
    model.require_trained()
    names = model.class_names or range(model.config.num_classes)
    source = labelled_images(model, data)
    targets = range(len(names)) if source.targets is None else source.targets
    require_classes(targets, names, len(source), allow_missing_classes)
    process = Process(0, 1, best_device())
    network = frozen(model.eval().to(process.device))
    network.exit = Exit()  # the stages' own answers
    configs, costs = (model.config, *fine_stages), list[tuple[StageMacs, StageLatency | None]]()
    for config in configs:
        network.config = config
        latency = measure_latency(network, batch_size) if isinstance(target, LatencyBudget) else None
        costs.append((count_macs(network), latency))
        require_reachable(target, *costs[-1])
    if training is not None:
        refuse_training_images(open_data(data, "validation"), *training)
    forward = partial(_answers, accelerate(network), configs)
    images = EvalImages(source, model.data_config)
    collected, unreadable = collect_with_progress(forward, images, batch_size, workers, process)
    (coarse, *fines), labels = collected.logits.values(), collected.labels
    for fine in fines:
        check_logits_and_labels(coarse, fine, labels)
    require_classes(labels.tolist(), names, len(labels), allow_missing_classes)
    fit = partial(_fit_exit, measure=measure, temperatures=scale_temperatures, best=best)
    halved = scale_temperatures or (best and isinstance(target, Promise))
    place, calibration = _choose(coarse, fines, labels, costs, target, names, fit, halved)
    network.config = configs[place]
    warnings = calibration.warnings if training is not None else (*calibration.warnings, NOT_COMPARED)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    origin = Origin(data, now, version("cfvit"), len(labels) - calibration.images, weights_digest(network))
    return replace(calibration, origin=origin, warnings=warnings), configs[place], unreadable


def _answers(network: CoarseToFineViT, configs: Sequence[ModelConfig], images: Tensor) -> dict[str, Tensor]:
    """Logits of the coarse stage, and of every fine stage on what it left."""
    state = network.coarse(images)
    found = {"coarse": state.logits}
    for place, config in enumerate(configs):
        network.config = config
        found[f"fine {place}"] = network.fine(images, state)
    return found


def _choose(
    coarse: Tensor,
    fines: Sequence[Tensor],
    labels: Tensor,
    costs: Sequence[tuple[StageMacs, StageLatency | None]],
    target: Target,
    names: Sequence[object],
    fit: Callable[..., Exit],
    halved: bool,
) -> tuple[int, Calibration]:
    """Which of several fine stages meets a target best: the most accurate within a budget, else the cheapest.

    Args:
        fit: from coarse logits, fine logits and labels to an exit without eta.
        halved: whether exits are fitted on a random half of the images, and eta is chosen on the other half.

    Raises:
        CfvitError: the target is out of reach.
    """
    every = torch.arange(len(labels))
    fitted, kept, doubts = _halve(labels, names) if halved else (every, every, [])
    exits = [fit(coarse[fitted], fine[fitted], labels[fitted]) for fine in fines]

    def calibrated(place: int, rows: Tensor) -> Calibration:
        images, options = (coarse[rows], fines[place][rows], labels[rows]), asdict(exits[place])
        del options["eta"]
        macs, options["latency"] = costs[place]
        # calibrate_model has looked for classes without images
        return calibrate(*images, macs, target, class_names=names, allow_missing_classes=True, **options)

    def merit(place: int) -> tuple[float, float]:
        try:
            outcome = calibrated(place, fitted)
        except CfvitError:  # out of reach with this fine stage
            return -math.inf, 0.0
        accuracy, cost = outcome.accuracy.value, outcome.gmacs.value
        return (accuracy, -cost) if isinstance(target, Budget) else (-cost, accuracy)

    place = max(range(len(fines)), key=merit)  # of equals the first
    temperatures = exits[place].coarse_temperature, exits[place].fine_temperature
    if any(not 1.01 * LOWEST_TEMPERATURE < value < 0.99 * HIGHEST_TEMPERATURE for value in temperatures):
        doubts.append("a temperature is at the bound of its range: do not rely on it")
    calibration = calibrated(place, kept)
    return place, replace(calibration, warnings=(*calibration.warnings, *doubts))


def _fit_exit(
    coarse: Tensor, fine: Tensor, labels: Tensor, measure: Measure | None, temperatures: bool, best: bool
) -> Exit:
    """An exit without eta, fitted on images: of the measure that is given, or with ``best`` of the best one."""
    exit = Exit(measure or "max_probability")
    if temperatures:
        exit = replace(exit, coarse_temperature=fit_temperature(coarse, labels))
        exit = replace(exit, fine_temperature=fit_temperature(fine, labels))
    if best:
        weight, temperature = fit_mixture(coarse, fine, labels)
        exit = replace(exit, coarse_weight=weight, fine_temperature=temperature)
        if measure is None:
            answers = exit.answer(coarse, fine)
            exit = replace(exit, measure=best_measure(coarse, answers, labels, exit.coarse_temperature))
    return exit


def fine_stages_of(model: CoarseToFineViT) -> list[ModelConfig]:
    """Other fine stages than the model has now: that of its training, with fewer cells split or more tokens merged."""
    cells, trained = model.grid[0] * model.grid[1], model.require_trained()
    found = []
    for ratio in (1.0, 0.8, 0.6):
        split = num_informative(ratio * trained.informative_ratio, cells)
        merging = 0 if timm_vit.refuses_merging(model.backbone) else round(MERGED_SHARE * (cells + 3 * split))
        for more in sorted({0, merging}):
            share, merged = round(ratio * trained.informative_ratio, 3), trained.fine_merged + more
            found.append(replace(trained, informative_ratio=share, fine_merged=merged))
    return [config for config in found if config != model.config]


def _halve(labels: Tensor, names: Sequence[object]) -> tuple[Tensor, Tensor, list[str]]:
    """Places of a random half of the images to fit temperatures on, of the other half, and doubts about the former.

    The half is not taken within each class, though a rare class may then miss in it, which is a warning. The promise
    of `Risk` counts worse answers as a binomial number, which they are in a random half of images drawn
    independently. Halved within each class they are not, as the classes' shares vary less than in a
    draw: with one class that is always worse and one that never is, a promise at a low confidence
    would break more often than it may. Odd classes would also weigh more in one half.
    """
    total = len(labels)
    if total < 2:
        raise CfvitError("1 image cannot be halved to fit temperatures on: give at least 2")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(_SEED))
    count = total // 2
    doubts = []
    if count < FEW_IMAGES:
        doubts.append(f"{count} images are few to fit a temperature on: use more")
    if missing := missing_classes(labels[order[:count]].tolist(), names, count):
        doubts.append(f"{missing} that temperatures were fitted on: give more of them")
    return order[:count], order[count:], doubts


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


def refuse_training_images(source: DataSource, training: DataSource, indices: Sequence[int]) -> None:
    """Refuses images that are among those of ``indices`` on which the model was trained, with a progress bar.

    Open the source anew to load it: a tar that is read here is not fit for loading processes. The `CfvitError` says how
    many there are, and which is the first.
    """
    shared = shared_images(source, training, indices)
    if shared:
        ours, theirs = shared[0]
        what = "1 image is" if len(shared) == 1 else f"{len(shared)} of {len(source)} images are"
        raise CfvitError(
            f"{what} among the training images, {source.name(ours)} first, which is {training.name(theirs)} there: "
            "give images that the model was not trained on"
        )


def shared_images(source: DataSource, others: DataSource, indices: Sequence[int]) -> list[tuple[int, int]]:
    """Images of a source that are stored byte for byte alike among some of another, each with its first likeness there.

    Only files of equal size are read. What cannot be opened is left out.
    """
    with progress_bar(2 * len(source) + len(indices)) as advance:

        def size_of(images: DataSource, index: int) -> int | None:
            advance(1)
            try:
                with images.stored(index) as file:
                    return file.seek(0, io.SEEK_END)
            except (ImageError, OSError):
                return None

        def digest(images: DataSource, index: int) -> bytes:
            with images.stored(index) as file:
                return hashlib.sha256(file.read()).digest()

        sizes = [size_of(source, index) for index in range(len(source))]
        there = set(sizes) - {None}
        found: dict[bytes, int] = {}
        for index in indices:
            if size_of(others, index) in there:
                found.setdefault(digest(others, index), index)
        shared = []
        for index, size in enumerate(sizes):
            advance(1)
            if found and size is not None and (content := digest(source, index)) in found:
                shared.append((index, found[content]))
    return shared
