"""No tensor is left behind on the CPU: the network on a GPU that torch only pretends to have.

Operations on torch's fake tensors compute nothing, but refuse tensors of different devices as a GPU would.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cfvit import CoarseToFineViT, create_model
from cfvit.inference.stream import placed
from cfvit.methods.base import create_method
from cfvit.modeling.config import Objective
from cfvit.modeling.exit import Exit, goes_on
from cfvit.modeling.losses import coarse_to_fine_loss, token_label_loss, token_target
from cfvit.training.recipe import Recipe
from cfvit.training.step import class_target, draw_mixed_cells, mix_images
from cfvit.training.tokens import pool_scores

GPU = torch.device("cuda", 0)
CLASSES = 5
BACKBONES = [
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "lvvit_tiny_patch16_224",
]
VARIANTS: list[dict[str, Any]] = [
    {"selection": "random"},
    {"selection": "negative"},
    *({"feature_reuse": kind} for kind in ("none", "linear", "class_token", "uninformative")),
]


def on_gpu(model: CoarseToFineViT) -> CoarseToFineViT:
    """The model with weights without contents on the GPU; to be called under `FakeTensorMode`."""
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                module._parameters[name] = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device=GPU))
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=GPU)
    return model


def images_of(model: CoarseToFineViT) -> Tensor:
    return torch.randn(4, 3, *model.image_size, device=GPU)


def labels() -> Tensor:
    return torch.zeros(4, dtype=torch.long, device=GPU)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("training", [False, True])
def test_both_stages_stay_on_the_gpu(backbone: str, training: bool) -> None:
    model = create_model(backbone, num_classes=CLASSES, coarse_grid=2, depth=4).train(training)
    made: set[str] = set()

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            answer = func(*args, **(kwargs or {}))
            if isinstance(answer, Tensor) and answer.device.type == "cpu":
                made.add(str(func))
            return answer

    with FakeTensorMode():
        model = on_gpu(model)
        images = images_of(model)
        with Note():
            state = model.coarse(images)
            model.fine(images, state)
        assert not made, "nothing is computed on the CPU"
        answers = [state.logits, state.class_attention, state.confidence, model.fine(images, state[labels()])]
        confidence = Exit("margin").coarse(state.logits)
        answers += [confidence, goes_on(confidence, 0.5), goes_on(confidence, 1)]
        assert {answer.device for answer in answers} == {GPU}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(variant.values()))
def test_variants_stay_on_the_gpu(variant: dict[str, Any]) -> None:
    model = create_model("test_vit", num_classes=CLASSES, coarse_grid=2, **variant)
    with FakeTensorMode():
        output = on_gpu(model)(images_of(model), informative_ratio=0.3)
        assert {output.coarse.device, output.fine.device} == {GPU}


def test_the_loss_of_mixed_images_stays_on_the_gpu() -> None:
    model, recipe = create_model("test_vit", num_classes=CLASSES, coarse_grid=2), Recipe()
    with FakeTensorMode():
        images, targets = mix_images(recipe, images_of(on_gpu(model)), labels(), 0, CLASSES)
        assert coarse_to_fine_loss(model(images), targets, Objective()).device == GPU


def test_the_loss_of_token_labels_stays_on_the_gpu() -> None:
    model = create_model("lvvit_tiny_patch16_224", num_classes=CLASSES, coarse_grid=3, depth=4)
    with FakeTensorMode():
        images = images_of(on_gpu(model))
        mixed = draw_mixed_cells(model.grid, 0, GPU)
        scores = torch.randn(4, CLASSES, 7, 7, device=GPU)
        output = model.forward_tokens(images, mixed=torch.zeros_like(mixed))
        fine, coarse = (pool_scores(scores, grid=grid) for grid in ((6, 6), (3, 3)))
        tokens = token_target(fine, coarse, output, None, 3)
        assert token_label_loss(output, class_target(labels(), None, 0.1, CLASSES), tokens, 1.0).device == GPU


@pytest.mark.parametrize(("name", "options"), [("tome", {"merged": 2}), ("evit", {"keep_rate": 0.7})])
def test_reduced_tokens_stay_on_the_gpu(name: str, options: dict[str, Any]) -> None:
    model = create_model("deit_tiny_patch16_224", num_classes=CLASSES, coarse_grid=3, depth=4).eval()
    with FakeTensorMode(), torch.no_grad():
        assert create_method(name, options=options).forward(on_gpu(model).backbone, images_of(model)).device == GPU


def test_images_are_converted_where_the_weights_are_and_nobody_waits() -> None:
    steps: list[tuple[Any, ...]] = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            answer = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default:
                steps.append((args[0].device.type, answer.device.type, answer.dtype, bool(kwargs.get("non_blocking"))))
            return answer

    with FakeTensorMode(), Note():
        answer = placed(torch.empty(2, 3, 4, 4), torch.empty(1, device=GPU, dtype=torch.bfloat16))
    assert (answer.device, answer.dtype) == (GPU, torch.bfloat16)
    assert steps == [("cpu", "cuda", torch.float32, True), ("cuda", "cuda", torch.bfloat16, False)]


def test_a_tensor_on_the_cpu_would_be_found() -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError, match="devices"):
        torch.add(torch.ones(3, device=GPU), torch.ones(3))
