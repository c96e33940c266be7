"""Which stage answers which image, and with what."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import check_prediction, highest_probability
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from cfvit import CfvitError, CoarseState, CoarseToFineOutput, CoarseToFineViT, Prediction, Predictor
from cfvit.inference.stream import COARSE, FINE
from cfvit.modeling.batches import Rows
from cfvit.modeling.exit import Exit, goes_on

COUNT = 6


@pytest.fixture
def model(make_model: Callable[..., CoarseToFineViT]) -> CoarseToFineViT:
    return make_model()


@pytest.fixture
def images(model: CoarseToFineViT, make_images: Callable[..., Tensor]) -> Tensor:
    return make_images(model, COUNT)


@pytest.fixture
def both(model: CoarseToFineViT, images: Tensor) -> CoarseToFineOutput:
    """What each stage answers for every image."""
    with torch.no_grad():
        return model(images)


@pytest.fixture
def between(both: CoarseToFineOutput) -> float:
    """A threshold with half of the images on either side, and none close to it."""
    ordered = highest_probability(both.coarse).sort().values
    middle = COUNT // 2
    assert ordered[middle] - ordered[middle - 1] > 1e-3
    return float(ordered[middle - 1 : middle + 1].mean())


def _record_fine(model: CoarseToFineViT, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The images of each later call of the fine stage."""
    calls: list[Tensor] = []
    original = model.fine

    def fine(images: Tensor, state: CoarseState) -> Tensor:
        calls.append(images)
        return original(images, state)

    monkeypatch.setattr(model, "fine", fine)
    return calls


