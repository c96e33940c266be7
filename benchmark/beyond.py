"""The paper's method, then each step beyond it: points above the plain network, MACs saved, milliseconds.

python benchmark/beyond.py MODEL --plain WEIGHTS --calibration-data DATA [--data TEST] [--part FILE] [--rounds 10]

At each step eta is the cheapest whose accuracy is at most --below points under the plain network's on the calibration
data. "held out" are means over 20 random halves of these images: all is chosen on one half and scored on the other.
--data is scored once, at the etas chosen on all calibration images; brackets are 95% intervals by the bootstrap. Times
are of 32 images of which the step's share goes on, all steps and the plain network in turn; ratios are within a round.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cyclopts
import numpy as np
import torch
from scipy import stats
from torch import Tensor

from cfvit import Predictor, StageMacs, calibrate, count_macs, load
from cfvit.calibration import Accuracy, Calibration, Saving, Target
from cfvit.calibration.tradeoff import best_measure, fit_mixture
from cfvit.checkpoints import initialise
from cfvit.data import EvalImages, eval_loader
from cfvit.errors import CfvitError
from cfvit.evaluation.calibrate import fine_stages_of
from cfvit.evaluation.metrics import collect, labelled_images
from cfvit.evaluation.timing import paired_ratio, time_in_turn
from cfvit.inference.engines.packing import accelerate, frozen
from cfvit.modeling.config import ModelConfig
from cfvit.modeling.exit import Exit, goes_on
from cfvit.modeling.model import CoarseToFineViT
from cfvit.paper.given import read_part

SAVINGS = (50, 60, 70)
TIMED = 32


@dataclass(frozen=True)
class Step:
    """One row: a fine stage, and whether the measure and the mixture are chosen besides eta."""

    name: str
    fine: str  # whose logits
    macs: StageMacs
    config: ModelConfig
    measured: bool = False
    mixed: bool = False

    def fitted(self, logits: dict[str, Tensor], labels: Tensor) -> dict[str, Any]:
        """All that is chosen by some images besides eta."""
        coarse, fine, options = logits["coarse"], logits[self.fine], dict[str, Any]()
        if self.mixed:
            options["coarse_weight"], options["fine_temperature"] = fit_mixture(coarse, fine, labels)
        if self.measured:
            rule = Exit(**options)
            options["measure"] = best_measure(coarse, rule.answer(coarse, fine), labels, rule.coarse_temperature)
        return options

    def calibrated(
        self, logits: dict[str, Tensor], labels: Tensor, target: Target, options: dict[str, Any]
    ) -> Calibration:
        """eta by some images."""
        return calibrate(
            logits["coarse"], logits[self.fine], labels, self.macs, target, allow_missing_classes=True, **options
        )

    def answers(self, logits: dict[str, Tensor], made: Calibration) -> tuple[Tensor, Tensor]:
        """The class of each image, and which go on."""
        on = goes_on(made.exit.coarse(logits["coarse"]), made.threshold)
        mixed = made.exit.answer(logits["coarse"], logits[self.fine])
        return torch.where(on, mixed.argmax(-1), logits["coarse"].argmax(-1)), on


def steps_of(model: CoarseToFineViT) -> list[Step]:
    """The paper's method, a better exit, and that with each fine stage."""
    steps = []
    for place, config in enumerate((model.config, *fine_stages_of(model))):
        twin = frozen(model)
        twin.config = config
        fine, macs = f"fine {place}", count_macs(twin)
        name = f"alpha {config.informative_ratio:g}, {config.fine_merged} merged"
        if place == 0:
            steps.append(Step(f"the paper's exit ({name})", fine, macs, config))
            steps.append(Step("+ the best measure", fine, macs, config, measured=True))
            name = "+ both answers mixed"
        steps.append(Step(name, fine, macs, config, measured=True, mixed=True))
    return steps


