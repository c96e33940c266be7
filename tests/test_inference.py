"""Which stage answers which image, and with what."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cfvit import CfvitError, CoarseState, CoarseToFineOutput, CoarseToFineViT, Prediction, Predictor
from cfvit.inference import COARSE, FINE, goes_on

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
    ordered = _confidence(both.coarse).sort().values
    middle = COUNT // 2
    assert ordered[middle] - ordered[middle - 1] > 1e-3
    return float(ordered[middle - 1 : middle + 1].mean())


def _confidence(logits: Tensor) -> Tensor:
    return logits.float().softmax(dim=-1).amax(dim=-1)


def _check(prediction: Prediction, logits: Tensor, stage: Tensor) -> None:
    torch.testing.assert_close(prediction.logits, logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prediction.confidence, _confidence(logits), atol=1e-5, rtol=1e-5)
    assert torch.equal(prediction.stage, stage)


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
    _check(Predictor(model, 0)(images), both.coarse, torch.full((COUNT,), COARSE))
    assert calls == []


def test_threshold_1_gives_the_fine_answers(model: CoarseToFineViT, images: Tensor, both: CoarseToFineOutput) -> None:
    _check(Predictor(model, 1)(images), both.fine, torch.full((COUNT,), FINE))


def test_threshold_1_sends_on_even_what_rounds_to_1(model: CoarseToFineViT, images: Tensor) -> None:
    with torch.no_grad():
        model.get_parameter("backbone.head.weight").mul_(1e4)
        assert (model.coarse(images).confidence == 1).all()
    assert (Predictor(model, 1)(images).stage == FINE).all()
    assert (Predictor(model, 0.999999)(images).stage == COARSE).all()


def test_each_image_gets_the_answer_of_its_stage(
    model: CoarseToFineViT, images: Tensor, both: CoarseToFineOutput, between: float
) -> None:
    hard = _confidence(both.coarse) < between
    expected = torch.where(hard[:, None], both.fine, both.coarse)
    _check(Predictor(model, between)(images), expected, hard.long())


def test_a_batch_is_answered_like_its_images_alone(model: CoarseToFineViT, images: Tensor, between: float) -> None:
    predictor = Predictor(model, between)
    alone = [predictor(image[None]) for image in images]
    stage = torch.cat([prediction.stage for prediction in alone])
    assert stage.sum() == COUNT // 2
    _check(predictor(images), torch.cat([prediction.logits for prediction in alone]), stage)


def test_answers_keep_the_order_of_the_images(model: CoarseToFineViT, images: Tensor, between: float) -> None:
    predictor = Predictor(model, between)
    straight = predictor(images)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    _check(predictor(images[order]), straight.logits[order], straight.stage[order])


def test_the_fine_stage_runs_once_on_exactly_the_hard_images(
    model: CoarseToFineViT, images: Tensor, both: CoarseToFineOutput, between: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _record_fine(model, monkeypatch)
    Predictor(model, between)(images)
    assert len(calls) == 1
    assert torch.equal(calls[0], images[_confidence(both.coarse) < between])


def test_an_image_at_the_threshold_exits(model: CoarseToFineViT, images: Tensor, both: CoarseToFineOutput) -> None:
    confidence = _confidence(both.coarse)
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
    spoilt = int(_confidence(both.coarse).argmax())
    straight = Predictor(model, between)(images)
    images[spoilt] = torch.nan
    prediction = Predictor(model, between)(images)
    assert straight.stage[spoilt] == COARSE
    assert prediction.stage[spoilt] == FINE
    assert prediction.confidence[spoilt] == -1
    others = torch.arange(COUNT) != spoilt
    _check(
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


def test_the_model_is_put_into_evaluation_mode(model: CoarseToFineViT) -> None:
    assert not Predictor(model.train(), 0.5).model.training


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_outside_its_range_is_refused(model: CoarseToFineViT, threshold: float) -> None:
    with pytest.raises(CfvitError, match=rf"^threshold is {threshold}: give"):
        Predictor(model, threshold)


def test_without_any_threshold_one_is_asked_for(model: CoarseToFineViT) -> None:
    with pytest.raises(CfvitError, match="no calibrated threshold"):
        Predictor(model)


def test_the_calibrated_threshold_is_the_default(model: CoarseToFineViT) -> None:
    model.threshold = 0.0
    assert Predictor(model).threshold == 0
    assert Predictor(model, 0.7).threshold == 0.7


def test_images_of_another_shape_are_refused(model: CoarseToFineViT) -> None:
    with pytest.raises(CfvitError, match=r"\[2, 3, 16, 16\]"):
        Predictor(model, 0.5)(torch.zeros(2, 3, 16, 16))
