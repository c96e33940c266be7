"""Speed on this machine: the plain backbone, each stage and the predictor, timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cfvit.calibration import StageLatency
from cfvit.flops import StageMacs, count_macs
from cfvit.inference import Predictor
from cfvit.model import CoarseToFineViT


@dataclass(frozen=True)
class Timing:
    """Seconds per call over several rounds."""

    median: float
    fastest: float
    slowest: float


@dataclass(frozen=True)
class BenchRow:
    """One way of answering at one batch size.

    Attributes:
        name: what ran.
        batch_size: images per call.
        images_per_second: by the median call.
        speedup: the backbone's median time over this one's, from the same rounds.
        macs_ratio: the backbone's MACs over these: the speed-up that the arithmetic promises.
        spread: slowest over fastest call; far above 1, the machine was busy with other things.
    """

    name: str
    batch_size: int
    images_per_second: float
    speedup: float
    macs_ratio: float
    spread: float


def time_in_turn(calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, Timing]:
    """Times several calls in turn, A B C A B C ..., so that a drifting machine treats all alike.

    Args:
        rounds: counted rounds, after two that are not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            _synchronise(device)
            start = time.perf_counter()
            call()
            _synchronise(device)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in seconds.items()}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def threshold_for_share(confidence: Tensor, fine_share: float) -> float:
    """The eta at which this share of a batch goes on (to the nearest image, if no two are equally sure).

    Args:
        confidence: ``[B]``, of the coarse stage.
    """
    hard = round(fine_share * len(confidence))
    if hard in (0, len(confidence)):
        return float(hard > 0)
    return confidence.sort().values[hard].item()


def time_stages(model: CoarseToFineViT, images: Tensor, rounds: int = 10) -> StageLatency:
    """Median time of an image through the coarse stage and through both, in milliseconds.

    Args:
        images: normalised ``[B, 3, S, S]`` on the model's device; one call takes them all.
    """
    model = model.eval()
    with torch.inference_mode():
        calls = {"coarse": lambda: model.coarse(images), "both": lambda: model(images)}
        timings = time_in_turn(calls, rounds, images.device)
    coarse, both = (1e3 * timings[name].median / len(images) for name in calls)
    return StageLatency(coarse, both)


def bench(
    model: CoarseToFineViT, images: Tensor, fine_share: float, rounds: int = 10, macs: StageMacs | None = None
) -> list[BenchRow]:
    """Times the plain backbone, both stages and the predictor on one batch.

    Args:
        images: normalised ``[B, 3, S, S]`` on the model's device.
        fine_share: share of the batch that the predictor has to send on, in [0, 1].
    """
    model = model.eval()
    macs = macs or count_macs(model)
    with torch.inference_mode():
        eta = threshold_for_share(model.exit_rule.coarse(model.coarse(images).logits), fine_share)
        predictor = Predictor(model, eta)
        sent = round(fine_share * len(images)) / len(images)
        calls: dict[str, Callable[[], object]] = {
            "backbone": lambda: model.backbone(images),
            "coarse": lambda: model.coarse(images),
            "both": lambda: model(images),
            "predictor": lambda: predictor(images),
        }
        cost = {
            "backbone": macs.backbone,
            "coarse": macs.coarse,
            "both": macs.both,
            "predictor": macs.expected(sent),
        }
        timings = time_in_turn(calls, rounds, images.device)
    return [
        BenchRow(
            name=f"predictor, {sent:.0%} fine" if name == "predictor" else name,
            batch_size=len(images),
            images_per_second=len(images) / timing.median,
            speedup=timings["backbone"].median / timing.median,
            macs_ratio=macs.backbone / cost[name],
            spread=timing.slowest / timing.fastest,
        )
        for name, timing in timings.items()
    ]