def scored(model: CoarseToFineViT, plain: Any, steps: Sequence[Step], data: str) -> tuple[dict[str, Tensor], Tensor]:
    """Logits of the plain network, the coarse stage and each fine stage, and labels."""
    fast, fast_plain = accelerate(frozen(model)), accelerate(plain)
    images = EvalImages(labelled_images(model, data), model.data_config)

    def forward(batch: Tensor) -> dict[str, Tensor]:
        state = fast.coarse(batch)
        found = {"plain": fast_plain(batch), "coarse": state.logits}
        for step in steps:
            fast.config = step.config
            if step.fine not in found:
                found[step.fine] = fast.fine(batch, state)
        return found

    collected = collect(forward, eval_loader(images, 50, 0, torch.device("cpu")), torch.device("cpu"))
    return collected.logits, collected.labels


def held_out(step: Step, logits: dict[str, Tensor], labels: Tensor, below: float, repeats: int = 20) -> list[str]:
    """Points above the plain network and MACs saved on halves that nothing was chosen on, means; for each target."""
    generator = torch.Generator().manual_seed(0)
    right = (logits["plain"].argmax(-1) == labels).double()
    found: list[list[tuple[float, float]]] = [[] for _ in range(1 + len(SAVINGS))]
    for _ in range(repeats):
        order = torch.randperm(len(labels), generator=generator)
        seen, kept = order[: len(order) // 2], order[len(order) // 2 :]
        ours, theirs = ({name: part[rows] for name, part in logits.items()} for rows in (seen, kept))
        options = step.fitted(ours, labels[seen])
        targets: list[Target] = [Accuracy(max(0.0, 100 * right[seen].mean().item() - below)), *map(Saving, SAVINGS)]
        for target, column in zip(targets, found, strict=True):
            try:
                made = step.calibrated(ours, labels[seen], target, options)
            except CfvitError:  # out of reach: the most accurate that there is
                made = step.calibrated(ours, labels[seen], Saving(0), options)
            answers, on = step.answers(theirs, made)
            points = 100 * ((answers == labels[kept]).double() - right[kept]).mean().item()
            column.append((points, saved(step, on)))
    first, *others = (np.mean(column, axis=0) for column in found)
    return [f"{first[0]:+.2f}, **{first[1]:.1f}%**", *(f"{points:+.2f}" for points, _ in others)]


def saved(step: Step, on: Tensor) -> float:
    """Of the plain network's MACs, in percent."""
    return 100 * (1 - step.macs.expected(on.double().mean().item()) / step.macs.backbone)


def compared(step: Step, made: Calibration, logits: dict[str, Tensor], labels: Tensor, kept: Tensor) -> str:
    """Points above the plain network with their interval, agreement and MACs saved, on some of the images."""
    answers, on = (part[kept] for part in step.answers(logits, made))
    plain = logits["plain"].argmax(-1)[kept]
    points = 100 * ((answers == labels[kept]).double() - (plain == labels[kept]).double()).numpy()
    low, high = stats.bootstrap((points,), np.mean, n_resamples=2000, method="percentile", rng=0).confidence_interval
    agreement = 100 * (answers == plain).double().mean()
    return f"{points.mean():+.1f} [{low:+.1f}, {high:+.1f}], {agreement:.1f}%, **{saved(step, on):.1f}%**"


def threshold_for_share(confidence: Tensor, fine_share: float) -> float:
    """The eta at which this share of a batch goes on, to the nearest image, by its confidences ``[B]``."""
    hard = round(fine_share * len(confidence))
    if hard in (0, len(confidence)):
        return float(hard > 0)
    return confidence.sort().values[hard].item()


def timed(
    model: CoarseToFineViT,
    plain: Any,
    made: dict[str, tuple[Step, Calibration]],
    images: Tensor,
    batch: int,
    rounds: int,
) -> dict[str, str]:
    """Milliseconds of an image in batches, and how many times faster than the plain network."""
    fast_plain = accelerate(plain)
    batches = images.split(batch)
    calls: dict[str, Any] = {"plain": [lambda part=part: fast_plain(part) for part in batches]}
    for name, (step, chosen) in made.items():
        twin = frozen(model)
        twin.config, twin.exit = step.config, chosen.exit
        eta = threshold_for_share(chosen.exit.coarse(twin.coarse(images).logits), chosen.fine_share.value)
        predictor = Predictor(twin, eta)
        calls[name] = [lambda part=part, run=predictor: run(part) for part in batches]
    timings, found = time_in_turn(calls, rounds, torch.device("cpu")), {}
    for name, timing in timings.items():
        ratio = paired_ratio(timings["plain"].totals, timing.totals)
        found[name] = f"{1e3 * np.median(timing.totals) / len(images):.1f} ({ratio.value:.2f}x)"
    return found


def main(
    model: str,
    *,
    plain: Path,
    calibration_data: str,
    data: str | None = None,
    part: Path | None = None,
    below: float = 0.5,
    rounds: int = 10,
) -> None:
    """Prints the tables as Markdown."""
    ours = load(model).requires_grad_(False)
    steps = steps_of(ours)
    other = CoarseToFineViT(ours.config)
    initialise(other, str(plain))
    backbone: Any = other.backbone.eval().requires_grad_(False)
    with torch.inference_mode():
        logits, labels = scored(ours, backbone, steps, calibration_data)
        base = 100 * (logits["plain"].argmax(-1) == labels).double().mean().item()
        chosen: dict[str, tuple[Step, Calibration]] = {}
        rows: dict[str, list[str]] = {}
        for step in steps:
            try:
                made = step.calibrated(logits, labels, Accuracy(base - below), step.fitted(logits, labels))
            except CfvitError as error:
                rows[step.name] = [str(error)]
                continue
            chosen[step.name] = step, made
            rows[step.name] = [
                f"{made.measure}, {made.coarse_weight:.2f}, {made.threshold:.4g}",
                f"{made.accuracy.value - base:+.2f}, **{made.saving.value:.1f}%**",
                *held_out(step, logits, labels, below),
            ]
        heads = ["step", "measure, weight, eta", f"{len(labels)} calibration images", "held out"]
        heads += [f"points at {percent}% saved, held out" for percent in SAVINGS]
        write(heads, rows)
        if data is not None:
            answers, truth = scored(ours, backbone, steps, data)
            parts = {f"all {len(truth)}": torch.ones_like(truth, dtype=torch.bool)}
            if part is not None:
                inside = torch.isin(truth, torch.tensor(sorted(read_part(part, ours.class_names or []))))
                parts |= {f"{part.stem}, {int(inside.sum())}": inside, f"others, {int((~inside).sum())}": ~inside}
            right = answers["plain"].argmax(-1) == truth
            rows = {"plain network, top-1": [f"{100 * right[kept].double().mean():.1f}%" for kept in parts.values()]}
            for name, (step, made) in chosen.items():
                rows[name] = [compared(step, made, answers, truth, kept) for kept in parts.values()]
            write(["points [95%], agreement, saved", *parts], rows)
            everything, rows = torch.ones_like(truth, dtype=torch.bool), {}
            for step in steps:
                options = step.fitted(logits, labels)
                each = [step.calibrated(logits, labels, Saving(percent), options) for percent in SAVINGS]
                rows[step.name] = [compared(step, made, answers, truth, everything) for made in each]
            write(["points [95%], agreement, saved", *(f"for {percent}% saved" for percent in SAVINGS)], rows)
        if rounds:
            images = torch.randn(TIMED, 3, *ours.image_size, generator=torch.Generator().manual_seed(0))
            columns = [timed(ours, backbone, chosen, images, batch, rounds) for batch in (1, 8, TIMED)]
            rows = {name: [column[name] for column in columns] for name in columns[0]}
            write(["ms an image (times plain)", "batch 1", "batch 8", f"batch {TIMED}"], rows)


def write(heads: Sequence[str], rows: dict[str, list[str]]) -> None:
    """A Markdown table, on standard output."""
    for row in (heads, ["---"] * len(heads), *([name, *cells] for name, cells in rows.items())):
        sys.stdout.write(f"| {' | '.join(row)} |\n")
    sys.stdout.write("\n")
    sys.stdout.flush()


if __name__ == "__main__":
    cyclopts.run(main)
