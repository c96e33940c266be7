"""Compiled stages answer as plain ones, for any number of images."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import WIDE, packs
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from cfvit import CoarseToFineViT, Predictor
from cfvit.inference.engines import packing
from cfvit.inference.engines.pytorch import compiled, in_sizes
from cfvit.modeling.exit import Exit

pytestmark = pytest.mark.usefixtures("packing_pays")
MakeModel = Callable[..., CoarseToFineViT]
MakeImages = Callable[..., Tensor]


@pytest.fixture
def model(make_model: MakeModel) -> CoarseToFineViT:
    return make_model(**{**WIDE, "depth": 1})


@pytest.fixture
def images(model: CoarseToFineViT, make_images: MakeImages) -> Tensor:
    return make_images(model, 3)


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


def test_what_is_compiled_leaves_the_number_of_images_open_and_takes_nothing_else_from_the_host(
    make_model: MakeModel, make_images: MakeImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float or a number of zero dimensions among a graph's inputs would be copied to a GPU at each call."""
    graphs: list[list[Any]] = []
    torch.compiler.reset()  # images of other sizes, in tests before, leave their sides open

    def look(graph: Any, inputs: list[Any], **options: Any) -> Any:
        graphs.append([node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"])
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=look))
    model = make_model(depth=2)
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


def _step(model: CoarseToFineViT) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    optimiser.zero_grad()


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
    assert operators.count(torch.ops.cfvit.packed_linear.default) == 2 * 4 + 2


def test_a_compiled_predictor_measures_by_the_models_rule(
    make_model: MakeModel, make_images: MakeImages, traced: CompileCounterWithBackend
) -> None:
    model = make_model(depth=1)
    for rule in (Exit("margin"), Exit("entropy", coarse_temperature=2.0)):
        model.exit = rule
        answer = Predictor(model, 0, compile=True)(make_images(model, 2))
        torch.testing.assert_close(answer.confidence, rule.coarse(answer.logits))


def test_weights_that_were_written_to_need_no_new_code(
    make_model: MakeModel, make_images: MakeImages, traced: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "packing_pays", lambda: False)
    model = make_model(depth=1)
    predictor = Predictor(model, 1, compile=True)
    predictor(make_images(model, 2))
    ready = traced.frame_count
    _step(model)
    predictor(make_images(model, 2))
    assert traced.frame_count == ready


@pytest.mark.parametrize("older", [False, True])
def test_two_compiled_models_do_not_answer_for_each_other(
    older: bool, make_model: MakeModel, make_images: MakeImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On torch that cannot keep apart what has the same code as well. Both stages are compiled in one way."""
    known, backend = torch.compile, _without_options(CompileCounterWithBackend("eager"))

    def compile(run: Callable[..., Any], *, options: dict[str, Any]) -> Callable[..., Any]:
        return known(run, backend=backend, options=options)

    monkeypatch.setattr(torch, "compile", compile if older else partial(known, backend=backend))
    models = [make_model(depth=depth) for depth in (1, 2)]
    for model in models:
        images = make_images(model, 2)
        expected = Predictor(model, 0, compile=False)(images).logits
        torch.testing.assert_close(Predictor(model, 0, compile=True)(images).logits, expected)


def test_a_copied_compiled_predictor_answers_by_its_own_weights(
    model: CoarseToFineViT, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    predictor = Predictor(model, 0, compile=True)
    former = predictor(images).logits
    twin = copy.deepcopy(predictor)
    with torch.no_grad():
        predictor.model.get_parameter("coarse_pos_embed").zero_()
    torch.testing.assert_close(twin(images).logits, former)
    assert not torch.allclose(predictor(images).logits, former, atol=1e-3)
    torch.testing.assert_close(pickle.loads(pickle.dumps(twin))(images).logits, former)
