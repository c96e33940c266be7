"""The demonstration: a coarse-to-fine ViT against the plain one on real scans, from training to speed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cfvit.benchmark.measure import compare_with_backbone
from cfvit.checkpoints import load
from cfvit.cli.application import print_line, print_table
from cfvit.data import EvalImages, open_data
from cfvit.errors import CfvitError
from cfvit.evaluation.metrics import evaluate_model
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


def run_demo(out: Path, epochs: int | None = None) -> None:
    """Trains both models on the digits, prints and draws how they compare, classifies sample photos.

    Pictures go to ``out``. Raises `CfvitError` if they cannot be written, or if scikit-learn or matplotlib is missing.
    """
    require_matplotlib()
    try:  # before the training, so that nobody waits for pictures that cannot be written
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CfvitError(f"cannot write to {out} ({error.strerror}): choose another --out") from error
    with tempfile.TemporaryDirectory() as scratch:
        _compare_on_digits(Path(scratch), out, epochs or DIGITS.epochs)
    print_line("")
    print_line(f"The trade-off curve is {out / 'trade_off.png'}, what the model looked at is in {out / 'explained'}.")
    _classify_photos(out / "photos")


def _compare_on_digits(scratch: Path, out: Path, epochs: int) -> None:
    """Both models trained alike: accuracy, cost and speed on the same test images, and the pictures of them."""
    write_digits(scratch / "digits")
    recipe = DIGITS.replace({"data": str(scratch / "digits"), "epochs": epochs, "eval_interval": epochs})
    print_line("Training the plain ViT on handwritten digits ...")
    plain_accuracy = train(recipe.replace({"method": "plain"}), scratch / "plain")["validation_plain_top1"]
    print_line("Training the coarse-to-fine ViT by the same recipe ...")
    train(recipe, scratch / "coarse_to_fine")
    model, source = load(scratch / "coarse_to_fine"), open_data(str(scratch / "digits"), "validation")
    etas = [i / 50 for i in range(51)]
    evaluation = evaluate_model(model, source, etas, 256, 0, Process(0, 1, torch.device("cpu")))
    point = next(point for point in evaluation.sweep if point.threshold == evaluation.calibrated)
    plain_gmacs = evaluation.macs.backbone / 1e9
    plain, *_, predictor = compare_with_backbone(model, BENCH_BATCH, 1 - point.exit_share)
    rows = [
        ("plain ViT", plain_accuracy, "-", plain_gmacs, plain),
        ("coarse-to-fine", point.accuracy, f"{point.exit_share:.0%}", point.gmacs, predictor),
    ]
    print_table(
        ("", "top-1 %", "answered coarse", "MMACs", "images/s"),
        [
            (name, f"{accuracy:.1f}", exits, f"{1e3 * gmacs:.2f}", f"{speed.images_per_second:.0f}")
            for name, accuracy, exits, gmacs, speed in rows
        ],
    )
    saved = 1 - point.gmacs / plain_gmacs
    print_line(verdict(plain_accuracy - point.accuracy, saved, predictor.ratio.value))
    with png(out / "trade_off.png", 6.4, 4) as figure:
        axis = figure.subplots()
        curve = [1e3 * each.gmacs for each in evaluation.sweep], [each.accuracy for each in evaluation.sweep]
        axis.plot(*curve, label="coarse-to-fine")
        axis.plot(1e3 * point.gmacs, point.accuracy, "C0o", label=f"calibrated eta {evaluation.calibrated:.2f}")
        axis.plot(1e3 * plain_gmacs, plain_accuracy, "C1s", label="plain ViT")
        axis.set(xlabel="MMACs per image", ylabel="top-1 %", xlim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right")
    images = EvalImages(source, model.data_config)
    batch = torch.stack([images[i][0] for i in range(len(images))])
    with torch.inference_mode():
        confidence = model.coarse(batch).confidence
    chosen = [int(confidence.argmax()), int(confidence.argmin())]  # the surest digit and the least sure one
    PictureFolder(out / "explained", model, point.threshold)([Path("easy"), Path("hard")], batch[chosen])


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


def verdict(drop: float, saved: float, speedup: float) -> str:
    """Whether coarse-to-fine kept the accuracy, saved half of the MACs and saved time, in plain words.

    Args:
        drop: percentage points of accuracy lost against the plain ViT.
        saved: share of its MACs.
        speedup: how many times faster.
    """
    kept = (
        f"keeps the plain ViT's accuracy ({-drop:+z.1f} points)"
        if drop <= 0.5
        else f"loses {drop:.1f} points of accuracy"
    )
    cost = f"saves {saved:.0%} of its MACs" if saved > 0 else f"spends {-saved:.0%} more MACs"
    time = f"takes {1 - 1 / speedup:.0%} less time" if speedup > 1 else f"takes {1 / speedup - 1:.0%} more time"
    goal = "" if drop <= 0.5 and saved >= 0.5 else " That misses the aim: the same accuracy at half of the MACs."
    return f"Coarse-to-fine {kept}, {cost} and {time} in batches of {BENCH_BATCH}.{goal}"


def _classify_photos(folder: Path) -> None:
    """scikit-learn's sample photos, read by the bundled model, and what that costs beside the plain ViT."""
    model = load(PHOTO_MODEL)
    predictor = Predictor(model)
    classes = f"{model.config.num_classes:,} classes"
    print_line("")
    print_line(f"scikit-learn's sample photos, read by {PHOTO_MODEL}, which knows {classes}:")
    pictures = PictureFolder(folder, model, predictor.threshold)
    photos = [Path(file) for file in _sklearn_datasets().load_sample_images().filenames]
    answers = [answer for answer in classify_files(photos, predictor, watch=pictures) if isinstance(answer, FileAnswer)]
    for answer in answers:
        sure = f"{answer.confidence:.0%}, {('coarse', 'fine')[answer.stage]} stage"
        print_line(f"  {answer.path.name}: {answer.label} ({sure}, {answer.gmacs:.2f} GMACs)")
    fine_share = sum(answer.stage for answer in answers) / len(answers)
    plain, *_, adaptive = compare_with_backbone(model, PHOTO_BATCH, fine_share)
    print_line(
        f"  With {fine_share:.0%} of the photos in the fine stage, a photo takes {adaptive.gmacs:.2f} GMACs "
        f"({plain.gmacs:.2f} by the plain ViT) and "
        f"{1e3 / adaptive.images_per_second:.1f} ms ({1e3 / plain.images_per_second:.1f}), in batches of {PHOTO_BATCH}."
    )
    print_line(f"  What it looked at is in {folder}.")