def test_threshold_0_gives_the_coarse_answers(
    model: CoarseToFineViT, images: Tensor, both: CoarseToFineOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _record_fine(model, monkeypatch)
    check_prediction(Predictor(model, 0)(images), both.coarse, torch.full((COUNT,), COARSE))
    assert calls == []


def test_threshold_1_gives_the_fine_answers(model: CoarseToFineViT, images: Tensor, both: CoarseToFineOutput) -> None:
    check_prediction(Predictor(model, 1)(images), both.fine, torch.full((COUNT,), FINE))


def test_threshold_1_sends_on_even_what_rounds_to_1(model: CoarseToFineViT, images: Tensor) -> None:
    with torch.no_grad():
        model.get_parameter("backbone.head.weight").mul_(1e4)
        assert (model.coarse(images).confidence == 1).all()
    assert (Predictor(model, 1)(images).stage == FINE).all()
    assert (Predictor(model, 0.999999)(images).stage == COARSE).all()


def test_each_image_gets_the_answer_of_its_stage(
    model: CoarseToFineViT, images: Tensor, both: CoarseToFineOutput, between: float
) -> None:
    hard = highest_probability(both.coarse) < between
    expected = torch.where(hard[:, None], both.fine, both.coarse)
    check_prediction(Predictor(model, between)(images), expected, hard.long())


def test_a_batch_is_answered_like_its_images_alone(model: CoarseToFineViT, images: Tensor, between: float) -> None:
    predictor = Predictor(model, between)
    alone = [predictor(image[None]) for image in images]
    stage = torch.cat([prediction.stage for prediction in alone])
    assert stage.sum() == COUNT // 2
    check_prediction(predictor(images), torch.cat([prediction.logits for prediction in alone]), stage)


def test_answers_keep_the_order_of_the_images(model: CoarseToFineViT, images: Tensor, between: float) -> None:
    predictor = Predictor(model, between)
    straight = predictor(images)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    check_prediction(predictor(images[order]), straight.logits[order], straight.stage[order])


def test_the_fine_stage_runs_once_on_exactly_the_hard_images(
    model: CoarseToFineViT, images: Tensor, both: CoarseToFineOutput, between: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _record_fine(model, monkeypatch)
    Predictor(model, between)(images)
    assert len(calls) == 1
    assert torch.equal(calls[0], images[highest_probability(both.coarse) < between])


def test_an_image_at_the_threshold_exits(model: CoarseToFineViT, images: Tensor, both: CoarseToFineOutput) -> None:
    confidence = highest_probability(both.coarse)
    stage = Predictor(model, float(confidence[0]))(images).stage
    assert torch.equal(stage, (confidence < confidence[0]).long())


@pytest.mark.parametrize("threshold", [0, 0.5, 1])
def test_an_empty_batch_has_an_empty_answer(model: CoarseToFineViT, threshold: float) -> None:
    prediction = Predictor(model, threshold)(torch.empty(0, 3, 32, 32))
    assert prediction.logits.shape == (0, 7)
    assert prediction.confidence.shape == prediction.stage.shape == (0,)


def test_an_image_that_is_not_a_number_goes_on_and_spoils_no_other(
    model: CoarseToFineViT, images: Tensor, both: CoarseToFineOutput, between: float
) -> None:
    spoilt = int(highest_probability(both.coarse).argmax())
    straight = Predictor(model, between)(images)
    images[spoilt] = torch.nan
    prediction = Predictor(model, between)(images)
    assert straight.stage[spoilt] == COARSE
    assert prediction.stage[spoilt] == FINE
    assert prediction.confidence[spoilt] == -1
    others = torch.arange(COUNT) != spoilt
    check_prediction(
        Prediction(prediction.logits[others], prediction.confidence[others], prediction.stage[others]),
        straight.logits[others],
        straight.stage[others],
    )


@pytest.mark.parametrize(("threshold", "expected"), [(0.0, [0, 0, 0]), (0.5, [1, 0, 1]), (1.0, [1, 1, 1])])
def test_which_confidences_go_on(threshold: float, expected: list[int]) -> None:
    assert goes_on(torch.tensor([0.4999, 1.0, torch.nan]), threshold).tolist() == expected


def test_a_model_of_lower_precision_takes_float32_images(model: CoarseToFineViT, images: Tensor) -> None:
    prediction = Predictor(model.to(torch.bfloat16), 1)(images)
    assert prediction.logits.dtype == torch.bfloat16
    assert prediction.confidence.dtype == torch.float32


@pytest.mark.parametrize("compile", [None, False])
def test_a_predictor_answers_in_evaluation_mode_and_leaves_the_model_in_its_own(
    compile: bool | None, make_model: Callable[..., CoarseToFineViT], images: Tensor
) -> None:
    model = make_model(drop_path_rate=0.9, proj_drop_rate=0.5)
    expected = Predictor(model, 1, compile=compile)(images).logits
    model.train()
    before, after = Predictor(model.eval(), 1, compile=compile), Predictor(model.train(), 1, compile=compile)
    model.train()
    for predictor in (before, after):
        assert torch.equal(predictor(images).logits, expected)
        assert not predictor.model.training
    assert all(module.training for module in model.modules())


CHANGES: dict[str, Callable[[CoarseToFineViT], object]] = {
    "assign": lambda model: model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()}, assign=True),
    "double": lambda model: model.double(),
    "layer": lambda model: setattr(model.get_submodule("backbone.blocks.1.mlp"), "fc2", nn.Linear(192, 48)),
    "ratio": lambda model: setattr(model, "config", replace(model.config, informative_ratio=1.0)),
    "rule": lambda model: setattr(model, "exit", Exit("margin")),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("compile", [None, False])
def test_a_predictor_takes_the_model_as_it_is_when_it_is_made(
    change: str, compile: bool | None, model: CoarseToFineViT, images: Tensor
) -> None:
    """Weights that are written to in place are another matter: they may be shared or packed."""
    predictor = Predictor(model, 1, compile=compile)
    before = predictor(images)
    CHANGES[change](model)
    after = predictor(images)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.confidence, before.confidence)
    new = Predictor(model, 1, compile=compile)(images.to(next(model.parameters()).dtype))
    assert not torch.equal(new.logits, before.logits) or not torch.equal(new.confidence, before.confidence)


@pytest.mark.parametrize("compile", ["yes", 2, "max-autotune"])
def test_another_way_to_compile_is_refused(compile: Any, model: CoarseToFineViT) -> None:
    with pytest.raises(CfvitError, match=f"compile is {compile!r}: give True, False, or None"):
        Predictor(model, 0.5, compile=compile)


