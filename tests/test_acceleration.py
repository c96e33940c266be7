"""Packed layers give the plain ones' answers, follow the weights, and leave the model alone."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune

from cfvit import CfvitError, CoarseToFineViT, Predictor
from cfvit.inference import acceleration
from cfvit.inference.acceleration import (
    ConvolvedLinear,
    PackedLinear,
    accelerate,
    accelerate_training,
    compiled,
    copied_ahead,
    in_sizes,
)
from cfvit.modeling.exit import Exit

WIDE = {"embed_dim": 192, "num_heads": 3, "depth": 4}
"""Layers large enough to be packed, all but the head."""

packs = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN packs, and this torch lacks it")
MakeModel = Callable[..., CoarseToFineViT]
MakeImages = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing, whatever this processor would say of it."""
    monkeypatch.setattr(acceleration, "packing_pays", lambda: True)
    monkeypatch.setattr(acceleration, "convolving_pays", lambda: True)


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
    assert left[0].weight.numel() < acceleration.FEWEST_WEIGHTS
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
    monkeypatch.setattr(acceleration, "packing_pays", lambda: False)
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
    first = _mlp(model).fc1
    prune.l1_unstructured(first, "weight", 0.5)
    predictor, plain = Predictor(model, 1), Predictor(model, 1, compile=False)
    predictor(images)
    with torch.no_grad():
        first.get_parameter("weight_orig").mul_(3)
    torch.testing.assert_close(predictor(images).logits, plain(images).logits, atol=1e-4, rtol=0)


@packs
@pytest.mark.parametrize("name", ["fc1", "act"])
def test_hooks_are_called(name: str, model: CoarseToFineViT, images: Tensor) -> None:
    calls = []
    _mlp(model).get_submodule(name).register_forward_hook(lambda *given: calls.append(given))
    Predictor(model, 1)(images)
    assert len(calls) == 2


@packs
def test_the_copy_is_in_evaluation_mode_even_of_a_model_in_training(make_model: MakeModel, images: Tensor) -> None:
    model = make_model(**WIDE, drop_path_rate=0.9)
    predictor = Predictor(model, 1)
    model.train()
    predictor(images)  # the twin is made now
    model.eval()
    with torch.inference_mode():
        torch.testing.assert_close(predictor(images).logits, model(images).fine, atol=1e-4, rtol=0)


def _step(model: CoarseToFineViT) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    optimiser.zero_grad()


