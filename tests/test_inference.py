"""Which stage answers which image, and with what."""

from __future__ import annotations

import contextlib
import gc
import itertools
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from cfvit import CfvitError, CoarseState, CoarseToFineOutput, CoarseToFineViT, Prediction, Predictor, load
from cfvit.inference.predictor import COARSE, FINE, FINE_BATCH, StreamedPrediction, _Hard, _Queue
from cfvit.modeling.exit import goes_on
from cfvit.modeling.tokens import coarse_image

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


@pytest.mark.parametrize("compile", ["yes", 2, "max-autotune"])
def test_another_way_to_compile_is_refused(compile: Any, model: CoarseToFineViT) -> None:
    with pytest.raises(CfvitError, match=f"compile is {compile!r}: give True, False, or None"):
        Predictor(model, 0.5, compile=compile)


def test_a_predictor_keeps_its_model(model: CoarseToFineViT) -> None:
    with pytest.raises(AttributeError, match="model"):
        Predictor(model, 0.5).model = model  # pyright: ignore[reportAttributeAccessIssue]


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


class _Counted:
    """Batches of images, each its own tensor, that says how far it was read and which batches still live."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches, self.read, self.closed = batches, 0, False
        self.alive: list[weakref.ref[Tensor]] = []

    def __iter__(self) -> Iterator[Tensor]:
        try:
            for batch in self.batches:
                self.read += len(batch)
                self.alive.append(weakref.ref(batch))
                yield batch
                del batch
        finally:
            self.closed = True

    def living(self) -> int:
        return sum(reference() is not None for reference in self.alive)


def _joined(answers: Iterable[StreamedPrediction]) -> StreamedPrediction:
    """All answers by rising index."""
    listed = list(answers)
    parts = (torch.cat([getattr(answer, f.name) for answer in listed]) for f in fields(StreamedPrediction))
    joined = StreamedPrediction(*parts)
    return joined[joined.index.argsort()]


def _batches(images: Tensor, sizes: Iterable[int]) -> list[Tensor]:
    return list(images.split(list(sizes)))


def _assert_streamed(answers: Iterable[StreamedPrediction], expected: Prediction) -> None:
    """Every image's answer once, and the one that the predictor gives of all at once."""
    joined = _joined(answers)
    assert joined.index.tolist() == list(range(len(expected.stage)))
    _check(joined, expected.logits, expected.stage)


MANY = 24


@pytest.fixture(scope="module")
def steady(make_model: Callable[..., CoarseToFineViT]) -> CoarseToFineViT:
    return make_model(depth=4)


