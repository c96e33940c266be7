"""Packed layers give the answers of the plain ones, and leave the model alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import WIDE, packs
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.utils import prune

from cfvit import CoarseToFineViT, Predictor
from cfvit.inference.engines import packing
from cfvit.inference.engines.packing import ConvolvedLinear, PackedLinear, accelerate, accelerate_training

pytestmark = pytest.mark.usefixtures("packing_pays")
MakeModel = Callable[..., CoarseToFineViT]
MakeImages = Callable[..., Tensor]


@pytest.fixture
def model(make_model: MakeModel) -> CoarseToFineViT:
    return make_model(**WIDE)


@pytest.fixture
def images(model: CoarseToFineViT, make_images: MakeImages) -> Tensor:
    return make_images(model, 3)


def _packed_layers(network: nn.Module) -> list[PackedLinear]:
    return [module for module in network.modules() if isinstance(module, PackedLinear)]


def _linear_layers(network: nn.Module) -> list[nn.Linear]:
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


def _mlp(model: CoarseToFineViT, block: int = 0) -> Mlp:
    mlp = model.get_submodule(f"backbone.blocks.{block}.mlp")
    assert isinstance(mlp, Mlp)
    return mlp


def _assert_same_answers(fast: CoarseToFineViT, plain: CoarseToFineViT, images: Tensor) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(fast(images), plain(images), atol=1e-4, rtol=0)


@packs
@pytest.mark.parametrize(
    ("backbone", "changes"),
    [
        ("deit_tiny_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("lvvit_tiny_patch16_224", {"patch_size": 16, "coarse_grid": 2}),
        ("eva02_tiny_patch14_224", {}),  # multiplies by the weights of qkv without calling it
        ("vit_small_patch16_dinov3_qkvb", {}),
        ("vit_base_patch16_xp_224", {}),  # parallel branches in one product of matrices
        ("vit_base_patch16_clip_quickgelu_224", {}),
    ],
)
def test_packed_and_plain_answer_alike(
    backbone: str, changes: dict[str, Any], make_model: MakeModel, make_images: MakeImages
) -> None:
    model = make_model(backbone=backbone, **{**WIDE, **changes})
    twin = accelerate(model)
    assert len(_packed_layers(twin)) >= 12
    _assert_same_answers(twin, model, make_images(model, 3))


@packs
@pytest.mark.parametrize("shape", [(0, 192), (1, 192), (5, 3, 192), (2, 1500, 192)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
def test_a_packed_layer_is_the_linear_one(shape: tuple[int, ...], bias: bool, gelu: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(192, 256, bias=bias), torch.randn(*shape)
    with torch.inference_mode():
        plain = F.gelu(linear(x)) if gelu else linear(x)
        torch.testing.assert_close(PackedLinear(linear, gelu)(x), plain, atol=1e-5, rtol=0)


@packs
def test_a_packed_layer_takes_every_second_token() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(192, 256), torch.randn(4, 6, 192)[:, ::2]
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), atol=1e-5, rtol=0)


@packs
def test_the_original_is_untouched(model: CoarseToFineViT, images: Tensor) -> None:
    modules, weights = list(model.modules()), {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        before = model(images)
    twin = accelerate(model)
    _assert_same_answers(twin, model, images)
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(images).fine, before.fine)


@packs
def test_the_original_still_trains(model: CoarseToFineViT, images: Tensor) -> None:
    predictor = Predictor(model, 1)
    predictor(images)
    model.train()
    model(images).fine.sum().backward()
    assert all(layer.weight.grad is not None for layer in _linear_layers(model))


@packs
def test_weights_are_shared(model: CoarseToFineViT) -> None:
    twin = accelerate(model)
    originals = {layer.weight.data_ptr() for layer in _linear_layers(model)}
    assert {layer.get_buffer("weight").data_ptr() for layer in _packed_layers(twin)} < originals
    own = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in twin.parameters()} < own


@packs
def test_small_layers_are_left_alone(model: CoarseToFineViT) -> None:
    twin = accelerate(model)
    left = _linear_layers(twin)
    assert left == [twin.backbone.head]
    assert left[0].weight.numel() < packing.FEWEST_WEIGHTS
    at_the_limit = [nn.Linear(2**7, 2**8), nn.Linear(2**7, 2**8 - 1)]
    assert [type(accelerate(layer)) for layer in at_the_limit] == [PackedLinear, nn.Linear]


@packs
def test_exact_gelu_alone_is_fused() -> None:
    def parts(activation: Any) -> tuple[bool, type[nn.Module]]:
        twin = accelerate(Mlp(192, 768, act_layer=activation))
        assert isinstance(twin.fc1, PackedLinear)
        return twin.fc1.gelu, type(twin.act)

    assert parts(nn.GELU) == (True, nn.Identity)
    assert parts(partial(nn.GELU, approximate="tanh")) == (False, nn.GELU)
    assert parts(nn.SiLU) == (False, nn.SiLU)


@packs
@pytest.mark.parametrize("activation", [nn.GELU, partial(nn.GELU, approximate="tanh"), nn.SiLU])
def test_an_mlp_answers_alike_whatever_its_activation(activation: Any) -> None:
    torch.manual_seed(0)
    mlp, x = Mlp(192, 768, act_layer=activation).eval(), torch.randn(2, 5, 192)
    with torch.inference_mode():
        torch.testing.assert_close(accelerate(mlp)(x), mlp(x), atol=1e-5, rtol=0)


def test_where_it_does_not_pay_the_model_itself_runs(
    model: CoarseToFineViT, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "packing_pays", lambda: False)
    assert accelerate(model) is model
    with torch.inference_mode():
        assert torch.equal(Predictor(model, 1)(images).logits, model(images).fine)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_are_left_alone(dtype: torch.dtype, model: CoarseToFineViT, images: Tensor) -> None:
    model.to(dtype)
    assert accelerate(model) is model
    assert Predictor(model, 1)(images).logits.dtype == dtype


def test_a_network_without_weights_and_one_without_memory_are_left_alone(make_model: MakeModel) -> None:
    activation, nowhere = nn.ReLU(), make_model(**WIDE).to("meta")
    assert accelerate(activation) is activation
    assert accelerate(nowhere) is nowhere


@packs
def test_a_layer_that_makes_its_weights_when_called_is_left_alone(model: CoarseToFineViT, images: Tensor) -> None:
    prune.l1_unstructured(_mlp(model).fc1, "weight", 0.5)
    with torch.no_grad():
        _mlp(model).fc1.get_parameter("weight_orig").mul_(3)
    packed, plain = (Predictor(model, 1, compile=choice)(images).logits for choice in (None, False))
    torch.testing.assert_close(packed, plain, atol=1e-4, rtol=0)


@packs
@pytest.mark.parametrize("name", ["fc1", "act"])
def test_hooks_are_called(name: str, model: CoarseToFineViT, images: Tensor) -> None:
    calls = []
    _mlp(model).get_submodule(name).register_forward_hook(lambda *given: calls.append(given))
    Predictor(model, 1)(images)
    assert len(calls) == 2


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The twins that predictors make from now on."""
    twins: list[nn.Module] = []

    def record(network: nn.Module) -> nn.Module:
        twins.append(accelerate(network))
        return twins[-1]

    monkeypatch.setattr("cfvit.inference.engines.pytorch.accelerate", record)
    return twins


