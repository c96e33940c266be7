"""Graphs in eight-bit integers: quantised by nncf, scored on other images, with an eta of their own."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfvit.calibration import Drop, rank_images
from cfvit.calibration.calibrated import FEW_IMAGES
from cfvit.calibration.targets import choose_eta
from cfvit.data import UNREADABLE, DataSource, EvalImages
from cfvit.deploy.graphs import silent, whole_graph, write_graphs
from cfvit.errors import CfvitError
from cfvit.evaluation.metrics import collect_with_progress, sweep
from cfvit.inference.engines.exported import ExportedEngine, ExportedModel, Quantised, TwoStageScores, without_telemetry
from cfvit.inference.engines.packing import accelerate
from cfvit.modeling.cost import count_macs
from cfvit.modeling.model import CoarseToFineViT
from cfvit.processes import Process

MOST_IMAGES = 300
"""So many images at most are calibrated on; nncf's own default."""
SMOOTHING = 0.5
"""SmoothQuant's alpha, as its authors have it. nncf's own, 0.95, changed twice as many answers of DeiT-T."""
FAST = {"avx512_vnni", "avx_vnni", "amx_int8"}
"""What /proc/cpuinfo calls instructions for products of eight-bit integers."""


def quantise(graph: Any, inputs: Sequence[Mapping[str, np.ndarray]]) -> Any:
    """An ``onnx.ModelProto`` with weights and activations of matrix products in eight bits.

    Args:
        inputs: what the graph is run on to find the ranges of its activations.
    """
    without_telemetry()
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, AdvancedSmoothQuantParameters

    with contextlib.ExitStack() as stack:
        stack.enter_context(silent())
        if sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # nncf's progress bars
        return nncf.quantize(
            graph,
            nncf.Dataset(inputs),
            subset_size=len(inputs),
            model_type=nncf.ModelType.TRANSFORMER,
            advanced_parameters=AdvancedQuantizationParameters(
                smooth_quant_alphas=AdvancedSmoothQuantParameters(matmul=SMOOTHING)
            ),
        )


def calibration_images(source: DataSource, data_config: dict[str, Any]) -> tuple[list[Tensor], list[int]]:
    """Images ``[3, H, W]`` to find ranges on, at most `MOST_IMAGES`, and the indices of others; the same in every run.

    Fewer than two images, and none that can be read, raise `CfvitError`.
    """
    if len(source) < 2:
        raise CfvitError("1 image cannot be parted into one to quantise by and another to choose eta on: give more")
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0)).tolist()
    count = min(MOST_IMAGES, len(order) // 2)
    items = EvalImages(source, data_config, order[:count])
    found = [image for image, target, _ in (items[place] for place in range(count)) if target != UNREADABLE]
    if not found:
        raise CfvitError(f"none of the {count} images to quantise by can be read: check the data")
    return found, sorted(order[count:])


@torch.inference_mode()
def quantise_export(
    model: CoarseToFineViT, graphs: Mapping[str, Any], about: ExportedModel, folder: Path, source: DataSource
) -> ExportedModel:
    """Replaces the graphs of an export by quantised ones with an eta of their own. Returns what the folder then holds.

    The fine stage is quantised on the coarse states that torch computes of the same images. These are a part of
    ``source``; the others serve to choose eta.
    """
    images, others = calibration_images(source, model.data_config)
    given = []
    for image in images:
        state = model.coarse(image[None])
        known = {**vars(state), "coarse_logits": state.logits, "images": image[None]}
        given.append({name: part.numpy() for name, part in known.items()})
    stages = {}
    for stage, graph in graphs.items():
        names = [each.name for each in graph.graph.input]
        stages[stage] = quantise(graph, [{name: each[name] for name in names} for each in given])
    write_graphs(stages, folder, about.format)
    found = score(model, ExportedEngine(folder), source, others, len(images))
    warn_of_loss(found)
    eta = found.after.eta
    write_graphs({**stages, "whole": whole_graph(**stages, eta=eta)}, folder, about.format)
    return replace(about, exit=replace(about.exit, eta=eta), quantised=found)


def score(
    model: CoarseToFineViT,
    engine: ExportedEngine,
    source: DataSource,
    indices: Sequence[int],
    calibrated_on: int,
) -> Quantised:
    """Answers of a model and of its quantised stages to the same images, and an eta for the quantised ones.

    It is the lowest at which they lose no more against their fine stage than the model loses at its own eta. Answers
    are compared with the labels, or with the fine answers in torch if ``source`` has no classes. Nothing was calibrated
    on the images of these indices.
    """
    fast = accelerate(model)

    def forward(images: Tensor) -> dict[str, Tensor]:
        state, (quantised, _) = fast.coarse(images), engine.coarse(images)
        return {
            "coarse": state.logits,
            "fine": fast.fine(images, state),
            "int8 coarse": quantised.logits,
            "int8 fine": engine.fine(images, quantised)[0],
        }

    others = EvalImages(source, model.data_config, indices)
    collected, _ = collect_with_progress(forward, others, 32, 0, Process(0, 1, torch.device("cpu")))
    labelled, rule, macs, logits = bool(source.class_names), model.exit, count_macs(model), collected.logits
    labels = collected.labels if labelled else logits["fine"].argmax(dim=-1)

    def scores(coarse: Tensor, fine: Tensor, eta: float | None) -> TwoStageScores:
        first, last, *chosen = sweep(coarse, fine, labels, macs, [0, 1] if eta is None else [0, 1, eta], rule)
        answered, share = (chosen[0].accuracy, 1 - chosen[0].exit_share) if chosen else (None, None)
        return TwoStageScores(first.accuracy, last.accuracy, eta, answered, share)

    before, eta = scores(logits["coarse"], logits["fine"], rule.eta), None
    quantised = logits["int8 coarse"], logits["int8 fine"]
    if before.answered is not None:
        trade = rank_images(*quantised, labels, rule.measure, rule.coarse_temperature)
        eta = choose_eta(Drop(max(0.0, before.fine - before.answered)), trade, macs)
    return Quantised(
        calibrated_on=calibrated_on,
        scored_on=len(collected.labels),
        measure="accuracy" if labelled else "agreement",
        before=before,
        after=scores(*quantised, eta),
    )


def warn_of_loss(found: Quantised) -> None:
    """Warns if there were few images, and if the quantised model is more than a point worse, with the figures."""
    if min(found.calibrated_on, found.scored_on) < FEW_IMAGES:
        warnings.warn(
            f"int8 is calibrated on {found.calibrated_on} images and scored on {found.scored_on}, which are few: "
            f"give --data of {2 * FEW_IMAGES} or more",
            stacklevel=2,
        )
    before, after, where = found.before.answered, found.after.answered, "at eta"
    if before is None or after is None:
        before, after, where = found.before.fine, found.after.fine, "in the fine stage"
    if before - after > 1:
        warnings.warn(
            f"int8 loses {before - after:.1f} points of {found.measure} {where}, {before:.1f} to {after:.1f}: "
            "give more images to calibrate on, or stay with float32",
            stacklevel=2,
        )


def warn_if_slow(cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """Warns on an x86 processor without products of eight-bit integers, on which int8 may be slower than float32."""
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    if "avx2" in flags and not flags & FAST:
        warnings.warn(
            "this processor has no VNNI, so int8 may be slower here than float32: compare with cfvit bench --engine",
            stacklevel=2,
        )
