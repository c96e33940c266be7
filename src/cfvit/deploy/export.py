"""A model as graphs for ONNX Runtime or OpenVINO, compared with torch before they take their place."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import shutil
import tempfile
import warnings
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from cfvit.checkpoints import weights_digest
from cfvit.errors import CfvitError, first_line
from cfvit.inference.engines.exported import (
    EXPORT_FILE,
    ExportedEngine,
    ExportedModel,
    Format,
    Graph,
    graph_file,
    graph_kind,
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
STATE = [f.name for f in fields(CoarseState)]


_EXAMPLE = Template('''\
"""Classifies a photo without torch or cfvit: python example.py PHOTO"""
import json, sys, numpy as np, $package
from pathlib import Path
from PIL import Image, ImageOps

here = Path(__file__).parent
about = json.loads((here / "$about").read_text())
(height, width), data = about["image_size"], about["data_config"]
photo = ImageOps.exif_transpose(Image.open(sys.argv[1])).convert("RGB")
scale = max(int(height / data["crop_pct"]) / photo.height, int(width / data["crop_pct"]) / photo.width)
photo = photo.resize([int(side * scale + 1e-6) for side in photo.size], Image.Resampling[data["interpolation"].upper()])
left, top = round((photo.width - width) / 2), round((photo.height - height) / 2)
pixels = np.asarray(photo.crop((left, top, left + width, top + height)), np.float32) / 255
images = ((pixels - data["mean"]) / data["std"]).astype(np.float32).transpose(2, 0, 1)[None]
eta = np.array($eta, np.float32)
$run
label = int(logits[0].argmax())
print((about["class_names"] or range(label + 1))[label], f"{float(confidence[0]):.4f}", ("coarse", "fine")[stage[0]])
''')

_RUN = {
    "onnx": """session = onnxruntime.InferenceSession(here / "whole.onnx")