@pytest.fixture(scope="module")
def many(steady: CoarseToFineViT) -> Tensor:
    return torch.randn(MANY, 3, *steady.image_size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def middle(steady: CoarseToFineViT, many: Tensor) -> float:
    """A threshold that a part of the images reaches, and none comes close to."""
    with torch.no_grad():
        ordered = _confidence(steady.coarse(many).logits).sort().values
    widest = MANY // 3 + int(ordered[MANY // 3 : -MANY // 3].diff().argmax())
    assert ordered[widest + 1] - ordered[widest] > 1e-4
    return float(ordered[widest : widest + 2].mean())


def _hard_first(predictor: Predictor, images: Tensor) -> tuple[Tensor, Tensor]:
    """One hard and one easy image."""
    stage = predictor(images).stage
    return images[stage == FINE][:1], images[stage == COARSE][:1]


class TestStream:
    """The hard images of many batches go on together, and nothing else changes."""

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        sizes=st.lists(st.integers(0, 6), max_size=8),
        fine_batch=st.none() | st.integers(1, 9),
        ordered=st.booleans(),
        threshold=st.sampled_from([0.0, None, 1.0]),
    )
    def test_every_image_is_answered_once_and_as_in_a_batch(
        self,
        steady: CoarseToFineViT,
        many: Tensor,
        middle: float,
        sizes: list[int],
        fine_batch: int | None,
        ordered: bool,
        threshold: float | None,
    ) -> None:
        predictor = Predictor(steady, middle if threshold is None else threshold)
        images = many.repeat(2, 1, 1, 1)[: sum(sizes)]
        with _fine_batches(predictor) as calls:
            answers = list(predictor.stream(_batches(images, sizes), fine_batch=fine_batch, ordered=ordered))
        if not answers:
            assert sum(sizes) == 0
            return
        _assert_streamed(answers, predictor(images))
        if ordered:
            assert torch.cat([answer.index for answer in answers]).tolist() == list(range(len(images)))
        full = fine_batch or FINE_BATCH["cpu"]
        assert all(count == full for count in calls[:-1])
        assert all(0 < count <= full for count in calls[-1:])

    def test_without_batches_there_is_no_answer(self, steady: CoarseToFineViT) -> None:
        assert list(Predictor(steady, 0.5).stream([])) == []

    def test_fine_batches_of_a_long_stream_are_full(self, steady: CoarseToFineViT, many: Tensor, middle: float) -> None:
        predictor = Predictor(steady, middle)
        with _fine_batches(predictor) as calls:
            answers = predictor.stream((many[:5] for _ in range(60)), fine_batch=5)
            answered = sum(len(answer.index) for answer in answers)
        assert answered == 300
        assert len(calls) > 10
        assert sum(calls) / (5 * len(calls)) >= 0.95

    @pytest.mark.parametrize("first", [0, 1, 4])
    def test_small_batches_do_not_make_small_fine_batches(
        self, first: int, steady: CoarseToFineViT, many: Tensor
    ) -> None:
        predictor = Predictor(steady, 1)
        with _fine_batches(predictor) as calls:
            list(predictor.stream([many[:first], *(many[i : i + 1] for i in range(20)), many[:20]]))
        assert calls == [FINE_BATCH["cpu"], first + 40 - FINE_BATCH["cpu"]]

    def test_a_hard_image_of_an_endless_stream_waits_for_a_bounded_number(
        self, steady: CoarseToFineViT, many: Tensor, middle: float
    ) -> None:
        predictor = Predictor(steady, middle)
        hard, easy = _hard_first(predictor, many)
        source = _Counted(itertools.chain([torch.cat([hard, easy])], (easy.clone() for _ in itertools.count())))
        for answer in predictor.stream(source, fine_batch=2, patience=50):
            if answer.stage[0] == FINE:
                assert answer.index.tolist() == [0]
                break
        assert 50 < source.read <= 50 + 2

    def test_in_order_what_is_behind_a_hard_image_waits_with_it(
        self, steady: CoarseToFineViT, many: Tensor, middle: float
    ) -> None:
        predictor = Predictor(steady, middle)
        hard, easy = _hard_first(predictor, many)
        source = _Counted(itertools.chain([hard.clone()], (easy.clone() for _ in itertools.count())))
        first = next(iter(predictor.stream(source, fine_batch=1, ordered=True)))
        assert first.index.tolist() == [0]
        source = _Counted(itertools.chain([hard.clone()], (easy.clone() for _ in itertools.count())))
        following = itertools.islice(predictor.stream(source, fine_batch=3, patience=30, ordered=True), 2)
        assert torch.cat([answer.index for answer in following]).tolist() == list(range(source.read))
        assert source.read <= 30 + 2

    @pytest.mark.parametrize("ordered", [False, True])
    def test_images_are_let_go(self, ordered: bool, steady: CoarseToFineViT, many: Tensor, middle: float) -> None:
        predictor = Predictor(steady, middle)
        source = _Counted(many[i % 20 : i % 20 + 3].clone() for i in range(60))
        most = max(source.living() for _ in predictor.stream(source, fine_batch=4, ordered=ordered))
        assert source.read == 180
        assert most <= 2

    def test_a_few_that_wait_do_not_keep_a_large_batch(self, steady: CoarseToFineViT, many: Tensor) -> None:
        queue = _Queue()
        with torch.inference_mode():
            queue.put(_Hard(many.clone(), steady.coarse(many), torch.arange(MANY)))
        taken = queue.take(MANY - 1)
        assert (len(taken.index), queue.count, queue.parts[0].index.tolist()) == (MANY - 1, 1, [MANY - 1])
        waiting = queue.parts[0]
        for tensor in (waiting.images, *(getattr(waiting.state, f.name) for f in fields(CoarseState))):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes

    def test_the_queue_keeps_its_order(self, steady: CoarseToFineViT, many: Tensor) -> None:
        queue = _Queue()
        with torch.inference_mode():
            for index in torch.arange(MANY).split([5, 0, 1, 12, 6]):
                queue.put(_Hard(many[index], steady.coarse(many[index]), index))
        assert queue.waits_since(30) == 30
        taken = [queue.take(most) for most in (7, 7, 1, 100)]
        assert [len(part.index) for part in taken] == [7, 7, 1, 9]
        assert torch.cat([part.index for part in taken]).tolist() == list(range(MANY))
        assert torch.equal(torch.cat([part.images for part in taken]), many)
        assert (queue.count, queue.waits_since(30)) == (0, 0)

    @pytest.mark.parametrize("ordered", [False, True])
    def test_a_consumer_may_stop_early(
        self, ordered: bool, steady: CoarseToFineViT, many: Tensor, middle: float
    ) -> None:
        source = _Counted(many[:3].clone() for _ in itertools.count())
        answers = Predictor(steady, middle).stream(source, ordered=ordered)
        next(iter(answers))
        read = source.read
        answers.close()  # type: ignore[attr-defined]
        gc.collect()
        assert source.closed
        assert source.read == read
        assert list(answers) == []
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()

    def test_nothing_is_read_before_the_first_answer_is_asked_for(self, steady: CoarseToFineViT, many: Tensor) -> None:
        source = _Counted([many])
        Predictor(steady, 1).stream(source)
        assert source.read == 0

    def test_between_answers_gradients_flow_as_before(
        self, steady: CoarseToFineViT, many: Tensor, middle: float
    ) -> None:
        for _ in Predictor(steady, middle).stream([many[:4], many[4:8]]):
            assert not torch.is_inference_mode_enabled()
            assert torch.is_grad_enabled()

    @pytest.mark.parametrize("ordered", [False, True])
    @pytest.mark.parametrize("fine_batch", [1, 4, 100])
    def test_if_the_source_fails_what_came_before_is_answered_first(
        self, fine_batch: int, ordered: bool, steady: CoarseToFineViT, many: Tensor, middle: float
    ) -> None:
        failure = OSError("the camera is gone")

        def batches() -> Iterator[Tensor]:
            yield from many.split(5)
            raise failure

        predictor, answers = Predictor(steady, middle), []
        with pytest.raises(OSError) as caught:
            answers.extend(predictor.stream(batches(), fine_batch=fine_batch, ordered=ordered))
        assert caught.value is failure
        answers.clear()
        with contextlib.suppress(OSError):
            for answer in predictor.stream(batches(), fine_batch=fine_batch, ordered=ordered):
                answers.append(answer)
        _assert_streamed(answers, predictor(many))

    @pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 32, 32), (3, 32, 32), (2, 3, 16, 16)])
    def test_a_batch_of_another_shape_is_refused_when_the_others_are_answered(
        self, shape: tuple[int, ...], steady: CoarseToFineViT, many: Tensor, middle: float
    ) -> None:
        predictor, answers = Predictor(steady, middle), []
        source = _Counted([many[:4], many[4:8], torch.zeros(shape), many[8:]])
        with pytest.raises(CfvitError, match=re.escape(str(list(shape)))):
            for answer in predictor.stream(source, fine_batch=3):
                answers.append(answer)
        _assert_streamed(answers, predictor(many[:8]))

    @pytest.mark.parametrize("ordered", [False, True])
    @pytest.mark.parametrize("lost", [[0], [3], [0, 3, 4], list(range(12))])
    def test_images_that_cannot_be_had_whole_are_the_only_ones_without_an_answer(
        self, lost: list[int], ordered: bool, steady: CoarseToFineViT, many: Tensor
    ) -> None:
        def whole(places: list[int]) -> Tensor:
            if bad := [place for place in places if place in lost]:
                raise OSError(f"cannot read {bad[0]}")
            return many[places]

        predictor, answers = Predictor(steady, 1), []
        source = _Counted([*map(coarse_image, many.split(4))])
        with pytest.raises(OSError, match=f"cannot read {lost[0]}") as caught:
            for answer in predictor.stream(source, fine_batch=4, whole=whole, ordered=ordered):
                answers.append(answer)
        read = 4 * (1 + lost[0] // 4)
        unanswered = [place for place in lost if place < read]
        assert source.read == read
        assert caught.value.__notes__ == [f"images of the stream without an answer: {', '.join(map(str, unanswered))}"]
        answered = [place for place in range(read) if place not in lost]
        found = [place for answer in answers for place in answer.index.tolist()]
        assert (found if ordered else sorted(found)) == answered
        if answered:
            expected = predictor(many[answered])
            _check(_joined(answers), expected.logits, expected.stage)

    def test_a_fine_stage_that_fails_on_large_batches_loses_none(
        self, steady: CoarseToFineViT, many: Tensor, middle: float
    ) -> None:
        def whole(places: list[int]) -> Tensor:
            if len(places) > 2:
                raise MemoryError
            return many[places]

        predictor, answers = Predictor(steady, middle), []
        with pytest.raises(MemoryError) as caught:
            for answer in predictor.stream([coarse_image(many)], whole=whole, ordered=True):
                answers.append(answer)
        assert not hasattr(caught.value, "__notes__")
        _assert_streamed(answers, predictor(many))

    def test_whole_images_are_asked_for_by_the_places_of_those_that_go_on(
        self, steady: CoarseToFineViT, many: Tensor, middle: float
    ) -> None:
        predictor, asked = Predictor(steady, middle), []

        def whole(places: list[int]) -> Tensor:
            asked.extend(places)
            return many[places]

        answers = predictor.stream(map(coarse_image, many.split(5)), fine_batch=3, whole=whole)
        expected = predictor(many)
        _assert_streamed(answers, expected)
        assert asked == expected.stage.nonzero().flatten().tolist()

    def test_whole_images_come_in_the_right_number(self, steady: CoarseToFineViT, many: Tensor) -> None:
        answers = Predictor(steady, 1).stream([coarse_image(many[:4])], whole=lambda places: many[places[1:]])
        with pytest.raises(CfvitError, match="3 whole images for 4 places: give one for each"):
            list(answers)

    def test_what_is_no_tensor_is_refused_with_its_place(self, steady: CoarseToFineViT, many: Tensor) -> None:
        batches: list[Any] = [many[:4], [many[4:8], torch.zeros(4)]]
        with pytest.raises(
            CfvitError, match=r"images are a list: give a tensor, normalised \[B, 3, 32, 32\]"
        ) as caught:
            list(Predictor(steady, 0).stream(batches))
        assert caught.value.__notes__ == ["in the batch that begins with image 4 of the stream, counted from 0"]

    def test_what_fills_the_memory_is_let_go_before_the_halves_are_tried(
        self, steady: CoarseToFineViT, many: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        held: list[weakref.ref[Tensor]] = []
        living: list[int] = []

        def fine(images: Tensor, state: CoarseState) -> Tensor:
            living.append(sum(reference() is not None for reference in held))
            features = images * 2
            held.append(weakref.ref(features))
            if len(images) > 2:
                raise MemoryError(len(features))
            return state.logits

        monkeypatch.setattr(steady, "fine", fine)
        with pytest.raises(MemoryError):
            list(Predictor(steady, 1, compile=False).stream([many[:8]]))
        assert living == [0] * 7

    def test_where_whole_images_are_to_come_batches_have_half_their_sides(
        self, steady: CoarseToFineViT, many: Tensor
    ) -> None:
        answers = Predictor(steady, 0).stream([many], whole=lambda places: many[places])
        with pytest.raises(CfvitError, match=r"\[24, 3, 32, 32\]: give normalised \[B, 3, 16, 16\]"):
            list(answers)

    @pytest.mark.parametrize("given", [{"fine_batch": 0}, {"fine_batch": -1}, {"patience": 0}])
    def test_numbers_below_one_are_refused_before_anything_is_read(
        self, given: dict[str, Any], steady: CoarseToFineViT
    ) -> None:
        ((name, value),) = given.items()
        with pytest.raises(CfvitError, match=rf"^{name} is {value}: give at least 1"):
            Predictor(steady, 1).stream([], **given)

    def test_answers_are_picked_by_a_mask(self, steady: CoarseToFineViT, many: Tensor, middle: float) -> None:
        (answer,) = Predictor(steady, 0).stream([many[:4]])
        assert answer[torch.tensor([False, True, False, True])].index.tolist() == [1, 3]

    def test_an_image_that_is_not_a_number_goes_on_and_spoils_no_other(
        self, steady: CoarseToFineViT, many: Tensor, middle: float
    ) -> None:
        predictor = Predictor(steady, middle)
        straight, spoilt = predictor(many), many.clone()
        place = int(straight.stage.argmin())
        spoilt[place] = torch.nan
        joined = _joined(predictor.stream(spoilt.split(5), fine_batch=4))
        assert (joined.stage[place], joined.confidence[place]) == (FINE, -1)
        others = torch.arange(MANY) != place
        torch.testing.assert_close(joined.logits[others], straight.logits[others], atol=1e-5, rtol=1e-5)

    def test_lower_precision(self, make_model: Callable[..., CoarseToFineViT], many: Tensor) -> None:
        predictor = Predictor(make_model(depth=4).to(torch.bfloat16), 1)
        joined = _joined(predictor.stream(many.split(5), fine_batch=4))
        assert joined.logits.dtype == torch.bfloat16
        assert joined.confidence.dtype == torch.float32

    @pytest.mark.parametrize("accelerated", [None, False])
    def test_the_bundled_model_streams_what_it_answers(self, accelerated: bool | None) -> None:
        model = load("deit_tiny_imagenette").float()
        smooth = torch.randn(8, 3, 7, 7, generator=torch.Generator().manual_seed(0))
        images = torch.nn.functional.interpolate(smooth, model.image_size, mode="bilinear")
        with torch.inference_mode():
            ordered = model.exit.coarse(model.coarse(images).logits).sort().values
        widest = 2 + int(ordered[2:6].diff().argmax())
        predictor = Predictor(model, float(ordered[widest : widest + 2].mean()), compile=accelerated)
        joined = _joined(predictor.stream(images.split(3), ordered=True))
        expected = predictor(images)
        assert torch.equal(joined.stage, expected.stage)
        assert 0 < joined.stage.sum() < 8
        torch.testing.assert_close(joined.logits, expected.logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(joined.confidence, expected.confidence, atol=1e-4, rtol=0)


@contextlib.contextmanager
def _fine_batches(predictor: Predictor) -> Iterator[list[int]]:
    """How many images the fine stage is given each time."""
    counts: list[int] = []
    now = predictor._stages.now

    def recording() -> tuple[Any, Any]:
        coarse, fine = now()
        return coarse, lambda images, state: counts.append(len(images)) or fine(images, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor._stages, "now", recording)
        yield counts


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Counts what is compiled from now on, by a backend that has nothing to do."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    return counter


def test_compiled_stages_answer_alike_and_take_any_number_of_images(
    make_model: Callable[..., CoarseToFineViT], many: Tensor, graphs: CompileCounterWithBackend
) -> None:
    model = make_model(depth=1)
    with torch.no_grad():
        threshold = float(model.coarse(many).confidence.sort().values[MANY // 2 - 1 : MANY // 2 + 1].mean())
    compiled, plain = Predictor(model, threshold, compile=True), Predictor(model, threshold, compile=False)
    expected = plain(many)
    _check(compiled(many), expected.logits, expected.stage)
    _assert_streamed(compiled.stream(many.split(7), fine_batch=4), expected)
    ready = graphs.frame_count
    assert ready >= 2
    _assert_streamed(compiled.stream(many.split(6), fine_batch=3), expected)
    assert graphs.frame_count == ready


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