@dataclass(eq=False)
class _Names(Rows):
    """A state of an engine that computes nothing: of each image, its mean."""

    logits: Tensor
    means: Tensor


class _Means:
    """An engine without a network: the mean of an image is its class at the coarse stage, and one more at the fine."""

    def __init__(self, model: CoarseToFineViT) -> None:
        self.model, self.weight = model, torch.zeros(1)

    def _logits(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        logits = 9 * torch.nn.functional.one_hot(classes.long(), 7).float()
        return logits, (classes % 2).float() / 2 + 0.25

    def coarse(self, images: Tensor) -> tuple[_Names, Tensor]:
        means = images.mean(dim=(1, 2, 3))
        logits, confidence = self._logits(means)
        return _Names(logits, means), confidence

    def fine(self, images: Tensor, state: _Names) -> tuple[Tensor, Tensor]:
        assert torch.equal(images.mean(dim=(1, 2, 3)), state.means)
        return self._logits(state.means + 1)


def test_any_engine_predicts_and_streams(model: CoarseToFineViT) -> None:
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, *model.image_size)
    predictor = Predictor(_Means(model), 0.5)
    answer = predictor(images)
    assert answer.logits.argmax(dim=-1).tolist() == [1, 1, 3, 3, 5, 5]
    assert answer.stage.tolist() == [FINE, COARSE] * 3
    (streamed,) = predictor.stream([images], fine_batch=3, ordered=True)
    assert torch.equal(streamed.logits, answer.logits)
    with pytest.raises(CfvitError, match="compile is True: leave it out"):
        Predictor(_Means(model), 0.5, compile=True)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile, torch.nn.Module.state_dict])
def test_what_is_no_model_is_refused(wrap: Any, model: CoarseToFineViT) -> None:
    with pytest.raises(CfvitError, match=r"^the model is a \w+: give one as cfvit.load gives it"):
        Predictor(wrap(model), 0.5)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan"), "0.5", [0.5], 0.5j, torch.ones(2), True, False])
def test_a_threshold_that_is_no_number_in_its_range_is_refused(model: CoarseToFineViT, threshold: Any) -> None:
    with pytest.raises(CfvitError, match=rf"^threshold is {re.escape(repr(threshold))}: give a number between 0"):
        Predictor(model, threshold)


@pytest.mark.parametrize("threshold", [1, 0.5, np.float32(0.5), torch.tensor(0.5)])
def test_numbers_of_any_kind_are_thresholds(model: CoarseToFineViT, threshold: Any) -> None:
    assert Predictor(model, threshold).threshold == float(threshold)


def test_without_any_threshold_one_is_asked_for(model: CoarseToFineViT) -> None:
    with pytest.raises(CfvitError, match=r"no calibrated threshold: give one .*--threshold"):
        Predictor(model)


def test_the_calibrated_threshold_is_the_default(model: CoarseToFineViT) -> None:
    model.threshold = 0.0
    assert Predictor(model).threshold == 0
    assert Predictor(model, 0.7).threshold == 0.7


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Counts what is compiled from now on, by a backend that has nothing to do."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    return counter


def test_nothing_is_compiled_unless_asked_for(
    model: CoarseToFineViT, images: Tensor, graphs: CompileCounterWithBackend
) -> None:
    for choice in (None, False):
        Predictor(model, 1, compile=choice)(images)
    assert graphs.frame_count == 0


@pytest.mark.parametrize("threshold", [0, 1])
def test_images_at_half_their_sides_are_refused_whether_any_goes_on_or_not(
    threshold: float, model: CoarseToFineViT
) -> None:
    with pytest.raises(CfvitError, match=r"\[2, 3, 16, 16\]: give normalised \[B, 3, 32, 32\]"):
        Predictor(model, threshold)(torch.zeros(2, 3, 16, 16))


@pytest.mark.parametrize("threshold", [0, 1])
def test_images_that_are_no_floats_were_not_normalised_and_are_refused(
    threshold: float, model: CoarseToFineViT
) -> None:
    with pytest.raises(CfvitError, match=r"images of uint8: give floats \[B, 3, 32, 32\], normalised"):
        Predictor(model, threshold)(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