@packs
def test_the_twin_is_made_with_the_predictor_and_once(
    model: CoarseToFineViT, images: Tensor, made: list[nn.Module]
) -> None:
    predictor = Predictor(model, 1)
    assert len(made) == 1
    for _ in range(3):
        predictor(images)
        list(predictor.stream([images, images]))
    assert len(made) == 1


@packs
def test_threads_share_a_twin_and_get_the_same_answers(
    model: CoarseToFineViT, make_images: MakeImages, made: list[nn.Module]
) -> None:
    batches = [make_images(model, 1 + seed % 3, seed) for seed in range(12)]
    with torch.no_grad():
        threshold = float(model.coarse(torch.cat(batches)).confidence.median()) + 1e-4
    expected = [Predictor(model, threshold, compile=False)(batch) for batch in batches]
    predictor = Predictor(model, threshold)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(predictor, batches))
    assert len(made) == 1
    for answer, right in zip(answers, expected, strict=True):
        assert torch.equal(answer.stage, right.stage)
        torch.testing.assert_close(answer.logits, right.logits, atol=1e-4, rtol=0)


@packs
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))])
@pytest.mark.parametrize("part", ["predictor", "model"])
def test_predictor_and_model_can_be_copied(
    copied: Callable[[Any], Any], part: str, model: CoarseToFineViT, images: Tensor
) -> None:
    predictor = Predictor(model, 1)
    expected = predictor(images).logits
    other = copied(predictor) if part == "predictor" else Predictor(copied(predictor.model), 1)
    assert len(_packed_layers(other.model)) == 0
    torch.testing.assert_close(other(images).logits, expected, atol=1e-4, rtol=0)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.zero_()
    torch.testing.assert_close(predictor(images).logits, expected, atol=0, rtol=0)
    assert predictor.model.get_parameter("backbone.head.weight").any()


