"""The scheduler gives each image its own answer, whatever comes, leaves or fails meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cfvit import CfvitError
from cfvit.deploy import Queues
from cfvit.deploy.scheduler import FOLLOWING, Answer, RefusedError, Scheduler
from cfvit.inference.stream import COARSE, FINE
from cfvit.modeling.batches import Rows
from cfvit.modeling.exit import goes_on

ETA = 0.5
SOON = 20.0
"""Seconds after which something that should happen at once has not."""


@dataclass(eq=False)
class FakeState(Rows):
    logits: Tensor
    number: Tensor


class FakeEngine:
    """An image's first pixel is its number. The logits are the number and the stage; the confidence follows from it.

    Attributes:
        batches: the numbers that each stage has seen, by batch.
        gate: a batch takes a permit of it, where there is one.
        begun: set when a batch is at the gate.
        fails: an image of this number makes its batch fail.
    """

    def __init__(self, gate: threading.Semaphore | None = None, fails: int | None = None) -> None:
        self.model, self.weight = SimpleNamespace(image_size=(2, 2)), torch.empty(0)
        self.batches: tuple[list[list[int]], list[list[int]]] = ([], [])
        self.gate, self.begun, self.fails = gate, threading.Event(), fails

    def coarse(self, images: Tensor) -> tuple[FakeState, Tensor]:
        numbers = self._pass(COARSE, images)
        state = FakeState(torch.stack([numbers, torch.zeros_like(numbers)], 1), numbers)
        return state, torch.tensor([confidence(int(number)) for number in numbers])

    def fine(self, images: Tensor, state: FakeState) -> tuple[Tensor, Tensor]:
        numbers = self._pass(FINE, images)
        assert torch.equal(numbers, state.number)
        return torch.stack([numbers, torch.ones_like(numbers)], 1), torch.ones_like(numbers)

    def _pass(self, stage: int, images: Tensor) -> Tensor:
        self.batches[stage].append(images[:, 0, 0, 0].int().tolist())
        self.begun.set()
        if self.gate is not None:
            self.gate.acquire()
        if self.fails in self.batches[stage][-1]:
            raise RuntimeError("out of memory")
        return images[:, 0, 0, 0]


def confidence(number: int) -> float:
    return number * 37 % 101 / 101


HARD = [number for number in range(100) if confidence(number) < ETA]
EASY = [number for number in range(100) if confidence(number) >= ETA]


def images(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def check(number: int, answer: Answer) -> None:
    assert answer.stage == int(goes_on(torch.tensor(confidence(number)), answer.eta))
    assert answer.logits.tolist() == [number, answer.stage]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def gated() -> Iterator[FakeEngine]:
    """An engine whose batches wait for permits; at the end it has as many as it likes."""
    engine = FakeEngine(threading.Semaphore(0))
    yield engine
    engine.gate.release(1000)  # pyright: ignore[reportOptionalMemberAccess]


ACTIONS = st.one_of(
    st.tuples(st.just("submit"), st.integers(1, 5)),
    st.tuples(st.just("cancel"), st.integers(0, 100)),
    st.tuples(st.just("eta"), st.floats(0, 1)),
    st.tuples(st.just("compute"), st.integers(1, 3)),
)
BATCH, WAIT = st.integers(1, 6), st.sampled_from([0.0, 1.0, 5.0])
QUEUES = st.builds(
    Queues,
    coarse_batch=BATCH,
    coarse_wait=WAIT,
    fine_batch=BATCH,
    fine_wait=WAIT,
    least_eta=st.sampled_from([None, 0.1]),
    target_wait=st.just(1.0),
    max_waiting=st.just(30),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTIONS, max_size=25), QUEUES)
def test_each_image_gets_its_own_answer_once(actions: list[tuple[str, int]], queues: Queues) -> None:
    gate = threading.Semaphore(0)
    engine = FakeEngine(gate)
    scheduler = Scheduler(engine, ETA, queues)
    futures: dict[int, Future[Answer]] = {}
    offered = 0
    for action, value in actions:
        if action == "submit":
            numbers = range(offered, offered + value)
            offered += value
            open_places = scheduler.max_waiting - scheduler.waiting
            try:
                futures.update(zip(numbers, scheduler.submit(images(numbers)), strict=True))
            except RefusedError:
                assert open_places < value
        elif action == "cancel" and futures:
            futures[sorted(futures)[value % len(futures)]].cancel()
        elif action == "eta":
            scheduler.eta = value
        elif action == "compute":
            gate.release(value)
    gate.release(1000)
    assert scheduler.drain(SOON)
    assert scheduler.waiting == 0
    for number, future in futures.items():
        assert future.done()
        if not future.cancelled():
            check(number, future.result())
    for stage in (COARSE, FINE):
        seen = [number for batch in engine.batches[stage] for number in batch]
        assert len(seen) == len(set(seen))
        assert set(seen) <= futures.keys()
        assert all(len(batch) <= scheduler.options[stage][0] for batch in engine.batches[stage])


def test_callers_on_many_threads_get_their_own_answers(engine: FakeEngine) -> None:
    scheduler = Scheduler(engine, ETA, Queues(max_waiting=10_000))
    answers: dict[int, Answer] = {}

    def call(first: int) -> None:
        for number in range(first, first + 50):
            answers[number] = scheduler.submit(images([number]))[0].result(SOON)

    threads = [threading.Thread(target=call, args=(first,)) for first in range(0, 400, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == list(range(400))
    for number, answer in answers.items():
        check(number, answer)


def test_too_many_images_are_refused_all_together(gated: FakeEngine) -> None:
    scheduler = Scheduler(gated, ETA, Queues(max_waiting=3))
    first = scheduler.submit(images([1, 2]))
    with pytest.raises(RefusedError, match="2 images are waiting, of 3 at most") as caught:
        scheduler.submit(images([3, 4]))
    assert caught.value.retry_after >= 1
    assert scheduler.waiting == 2
    assert first[1].cancel()
    assert len(scheduler.submit(images([3, 4]))) == 2


def test_an_image_that_was_cancelled_is_not_computed_further(gated: FakeEngine) -> None:
    scheduler = Scheduler(gated, ETA, Queues(coarse_batch=1, coarse_wait=0))
    hard, waiting = scheduler.submit(images(HARD[:2]))
    assert gated.begun.wait(SOON)
    assert hard.cancel() and waiting.cancel()
    assert scheduler.waiting == scheduler.lengths[COARSE] == 0
    gated.gate.release(1000)  # pyright: ignore[reportOptionalMemberAccess]
    assert scheduler.drain(SOON)
    assert gated.batches == ([[HARD[0]]], [])


def test_hard_images_of_many_requests_fill_a_fine_batch(engine: FakeEngine) -> None:
    scheduler = Scheduler(engine, ETA, Queues(coarse_batch=1, coarse_wait=0, fine_batch=4, fine_wait=3_600_000))
    futures = [scheduler.submit(images([number]))[0] for number in [*EASY[:3], *HARD[:4]]]
    assert all(future.result(SOON) for future in futures)
    assert engine.batches[FINE] == [HARD[:4]]


def test_a_batch_that_does_not_fill_begins_when_its_time_has_come(engine: FakeEngine) -> None:
    scheduler = Scheduler(engine, ETA, Queues(coarse_batch=100, coarse_wait=20, fine_batch=100, fine_wait=20))
    assert scheduler.submit(images(HARD[:1]))[0].result(SOON).stage == FINE


def test_draining_answers_what_waits_and_refuses_what_comes(engine: FakeEngine) -> None:
    scheduler = Scheduler(
        engine, ETA, Queues(coarse_batch=100, coarse_wait=3_600_000, fine_batch=100, fine_wait=3_600_000)
    )
    futures = scheduler.submit(images(range(20)))
    assert not any(future.done() for future in futures)
    assert scheduler.drain(SOON)
    for number, future in enumerate(futures):
        check(number, future.result(0))
    with pytest.raises(RefusedError, match="ending"):
        scheduler.submit(images([1]))


@pytest.mark.parametrize("stage", [COARSE, FINE])
def test_a_batch_that_fails_is_told_to_its_callers_alone(stage: int) -> None:
    scheduler = Scheduler(FakeEngine(fails=(EASY, HARD)[stage][0]), ETA, Queues(coarse_batch=1, coarse_wait=0))
    bad, good = (scheduler.submit(images([number]))[0] for number in (EASY, HARD)[stage][:2])
    with pytest.raises(RuntimeError, match="out of memory"):
        bad.result(SOON)
    check((EASY, HARD)[stage][1], good.result(SOON))
    assert scheduler.waiting == 0


def test_eta_falls_under_load_to_its_least_and_is_told(gated: FakeEngine) -> None:
    scheduler = Scheduler(gated, 0.9, Queues(coarse_batch=1, coarse_wait=0, least_eta=0.2, target_wait=20))
    first, late = scheduler.submit(images(EASY[:2]))
    assert gated.begun.wait(SOON)
    threading.Event().wait(0.05)  # more than twice the target
    gated.gate.release(1000)  # pyright: ignore[reportOptionalMemberAccess]
    assert 0.9 >= first.result(SOON).eta >= late.result(SOON).eta == scheduler.eta_now == 0.2
    assert scheduler.eta == 0.9


def test_eta_stays_without_a_least_one(engine: FakeEngine) -> None:
    scheduler = Scheduler(engine, ETA, Queues(target_wait=1e-6))
    assert scheduler.submit(images([1]))[0].result(SOON).eta == ETA


def test_eta_follows_a_budget_whatever_comes_and_stays_within_its_bounds(engine: FakeEngine) -> None:
    scheduler = Scheduler(engine, 0.9, Queues(coarse_batch=8, coarse_wait=0, least_eta=0.05), fine_share=0.2)
    generator = torch.Generator().manual_seed(0)

    def answered(numbers: list[int], count: int) -> list[Answer]:
        drawn = [numbers[i] for i in torch.randint(len(numbers), (count,), generator=generator).tolist()]
        futures = [
            future for start in range(0, count, 80) for future in _all_done(scheduler, drawn[start : start + 80])
        ]
        return [future.result(SOON) for future in futures]

    for numbers in (list(range(101)), HARD, list(range(101))):  # the traffic gets harder, and easier again
        answers = answered(numbers, 1600)
        share = sum(answer.stage for answer in answers) / len(answers)
        assert share == pytest.approx(0.2, abs=1 / (FOLLOWING * len(answers)))
        assert sum(answer.stage for answer in answers[-800:]) / 800 == pytest.approx(0.2, abs=0.05)
    surest = [number for number in range(101) if confidence(number) > 0.95]
    assert {answer.eta for answer in answered(surest, 2000)[-10:]} == {0.9}
    assert answered([0], 400)[-1].eta == 0.05


def _all_done(scheduler: Scheduler, numbers: list[int]) -> list[Future[Answer]]:
    futures = scheduler.submit(images(numbers))
    for future in futures:
        future.result(SOON)
    return futures


def test_both_stages_on_request(engine: FakeEngine) -> None:
    answer = Scheduler(engine, ETA).submit(images(EASY[:1]), both=True)[0].result(SOON)
    assert answer.stage == FINE and answer.state.number.tolist() == EASY[:1]
    assert answer.coarse_confidence == pytest.approx(confidence(EASY[0]))


def test_images_of_another_shape_are_refused(engine: FakeEngine) -> None:
    scheduler = Scheduler(engine, ETA)
    with pytest.raises(CfvitError, match=r"\[1, 3, 4, 4\]"):
        scheduler.submit(torch.zeros(1, 3, 4, 4))
    assert scheduler.waiting == 0


@pytest.mark.parametrize(("batch", "wait"), [(0, 1.0), (1, -1.0), (1, float("nan"))])
def test_options_out_of_range_are_refused(batch: int, wait: float) -> None:
    with pytest.raises(CfvitError, match="at least 1 image"):
        Queues(coarse_batch=batch, coarse_wait=wait)
