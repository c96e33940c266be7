"""The demonstration: a coarse-to-fine ViT against the plain one on real scans, from training to speed."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from cfvit.benchmark.measure import Row, compare_with_backbone
from cfvit.checkpoints import load
from cfvit.data import EvalImages, find_images, open_data
from cfvit.errors import CfvitError
from cfvit.evaluation.metrics import Evaluation, evaluate_model
from cfvit.inference.files import FileAnswer, classify_files
from cfvit.inference.predictor import Predictor
from cfvit.plots.explain import PictureFolder
from cfvit.plots.style import png, require_matplotlib
from cfvit.processes import Process
from cfvit.training.loop import train
from cfvit.training.recipe import DIGITS

TEST_SHARE = 0.25
BENCH_BATCH = 256
PHOTO_MODEL, PHOTO_BATCH = "deit_tiny_imagenet", 8


@dataclass(frozen=True)
class Comparison:
    """The coarse-to-fine model at its calibrated eta beside the plain ViT trained alike, on the same test images."""

    accuracy: float  # top-1 in percent
    plain_accuracy: float  # top-1 in percent
    exit_share: float  # share of test images answered at the coarse stage
    gmacs: float  # cost of an image
    plain_gmacs: float  # cost of an image
    speed: list[Row]  # images per second and speed-up of the predictor at that exit share, and of the backbone


def run_demo(out: Path, epochs: int | None = None) -> None:
    """Trains both models on the digits, prints and draws how they compare, classifies sample photos.

    Pictures go to ``out``. Raises `CfvitError` if they cannot be written, or if scikit-learn or matplotlib is missing.
    """
    console = Console(highlight=False, markup=False)
    require_matplotlib()
    try:  # before the training, so that nobody waits for pictures that cannot be written
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CfvitError(f"cannot write to {out} ({error.strerror}): choose another --out") from error
    with tempfile.TemporaryDirectory() as scratch:
        digits = Path(scratch) / "digits"
        write_digits(digits)
        epochs = epochs or DIGITS.epochs
        recipe = DIGITS.replace({"data": str(digits), "epochs": epochs, "eval_interval": epochs})
        console.print("Training the plain ViT on handwritten digits ...")
        plain = train(recipe.replace({"method": "plain"}), Path(scratch) / "plain")
        console.print("Training the coarse-to-fine ViT by the same recipe ...")
        train(recipe, Path(scratch) / "coarse_to_fine")
        model, source = load(Path(scratch) / "coarse_to_fine"), open_data(str(digits), "validation")
        etas = [i / 50 for i in range(51)]
        evaluation = evaluate_model(model, source, etas, 256, 0, Process(0, 1, torch.device("cpu")))
        point = next(point for point in evaluation.sweep if point.threshold == evaluation.calibrated)
        comparison = Comparison(
            accuracy=point.accuracy,
            plain_accuracy=plain["validation_plain_top1"],
            exit_share=point.exit_share,
            gmacs=point.gmacs,
            plain_gmacs=evaluation.backbone_gmacs,
            speed=compare_with_backbone(model, BENCH_BATCH, 1 - point.exit_share),
        )
        console.print(_table(comparison))
        console.print(verdict(comparison))
        draw_trade_off(evaluation, comparison, out / "trade_off.png")
        images = EvalImages(source, model.data_config)
        batch = torch.stack([images[i][0] for i in range(len(images))])
        with torch.inference_mode():
            confidence = model.coarse(batch).confidence
        chosen = [int(confidence.argmax()), int(confidence.argmin())]  # the surest digit and the least sure one
        write = PictureFolder(out / "explained", model, Predictor(model).threshold)
        write([Path("easy"), Path("hard")], batch[chosen])
    console.print(
        f"\nThe trade-off curve is {out / 'trade_off.png'}, what the model looked at is in {out / 'explained'}."
    )
    _classify_photos(out / "photos", console)


def write_digits(folder: Path) -> None:
    """scikit-learn's 1,797 scans of handwritten digits, 8 x 8 pixels each, as ``train/`` and ``val/`` of PNGs."""
    scans: Any = _sklearn_datasets().load_digits()
    order = np.random.default_rng(0).permutation(len(scans.target))
    held = set(order[: round(TEST_SHARE * len(order))].tolist())
    for i, (scan, digit) in enumerate(zip(scans.images, scans.target, strict=True)):
        target = folder / ("val" if i in held else "train") / str(digit)
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray((scan * 255 / 16).astype(np.uint8)).save(target / f"{i:04d}.png")


