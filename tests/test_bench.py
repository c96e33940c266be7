"""What is timed and what stands beside the times, by a clock that is made up. Times themselves are not judged."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Outcome
from PIL import Image
from torch import Tensor

from cfvit import CoarseToFineViT, Predictor, count_macs, load
from cfvit.benchmark import EngineName, Plan
from cfvit.benchmark import contenders as contenders_module
from cfvit.benchmark import measure as measure_module
from cfvit.benchmark import run as run_module
from cfvit.benchmark.conditions import Conditions
from cfvit.benchmark.contenders import (
    OWN_METHODS,
    Contender,
    Engines,
    ForcedExits,
    own_contenders,
    peers_of,
    prepare,
    spread_evenly,
    whole_fine_batches,
    whole_images,
)
from cfvit.benchmark.measure import (
    Row,
    TimedBatch,
    compare_with_backbone,
    measure_batch,
    peak_bytes,
    random_images,
)
from cfvit.benchmark.report import (
    Bench,
    best_engines,
    cells,
    noise_warnings,
    papers_comparison,
    peers_comparison,
    to_json,
    to_markdown,
    write_report,
)
from cfvit.benchmark.run import DECODING, FILES, SCALED, SCOPES, inputs_of, measure_real, read_files, run_bench
from cfvit.calibration import Estimate
from cfvit.data import open_images
from cfvit.errors import CfvitError
from cfvit.evaluation.timing import Timing
from cfvit.inference.files import FileAnswer
from cfvit.methods import base
from cfvit.methods.cf_vit import CfViT
from cfvit.methods.plain import Plain
from cfvit.modeling.exit import goes_on

pytestmark = pytest.mark.usefixtures("timed_at_once")
Fails = Callable[..., AbstractContextManager[None]]
Cli = Callable[..., Outcome]

QUICK = Plan(("eager",), (0.5,), 1, 1)
NAMES = [
    "backbone",
    "coarse stage",
    "fine stage",
    "both stages",
    "predictor",
    "stream",
    "cascade of two ViTs",
    "EViT, keep 0.7",
    "literal port",
    "ToMe, r=13",
]


@pytest.fixture(scope="module")
def model(make_model: Callable[..., CoarseToFineViT]) -> CoarseToFineViT:
    return make_model().requires_grad_(False)


@contextmanager
def _few_methods(*names: str) -> Iterator[None]:
    """Those of `NAMES` alone: what is tested of a peer holds of each, and all take long to build and count."""
    few = {name: base.known_methods()[name] for name in names or ("cascade", "evit", "literal", "tome")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contenders_module, "known_methods", lambda: few)
        yield


@pytest.fixture
def few_methods() -> Iterator[None]:
    with _few_methods():
        yield


@pytest.fixture(scope="module")
def contenders(model: CoarseToFineViT) -> list[Contender]:
    return _all_contenders(model)


def _all_contenders(model: CoarseToFineViT, *methods: str) -> list[Contender]:
    with _few_methods(*methods):
        peers, refusals = peers_of(model)
    assert refusals == {}
    return own_contenders(Engines(model)) + [peer for peer in peers if peer.name in NAMES]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """In place of a clock: calls run once, their results are kept, and the seconds are those that are put in here.

    ``seconds`` says of a name's call what its rounds take; of others it is 1 in each of 8 rounds.
    """
    kept: dict[str, Any] = {"seconds": lambda name: [1.0] * 8, "results": {}, "calls": []}

    def time_in_turn(calls: dict[str, Any], rounds: int, device: torch.device, seconds: float) -> dict[str, Timing]:
        kept["calls"] += list(calls)
        for name, call in calls.items():
            kept["running"] = name
            kept["results"][name] = [each() for each in ([call] if callable(call) else call)]
        return {
            name: Timing(tuple((value / len(made),) * len(made) for value in kept["seconds"](name)))
            for name, made in kept["results"].items()
        }

    monkeypatch.setattr(measure_module, "time_in_turn", time_in_turn)
    monkeypatch.setattr(measure_module, "peak_bytes", lambda call, device: 3_000_000)
    return kept


# Contenders


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [
        (1, 0.24, {(0,): 0.76, (1,): 0.24}),
        (1, 1, {(1,): 1}),
        (1, 0, {(0,): 1}),
        (2, 0.51, {(1,): 1}),
        (2, 0.24, {(0,): 0.52, (1,): 0.48}),
        (8, 0.24, {(2,): 1}),
        (32, 0.51, {(16,): 1}),
        (1024, 0.24, {(246,): 1}),
    ],
)
def test_a_share_is_met_in_whole_images(count: int, share: float, expected: dict[int, float]) -> None:
    assert whole_images(count, share) == pytest.approx(expected)


@pytest.mark.parametrize("share", [0, 0.01, 0.24, 0.51, 0.97, 1])
@pytest.mark.parametrize(("count", "fine_batch"), [(1, 8), (7, 32), (8, 32), (32, 32), (1024, 256)])
def test_a_stream_meets_its_share_evenly_and_in_whole_batches_of_the_fine_stage(
    count: int, fine_batch: int, share: float
) -> None:
    goings = whole_fine_batches(count, share, fine_batch)
    assert sum(goings) % fine_batch == 0
    assert sum(goings) / (len(goings) * count) == pytest.approx(share, abs=0.02)
    assert 0 <= min(goings) <= max(goings) <= min(count, min(goings) + 1)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize(("count", "going"), [(1, 0), (1, 1), (8, 3), (7, 7), (7, 0)])
def test_exits_are_forced_whatever_the_confidence(value: float, count: int, going: int) -> None:
    confidence = torch.full((count,), value)
    engine: Any = SimpleNamespace(model=None, weight=None, fine=None, coarse=lambda images: (None, confidence))
    forced = ForcedExits(engine)
    forced.confidence = 1 - spread_evenly(count, going, torch.device("cpu")).float()
    on = goes_on(forced.coarse(torch.empty(count))[1], 0.5)
    assert torch.equal(on, forced.confidence == 0)
    assert on.sum() == going
    if going:
        gaps = on.nonzero().flatten().diff()
        assert not len(gaps) or gaps.max() - gaps.min() <= 1, "they are evenly spread"


def test_every_call_answers_by_what_it_names(
    model: CoarseToFineViT, contenders: list[Contender], make_images: Callable[..., Tensor]
) -> None:
    images = make_images(model, 4)
    assert [contender.name for contender in contenders] == NAMES
    coarse, fine = model(images)
    on = torch.tensor([False, True, False, True])
    expected = torch.where(on[:, None], fine, coarse)
    for engine in ("eager", "torch"):
        answers: dict[str, Any] = {each.name: each.build(engine)(images, [2])() for each in contenders}
        for name, logits in {"backbone": model.backbone(images), "coarse stage": coarse, "fine stage": fine}.items():
            torch.testing.assert_close(_logits(answers[name]), logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(_logits(answers["both stages"]), fine, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(answers["predictor"].logits, expected, rtol=1e-4, atol=1e-4)
        for name in ("predictor", "cascade of two ViTs", "literal port"):
            assert (answers[name].stage == 1).tolist() == on.tolist()
        streamed = torch.cat([part.logits for part in answers["stream"]])
        order = torch.cat([part.index for part in answers["stream"]]).argsort()
        torch.testing.assert_close(streamed[order], expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def small_ranet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fewer layers, which take long to build and count."""
    monkeypatch.setattr("cfvit.methods.ranet.LAYERS", 2)