logits, confidence, stage = session.run(None, {"images": images, "eta": eta})""",
    "openvino": """whole = openvino.compile_model(here / "whole.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
logits, confidence, stage = whole({"images": images, "eta": eta}).values()""",
}


class _Stage(nn.Module):
    """What is exported of a model: tensors in, tensors out."""

    def __init__(self, model: CoarseToFineViT) -> None:
        super().__init__()
        self.model = model


class _Coarse(_Stage):
    """The coarse stage: all of its state, and its confidence."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        state = self.model.coarse(images)
        return (*(getattr(state, name) for name in STATE), self.model.exit.coarse(state.logits))


class _Fine(_Stage):
    """The fine stage, from images and what it needs of their state."""

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        embedding: Tensor,
        class_attention: Tensor,
        class_token: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        unused = tokens[:, 0]
        state = CoarseState(unused, tokens, embedding, class_attention, unused if class_token is None else class_token)
        logits = self.model.fine(images, state)
        return logits, self.model.exit.fine(logits)


class _Whole(_Stage):
    """Both stages, the second for those images alone that need it."""

    def forward(self, images: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = self.model.coarse(images)
        confidence = self.model.exit.coarse(state.logits)
        # as `goes_on` decides, without a choice between booleans, which ONNX Runtime does not compute
        on = (~(confidence >= eta) | (eta >= 1)) & (eta > 0)
        hard = on.nonzero().flatten()
        picked = CoarseState(*(getattr(state, name).index_select(0, hard) for name in STATE))
        fine = self.model.fine(images.index_select(0, hard), picked)
        logits = state.logits.index_copy(0, hard, fine)
        return logits, confidence.index_copy(0, hard, self.model.exit.fine(fine)), on.long()


def export(
    model: CoarseToFineViT, folder: str | Path, *, format: Format = "onnx", images: Tensor | None = None
) -> ExportedModel:
    """Writes a model as graphs that run without torch, for `cfvit.Predictor(folder)` and for programs without cfvit.

    The folder gets ``coarse``, ``fine`` and ``whole`` in float32 for batches of any size, `EXPORT_FILE` and an
    ``example.py``. ``whole`` runs both stages as `cfvit.Predictor` does; eta is one of its inputs. The graphs
    are compared with torch on random images at first, and take their place only if they agree.

    Args:
        folder: made if it is not there; what another export left in it is replaced.
        format: ``"onnx"`` or ``"openvino"``.
        images: further normalised images ``[n, 3, H, W]`` to compare on.

    Raises:
        CfvitError: a model that cannot be exported, graphs that differ from torch by more than `TOLERANCE`, packages
            that are not installed, a folder that cannot be written.
    """
    folder = Path(folder)
    if format not in get_args(Format):
        raise CfvitError(f"format is {format!r}: give one of {', '.join(get_args(Format))}")
    if model.config.selection == "random":
        raise CfvitError("a model that splits random cells cannot be exported: use selection attention or negative")
    try:
        versions = {name: version(name) for name in ("cfvit", "torch", *PACKAGES[format])}
    except ImportError as error:
        raise CfvitError(f"exporting to {format} needs {error.name}: install cfvit[{format}]") from error
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".export.") as temporary:
            made = Path(temporary)
            try:
                _write_graphs(model, made, format)
            except OSError:
                raise
            except Exception as error:
                raise CfvitError(f"{model.config.backbone} cannot be exported ({first_line(error)})") from error
            _write_about(about, made)
            difference = compare(model, made, images)
            if not difference <= TOLERANCE:
                raise CfvitError(
                    f"the exported graphs differ from torch by {difference:.2g}, more than {TOLERANCE:g}: not written; "
                    f"other versions of {' and '.join(PACKAGES[format])} may do better"
                )
            about = ExportedModel(**{**vars(about), "difference": difference})
            _write_about(about, made)
            (folder / EXPORT_FILE).unlink(missing_ok=True)
            for file in sorted(made.iterdir(), key=lambda file: file.name == EXPORT_FILE):  # it says that all is there
                shutil.move(file, folder / file.name)
    except OSError as error:
        raise CfvitError(
            f"cannot write {folder} ({error.strerror or error}): make room or choose another place"
        ) from error
    return about


def _write_graphs(model: CoarseToFineViT, folder: Path, format: Format) -> None:
    """Writes the three graphs and the example."""
    import onnx

    images = torch.zeros(2, 3, *model.image_size)
    with torch.no_grad():
        state = model.coarse(images)
    eta = torch.tensor(0.5 if model.threshold is None else model.threshold)
    needed = ["tokens", "embedding", "class_attention"]
    needed += ["class_token"] if model.config.feature_reuse == "class_token" else []
    given = {name: getattr(state, name) for name in needed}
    stages: dict[str, tuple[nn.Module, dict[str, Tensor], list[str]]] = {
        "coarse": (_Coarse(model), {"images": images}, [*STATE, "confidence"]),
        "fine": (_Fine(model), {"images": images, **given}, ["logits", "confidence"]),
        "whole": (_Whole(model), {"images": images, "eta": eta}, ["logits", "confidence", "stage"]),
    }
    batch = torch.export.Dim("batch", min=0)
    for stage, (network, inputs, outputs) in stages.items():
        path = folder / f"{stage}.onnx"
        with _silent():
            torch.onnx.export(
                network.eval(),
                tuple(inputs.values()),
                dynamo=True,
                verbose=False,
                input_names=list(inputs),
                output_names=outputs,
                dynamic_shapes=tuple(None if name == "eta" else {0: batch} for name in inputs),
                custom_translation_table={torch.ops.aten.sort.stable: _sort},
            ).save(path, external_data=False)  # pyright: ignore[reportOptionalMemberAccess]
        if format == "openvino":
            _to_openvino(path)
        elif stage == "whole" and model.threshold is not None:
            whole = onnx.load(path)
            whole.graph.initializer.append(onnx.numpy_helper.from_array(eta.numpy(), "eta"))  # its value if not given
            onnx.save(whole, path)
    default = "0.5" if model.threshold is None else 'about["exit"]["eta"]'
    text = _EXAMPLE.substitute(package=PACKAGES[format][-1], about=EXPORT_FILE, eta=default, run=_RUN[format])
    (folder / "example.py").write_text(text)


@contextlib.contextmanager
def _silent() -> Any:
    """Without what torch prints and logs of an export."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _sort(self: Any, stable: bool = False, dim: int = -1, descending: bool = False) -> Any:
    """Sorting as ONNX has it: TopK of all, in which the lower index goes first among equals. torch translates none."""
    from onnxscript import opset18

    whole: Any = opset18.Shape(self, start=dim, end=None if dim == -1 else dim + 1)
    return opset18.TopK(self, whole, axis=dim, largest=int(descending), sorted=1)


def _to_openvino(path: Path) -> None:
    """Converts a graph, in which TopK has to keep the order of equals, as ONNX's does."""
    import openvino
    from openvino import opset11

    model = openvino.convert_model(path)
    for node in model.get_ops():
        if node.get_type_name() == "TopK":
            given = node.get_attributes()
            stable = opset11.topk(
                node.input_value(0),
                node.input_value(1),
                given["axis"],
                given["mode"],
                given["sort"],
                given["index_element_type"],
                stable=True,
            )
            for old, new in zip(node.outputs(), stable.outputs(), strict=True):
                for target in old.get_target_inputs():
                    target.replace_source_output(new)
    openvino.save_model(model, path.with_suffix(".xml"), compress_to_fp16=False)
    path.unlink()


def _write_about(about: ExportedModel, folder: Path) -> None:
    values = {**asdict(about), "data_config": dict(about.data_config)}
    values["config"]["timm_kwargs"] = dict(about.config.timm_kwargs)
    (folder / EXPORT_FILE).write_text(json.dumps(values, indent=2) + "\n")


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
    whole = graph_kind(engine.model.format)(graph_file(folder, "whole", engine.model.format))
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