def _sklearn_datasets():
    try:
        from sklearn import datasets
    except ImportError as error:
        raise CfvitError("the demo needs scikit-learn and matplotlib: install cfvit[demo]") from error
    return datasets


def _table(comparison: Comparison) -> Table:
    plain, *_, predictor = comparison.speed
    table = Table("", "top-1 %", "answered coarse", "MMACs", "images/s", box=None)
    for name, accuracy, exits, gmacs, speed in (
        ("plain ViT", comparison.plain_accuracy, "-", comparison.plain_gmacs, plain),
        ("coarse-to-fine", comparison.accuracy, f"{comparison.exit_share:.0%}", comparison.gmacs, predictor),
    ):
        table.add_row(name, f"{accuracy:.1f}", exits, f"{1e3 * gmacs:.2f}", f"{speed.images_per_second:.0f}")
    return table


def verdict(comparison: Comparison) -> str:
    """Whether coarse-to-fine kept the accuracy, saved half of the MACs and saved time, in plain words."""
    saved = 1 - comparison.gmacs / comparison.plain_gmacs
    drop = comparison.plain_accuracy - comparison.accuracy
    speedup = comparison.speed[-1].ratio.value
    kept = (
        f"keeps the plain ViT's accuracy ({-drop:+z.1f} points)"
        if drop <= 0.5
        else f"loses {drop:.1f} points of accuracy"
    )
    cost = f"saves {saved:.0%} of its MACs" if saved > 0 else f"spends {-saved:.0%} more MACs"
    time = f"takes {1 - 1 / speedup:.0%} less time" if speedup > 1 else f"takes {1 / speedup - 1:.0%} more time"
    goal = "" if drop <= 0.5 and saved >= 0.5 else " That misses the aim: the same accuracy at half of the MACs."
    return f"Coarse-to-fine {kept}, {cost} and {time} in batches of {BENCH_BATCH}.{goal}"


def draw_trade_off(evaluation: Evaluation, comparison: Comparison, path: Path) -> None:
    """A PNG of accuracy against cost over eta, with the plain ViT and the calibrated eta marked."""
    with png(path, 6.4, 4) as figure:
        axis = figure.subplots()
        axis.plot(
            [1e3 * p.gmacs for p in evaluation.sweep], [p.accuracy for p in evaluation.sweep], label="coarse-to-fine"
        )
        axis.plot(
            1e3 * comparison.gmacs,
            comparison.accuracy,
            "o",
            color="C0",
            label=f"calibrated eta {evaluation.calibrated:.2f}",
        )
        axis.plot(1e3 * comparison.plain_gmacs, comparison.plain_accuracy, "s", color="C1", label="plain ViT")
        axis.set_xlabel("MMACs per image")
        axis.set_ylabel("top-1 %")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right")


def _classify_photos(folder: Path, console: Console) -> None:
    """scikit-learn's sample photos, read by the bundled model, and what that costs beside the plain ViT."""
    model = load(PHOTO_MODEL)
    predictor = Predictor(model)
    console.print(
        f"\nscikit-learn's sample photos, read by {PHOTO_MODEL}, which knows {model.config.num_classes:,} classes:"
    )
    pictures = PictureFolder(folder, model, predictor.threshold)
    photos = find_images([Path(file) for file in _sklearn_datasets().load_sample_images().filenames])
    answers = [answer for answer in classify_files(photos, predictor, watch=pictures) if isinstance(answer, FileAnswer)]
    for answer in answers:
        stage = ("coarse", "fine")[answer.stage]
        console.print(
            f"  {answer.path.name}: {answer.label} ({answer.confidence:.0%}, {stage} stage, {answer.gmacs:.2f} GMACs)"
        )
    fine_share = sum(answer.stage for answer in answers) / len(answers)
    plain, *_, adaptive = compare_with_backbone(model, PHOTO_BATCH, fine_share)
    console.print(
        f"  With {fine_share:.0%} of the photos in the fine stage, a photo takes {adaptive.gmacs:.2f} GMACs "
        f"({plain.gmacs:.2f} by the plain ViT) and "
        f"{1e3 / adaptive.images_per_second:.1f} ms ({1e3 / plain.images_per_second:.1f}), in batches of {PHOTO_BATCH}."
    )
    console.print(f"  What it looked at is in {folder}.")