@pytest.mark.usefixtures("small_ranet")
def test_each_method_is_a_peer(model: CoarseToFineViT) -> None:
    peers, _ = peers_of(model)
    for peer in peers:
        engine = peer.engines[0] if peer.engines else "eager"
        assert _logits(peer.build(engine)(random_images(model, 1), [1])()).shape == (1, model.config.num_classes)
    titles = {method.title for name, method in base.known_methods().items() if name not in OWN_METHODS}
    assert {peer.name.split(", ")[0] for peer in peers} == titles


def test_compiled_calls_answer_alike(
    make_model: Callable[..., CoarseToFineViT],
    make_images: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a compiler that traces and makes no code, which is what takes long, and of two blocks, each of which does."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = make_model(depth=2).requires_grad_(False)
    images = make_images(model, 4)
    for contender in _all_contenders(model, "cascade", "tome"):
        if contender.name not in ("backbone", "stream"):
            eager, compiled = (contender.build(engine)(images, [2])() for engine in ("eager", "compiled"))
            torch.testing.assert_close(_logits(compiled), _logits(eager), rtol=1e-4, atol=1e-4)


def _logits(answer: Any) -> Tensor:
    """Of whatever a contender gives: logits, a prediction, or a stage's state or logits with its confidence."""
    answer = answer[0] if isinstance(answer, tuple) else answer
    return answer if isinstance(answer, Tensor) else answer.logits


def test_one_predictor_serves_several_shares_and_leaves_the_model_as_it_was(
    model: CoarseToFineViT, contenders: list[Contender], make_images: Callable[..., Tensor]
) -> None:
    images, rule = make_images(model, 4), model.exit
    runner = next(each for each in contenders if each.name == "predictor").build("eager")
    one, three = runner(images, [1]), runner(images, [3])
    results: list[Any] = [call() for call in (one, three, one)]
    assert [int(result.stage.sum()) for result in results] == [1, 3, 1]
    assert model.exit is rule


def test_a_stream_sends_on_what_is_asked_of_each_batch(
    model: CoarseToFineViT, contenders: list[Contender], make_images: Callable[..., Tensor]
) -> None:
    call = next(each for each in contenders if each.name == "stream").build("eager")(make_images(model, 2), [1, 0, 2])
    for _ in range(2):
        answers: Any = call()
        hard = torch.cat([part.index[part.stage.cpu() == 1] for part in answers])
        assert sorted(torch.cat([part.index for part in answers]).tolist()) == list(range(6))
        assert sorted(hard.tolist()) == [1, 4, 5]


def test_networks_are_prepared_once_for_all_batch_sizes(
    model: CoarseToFineViT, monkeypatch: pytest.MonkeyPatch, make_images: Callable[..., Tensor]
) -> None:
    made: list[object] = []
    original = CfViT.engine

    def engine(self: CfViT, network: Any, compile: bool | None = None) -> Any:
        made.append(compile)
        return original(self, network, compile)

    monkeypatch.setattr(CfViT, "engine", engine)
    engines = Engines(model)
    contenders = own_contenders(engines)
    for count in (1, 2):
        for contender in contenders:
            contender.build("eager")(make_images(model, count), [1])()
    assert made == [False]
    assert engines.plain("torch") is engines.plain("torch")


def test_eager_is_the_network_itself(model: CoarseToFineViT) -> None:
    assert prepare(model.backbone, "eager") is model.backbone


def test_a_method_of_ones_own_is_timed_without_a_change_elsewhere(
    model: CoarseToFineViT, timed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "METHODS", {})

    @base.register("mean_colour")
    class MeanColour(Plain):
        title = "mean colour"

        def build(self, config: Any, weights: str | None = None, class_names: list[str] | None = None) -> Any:
            network: Any = torch.nn.Linear(3, config.num_classes)
            network.image_size = model.image_size
            return network

        def points(self, network: Any) -> dict[str, Callable[[Tensor], Tensor]]:
            return {"all": lambda images: network(images.mean(dim=(2, 3)))}

    peers, _ = peers_of(model)
    (own,) = (each for each in peers if each.name == "mean colour, all")
    batch = measure_batch(model, [own_contenders(Engines(model))[0], own], random_images(model, 2), QUICK)
    row = _by(batch.rows, "mean colour, all", "eager")
    assert row.gmacs == 3 * model.config.num_classes / 1e9
    assert timed["results"]["mean colour, all, eager, 0 on"][0].shape == (2, model.config.num_classes)


# Rows


def _by(rows: Sequence[Row], name: str, engine: EngineName, share: float | None = None) -> Row:
    (row,) = [
        row
        for row in rows
        if (row.name, row.engine) == (name, engine) and (share is None or row.fine_share == pytest.approx(share))
    ]
    return row


def test_rows_follow_from_the_times_and_the_macs(
    model: CoarseToFineViT, contenders: list[Contender], timed: dict[str, Any]
) -> None:
    drifting = [1.0, 1.01, 0.99, 1.0, 1.0, 1.01, 0.99, 1.0]
    factors = {"backbone, eager": 8, "backbone, torch": 4, "predictor, torch": 2, "matrix product": 0.5}
    timed["seconds"] = lambda name: [
        drift * next((factor for start, factor in factors.items() if name.startswith(start)), 1) for drift in drifting
    ]
    batch = measure_batch(model, contenders, random_images(model, 4), Plan(("torch",), (0.25, 0.5), 8, 1))
    macs = count_macs(model)
    assert [row.label for row in batch.rows][:9] == [
        "backbone",
        "backbone",
        "coarse stage",
        "fine stage",
        "both stages",
        "predictor, 25% fine",
        "predictor, 50% fine",
        "stream, 25% fine",
        "stream, 50% fine",
    ]
    row = _by(batch.rows, "predictor", "torch", 0.25)
    cost = macs.coarse + macs.fine / 4
    assert row.gmacs == cost / 1e9
    assert row.images_per_second == pytest.approx(4 / 2)
    assert row.p50_ms == pytest.approx(2000)
    assert row.mean_ms == pytest.approx(2000)
    stream = _by(batch.rows, "stream", "torch", 0.25)
    assert stream.images_per_round == 32 / 0.25, "a fine batch of 8 batches is filled once"
    assert stream.images_per_second == pytest.approx(stream.images_per_round)
    assert stream.mean_ms == pytest.approx(1000 * 4 / stream.images_per_round)
    assert (stream.p50_ms, stream.p95_ms, stream.p99_ms) == (None, None, None)
    assert stream.ratio.value == pytest.approx(4 * stream.images_per_round / 4), "by images, not by calls"
    assert (row.p95_ms, row.p99_ms, row.peak_megabytes, row.rounds) == (None, None, 3, 8)
    assert (row.ratio.value, row.eager_ratio.value) == pytest.approx((2, 4))
    assert row.macs_ratio == macs.backbone / cost
    assert row.telling
    rate = measure_module.MATRIX_SIDES["cpu"] ** 3 / 0.5
    assert batch.matrix_gmacs_per_second == pytest.approx(rate / 1e9)
    assert row.matrix_share == pytest.approx(cost * 4 / 2 / rate)
    assert _by(batch.rows, "backbone", "torch").eager_ratio.value == pytest.approx(2)
    port = _by(batch.rows, "literal port", "eager", 0.25)
    assert (port.ratio.value, port.eager_ratio.value) == pytest.approx((8, 8)), "beside the backbone in its own engine"
    assert port.predictor_ratio is not None
    assert port.predictor_ratio.value == pytest.approx(0.5), "the predictor in the engine in which it was timed"
    backbone = _by(batch.rows, "backbone", "torch")
    assert [each.predictor_ratio and each.predictor_ratio.value for each in (backbone, row)] == pytest.approx([2, 1])


def test_the_reference_and_the_port_are_there_once_in_eager_torch(
    model: CoarseToFineViT, contenders: list[Contender], timed: dict[str, Any]
) -> None:
    plan = Plan(("eager", "torch"), (0.5,), 1, 1)
    pairs = [(row.name, row.engine) for row in measure_batch(model, contenders, random_images(model, 2), plan).rows]
    everywhere = [name for name in NAMES if name != "literal port"]
    assert sorted(pairs) == sorted(
        [("literal port", "eager"), *((name, engine) for name in everywhere for engine in ("eager", "torch"))]
    )
    assert pairs[0] == ("backbone", "eager")


def test_single_images_are_a_mean_over_those_that_exit_and_those_that_go_on(
    model: CoarseToFineViT, contenders: list[Contender], timed: dict[str, Any]
) -> None:
    timed["seconds"] = lambda name: [4.0 if name.endswith(", 1 on") else 1.0] * 100
    batch = measure_batch(model, contenders[:5], random_images(model, 1), Plan(("eager",), (0.25, 0.75), 100, 1))
    assert [name for name in timed["calls"] if name.startswith("predictor")] == [
        "predictor, eager, 0 on",
        "predictor, eager, 1 on",
    ]
    rare, often = (_by(batch.rows, "predictor", "eager", share) for share in (0.25, 0.75))
    assert rare.images_per_second == pytest.approx(1 / 1.75)
    assert often.images_per_second == pytest.approx(1 / 3.25)
    assert (rare.p50_ms, rare.p95_ms, often.p50_ms) == (1000, 4000, 4000)
    assert (rare.mean_ms, often.mean_ms) == pytest.approx((1750, 3250))
    assert rare.parts == {"predictor, eager, 0 on": 0.75, "predictor, eager, 1 on": 0.25}
    assert batch.seconds["predictor, eager, 1 on"] == ((4.0,),) * 100
    assert rare.gmacs == pytest.approx(count_macs(model).expected(0.25) / 1e9)


def test_a_reference_that_drifts_makes_nothing_telling(
    model: CoarseToFineViT, contenders: list[Contender], timed: dict[str, Any]
) -> None:
    timed["seconds"] = lambda name: [1.0] * 4 + [1.2] * 4 if name.startswith("backbone") else [1.0] * 8
    batch = measure_batch(model, contenders[:3], random_images(model, 2), QUICK)
    assert not batch.steady
    assert not any(row.telling for row in batch.rows)
    assert "20% slower in one half" in noise_warnings(batch)[0]


def test_a_contender_whose_times_vary_is_not_told(
    model: CoarseToFineViT, contenders: list[Contender], timed: dict[str, Any]
) -> None:
    timed["seconds"] = lambda name: [1.0, 1.2] * 4 if name.startswith("fine") else [1.0] * 8
    batch = measure_batch(model, contenders[:3], random_images(model, 2), QUICK)
    assert [row.telling for row in batch.rows] == [True, True, False]
    (doubt,) = noise_warnings(batch)
    assert "1 of 3 ratios" in doubt
    assert [cells(row)[8].endswith("?") for row in batch.rows] == [False, False, True]


def test_the_peak_is_what_a_call_holds_at_a_time(capfd: pytest.CaptureFixture[str]) -> None:
    lay_there = torch.ones(1000)

    def call() -> None:
        for _ in range(3):
            held = torch.ones(1000, dtype=torch.float64)
            half = held[:500] + 1
            del held, half
        lay_there.add_(1)

    assert peak_bytes(call, torch.device("cpu")) == pytest.approx(8 * 1500, abs=100), "and a number or two"
    assert peak_bytes(lambda: None, torch.device("cpu")) == 0
    assert capfd.readouterr() == ("", ""), "the profiler is silent"


def test_few_rounds_tell_nothing(model: CoarseToFineViT, contenders: list[Contender], timed: dict[str, Any]) -> None:
    timed["seconds"] = lambda name: [1.0] * 5
    batch = measure_batch(model, contenders[:3], random_images(model, 2), QUICK)
    assert not any(row.telling for row in batch.rows)
    assert "5 rounds are too few" in noise_warnings(batch)[0]


def test_random_images_are_the_same_in_every_run_and_of_the_models_precision(model: CoarseToFineViT) -> None:
    images = random_images(model, 3)
    assert images.shape == (3, 3, *model.image_size)
    assert torch.equal(images, random_images(model, 3))
    assert random_images(load("deit_tiny_imagenet").bfloat16(), 1).dtype == torch.bfloat16


def test_bfloat16_is_timed(make_model: Callable[..., CoarseToFineViT]) -> None:
    model = make_model().bfloat16().requires_grad_(False)
    batch = measure_batch(model, _all_contenders(model), random_images(model, 2), QUICK)
    assert len(batch.rows) == len(NAMES)


def test_compared_with_the_backbone_alone(model: CoarseToFineViT) -> None:
    before = Predictor(model, 1)(random_images(model, 2)).logits
    plain, predictor = compare_with_backbone(model.train(), 4, 0.25, rounds=2)
    assert (plain.name, predictor.label) == ("backbone", "predictor, 25% fine")
    assert plain.ratio.value == 1
    assert not model.training
    assert torch.equal(Predictor(model, 1)(random_images(model, 2)).logits, before)


# Real images


def test_real_images_go_through_the_model_at_its_own_eta(
    colour_model: Path, colours: Path, timed: dict[str, Any]
) -> None:
    model, source = load(colour_model).requires_grad_(False), open_images(str(colours))
    assert model.threshold is not None
    batch = measure_real(Engines(model), source, 5, Plan(("torch",), (0.1,), 8, 1))
    files = read_files(source, 5)
    assert [len(part) for part in files] == [5] * 4
    with ThreadPoolExecutor() as pool:
        stages = torch.cat([Predictor(model)(give()).stage for give in inputs_of(files, model, pool)["computing"]])
    assert [(row.name, row.engine, row.scope) for row in batch.rows] == [
        (name, engine, scope)
        for name, engine in (("backbone", "eager"), ("backbone", "torch"), ("predictor", "torch"))
        for scope in SCOPES
    ] + [("stream", "torch", scope) for scope in (*SCOPES, FILES, SCALED)]
    share = float(stages.float().mean())
    assert 0 < share < 1
    assert batch.rows[-1].fine_share == share
    assert batch.rows[-1].gmacs == pytest.approx(count_macs(model).expected(share) / 1e9)
    assert batch.rows[-1].images_per_second == pytest.approx(20)
    (predictor,) = [row for row in batch.rows if (row.name, row.scope) == ("predictor", "computing")]
    assert predictor.p50_ms == predictor.mean_ms == pytest.approx(1000 / 4), "of a call, of which a round has four"


def test_jpegs_are_answered_from_files_with_and_without_scaled_decoding(
    colour_model: Path, colours: Path, tmp_path: Path, timed: dict[str, Any]
) -> None:
    for path in colours.rglob("*.png"):
        photo = tmp_path / path.relative_to(colours).with_suffix(".jpg")
        photo.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.convert("RGB").resize((256, 256)).save(photo)
    model, source = load(colour_model).requires_grad_(False), open_images(str(tmp_path))
    timed["seconds"] = lambda name: [{FILES: 2.0, SCALED: 1.0, DECODING: 4.0}.get(name.split(", ", 2)[-1], 1.0)] * 8
    batch = measure_real(Engines(model), source, 8, dataclasses.replace(QUICK, engines=("torch",)))
    whole, scaled = (timed["results"][f"stream, torch, {scope}"][0] for scope in (FILES, SCALED))
    expected = [model.label_of(i) for part in timed["results"]["predictor, torch, with decoding"] for i in part]
    assert [answer.label for answer in whole] == expected
    assert len(scaled) == len(expected)
    assert all(isinstance(answer, FileAnswer) for answer in scaled)
    rows = {row.scope: row for row in batch.rows if row.name == "stream"}
    assert (rows[FILES].ratio.value, rows[SCALED].ratio.value) == (2, 4), "beside the backbone that decodes"


def test_all_scopes_give_the_same_answers(colour_model: Path, colours: Path, timed: dict[str, Any]) -> None:
    model = load(colour_model).requires_grad_(False)
    measure_real(Engines(model), open_images(str(colours)), 8, dataclasses.replace(QUICK, engines=("torch",)))
    for name in ("backbone", "predictor"):
        computed, *others = (timed["results"][f"{name}, torch, {scope}"] for scope in SCOPES)
        expected = [logits.argmax(dim=-1).tolist() for logits in computed]
        assert len(expected) == 2
        assert others == [expected] * 3
    computed, *others = (timed["results"][f"stream, torch, {scope}"][0] for scope in SCOPES)
    assert [torch.cat(computed).argmax(dim=-1).tolist()] * 3 == [list(chain.from_iterable(each)) for each in others]


def test_a_scope_does_its_own_work_within_the_call(
    colour_model: Path, colours: Path, timed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: Counter[tuple[str, str]] = Counter()
    decode, transform = run_module.open_image, run_module.eval_transform

    def count(work: str, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def run(given: Any) -> Any:
            done[work, timed.get("running", "before").split(", ")[-1]] += 1
            return function(given)

        return run

    monkeypatch.setattr(run_module, "open_image", count("decode", decode))
    monkeypatch.setattr(run_module, "eval_transform", lambda config: count("resize", transform(config)))
    measure_real(Engines(load(colour_model).requires_grad_(False)), open_images(str(colours)), 16, QUICK)
    within = {key: times for key, times in done.items() if key[1] != "before"}
    times = 16 * 2 * 3  # two batches, by three contenders
    assert within == dict.fromkeys(
        [("resize", "with resizing"), ("resize", "with decoding"), ("decode", "with decoding")], times
    )


def test_few_images_are_used_again_and_unreadable_ones_left_out(
    make_colours: Callable[..., Path], fails: Fails
) -> None:
    folder = make_colours(per_class=1)
    (folder / "red" / "0.png").write_bytes(b"no image")
    files = read_files(open_images(str(folder)), 32)
    assert [len(batch) for batch in files] == [32, 32]
    assert len(set(files[0])) == 2
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    with fails("none of the images can be read"):
        read_files(open_images(str(folder)), 4)


def test_real_images_need_an_eta(model: CoarseToFineViT, colours: Path, fails: Fails) -> None:
    with fails("cfvit calibrate"):
        _run(model, source=open_images(str(colours)))


# Reports


def _run(model: CoarseToFineViT, sizes: Sequence[int] = (1, 3), **options: Any) -> Bench:
    given = {"name": "tiny", "command": "cfvit bench", "random_weights": True, "peers": True, **options}
    return list(run_bench(model, sizes, QUICK, **given))[-1][0]


def _row(**changes: Any) -> Row:
    values: dict[str, Any] = {
        "name": "predictor",
        "engine": "torch",
        "images": "random",
        "scope": "computing",
        "reference": "computing",
        "batch_size": 4,
        "fine_share": 0.25,
        "macs": 1.2345e9,
        "gmacs": 1.2345,
        "rounds": 20,
        "images_per_round": 4,
        "parts": {"predictor, torch, 1 on": 1.0},
        "images_per_second": 123.45,
        "mean_ms": 33.0,
        "p50_ms": 32.4,
        "p95_ms": 40.0,
        "p99_ms": None,
        "spread": 0.03,
        "ratio": Estimate(1.8, 1.75, 1.85),
        "eager_ratio": Estimate(3.0, 2.0, 4.0),
        "predictor_ratio": Estimate(1.0, 1.0, 1.0),
        "macs_ratio": 2.5,
        "matrix_share": 0.42,
        "peak_megabytes": 7.8,
        "steady": True,
    }
    return Row(**(values | changes))


def test_cells_of_a_row() -> None:
    ratios = ["1.80 (1.75 to 1.85)", "2.50", "3.00 (2.00 to 4.00) ?"]
    times = ["33.00", "32.40", "40.00", "-"]
    assert cells(_row()) == ["predictor, 25% fine", "torch", "1.234", "123.5", *times, *ratios, "42%", "3%", "8"]
    few = cells(_row(ratio=Estimate(1.8, 0, math.inf), peak_megabytes=12.3, scope="with decoding"))
    assert (few[0], few[8], few[-1]) == ("predictor, 25% fine, with decoding", "1.80 ?", "12")


def _bench(rows: Sequence[Row], **changes: Any) -> Bench:
    conditions = Conditions("cfvit bench", "a machine", "float32", "versions", "abc", "today")
    batch = TimedBatch(4, list(rows), 100.0, 1.0)
    given = {"backbone": "deit_small_patch16_224", "coarse_grid": (7, 7), "plan": Plan(("torch",), (0.24,), 1, 1)}
    return Bench(conditions, "model", random_weights=True, notes=("a note",), batches=(batch,), **(given | changes))


def test_beside_the_papers_table() -> None:
    """Its throughput of DeiT-S and of CF-ViT at eta 0.5, 0.75 and 1."""
    rows = [
        _row(name="backbone", engine="eager", fine_share=None, images_per_second=10.0),
        _row(name="backbone", fine_share=None, images_per_second=20.0, ratio=Estimate(1, 1, 1)),
        _row(name="both stages", fine_share=None, images_per_second=25.0, ratio=Estimate(1.25, 1.2, 1.3)),
        _row(fine_share=0.25, images_per_second=36.0),
    ]
    assert papers_comparison(_bench(rows)) == [
        ["plain", "-", "2601", "1.00", "20", "1.00"],
        ["0.5", "24%", "4903", "1.89", "36", "1.80 (1.75 to 1.85)"],
        ["0.75", "51%", "3701", "1.42", "-", "-"],
        ["1.0", "100%", "2760", "1.06", "25", "1.25 (1.20 to 1.30)"],
    ]
    assert papers_comparison(_bench(rows, coarse_grid=(9, 9))) == []
    assert "Beside the paper" in to_markdown(_bench(rows))
    assert "Beside the paper" not in to_markdown(_bench(rows, backbone="vit_small_patch16_224"))


def test_the_papers_table_stands_beside_the_largest_batch_in_the_predictors_fastest_engine() -> None:
    small, large = (
        [
            _row(name="backbone", fine_share=None, engine=engine, images_per_second=speed)
            for engine, speed in (("eager", 10.0 * size), ("compiled", 20.0 * size))
        ]
        + [_row(engine="compiled", images_per_second=90.0 * size), _row(engine="eager", images_per_second=30.0 * size)]
        for size in (1, 2)
    )
    bench = _bench([], plan=Plan(("compiled", "eager"), (0.24,), 1, 1))
    batches = (TimedBatch(64, large, 100.0, 1.0), TimedBatch(4, small, 100.0, 1.0))
    table = papers_comparison(dataclasses.replace(bench, batches=batches))
    assert [row[4] for row in table] == ["40", "180", "-", "-"]
    assert "batch size 64 here" in to_markdown(dataclasses.replace(bench, batches=batches))


@pytest.mark.parametrize(
    ("ratio", "steady", "verdict"),
    [
        (Estimate(1.2, 1.1, 1.4), True, "ahead"),
        (Estimate(0.8, 0.7, 0.9), True, "behind"),
        (Estimate(1.2, 0.9, 1.4), True, "cannot be told"),
        (Estimate(1.2, 0.0, math.inf), True, "cannot be told"),
        (Estimate(1.2, 1.1, 1.4), False, "cannot be told"),
        (None, True, None),
    ],
)
def test_the_predictor_is_ahead_or_behind_only_where_the_interval_tells(
    ratio: Estimate | None, steady: bool, verdict: str | None
) -> None:
    row = _row(predictor_ratio=ratio, steady=steady)
    assert row.predictor_is == row.to_dict()["predictor_is"] == verdict


def test_the_predictor_beside_its_peers() -> None:
    rows = [
        _row(name="backbone", fine_share=None),
        _row(),
        _row(fine_share=0.5),
        _row(name="ToMe, r=8", fine_share=None, predictor_ratio=Estimate(1.5, 1.4, 1.6)),
        _row(name="literal port", engine="eager", predictor_ratio=Estimate(0.9, 0.8, 1.1)),
        _row(name="literal port", engine="eager", fine_share=0.5),
    ]
    batch = TimedBatch(4, rows, 100.0, 1.0)
    predictor = ["predictor, 25% fine", "torch"]
    assert peers_comparison(batch) == [
        ["ToMe, r=8", "torch", *predictor, "1.50 (1.40 to 1.60)", "ahead"],
        ["literal port, 25% fine", "eager", *predictor, "0.90 (0.80 to 1.10) ?", "cannot be told"],
    ]
    assert "### The predictor beside its peers" in to_markdown(_bench(rows))
    assert "beside its peers" not in to_markdown(_bench(rows[:3]))


def test_the_best_default_is_the_fastest_engine_in_float32() -> None:
    def rows(*speeds: float) -> list[Row]:
        engines: tuple[EngineName, ...] = ("torch", "onnx", "openvino-int8")
        made = [_row(engine=engine, images_per_second=speed) for engine, speed in zip(engines, speeds, strict=True)]
        return [*made, _row(engine="torch", fine_share=0.5, images_per_second=99.0)]

    bench = _bench(rows(10, 20, 40))
    *_, best = best_engines(bench)
    assert best == "the best default here is onnx, over these batch sizes; int8 gives other answers"
    assert best_engines(bench)[0].endswith(
        "openvino-int8 3.00 (2.00 to 4.00) ?, onnx 3.00 (2.00 to 4.00) ?, torch 3.00 (2.00 to 4.00) ?"
    )
    more = dataclasses.replace(bench, batches=(*bench.batches, TimedBatch(8, rows(30, 10, 40), 100.0, 1.0)))
    assert "best default here is torch" in best_engines(more)[-1], "where it loses less"
    assert best_engines(_bench(rows(10, 20, 40)[:1])) == [], "one engine alone"


def test_exported_engines_are_for_float32(model: CoarseToFineViT, fails: Fails) -> None:
    with fails("engine onnx runs in float32 on a CPU"):
        next(
            run_bench(
                copy.deepcopy(model).bfloat16(),
                (1,),
                Plan(("onnx",), (0.5,), 1, 1),
                name="tiny",
                command="",
                random_weights=True,
                peers=False,
            )
        )


def test_what_does_not_fit_into_memory_is_a_note_and_the_run_goes_on(
    model: CoarseToFineViT, monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    def limit(images: int) -> None:
        def measure(model: CoarseToFineViT, contenders: Any, batch: Tensor, plan: Plan) -> TimedBatch:
            if len(batch) > images:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return measure_batch(model, contenders, batch, plan)

        monkeypatch.setattr(run_module, "measure_batch", measure)

    limit(2)
    bench = _run(model, peers=False)
    assert [batch.batch_size for batch in bench.batches] == [1]
    assert "random images, batch size 3: not measured, as it does not fit into memory" in bench.notes
    limit(0)
    with fails("a batch of 1 images does not fit into memory: lower --batch-sizes"):
        _run(model, peers=False)


def test_other_failures_are_not_taken_for_a_lack_of_memory(
    model: CoarseToFineViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*arguments: Any) -> TimedBatch:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(run_module, "measure_batch", measure)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        _run(model, peers=False)


def test_compilation_that_torch_would_give_up_fails_in_a_line(monkeypatch: pytest.MonkeyPatch, fails: Fails) -> None:
    monkeypatch.setattr(run_module, "COMPILATIONS", 2)
    torch.compiler.reset()
    compiled = torch.compile(lambda x, times: x * times, backend="eager", dynamic=False)
    before = torch._dynamo.config.recompile_limit
    with fails("cannot be timed compiled"), run_module.no_silent_eager():
        for size in range(2, 8):
            compiled(torch.ones(size), size)
    assert torch._dynamo.config.recompile_limit == before
    assert not torch._dynamo.config.fail_on_recompile_limit_hit


@pytest.mark.usefixtures("few_methods")
def test_a_whole_run_says_its_conditions_and_doubts(model: CoarseToFineViT, tmp_path: Path) -> None:
    given: dict[str, Any] = {"name": "tiny", "command": "cfvit bench", "random_weights": True, "peers": True}
    found = list(run_bench(model, (1, 3), QUICK, **given))
    bench = found[-1][0]
    assert tuple(batch for _, batch in found) == bench.batches
    assert [len(so_far.batches) for so_far, _ in found] == [1, 2], "what was measured so far can be kept"
    assert [batch.batch_size for batch in bench.batches] == [1, 3]
    assert bench.conditions.dtype == "float32"
    text = " ".join(bench.sentences)
    for word in ("weights are random", "random images, batch size 1: 1 rounds are too few"):
        assert word in text
    written = json.loads(json.dumps(to_json(bench), allow_nan=False))
    assert written["batches"][1]["rows"][0]["ratio"] == {"value": 1, "low": 0, "high": None}
    raw = written["batches"][1]["seconds"]
    assert set(raw) >= {name for row in written["batches"][1]["rows"] for name in row["parts"]}
    assert len(raw["backbone, eager, 0 on"]) == 1
    page = to_markdown(bench)
    for batch in bench.batches:
        for row in batch.rows:
            assert f"| {' | '.join(cells(row))} |" in page
    write_report(bench, tmp_path)
    with Image.open(tmp_path / "bench.png") as image:
        image.verify()


@pytest.mark.usefixtures("small_ranet")
def test_a_network_without_peers_says_why(make_model: Callable[..., CoarseToFineViT]) -> None:
    bench = _run(make_model(reg_tokens=1), (1,))
    peers = {row.name.split(", ")[0] for row in bench.batches[0].rows} - {*NAMES[:6]}
    assert peers == {"cascade of two ViTs", "MSDNet", "RANet"}
    refused = {note.split(": ")[0] for note in bench.notes if note.startswith("without ")}
    assert {"without EViT", "without literal port", "without ToMe"} <= refused


# Command


def _json(outcome: Outcome) -> list[dict[str, Any]]:
    return [json.loads(line) for line in outcome.out]


@pytest.mark.usefixtures("few_methods")
def test_the_command_gives_a_row_for_each_way_and_batch_size(cfvit_main: Cli, colour_model: Path) -> None:
    arguments = ("bench", "--model", colour_model, "--batch-sizes", "1", "4", "--fine-share", "0.5", "--rounds", "1")
    outcome = cfvit_main(*arguments, "--json")
    assert outcome.status == 0, outcome.err
    first, *rows = _json(outcome)
    assert {"conditions", "plan", "notes"} <= set(first)
    assert [(each["batch_size"], each["steady"]) for each in first["measured"]] == [
        (size, each["drift"] <= 1.05) for size, each in zip((1, 4), first["measured"], strict=True)
    ]
    assert all(each["matrix_gmacs_per_second"] > 0 for each in first["measured"])
    rows = [row for row in rows if row["name"] in NAMES]  # EViT and ToMe have more points
    names = ["backbone", *(name for name in NAMES if name != "literal port"), "literal port"]
    assert [(row["batch_size"], row["name"]) for row in rows] == [(size, name) for size in (1, 4) for name in names]
    macs = count_macs(load(colour_model))
    assert [row["macs_ratio"] for row in rows[-9:-6]] == [
        macs.backbone / cost for cost in (macs.coarse, macs.fine, macs.both)
    ]

    outcome = cfvit_main(*arguments, "--no-peers", "--engine", "eager")
    assert outcome.status == 0, outcome.err
    told = [line.split()[0].rstrip(",") for line in outcome.out if "eager" in line and "GMACs" not in line]
    assert told == ["backbone", "coarse", "fine", "both", "predictor", "stream"] * 2


def test_the_command_writes_its_report_with_real_images(
    cfvit_main: Cli, colour_model: Path, colours: Path, tmp_path: Path
) -> None:
    arguments = ("--model", colour_model, "--batch-sizes", "4", "--rounds", "1", "--no-peers")
    outcome = cfvit_main("bench", *arguments, "--data", colours, "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"bench.json", "bench.md", "bench.png"}
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert {(row["images"], row["scope"]) for row in written["real"][0]["rows"]} == {
        ("real", scope) for scope in (*SCOPES, FILES, SCALED)
    }
    assert "Real images, batch size 4" in (tmp_path / "out" / "bench.md").read_text()


def test_the_command_makes_a_model_with_random_weights(cfvit_main: Cli) -> None:
    arguments = ("--backbone", "test_vit", "--coarse-grid", "2x3", "--batch-sizes", "1", "--rounds", "1", "--no-peers")
    outcome = cfvit_main("bench", *arguments, "--precision", "bfloat16", "--engine", "eager", "--json")
    assert outcome.status == 0, outcome.err
    own = ["backbone", "coarse stage", "fine stage", "both stages"] + ["predictor"] * 2 + ["stream"] * 2
    assert [row["name"] for row in _json(outcome)[1:]] == own
    assert any("weights are random" in line for line in outcome.err)


def test_a_late_failure_leaves_the_report_of_what_was_measured(
    cfvit_main: Cli, colour_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(model: CoarseToFineViT, contenders: Any, images: Tensor, plan: Plan) -> TimedBatch:
        if len(images) == 2:
            raise CfvitError("too late")
        return measure_batch(model, contenders, images, plan)

    monkeypatch.setattr(run_module, "measure_batch", measure)
    arguments = ("--model", colour_model, "--batch-sizes", "1", "2", "--rounds", "1", "--no-peers", "--engine", "eager")
    outcome = cfvit_main("bench", *arguments, "--out", tmp_path / "out", "--json")
    assert outcome.status != 0
    assert "too late" in outcome.err[-1]
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [batch["batch_size"] for batch in written["batches"]] == [1]
    assert _json(outcome)[0]["measured"][0]["batch_size"] == 1


def test_a_report_that_cannot_be_written_is_refused_at_once(cfvit_main: Cli, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "folder"):
        outcome = cfvit_main("bench", "--out", out)
        assert (outcome.out, len(outcome.err)) == ([], 1)
        assert outcome.status != 0
        assert "Errno" not in outcome.err[0]
        assert str(out) in outcome.err[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coarse-grid", "7"], "--coarse-grid .* give it with --backbone"),
        (["--backbone", "test_vit", "--data", "x"], "--backbone has random weights"),
        (["--backbone", "test_vit", "--model", "x"], "--backbone has random weights"),
        (["--engine", "fast"], "fast.*eager"),
        (["--seconds", "0"], "--seconds"),
        (["--fine-share", "0.5", "2"], "--fine-share.*<= 1"),
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments: list[str], message: str, cfvit_main: Cli) -> None:
    outcome = cfvit_main("bench", *arguments)
    assert (outcome.status, outcome.out, len(outcome.err)) == (2, [], 1)
    assert re.search(message, outcome.err[0])