def _load(model: CoarseToFineViT, assign: bool) -> None:
    weights = {name: value * 1.1 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    model.load_state_dict(weights, assign=assign)


def _replace_a_layer(model: CoarseToFineViT) -> None:
    _mlp(model, 1).fc2 = nn.Linear(768, 192)


CHANGES: dict[str, Callable[[CoarseToFineViT], object]] = {
    "step": _step,
    "load_state_dict": lambda model: _load(model, assign=False),
    "assign": lambda model: _load(model, assign=True),
    "twice-assigned": lambda model: [_load(model, assign=True) for _ in range(2)],
    "there-and-back": lambda model: model.half().float(),
    "double": lambda model: model.double(),
    "layer": _replace_a_layer,
    "ratio": lambda model: setattr(model, "config", replace(model.config, informative_ratio=1.0)),
}


@packs
@pytest.mark.parametrize("change", CHANGES)
def test_a_predictor_follows_the_weights(change: str, model: CoarseToFineViT, images: Tensor) -> None:
    predictor = Predictor(model, 1)
    before = predictor(images).logits
    CHANGES[change](model)
    with torch.inference_mode():
        expected = model(images.to(next(model.parameters()).dtype)).fine
    after = predictor(images).logits
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=0)
    assert change in ("double", "there-and-back") or not torch.allclose(after, before.to(after.dtype), atol=1e-3)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The twins that predictors make from now on."""
    twins: list[nn.Module] = []

    def record(network: nn.Module) -> nn.Module:
        twins.append(accelerate(network))
        return twins[-1]

    monkeypatch.setattr("cfvit.inference.stages.accelerate", record)
    return twins


@packs
def test_the_twin_is_made_once_for_the_same_weights(
    model: CoarseToFineViT, images: Tensor, made: list[nn.Module]
) -> None:
    predictor = Predictor(model, 1)
    assert made == []
    for _ in range(3):
        predictor(images)
        list(predictor.stream([images, images]))
        model.train().eval()
        model.state_dict()
    assert len(made) == 1
    _step(model)
    predictor(images)
    assert len(made) == 2


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
    assert other.model is not model
    assert len(_packed_layers(other.model)) == 0
    torch.testing.assert_close(other(images).logits, expected, atol=1e-4, rtol=0)
    _step(other.model)
    assert not torch.allclose(other(images).logits, expected, atol=1e-3)
    torch.testing.assert_close(predictor(images).logits, expected, atol=1e-4, rtol=0)


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
    acceleration.packing_pays.cache_clear()
    assert isinstance(acceleration.packing_pays(), bool)
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
    monkeypatch.setattr(acceleration, "convolving_pays", lambda: False)
    assert accelerate_training(model) is model


@packs
def test_torchs_defaults_do_not_matter_to_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            acceleration.packing_pays.cache_clear()
            acceleration.convolving_pays.cache_clear()
            assert isinstance(acceleration.packing_pays(), bool)
            assert isinstance(acceleration.convolving_pays(), bool)
    finally:
        torch.set_default_dtype(torch.float32)


@packs
def test_a_predictor_follows_a_module_that_is_replaced(model: CoarseToFineViT, images: Tensor) -> None:
    predictor = Predictor(model, 1)
    predictor(images)
    _mlp(model).act = nn.ReLU()
    with torch.inference_mode():
        torch.testing.assert_close(predictor(images).logits, model(images).fine, atol=1e-4, rtol=0)


def test_stages_in_few_sizes_answer_alike(make_model: MakeModel, make_images: MakeImages) -> None:
    model, seen = make_model(depth=4), []

    def noting(stage: Callable[..., Any]) -> Callable[..., Any]:
        def run(images: Tensor, *state: Any) -> Any:
            seen.append(len(images))
            return stage(images, *state)

        return in_sizes(run, (1, 4, 6))

    coarse, fine = noting(model.coarse), noting(model.fine)
    with torch.inference_mode():
        for count in range(1, 7):
            images = make_images(model, count)
            state, expected = coarse(images), model.coarse(images)
            for name in ("logits", "tokens", "embedding", "class_attention", "class_token"):
                torch.testing.assert_close(getattr(state, name), getattr(expected, name))
            torch.testing.assert_close(fine(images, state), model.fine(images, expected))
    assert seen == [1, 1, 4, 4, 4, 4, 4, 4, 6, 6, 6, 6]


def test_an_answer_survives_the_next_call_to_a_function_that_writes_where_it_wrote_before() -> None:
    memory = torch.empty(4)
    double = in_sizes(lambda images: torch.mul(images, 2, out=memory), (4,))
    first, second = double(torch.ones(2)), double(torch.full((4,), 3.0))
    assert first.tolist() == [2, 2]
    assert second.tolist() == [6, 6, 6, 6]


@pytest.mark.parametrize(
    ("device", "count", "recorded", "size"),
    [
        ("cuda", 1, True, 1),
        ("cuda", 5, True, 8),
        ("cuda", 64, True, 64),
        ("cuda", 65, False, 65),
        ("cpu", 5, False, 5),
    ],
)
def test_launches_of_small_batches_on_a_gpu_are_recorded(
    device: str, count: int, recorded: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []

    def compile(run: Callable[..., Any], *, options: dict[str, Any]) -> Callable[..., Any]:
        return lambda images: called.append((options.get("triton.cudagraphs", False), len(images))) or run(images)

    monkeypatch.setattr(torch, "compile", compile)
    with FakeTensorMode():
        answer = compiled(torch.neg)(torch.empty(count, 2, device=device))
        none = compiled(torch.neg)(torch.empty(0, 2, device=device))
    assert called == [(recorded, size)]
    assert answer.device.type == none.device.type == device
    assert (len(answer), len(none)) == (count, 0)


class _Streams:
    """In place of a GPU's streams, notes of what they were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.notes: list[str] = []
        self.on = "computing"
        computing = SimpleNamespace(wait_event=lambda event: self.notes.append(f"computing waits for {event}"))
        beside = SimpleNamespace(
            record_event=lambda: f"copy {sum(note.startswith('copies') for note in self.notes)}",
            wait_stream=lambda stream: self.notes.append("beside waits for computing"),
        )
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: beside)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
        monkeypatch.setattr(torch.cuda, "stream", self._within)
        monkeypatch.setattr(acceleration, "placed", self._placed)

    def given(self, batches: Iterator[Any]) -> Iterator[Any]:
        weight: Any = SimpleNamespace(device=torch.device("cuda"))
        return copied_ahead(batches, weight)

    @contextlib.contextmanager
    def _within(self, stream: Any) -> Iterator[None]:
        self.on = "beside"
        yield
        self.on = "computing"

    def _placed(self, batch: Any, weight: Any) -> Any:
        self.notes.append(f"copies {batch.name} {self.on}")
        kept = lambda stream: self.notes.append(f"{batch.name} kept")  # noqa: E731
        return SimpleNamespace(name=batch.name, record_stream=kept)

    def batch(self, number: int, device: str = "cpu") -> Any:
        batch = SimpleNamespace(name=str(number), device=torch.device(device))
        batch.pin_memory = lambda: self.notes.append(f"pins {number}") or batch
        batch.record_stream = lambda stream: self.notes.append(f"{number} kept for its copy")
        return batch