@packs
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_works_whatever_becomes_of_gradients(
    mode: Callable[[], Any], model: CoarseToFineViT, images: Tensor
) -> None:
    with mode():
        predictor = Predictor(model, 1)
        inside = predictor(images).logits
    assert not inside.requires_grad
    torch.testing.assert_close(predictor(images).logits, inside, atol=1e-4, rtol=0)


@packs
def test_under_autocast_the_plain_model_runs(model: CoarseToFineViT, images: Tensor) -> None:
    predictor = Predictor(model, 0)
    predictor(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert predictor(images).logits.dtype == torch.bfloat16
    assert predictor(images).logits.dtype == torch.float32


@packs
def test_a_trial_leaves_the_random_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    packing.packing_pays.cache_clear()
    assert isinstance(packing.packing_pays(), bool)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("shape", [(5, 192), (2, 7, 192), (2, 1, 192)])
def test_a_convolution_is_the_linear_layer(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(192, 256)
    x = torch.randn(shape, requires_grad=True)
    plain, convolved = linear(x), ConvolvedLinear(linear)(x)
    torch.testing.assert_close(convolved, plain, atol=1e-5, rtol=1e-5)
    target = torch.randn_like(plain)
    wanted = (x, linear.weight, linear.bias)
    for one, other in zip(
        *(torch.autograd.grad((out * target).sum(), wanted) for out in (plain, convolved)), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_training_changes_the_very_weights_of_the_model(make_model: MakeModel, images: Tensor) -> None:
    """Same names, same parameters, same gradients; what is small stays linear."""
    model = make_model(**WIDE).train()
    network = accelerate_training(model)
    assert sum(isinstance(module, ConvolvedLinear) for module in network.modules()) == 4 * 4 + 2
    named, own = dict(network.named_parameters()), dict(model.named_parameters())
    assert named.keys() == own.keys()
    assert all(named[name] is own[name] for name in own)
    gradients = []
    for one in (model, network):
        torch.stack([logits.square().mean() for logits in one(images)]).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in own.items()})
        model.zero_grad()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_where_convolutions_do_not_pay_the_model_itself_trains(
    model: CoarseToFineViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "convolving_pays", lambda: False)
    assert accelerate_training(model) is model


@packs
def test_torchs_defaults_do_not_matter_to_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            packing.packing_pays.cache_clear()
            packing.convolving_pays.cache_clear()
            assert isinstance(packing.packing_pays(), bool)
            assert isinstance(packing.convolving_pays(), bool)
    finally:
        torch.set_default_dtype(torch.float32)
