"""Streams: the hard images of many batches go on together, and nothing else changes."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import check_prediction, highest_probability
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from cfvit import CfvitError, CoarseState, CoarseToFineViT, Prediction, Predictor, load
from cfvit.inference.predictor import FINE_BATCH
from cfvit.inference.stream import COARSE, FAILED, FINE, HardImages, HardQueue, StreamedPrediction, prefetched
from cfvit.modeling.tokens import coarse_image


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
    check_prediction(joined, expected.logits, expected.stage)


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
        ordered = highest_probability(steady.coarse(many).logits).sort().values
    widest = MANY // 3 + int(ordered[MANY // 3 : -MANY // 3].diff().argmax())
    assert ordered[widest + 1] - ordered[widest] > 1e-4
    return float(ordered[widest : widest + 2].mean())


def _hard_first(predictor: Predictor, images: Tensor) -> tuple[Tensor, Tensor]:
    """One hard and one easy image."""
    stage = predictor(images).stage
    return images[stage == FINE][:1], images[stage == COARSE][:1]


@contextlib.contextmanager
def _fine_batches(predictor: Predictor) -> Iterator[list[int]]:
    """How many images the fine stage is given each time."""
    counts: list[int] = []
    fine = predictor.engine.fine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor.engine, "fine", lambda images, state: counts.append(len(images)) or fine(images, state))
        yield counts


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 6), max_size=8),
    fine_batch=st.none() | st.integers(1, 9),
    ordered=st.booleans(),
    threshold=st.sampled_from([0.0, None, 1.0]),
)
def test_every_image_is_answered_once_and_as_in_a_batch(
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


def test_without_batches_there_is_no_answer(steady: CoarseToFineViT) -> None:
    assert list(Predictor(steady, 0.5).stream([])) == []


def test_fine_batches_of_a_long_stream_are_full(steady: CoarseToFineViT, many: Tensor, middle: float) -> None:
    predictor = Predictor(steady, middle)
    with _fine_batches(predictor) as calls:
        answers = predictor.stream((many[:5] for _ in range(60)), fine_batch=5)
        answered = sum(len(answer.index) for answer in answers)
    assert answered == 300
    assert len(calls) > 10
    assert sum(calls) / (5 * len(calls)) >= 0.95


@pytest.mark.parametrize("first", [0, 1, 4])
def test_small_batches_do_not_make_small_fine_batches(first: int, steady: CoarseToFineViT, many: Tensor) -> None:
    predictor = Predictor(steady, 1)
    with _fine_batches(predictor) as calls:
        list(predictor.stream([many[:first], *(many[i : i + 1] for i in range(20)), many[:20]]))
    assert calls == [FINE_BATCH["cpu"], first + 40 - FINE_BATCH["cpu"]]


def test_a_hard_image_of_an_endless_stream_waits_for_a_bounded_number(
    steady: CoarseToFineViT, many: Tensor, middle: float
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
    steady: CoarseToFineViT, many: Tensor, middle: float
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
def test_images_are_let_go(ordered: bool, steady: CoarseToFineViT, many: Tensor, middle: float) -> None:
    predictor = Predictor(steady, middle)
    source = _Counted(many[i % 20 : i % 20 + 3].clone() for i in range(60))
    most = max(source.living() for _ in predictor.stream(source, fine_batch=4, ordered=ordered))
    assert source.read == 180
    assert most <= 2


def test_a_few_that_wait_do_not_keep_a_large_batch(steady: CoarseToFineViT, many: Tensor) -> None:
    queue = HardQueue()
    with torch.inference_mode():
        queue.put(HardImages(many.clone(), torch.arange(MANY), steady.coarse(many)))
    taken = queue.take(MANY - 1)
    assert (len(taken.index), len(queue), queue.parts[0].index.tolist()) == (MANY - 1, 1, [MANY - 1])
    waiting = queue.parts[0]
    for tensor in (waiting.images, *(getattr(waiting.state, f.name) for f in fields(CoarseState))):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_the_queue_keeps_its_order(steady: CoarseToFineViT, many: Tensor) -> None:
    queue = HardQueue()
    with torch.inference_mode():
        for index in torch.arange(MANY).split([5, 0, 1, 12, 6]):
            queue.put(HardImages(many[index], index, steady.coarse(many[index])))
    assert len(queue) == MANY
    taken = [queue.take(most) for most in (7, 7, 1, 100)]
    assert [len(part.index) for part in taken] == [7, 7, 1, 9]
    assert torch.cat([part.index for part in taken]).tolist() == list(range(MANY))
    assert torch.equal(torch.cat([part.images for part in taken]), many)
    assert len(queue) == 0


@pytest.mark.parametrize("ordered", [False, True])
def test_a_consumer_may_stop_early(ordered: bool, steady: CoarseToFineViT, many: Tensor, middle: float) -> None:
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


def test_nothing_is_read_before_the_first_answer_is_asked_for(steady: CoarseToFineViT, many: Tensor) -> None:
    source = _Counted([many])
    Predictor(steady, 1).stream(source)
    assert source.read == 0


def test_between_answers_gradients_flow_as_before(steady: CoarseToFineViT, many: Tensor, middle: float) -> None:
    for _ in Predictor(steady, middle).stream([many[:4], many[4:8]]):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("fine_batch", [1, 4, 100])
def test_if_the_source_fails_what_came_before_is_answered_first(
    fine_batch: int, ordered: bool, steady: CoarseToFineViT, many: Tensor, middle: float
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
    shape: tuple[int, ...], steady: CoarseToFineViT, many: Tensor, middle: float
) -> None:
    predictor, answers = Predictor(steady, middle), []
    source = _Counted([many[:4], many[4:8], torch.zeros(shape), many[8:]])
    with pytest.raises(CfvitError, match=re.escape(str(list(shape)))):
        for answer in predictor.stream(source, fine_batch=3):
            answers.append(answer)
    _assert_streamed(answers, predictor(many[:8]))


def _losing(lost: list[int], many: Tensor) -> Callable[[list[int]], Tensor]:
    """Gives whole images, but not the lost ones, nor others that are asked for with them."""

    def whole(places: list[int]) -> Tensor:
        if bad := [place for place in places if place in lost]:
            raise OSError(f"cannot read {bad[0]}")
        return many[places]

    return whole


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("lost", [[0], [3], [0, 3, 4], list(range(12))])
def test_a_fine_batch_that_fails_ends_the_stream(
    lost: list[int], ordered: bool, steady: CoarseToFineViT, many: Tensor
) -> None:
    predictor, answers = Predictor(steady, 1), []
    source = _Counted([*map(coarse_image, many.split(4))])
    with pytest.raises(OSError, match=f"cannot read {lost[0]}") as caught:
        for answer in predictor.stream(source, fine_batch=4, whole=_losing(lost, many), ordered=ordered):
            answers.append(answer)
    first = 4 * (lost[0] // 4)
    assert source.read == first + 4
    failed = ", ".join(map(str, range(first, first + 4)))
    assert caught.value.__notes__ == [f"images of the stream without an answer: {failed}"]
    if first:
        _assert_streamed(answers, predictor(many[:first]))
    assert sum(len(answer.index) for answer in answers) == first


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("fine_batch", [1, 3, 100])
@pytest.mark.parametrize("lost", [[], [0], [3, 4, 23], list(range(MANY))])
def test_where_errors_are_reported_all_other_batches_are_answered(
    lost: list[int], fine_batch: int, ordered: bool, steady: CoarseToFineViT, many: Tensor, middle: float
) -> None:
    """Every image is given once; the errors name the images with stage -1, which were with a lost one."""
    predictor = Predictor(steady, middle)
    expected, errors = predictor(many), {}
    answers = list(
        predictor.stream(
            map(coarse_image, many.split(5)),
            fine_batch=fine_batch,
            ordered=ordered,
            whole=_losing(lost, many),
            on_error=lambda places, error: errors.update(dict.fromkeys(places, str(error))),
        )
    )
    joined = _joined(answers)
    assert joined.index.tolist() == list(range(MANY))
    if ordered:
        assert torch.cat([answer.index for answer in answers]).tolist() == list(range(MANY))
    failed = joined.stage == FAILED
    assert failed.nonzero().flatten().tolist() == sorted(errors)
    hard = expected.stage.nonzero().flatten().tolist()
    in_batches = [hard[start : start + fine_batch] for start in range(0, len(hard), fine_batch)]
    assert sorted(errors) == sorted(place for part in in_batches if {*part} & {*lost} for place in part)
    assert joined.logits[failed].isnan().all()
    assert (joined.confidence[failed] == -1).all()
    check_prediction(joined[~failed], expected.logits[~failed], expected.stage[~failed])


@pytest.mark.parametrize("ordered", [False, True])
def test_where_errors_are_reported_a_batch_of_another_shape_is_one(
    ordered: bool, steady: CoarseToFineViT, many: Tensor, middle: float
) -> None:
    predictor, errors = Predictor(steady, middle), []
    source = [many[:4], torch.zeros(3, 3, 8, 8), many[4:]]
    answers = predictor.stream(
        source, fine_batch=3, ordered=ordered, on_error=lambda places, error: errors.append((places, str(error)))
    )
    joined = _joined(answers)
    assert joined.index.tolist() == list(range(MANY + 3))
    assert (joined.stage == FAILED).nonzero().flatten().tolist() == [4, 5, 6]
    assert errors == [([4, 5, 6], "images of shape [3, 3, 8, 8]: give normalised [B, 3, 32, 32]")]
    answered, expected = joined[joined.stage != FAILED], predictor(many)
    check_prediction(answered, expected.logits, expected.stage)


def test_where_errors_are_reported_what_the_source_raises_is_raised(steady: CoarseToFineViT, many: Tensor) -> None:
    def batches() -> Iterator[Tensor]:
        yield many[:4]
        raise OSError("the camera is gone")

    answers = Predictor(steady, 1).stream(batches(), on_error=lambda places, error: None)
    assert next(answers).index.tolist() == [0, 1, 2, 3]
    with pytest.raises(OSError, match="the camera is gone"):
        next(answers)


def test_whole_images_are_asked_for_by_the_places_of_those_that_go_on(
    steady: CoarseToFineViT, many: Tensor, middle: float
) -> None:
    predictor, asked = Predictor(steady, middle), []

    def whole(places: list[int]) -> Tensor:
        asked.extend(places)
        return many[places]

    answers = predictor.stream(map(coarse_image, many.split(5)), fine_batch=3, whole=whole)
    expected = predictor(many)
    _assert_streamed(answers, expected)
    assert asked == expected.stage.nonzero().flatten().tolist()


def test_whole_images_come_in_the_right_number(steady: CoarseToFineViT, many: Tensor) -> None:
    answers = Predictor(steady, 1).stream([coarse_image(many[:4])], whole=lambda places: many[places[1:]])
    with pytest.raises(CfvitError, match="3 whole images for 4 places: give one for each"):
        list(answers)


def test_what_is_no_tensor_is_refused_with_its_place(steady: CoarseToFineViT, many: Tensor) -> None:
    batches: list[Any] = [many[:4], [many[4:8], torch.zeros(4)]]
    with pytest.raises(CfvitError, match=r"images are a list: give a tensor, normalised \[B, 3, 32, 32\]") as caught:
        list(Predictor(steady, 0).stream(batches))
    assert caught.value.__notes__ == ["in the batch that begins with image 4 of the stream, counted from 0"]


def test_a_batch_that_fails_leaves_nothing_in_memory(
    steady: CoarseToFineViT, many: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Tensor]] = []
    living: list[int] = []

    def fine(images: Tensor, state: CoarseState) -> Tensor:
        living.append(sum(reference() is not None for reference in held))
        features = images * 2
        held.append(weakref.ref(features))
        raise MemoryError(len(features))

    monkeypatch.setattr(steady, "fine", fine)
    answers = Predictor(steady, 1, compile=False).stream([many[:8]], fine_batch=2, on_error=lambda places, error: None)
    assert torch.cat([answer.stage for answer in answers]).tolist() == [FAILED] * 8
    assert living == [0] * 4


def test_where_whole_images_are_to_come_batches_have_half_their_sides(steady: CoarseToFineViT, many: Tensor) -> None:
    answers = Predictor(steady, 0).stream([many], whole=lambda places: many[places])
    with pytest.raises(CfvitError, match=r"\[24, 3, 32, 32\]: give normalised \[B, 3, 16, 16\]"):
        list(answers)


@pytest.mark.parametrize(
    "given",
    [
        {"fine_batch": 0},
        {"fine_batch": -1},
        {"patience": 0},
        {"patience": math.nan},
        {"fine_batch": "2"},
        {"fine_batch": True},
        {"fine_batch": 2.0},
    ],
)
def test_what_is_no_number_of_images_is_refused_before_anything_is_read(
    given: dict[str, Any], steady: CoarseToFineViT
) -> None:
    ((name, value),) = given.items()
    with pytest.raises(CfvitError, match=rf"^{name} is {value!r}: give a whole number of at least 1"):
        Predictor(steady, 1).stream([], **given)


def test_answers_are_picked_by_a_mask(steady: CoarseToFineViT, many: Tensor, middle: float) -> None:
    (answer,) = Predictor(steady, 0).stream([many[:4]])
    assert answer[torch.tensor([False, True, False, True])].index.tolist() == [1, 3]


def test_an_image_that_is_not_a_number_goes_on_and_spoils_no_other(
    steady: CoarseToFineViT, many: Tensor, middle: float
) -> None:
    predictor = Predictor(steady, middle)
    straight, spoilt = predictor(many), many.clone()
    place = int(straight.stage.argmin())
    spoilt[place] = torch.nan
    joined = _joined(predictor.stream(spoilt.split(5), fine_batch=4))
    assert (joined.stage[place], joined.confidence[place]) == (FINE, -1)
    others = torch.arange(MANY) != place
    torch.testing.assert_close(joined.logits[others], straight.logits[others], atol=1e-5, rtol=1e-5)


def test_lower_precision(make_model: Callable[..., CoarseToFineViT], many: Tensor) -> None:
    predictor = Predictor(make_model(depth=4).to(torch.bfloat16), 1)
    joined = _joined(predictor.stream(many.split(5), fine_batch=4))
    assert joined.logits.dtype == torch.bfloat16
    assert joined.confidence.dtype == torch.float32


@pytest.mark.parametrize("accelerated", [None, False])
def test_the_bundled_model_streams_what_it_answers(accelerated: bool | None) -> None:
    model = load("deit_tiny_imagenet").float()
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


def test_a_compiled_stream_takes_any_number_of_images(
    make_model: Callable[..., CoarseToFineViT], many: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    model = make_model(depth=1)
    with torch.no_grad():
        threshold = float(model.coarse(many).confidence.sort().values[MANY // 2 - 1 : MANY // 2 + 1].mean())
    compiled, plain = Predictor(model, threshold, compile=True), Predictor(model, threshold, compile=False)
    expected = plain(many)
    check_prediction(compiled(many), expected.logits, expected.stage)
    _assert_streamed(compiled.stream(many.split(7), fine_batch=4), expected)
    ready = graphs.frame_count
    assert ready >= 2
    _assert_streamed(compiled.stream(many.split(6), fine_batch=3), expected)
    assert graphs.frame_count == ready


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
        monkeypatch.setattr("cfvit.inference.stream.placed", self._placed)

    def given(self, batches: Iterator[Any]) -> Iterator[Any]:
        weight: Any = SimpleNamespace(device=torch.device("cuda"))
        return prefetched(batches, weight)

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


def test_integers_are_not_converted_before_they_are_refused(steady: CoarseToFineViT) -> None:
    raw = torch.zeros(2, 3, *steady.image_size, dtype=torch.uint8)
    with pytest.raises(CfvitError, match="images of uint8: give floats"):
        list(Predictor(steady, 0).stream(prefetched([raw], next(steady.parameters()))))


def test_on_a_cpu_no_batch_is_asked_for_early() -> None:
    asked = []
    batches = (asked.append(number) or torch.full((1, 2), float(number)) for number in range(3))
    for number, images in enumerate(prefetched(batches, torch.empty(1, dtype=torch.float64))):
        assert (images.dtype, images[0, 0], len(asked)) == (torch.float64, number, number + 1)