def test_on_a_gpu_a_batch_is_copied_before_the_one_in_front_of_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = _Streams(monkeypatch)
    for images in streams.given(map(streams.batch, (1, 2))):
        streams.notes.append(f"gives {images.name}")
    copied = ["pins 1", "copies 1 beside", "pins 2", "copies 2 beside"]
    first, second = ([f"computing waits for copy {n}", f"{n} kept", f"gives {n}"] for n in (1, 2))
    assert streams.notes == [*copied, *first, *second]
    assert list(streams.given(iter([]))) == []


def test_a_batch_that_lies_on_the_gpu_is_read_when_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = _Streams(monkeypatch)
    list(streams.given(iter([streams.batch(1, "cuda")])))
    assert streams.notes[:3] == ["beside waits for computing", "1 kept for its copy", "copies 1 beside"]


def test_what_came_before_a_failure_of_the_source_is_given_first(monkeypatch: pytest.MonkeyPatch) -> None:
    streams, given = _Streams(monkeypatch), []

    def source() -> Iterator[Any]:
        yield from map(streams.batch, (1, 2))
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        given.extend(images.name for images in streams.given(source()))
    given.clear()
    with contextlib.suppress(OSError):
        for images in streams.given(source()):
            given.append(images.name)
    assert given == ["1", "2"]


def test_integers_are_not_converted_before_they_are_refused(model: CoarseToFineViT) -> None:
    raw = torch.zeros(2, 3, *model.image_size, dtype=torch.uint8)
    with pytest.raises(CfvitError, match="images of uint8: give floats"):
        list(Predictor(model, 0).stream(copied_ahead([raw], next(model.parameters()))))


def test_on_a_cpu_no_batch_is_asked_for_early() -> None:
    asked = []
    batches = (asked.append(number) or torch.full((1, 2), float(number)) for number in range(3))
    for number, images in enumerate(copied_ahead(batches, torch.empty(1, dtype=torch.float64))):
        assert (images.dtype, images[0, 0], len(asked)) == (torch.float64, number, number + 1)


