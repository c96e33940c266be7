"""A model as graphs for ONNX Runtime or OpenVINO, compared with torch before they take their place."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn

from cfvit.checkpoints import CONFIG_FILE, weights_digest
from cfvit.data import DataSource
from cfvit.deploy.graphs import STATE, stage_graphs, whole_graph, write_graphs
from cfvit.deploy.quantising import quantise_export, warn_if_slow
from cfvit.errors import CfvitError, first_line
from cfvit.files import fill_template, unwritable
from cfvit.inference.engines.exported import (
    EXPORT_FILE,
    WEIGHTS_FILE,
    ExportedEngine,
    ExportedModel,
    Format,
    Graph,
    open_graph,
)
from cfvit.modeling import lvvit
from cfvit.modeling.cost import count_macs
from cfvit.modeling.exit import goes_on
from cfvit.modeling.model import CoarseState, CoarseToFineViT
from cfvit.modeling.tokens import num_informative

TOLERANCE = 1e-3
"""An export is accepted if no output of a stage differs from torch's by more than this share of its largest value (by
more than this itself, where the largest value is below 1). Usual are 1e-5 and less."""

BATCHES = (0, 1, 2, 5, 32)
"""How many images the graphs are compared on at a time."""

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}


def export(
    model: CoarseToFineViT,
    folder: str | Path,
    *,
    format: Format = "onnx",
    images: Tensor | None = None,
    int8: DataSource | None = None,
) -> ExportedModel:
    """Writes a model as graphs that run without torch, for `cfvit.Predictor(folder)` and for programs without cfvit.

    The folder gets ``coarse``, ``fine`` and ``whole`` for batches of any size, `EXPORT_FILE` and ``example.py``; ONNX
    graphs share a file of weights. ``whole`` runs both stages as `cfvit.Predictor` does; eta is one of its inputs. The
    graphs are in float32 at first, are compared with torch on random images, and go on only if they agree.

    Args:
        folder: made if it is not there; another export in it is replaced once the new one is complete.
        format: ``"onnx"`` or ``"openvino"``.
        images: further normalised images ``[n, 3, H, W]`` to compare on.
        int8: quantise weights and activations to eight bits, by some of these images. On the others both stages are
            scored and eta is chosen anew, see `cfvit.deploy.quantising.score`; by labels if ``int8.class_names`` says
            that there are any, which then have to be the model's.

    Raises:
        CfvitError: a model that cannot be exported, graphs that differ from torch by more than `TOLERANCE`, too few
            images for ``int8``, packages that are not installed, a folder that cannot be written or holds a model.
    """
    if not isinstance(model, CoarseToFineViT):
        raise CfvitError(f"the model is a {type(model).__name__}: give one that cfvit.load gives")
    folder = Path(folder)
    if (folder / CONFIG_FILE).exists():
        raise CfvitError(f"{folder} holds a model, which would no longer load: choose another folder")
    if format not in get_args(Format):
        raise CfvitError(f"format is {format!r}: give one of {', '.join(get_args(Format))}")
    if model.config.selection == "random":
        raise CfvitError("a model that splits random cells cannot be exported: use selection attention or negative")
    model.require_trained()
    versions = _versions(format, int8 is not None)
    if int8 is not None:
        warn_if_slow()
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    source = weights_digest(model)
    if isinstance(model.backbone.patch_embed, lvvit.ConvStem):
        model.backbone.patch_embed.fuse()  # torch exports no batch norm of a batch that may be empty
    about = ExportedModel(
        format=format,
        config=model.config,
        image_size=model.image_size,
        data_config=model.data_config,
        class_names=model.class_names,
        class_order=model.class_order,
        exit=model.exit,
        macs=count_macs(model),
        source=source,
        difference=0.0,
        versions=versions,
    )
    with _atomic_export(folder) as temporary:
        try:
            graphs = stage_graphs(model)
            write_graphs({**graphs, "whole": whole_graph(**graphs, eta=model.threshold)}, temporary, format)
        except OSError:
            raise
        except Exception as error:
            raise CfvitError(f"{model.config.backbone} cannot be exported ({first_line(error)})") from error
        _write_about(about, temporary)
        about = replace(about, difference=compare(model, temporary, images))
        if not about.difference <= TOLERANCE:
            raise CfvitError(
                f"the exported graphs differ from torch by {about.difference:.2g}, more than {TOLERANCE:g}: not "
                f"written; other versions of {' and '.join(PACKAGES[format])} may do better"
            )
        if int8 is not None:
            about = quantise_export(model, graphs, about, temporary, int8)
        _write_about(about, temporary)
    return about


def _versions(format: Format, int8: bool) -> dict[str, str]:
    """Of the packages that make an export. A missing one raises `CfvitError`."""
    try:
        return {name: version(name) for name in ("cfvit", "torch", *PACKAGES[format], *(["nncf"] if int8 else []))}
    except ImportError as error:
        what, extra = ("int8", "int8") if error.name == "nncf" else (f"exporting to {format}", format)
        raise CfvitError(f"{what} needs {error.name}: install cfvit[{extra}]") from error


@contextlib.contextmanager
def _atomic_export(folder: Path) -> Iterator[Path]:
    """A temporary folder for an export, which takes the place of another one in ``folder`` once complete.

    Raises:
        CfvitError: a file cannot be written.
    """
    beside = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    old = [f"{stage}.{suffix}" for stage in ("coarse", "fine", "whole") for suffix in ("onnx", "xml", "bin")]
    try:
        with tempfile.TemporaryDirectory(dir=beside, prefix=".export.") as temporary:
            yield Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            for name in (EXPORT_FILE, WEIGHTS_FILE, *old):
                (folder / name).unlink(missing_ok=True)
            new = sorted(Path(temporary).iterdir(), key=lambda file: file.name == EXPORT_FILE)
            for file in new:  # the last one says that all are there
                shutil.move(file, folder / file.name)
    except OSError as error:
        raise unwritable(folder, error) from error


def _write_about(about: ExportedModel, folder: Path) -> None:
    """Writes all but the graphs."""
    values = {**asdict(about), "data_config": dict(about.data_config)}
    values["config"]["timm_kwargs"] = dict(about.config.timm_kwargs)
    (folder / EXPORT_FILE).write_text(json.dumps(values, indent=2) + "\n")
    given = {"about": about, "package": PACKAGES[about.format][-1], "about_file": EXPORT_FILE}
    (folder / "example.py").write_text(fill_template("deploy/templates/example.py.j2", **given))


@torch.inference_mode()
def compare(model: CoarseToFineViT, folder: Path, images: Tensor | None = None) -> float:
    """The largest difference between exported graphs and torch, in the measure of `TOLERANCE`.

    Stages are compared one by one, the fine one from torch's state. The whole graph is compared at eta 0, at 1, and at
    one that parts the images; where rounding may decide, which is at cells of equal rank and at confidences close to
    eta, its answers need not be the same.

    Args:
        images: compared on besides random ones, rough and smooth.
    """
    engine = ExportedEngine(folder)
    whole = open_graph(folder, "whole", engine.model.format)
    generator = torch.Generator().manual_seed(0)
    rough = torch.randn(max(BATCHES), 3, *model.image_size, generator=generator)
    smooth = nn.functional.interpolate(rough[..., ::16, ::16], model.image_size, mode="bicubic")
    mixed = torch.where(torch.arange(len(rough))[:, None, None, None] % 2 == 0, rough, smooth)
    batches = [mixed[:count] for count in BATCHES] + ([] if images is None else list(images.split(max(BATCHES))))
    worst = 0.0
    for batch in batches:
        try:
            state = model.coarse(batch)
            fine = model.fine(batch, state)
        except RuntimeError:
            if len(batch):
                raise
            continue  # some of timm's blocks take no empty batch
        exported, confidence = engine.coarse(batch)
        pairs = [(getattr(exported, name), getattr(state, name)) for name in STATE]
        pairs += [(confidence, model.exit.coarse(state.logits))]
        pairs += zip(engine.fine(batch, state), (fine, model.exit.fine(fine)), strict=True)
        worst = max(
            [worst, *(_difference(*pair) for pair in pairs), _whole_difference(model, whole, batch, state, fine)]
        )
    return worst


def _whole_difference(model: CoarseToFineViT, whole: Graph, images: Tensor, state: CoarseState, fine: Tensor) -> float:
    confidence, cells = model.exit.coarse(state.logits), state.class_attention.shape[1]
    k = num_informative(model.config.informative_ratio, cells)
    ranked = state.class_attention.sort(dim=1, descending=True).values
    clear = torch.ones(len(images), dtype=torch.bool)
    if 0 < k < cells:
        clear = (ranked[:, k - 1] - ranked[:, k]) > TOLERANCE * ranked.abs().amax(dim=1)
    worst = 0.0
    between = float(confidence.sort().values[len(images) // 2 :][:1].sum()) or 0.5
    for eta in {0.0, 1.0, between if model.threshold is None else model.threshold, between}:
        answer = whole({"images": images.numpy(), "eta": np.array(eta, np.float32)})
        logits, sure, stage = (torch.from_numpy(answer[name]) for name in ("logits", "confidence", "stage"))
        hard = goes_on(confidence, eta)
        decided = (confidence - eta).abs() > TOLERANCE if 0 < eta < 1 else torch.ones_like(hard)
        if (stage.bool() != hard)[decided].any():
            return float("inf")
        compared = decided & (clear | ~hard)
        expected = torch.where(hard[:, None], fine, state.logits)
        expected_sure = torch.where(hard, model.exit.fine(fine), confidence)
        pairs = ((logits, expected), (sure, expected_sure))
        worst = max(worst, *(_difference(got[compared], right[compared]) for got, right in pairs))
    return worst


def _difference(got: Tensor, right: Tensor) -> float:
    if got.shape != right.shape:
        return float("inf")
    if right.numel() == 0:
        return 0.0
    return float((got - right).abs().max() / max(1.0, float(right.abs().max())))