def test_what_is_compiled_leaves_the_number_of_images_open_and_takes_nothing_else_from_the_host(
    make_model: MakeModel, make_images: MakeImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float or a number of zero dimensions among a graph's inputs would be copied to a GPU at each call."""
    graphs: list[list[Any]] = []

    def look(graph: Any, inputs: list[Any], **options: Any) -> Any:
        graphs.append([node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"])
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=look))
    model = make_model(depth=5)
    coarse, fine = compiled(model.coarse), compiled(model.fine)
    with torch.inference_mode():
        for count in (3, 5, 2):
            images = make_images(model, count)
            torch.testing.assert_close(fine(images, coarse(images)), model.fine(images, model.coarse(images)))
    assert len(graphs) == 2
    for inputs in graphs:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        assert any(isinstance(tensor.shape[0], torch.SymInt) for tensor in tensors)
        assert all(tensor.ndim > 0 for tensor in tensors)
        assert all(type(side) is int for tensor in tensors for side in tensor.shape[1:])
        assert not any(isinstance(value, float | torch.SymFloat) for value in inputs)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """In place of the compiler, what traces down to torch's operators and makes no code; counts its graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=_without_options(counter)))
    return counter


def _without_options(backend: Callable[..., Any]) -> Callable[..., Any]:
    """Options are for the compiler that makes code."""
    return lambda graph, inputs, options=None: backend(graph, inputs)


@packs
def test_what_is_packed_can_be_compiled(
    model: CoarseToFineViT, make_images: MakeImages, traced: CompileCounterWithBackend
) -> None:
    predictor = Predictor(model, 1, compile=True)
    for count in (3, 2, 5):
        images = make_images(model, count)
        with torch.inference_mode():
            torch.testing.assert_close(predictor(images).logits, model(images).fine, atol=1e-4, rtol=0)
    assert traced.frame_count == 2
    operators = [node.target for graph in traced.graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert operators.count(torch.ops.cfvit.packed_linear.default) == 2 * 4 * 4 + 2


@pytest.mark.parametrize(
    ("change", "packing"),
    [
        *((change, False) for change in ("step", "there-and-back", "layer", "ratio")),
        *(pytest.param(change, True, marks=packs) for change in ("load_state_dict", "assign")),
    ],
)
def test_a_compiled_predictor_follows_the_model(
    change: str, packing: bool, make_model: MakeModel, make_images: MakeImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=_without_options(counter)))
    monkeypatch.setattr(acceleration, "packing_pays", lambda: packing)
    model = make_model(**WIDE | {"depth": 2})
    images = make_images(model, 2)
    predictor = Predictor(model, 1, compile=True)
    predictor(images)
    ready = counter.frame_count
    CHANGES[change](model)
    with torch.inference_mode():
        expected = model(images).fine
    torch.testing.assert_close(predictor(images).logits, expected, atol=1e-4, rtol=0)
    if change == "step":
        assert counter.frame_count == ready, "weights that were written to need no new code"


def test_a_compiled_predictor_measures_by_the_models_rule(
    make_model: MakeModel, make_images: MakeImages, traced: CompileCounterWithBackend
) -> None:
    model = make_model(depth=1)
    predictor = Predictor(model, 0, compile=True)
    for rule in (Exit("margin"), Exit("entropy", coarse_temperature=2.0)):
        model.exit = rule
        answer = predictor(make_images(model, 2))
        torch.testing.assert_close(answer.confidence, rule.coarse(answer.logits))


@pytest.mark.parametrize("older", [False, True])
def test_two_compiled_models_do_not_answer_for_each_other(
    older: bool, make_model: MakeModel, make_images: MakeImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On torch that cannot keep apart what has the same code as well."""
    known, backend = torch.compile, _without_options(CompileCounterWithBackend("eager"))

    def compile(run: Callable[..., Any], *, options: dict[str, Any]) -> Callable[..., Any]:
        return known(run, backend=backend, options=options)

    monkeypatch.setattr(torch, "compile", compile if older else partial(known, backend=backend))
    models = [make_model(depth=depth) for depth in (1, 2)]
    for model in models:
        images = make_images(model, 2)
        expected = Predictor(model, 1, compile=False)(images).logits
        torch.testing.assert_close(Predictor(model, 1, compile=True)(images).logits, expected)


@packs
def test_a_predictor_follows_a_module_that_lies_where_its_forerunner_lay(
    make_model: MakeModel, make_images: MakeImages
) -> None:
    model = make_model(**WIDE | {"depth": 1})
    images, predictor = make_images(model, 2), Predictor(model, 1)
    predictor(images)
    place, others = id(_mlp(model).act), []
    _mlp(model).act = nn.Identity()
    while id(act := nn.ReLU()) != place and len(others) < 1000:
        others.append(act)
    _mlp(model).act = act
    with torch.inference_mode():
        torch.testing.assert_close(predictor(images).logits, model(images).fine, atol=1e-4, rtol=0)


def test_a_copied_compiled_predictor_answers_by_its_own_weights(
    model: CoarseToFineViT, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    predictor = Predictor(model, 1, compile=True)
    former = predictor(images).logits
    twin = copy.deepcopy(predictor)
    weights = twin.model.state_dict()  # shares their memory
    weights["backbone.head.weight"].zero_()
    weights["backbone.head.bias"].fill_(7)
    assert (twin(images).logits == 7).all()
    torch.testing.assert_close(predictor(images).logits, former)
    torch.testing.assert_close(pickle.loads(pickle.dumps(predictor))(images).logits, former)
