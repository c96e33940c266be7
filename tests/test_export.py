"""Exported models answer as torch does, in every batch size, and stand alone."""

from __future__ import annotations

import asyncio
import json
import pickle
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, cast, get_args

import httpx
import pytest
import torch
from conftest import Outcome
from PIL import Image
from torch import Tensor

from cfvit import (
    CoarseState,
    CoarseToFineViT,
    Predictor,
    count_macs,
    eval_transform,
    export,
    load,
    open_image,
    save,
)
from cfvit.benchmark.contenders import Engines
from cfvit.data import open_images
from cfvit.deploy import export as export_module
from cfvit.deploy import graphs
from cfvit.deploy.graphs import stage_graphs, trace
from cfvit.deploy.quantising import calibration_images, warn_if_slow, warn_of_loss
from cfvit.deploy.server import BROWSER_RUNTIME, Settings, create_app
from cfvit.files import fill_template
from cfvit.inference.engines.exported import (
    EXPORT_FILE,
    WEIGHTS_FILE,
    ExportedEngine,
    Format,
    Graph,
    Quantised,
    TwoStageScores,
    open_graph,
    read_exported,
)
from cfvit.modeling.exit import Exit
from cfvit.plots.explain import explain

pytestmark = pytest.mark.usefixtures("each_block_gives_its_class_attention")
Fails = Callable[..., AbstractContextManager[None]]
FORMATS: tuple[Format, ...] = get_args(Format)


@pytest.fixture(scope="module")
def colour_model(shallow_colour_model: Path) -> Path:
    return shallow_colour_model


@pytest.fixture(scope="module")
def model(colour_model: Path) -> CoarseToFineViT:
    return load(colour_model)


@pytest.fixture(scope="module")
def traced(model: CoarseToFineViT) -> Iterator[None]:
    """Within it, exports of this model and of its backbone take the graphs that torch traced once, which takes long."""
    stages = stage_graphs(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            export_module, "stage_graphs", lambda each: stages if each.config == model.config else stage_graphs(each)
        )
        plain = cache(partial(trace, model.backbone, {"x": _images(model, 2)}, ["logits"]))
        patch.setattr(graphs, "trace", lambda *given: plain() if given[2] == ["logits"] else trace(*given))
        yield


@pytest.fixture(scope="module", params=FORMATS)
def folder(
    request: pytest.FixtureRequest, model: CoarseToFineViT, traced: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An export in each format. Only to be read."""
    folder = tmp_path_factory.mktemp("exported") / request.param
    export(model, folder, format=request.param)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> ExportedEngine:
    return ExportedEngine(folder)


@pytest.fixture(scope="module")
def whole(folder: Path, engine: ExportedEngine) -> Graph:
    return open_graph(folder, "whole", engine.model.format)


def _images(model: CoarseToFineViT, count: int, seed: int = 7) -> Tensor:
    return torch.randn(count, 3, *model.image_size, generator=torch.Generator().manual_seed(seed))


def test_the_folder_says_what_the_model_is(folder: Path, model: CoarseToFineViT) -> None:
    about = read_exported(folder)
    same = ("config", "image_size", "grid", "data_config", "class_names", "exit", "threshold")
    assert {name: getattr(about, name) for name in same} == {name: getattr(model, name) for name in same}
    assert about.macs == count_macs(model)
    assert about.difference < 1e-4
    assert {"cfvit", "torch"} < about.versions.keys()
    suffixes = {"onnx": [".onnx"], "openvino": [".bin", ".xml"]}[about.format]
    graphs = {f"{stage}{suffix}" for stage in ("coarse", "fine", "whole") for suffix in suffixes}
    shared = {"weights.data"} if about.format == "onnx" else set()
    assert {file.name for file in folder.iterdir()} == {*graphs, *shared, EXPORT_FILE, "example.py"}


def test_graphs_in_onnx_share_their_weights(folder: Path, model: CoarseToFineViT) -> None:
    if read_exported(folder).format == "onnx":
        weights = 4 * sum(parameter.numel() for parameter in model.parameters())
        assert (folder / "weights.data").stat().st_size < 1.1 * weights


@pytest.mark.parametrize("count", [0, 1, 2, 5, 32])
@pytest.mark.parametrize("eta", [0, None, 1])
def test_an_exported_model_answers_as_the_one_in_torch(
    count: int, eta: float | None, engine: ExportedEngine, model: CoarseToFineViT
) -> None:
    images = _images(model, count)
    expected, answer = Predictor(model, eta, compile=False)(images), Predictor(engine, eta)(images)
    assert torch.equal(answer.stage, expected.stage)
    torch.testing.assert_close(answer.logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(answer.confidence, expected.confidence, atol=1e-4, rtol=0)


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("eta", [0, None, 1])
def test_the_whole_graph_answers_as_the_two_do(
    count: int, eta: float | None, engine: ExportedEngine, whole: Graph
) -> None:
    predictor = Predictor(engine, eta)
    images = _images(predictor.model, count)
    answer = whole({"images": images.numpy(), "eta": torch.tensor(predictor.threshold).numpy()})
    expected = predictor(images)
    assert answer["stage"].tolist() == expected.stage.tolist()
    torch.testing.assert_close(torch.from_numpy(answer["logits"]), expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.from_numpy(answer["confidence"]), expected.confidence, atol=1e-5, rtol=0)


def test_in_onnx_eta_need_not_be_given(engine: ExportedEngine, whole: Graph, model: CoarseToFineViT) -> None:
    images = _images(model, 5)
    assert whole.inputs == {"onnx": ("images",), "openvino": ("images", "eta")}[engine.model.format]
    given = {"images": images.numpy(), "eta": torch.tensor(model.threshold).numpy()}
    answer = whole({name: given[name] for name in whole.inputs})
    assert answer["stage"].tolist() == Predictor(model)(images).stage.tolist()


def test_cells_of_equal_rank_are_split_as_in_torch(engine: ExportedEngine, model: CoarseToFineViT) -> None:
    images = _images(model, 8)
    with torch.inference_mode():
        state = model.coarse(images)
        for steps in (0, 1, 3):
            rank = (steps * state.class_attention / state.class_attention.amax(dim=1, keepdim=True)).round()
            tied = CoarseState(state.logits, state.tokens, state.embedding, rank, state.class_token)
            logits, _ = engine.fine(images, tied)
            torch.testing.assert_close(logits, model.fine(images, tied), atol=1e-4, rtol=0)


def test_an_exported_model_streams(engine: ExportedEngine, model: CoarseToFineViT) -> None:
    images = _images(model, 24)
    expected = Predictor(model)(images)
    for ordered in (False, True):
        answers = list(Predictor(engine).stream(images.split(5), fine_batch=4, ordered=ordered))
        index = torch.cat([answer.index for answer in answers])
        assert sorted(index.tolist()) == list(range(24))
        logits = torch.cat([answer.logits for answer in answers])
        torch.testing.assert_close(logits, expected.logits[index], atol=1e-4, rtol=0)


def test_files_are_answered_as_by_torch(
    folder: Path, colour_model: Path, colours: Path, cfvit_main: Callable[..., Outcome]
) -> None:
    answers = [cfvit_main("predict", colours / "val", "--model", given, "--json") for given in (folder, colour_model)]
    assert [outcome.status for outcome in answers] == [0, 0]
    exported, torchs = ([json.loads(line) for line in outcome.out] for outcome in answers)
    assert len(exported) == 33
    for one, other in zip(exported, torchs, strict=True):
        assert one.pop("confidence") == pytest.approx(other.pop("confidence"), abs=1e-4)
        assert one == other
    assert answers[0].err[-1] == answers[1].err[-1]


def test_an_exported_model_is_scored_as_the_one_in_torch(
    folder: Path, colour_model: Path, colours: Path, cfvit_main: Callable[..., Outcome]
) -> None:
    arguments = ("eval", "--data", colours, "--json", "--workers", 0)
    exported, torchs = (cfvit_main(*arguments, "--model", given) for given in (folder, colour_model))
    assert exported.status == torchs.status == 0
    for one, other in zip(exported.out, torchs.out, strict=True):
        assert json.loads(one) == json.loads(other)


def test_a_report_of_an_exported_model_is_refused(
    folder: Path, colours: Path, tmp_path: Path, cfvit_main: Callable[..., Outcome]
) -> None:
    outcome = cfvit_main("eval", "--data", colours, "--model", folder, "--report", tmp_path)
    assert outcome.status == 2
    assert outcome.err == [f"cfvit: --report is for models in torch, and {folder} is an exported one: leave it out"]


@pytest.mark.parametrize("option", [["--scaled-decode"], ["--calibration", "calibration.json"]])
def test_options_for_models_in_torch_are_refused(
    option: list[str], folder: Path, colours: Path, cfvit_main: Callable[..., Outcome]
) -> None:
    outcome = cfvit_main("predict", colours / "val", "--model", folder, *option)
    assert outcome.status == 2
    assert outcome.err == [f"cfvit: {option[0]} is for models in torch, and {folder} is an exported one: leave it out"]


def test_pictures_are_drawn_from_an_exported_model(engine: ExportedEngine, model: CoarseToFineViT) -> None:
    images = _images(model, 3)
    pairs = zip(explain(engine, images, 0.5), explain(model, images, 0.5), strict=True)
    for one, other in pairs:
        assert (one.split == other.split).all()
        assert [label for label, _ in one.answers] == [label for label, _ in other.answers]


def test_the_example_needs_neither_torch_nor_cfvit(folder: Path, engine: ExportedEngine, tmp_path: Path) -> None:
    photo = tmp_path / "palace.png"
    with Image.open(Path(export_module.__file__).parent / "page" / "samples" / "palace.jpg") as palace:
        palace.resize((90, 40)).save(photo)
    examples = [folder / "example.py"]
    for mode in ("squash", "border"):  # as models that were made for it have it
        shutil.copytree(folder, tmp_path / mode)
        about = replace(engine.model, data_config={**engine.model.data_config, "crop_mode": mode})
        package = "onnxruntime" if about.format == "onnx" else "openvino"
        text = fill_template("deploy/templates/example.py.j2", about=about, package=package, about_file=EXPORT_FILE)
        examples.append(tmp_path / mode / "example.py")
        examples[-1].write_text(text)
    code = (
        "import runpy, sys; sys.modules |= dict.fromkeys(['torch', 'timm', 'cfvit', 'openvino_telemetry']); "
        "sys.argv, examples = sys.argv[:2], sys.argv[2:]; "
        "[runpy.run_path(each, run_name='__main__') for each in examples]"
    )
    said = subprocess.run([sys.executable, "-c", code, photo, *examples], capture_output=True, text=True, check=True)
    for mode, line in zip(("center", "squash", "border"), said.stdout.splitlines(), strict=True):
        label, confidence, stage = line.split()
        transform = eval_transform({**engine.model.data_config, "crop_mode": mode})
        expected = Predictor(engine)(transform(open_image(photo))[None])
        assert label == engine.model.label_of(int(expected.logits.argmax()))
        assert float(confidence) == pytest.approx(float(expected.confidence), abs=1e-3)
        assert stage == ("coarse", "fine")[int(expected.stage)]
    assert all(len(example.read_text().splitlines()) <= 18 for example in examples)


def test_the_server_offers_onnx_graphs_to_browsers(folder: Path, tmp_path: Path, fails: Fails) -> None:
    predictor, key = Predictor(folder), "quite secret"
    settings = Settings(browser_runtime=tmp_path, api_key=key)
    if ExportedEngine(folder).model.format != "onnx":
        with fails("a browser runs models that were exported to ONNX"):
            create_app(predictor, settings)
        return
    with fails(f"{BROWSER_RUNTIME[0]} is missing"):
        create_app(predictor, settings)
    for name in (*BROWSER_RUNTIME, "secret.txt"):
        (tmp_path / name).write_text(name)
    app = create_app(predictor, settings)

    async def ask() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            for name in BROWSER_RUNTIME:
                assert (await client.get(f"/runtime/{name}")).text == name
            for name in ("coarse.onnx", "fine.onnx", WEIGHTS_FILE, EXPORT_FILE):
                assert (await client.get(f"/graphs/{name}")).status_code == 401
                answer = await client.get(f"/graphs/{name}", headers={"Authorization": f"Bearer {key}"})
                assert answer.content == (folder / name).read_bytes()
            for address in ("runtime/secret.txt", "graphs/whole.onnx", "graphs/../secret.txt"):
                assert (await client.get(f"/{address}")).status_code == 404

    asyncio.run(ask())
    assert app.state.service.scheduler.drain(20)


@pytest.mark.usefixtures("traced", "timed_at_once")
def test_the_benchmark_sets_exported_engines_beside_the_plain_backbone(
    model: CoarseToFineViT, colour_model: Path, cfvit_main: Callable[..., Outcome]
) -> None:
    images = _images(model, 3)
    torch.testing.assert_close(Engines(model).plain("onnx")(images), model.backbone(images), atol=1e-4, rtol=0)
    engines = ("torch", "onnx", "openvino-int8")
    arguments = ("--model", colour_model, "--batch-sizes", "2", "--fine-share", "0.5", "--rounds", "1", "--no-peers")
    outcome = cfvit_main("bench", *arguments, "--engine", *engines, "--json")
    assert outcome.status == 0, outcome.err
    names = ["backbone", "coarse stage", "fine stage", "both stages", "predictor", "stream"]
    rows = [(row["name"], row["engine"]) for row in map(json.loads, outcome.out[1:])]
    assert rows == [("backbone", "eager"), *((name, engine) for engine in engines for name in names)]
    assert any("int8 is quantised by noise" in line for line in outcome.err)
    assert any("the best default here is" in line for line in outcome.err)


def test_threads_share_an_engine_and_keep_their_answers(engine: ExportedEngine, model: CoarseToFineViT) -> None:
    batches = _images(model, 12).split([1, 5, 2, 4])
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(Predictor(engine), batches * 3))
    expected = Predictor(model)
    for images, answer in zip(batches * 3, answers, strict=True):
        torch.testing.assert_close(answer.logits, expected(images).logits, atol=1e-4, rtol=0)


def test_an_exported_predictor_can_be_pickled(folder: Path, model: CoarseToFineViT) -> None:
    images, predictor = _images(model, 2), Predictor(folder)
    assert torch.equal(pickle.loads(pickle.dumps(predictor))(images).logits, predictor(images).logits)


def test_other_shapes_are_refused(engine: ExportedEngine, fails: Fails) -> None:
    with fails(r"images of shape \[1, 3, 8, 8\]: give normalised \[B, 3, 32, 32\]"):
        Predictor(engine)(torch.zeros(1, 3, 8, 8))


def test_compiling_is_for_torch(folder: Path, fails: Fails) -> None:
    with fails("compile is True: leave it out"):
        Predictor(folder, compile=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": "lvvit_tiny_patch16_224", "patch_size": 16, "coarse_grid": 2, "feature_reuse": "class_token"},
        {"backbone": "vit_base_patch16_rope_mixed_224", "patch_size": 16, "coarse_grid": 2},
        {"backbone": "eva02_tiny_patch14_224", "coarse_grid": (2, 3), "selection": "negative"},
        {"fine_merged": 3},
    ],
)
def test_other_models_can_be_exported(
    changes: dict[str, Any], make_model: Callable[..., CoarseToFineViT], tmp_path: Path
) -> None:
    model = make_model(**{"depth": 1, **changes})
    model.exit = Exit("margin", coarse_weight=0.3)
    images = _images(model, 5)
    assert export(model, tmp_path, images=images).difference < 1e-4
    for eta in (0, 1):
        expected, answer = Predictor(model, eta, compile=False)(images), Predictor(tmp_path, eta)(images)
        torch.testing.assert_close(answer.logits, expected.logits, atol=1e-4, rtol=0)
    assert "0.5" in (tmp_path / "example.py").read_text()  # an eta, where the model has none


def test_graphs_that_differ_from_torch_are_not_written(
    model: CoarseToFineViT, traced: None, tmp_path: Path, fails: Fails
) -> None:
    changed = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        changed.get_parameter("backbone.pos_embed")[0, 1:] *= 2  # which the fine stage alone reads
    with fails("the exported graphs differ from torch by .*, more than 0.001: not written"):
        export(changed, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    export(model, tmp_path / "new")
    assert read_exported(tmp_path / "new").difference < 1e-4


def test_what_cannot_be_exported_is_told(
    make_model: Callable[..., CoarseToFineViT], tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fails("splits random cells cannot be exported"):
        export(make_model(selection="random"), tmp_path)
    coarse_only = make_model()
    coarse_only.trained = None
    with fails("fine stage was never trained"):
        export(coarse_only, tmp_path)
    format: Any = "tensorrt"
    with fails("format is 'tensorrt': give one of onnx, openvino"):
        export(make_model(), tmp_path, format=format)

    def missing(name: str) -> str:
        if name == "onnxscript":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(export_module, "version", missing)
    with fails(r"exporting to openvino needs onnxscript: install cfvit\[openvino\]"):
        export(make_model(), tmp_path, format="openvino")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("format", "runtime"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_runtime_that_is_missing_is_told(
    format: Format, runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    monkeypatch.setitem(sys.modules, runtime, None)
    (tmp_path / f"fine{'.onnx' if format == 'onnx' else '.xml'}").touch()
    with fails(rf"models exported to {format} need {runtime}: install cfvit\[{format}\]"):
        open_graph(tmp_path, "fine", format)


@pytest.mark.parametrize("text", ["", "{}", '{"format": "tensorrt"}'])
def test_a_folder_without_an_exported_model_is_told(text: str, tmp_path: Path, fails: Fails) -> None:
    with fails(f"{tmp_path} holds no exported model"):
        Predictor(tmp_path)
    (tmp_path / EXPORT_FILE).write_text(text)
    with fails(f"{EXPORT_FILE} cannot be used"):
        Predictor(tmp_path)


def test_an_exported_model_is_no_model_in_torch(tmp_path: Path, fails: Fails) -> None:
    (tmp_path / EXPORT_FILE).write_text("{}")
    with fails("holds an exported model, which cfvit.Predictor, predict and eval take"):
        load(tmp_path)


def test_a_damaged_graph_is_told(folder: Path, tmp_path: Path, fails: Fails) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes() if file.name == EXPORT_FILE else b"")
    with fails(f"{tmp_path} is damaged, {read_exported(folder).format} cannot read it: export it again"):
        Predictor(tmp_path)
    for file in sorted(tmp_path.glob("coarse.*")):
        file.unlink()
    with fails(f"{tmp_path} has no coarse.[a-z]*: export the model again"):
        Predictor(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "match"),
    [
        (("class_names",), ["one"], "class_names do not name"),
        (("data_config", "mean"), "grey", "mean is 'grey': give"),
        (("data_config", "interpolation"), "cubic", "interpolation is 'cubic': give one of nearest"),
        (("data_config", "input_size"), [3, 9, 9], r"input_size is \(3, 9, 9\), not"),
        (("exit", "eta"), 7, r"\(exit: threshold is 7.0: give"),
        (("format",), None, r"\(format: Input should be"),
        (("macs", "coarse"), -5, r"\(macs.coarse: Input should be greater"),
    ],
)
def test_a_description_that_does_not_fit_is_told(
    place: tuple[str, ...], value: Any, match: str, folder: Path, tmp_path: Path, fails: Fails
) -> None:
    about = json.loads((folder / EXPORT_FILE).read_text())
    part = about
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    (tmp_path / EXPORT_FILE).write_text(json.dumps(about))
    with fails(f"{EXPORT_FILE} cannot be used.*{match}.*: export the model again"):
        read_exported(tmp_path)


@pytest.mark.parametrize("change", [{"num_classes": 900}, {"coarse_grid": 5}])
def test_graphs_of_another_model_are_told(change: dict[str, int], folder: Path, tmp_path: Path, fails: Fails) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    about = json.loads((folder / EXPORT_FILE).read_text())
    about = {**about, "config": {**about["config"], **change}, "class_names": None}
    (tmp_path / EXPORT_FILE).write_text(json.dumps(about))
    with fails("has graphs of another model than its cfvit.json says: export it again"):
        Predictor(tmp_path)


def test_from_the_command_line(
    colour_model: Path, traced: None, tmp_path: Path, cfvit_main: Callable[..., Outcome]
) -> None:
    outcome = cfvit_main("export", colour_model, tmp_path / "exported", "--format", "onnx")
    assert outcome.status == 0, outcome.err
    assert "differs from torch by" in outcome.err[-1]
    assert Predictor(tmp_path / "exported").threshold == load(colour_model).threshold


def test_an_export_replaces_another_and_no_model(
    model: CoarseToFineViT, colour_model: Path, traced: None, folder: Path, tmp_path: Path, fails: Fails
) -> None:
    for suffix in (".onnx", ".bin", ".xml"):
        (tmp_path / f"whole{suffix}").write_text("of another format")
    (tmp_path / "notes.txt").write_text("mine")
    export(model, tmp_path, format=read_exported(folder).format)
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in folder.iterdir()} | {"notes.txt"}
    with fails(f"{colour_model} holds a model, which would no longer load: choose another folder"):
        export(model, colour_model)
    with fails(f"{folder} holds an exported model, beside which no other is found: choose another folder"):
        save(model, folder)
    with fails("the model is a PosixPath: give one that cfvit.load gives"):
        export(cast(Any, colour_model), tmp_path)


def test_an_unwritable_folder_is_refused_before_anything_is_read(
    tmp_path: Path, cfvit_main: Callable[..., Outcome]
) -> None:
    (tmp_path / "file").touch()
    outcome = cfvit_main("export", tmp_path / "nowhere", tmp_path / "file" / "exported")
    assert outcome.status == 1
    (line,) = outcome.err
    assert "exported" in line
    assert line.endswith("(Not a directory): choose another place; nothing was changed")


def test_nothing_is_left_of_an_export_that_was_ended(
    folder: Path,
    colour_model: Path,
    tmp_path: Path,
    cfvit_main: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ExportedEngine(folder)  # and it is gone: OpenVINO has to leave signals as they were
    monkeypatch.setattr(export_module, "stage_graphs", lambda _: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert cfvit_main("export", colour_model, tmp_path / "exported").status == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert list(tmp_path.iterdir()) == []


def test_a_server_answers_from_an_export(folder: Path, model: CoarseToFineViT, colours: Path) -> None:
    photo = sorted((colours / "val").rglob("*.png"))[0]
    image = eval_transform(model.data_config)(open_image(photo))[None]
    expected = Predictor(model, compile=False)(image)
    (shown,) = explain(model, image, Predictor(model).threshold)

    async def ask() -> tuple[dict[str, Any], dict[str, Any]]:
        app = create_app(Predictor(folder), Settings())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            predicted, explained = [
                (await client.post(path, content=photo.read_bytes())).raise_for_status().json()
                for path in ("/predict", "/explain")
            ]
        app.state.service.scheduler.drain()
        return predicted["predictions"][0], explained

    predicted, explained = asyncio.run(ask())
    assert predicted["stage"] == explained["stage"] == int(expected.stage)
    assert predicted["confidence"] == pytest.approx(float(expected.confidence), abs=1e-4)
    assert explained["split"] == shown.split.flatten().tolist()


def test_int8_needs_data(tmp_path: Path, cfvit_main: Callable[..., Outcome]) -> None:
    outcome = cfvit_main("export", "deit_tiny_imagenet", tmp_path / "exported", "--int8")
    assert outcome.status == 2
    assert outcome.err == ["cfvit: --int8 quantises by the images of --data: give them"]


def test_an_export_is_compared_on_some_of_the_given_images_that_can_be_read(
    colour_model: Path, colours: Path, tmp_path: Path, cfvit_main: Callable[..., Outcome], monkeypatch: Any
) -> None:
    shutil.copytree(colours / "val", tmp_path / "photos")
    (tmp_path / "photos" / "red" / "0.png").write_text("no image")
    seen: list[int] = []
    monkeypatch.setattr("cfvit.deploy.export.compare", lambda model, folder, images: seen.append(len(images)) or 0.5)
    outcome = cfvit_main("export", colour_model, tmp_path / "exported", "--data", tmp_path / "photos")
    assert 1 < seen[0] <= 32
    assert "the exported graphs differ from torch by 0.5" in outcome.err[-1]


@pytest.mark.parametrize(("format", "labelled"), [("onnx", True), ("openvino", False)])
def test_int8_is_told_with_what_it_costs_and_has_an_eta_of_its_own(
    format: Format,
    labelled: bool,
    colour_model: Path,
    traced: None,
    colours: Path,
    tmp_path: Path,
    cfvit_main: Callable[..., Outcome],
) -> None:
    model, folder = load(colour_model), tmp_path / "exported"
    data = colours / "val" if labelled else colours / "val" / "red"
    outcome = cfvit_main("export", colour_model, folder, "--format", format, "--int8", "--data", data)
    assert outcome.status == 0, outcome.err
    engine = ExportedEngine(folder)
    about, found = engine.model, engine.model.quantised
    assert found is not None
    count = 33 if labelled else 11
    assert (found.calibrated_on, found.scored_on) == (count // 2, count - count // 2)
    assert found.measure == ("accuracy" if labelled else "agreement")
    assert (found.before.fine == 100) == (not labelled), "torch agrees with itself"
    assert found.before.eta == model.threshold
    assert about.threshold == found.after.eta
    assert found.after.answered is not None
    assert found.before.answered is not None
    assert found.after.fine - found.after.answered <= max(0, found.before.fine - found.before.answered) + 1e-9
    assert f"coarse {found.after.coarse:.2f}, fine {found.after.fine:.2f}, at eta" in outcome.err[-2]
    assert "nncf" in about.versions
    few = f"calibrated on {found.calibrated_on} images and scored on {found.scored_on}, which are few"
    assert sum(few in line for line in outcome.err) == 1

    images = _images(model, 8)
    state, _ = engine.coarse(images)
    with torch.inference_mode():
        expected = model(images)
    assert 1e-6 < float((state.logits - expected.coarse).abs().max()) < 0.5 * float(expected.coarse.abs().max())
    whole = open_graph(folder, "whole", format)
    answer = whole({"images": images.numpy(), "eta": torch.tensor(about.threshold).numpy()})
    assert answer["stage"].tolist() == Predictor(engine)(images).stage.tolist()
    torch.testing.assert_close(
        torch.from_numpy(answer["logits"]), Predictor(engine)(images).logits, atol=0.05, rtol=0.05
    )


def test_what_int8_needs_is_told(
    model: CoarseToFineViT, colours: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = open_images(str(colours / "val" / "red" / "0.png"))
    with fails("1 image cannot be parted"):
        calibration_images(one, model.data_config)
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "b.png").write_bytes(b"no image")
    with fails("none of the 1 images to quantise by can be read"):
        calibration_images(open_images(str(tmp_path)), model.data_config)

    def missing(name: str) -> str:
        if name == "nncf":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(export_module, "version", missing)
    with fails(r"int8 needs nncf: install cfvit\[int8\]"):
        export(model, tmp_path / "new", int8=one)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("flags", "slow"), [("avx2 fma", True), ("avx2 avx512_vnni", False), ("asimd", False)])
def test_a_processor_on_which_int8_may_be_slower_is_told(flags: str, slow: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : fpu {flags}\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_slow(tmp_path / "cpuinfo")
    assert ["no VNNI" in str(each.message) for each in caught] == [True] * slow


@pytest.mark.parametrize(
    ("images", "before", "after", "expected"),
    [
        (300, (80.0, 78.0), (80.0, 77.5), []),
        (300, (80.0, 78.0), (80.0, 76.5), ["loses 1.5 points of accuracy at eta, 78.0 to 76.5: give more images"]),
        (300, (80.0, None), (77.0, None), ["loses 3.0 points of accuracy in the fine stage, 80.0 to 77.0"]),
        (99, (80.0, 78.0), (80.0, 78.0), ["calibrated on 99 images and scored on 400, which are few: give --data of"]),
    ],
)
def test_what_int8_costs_is_a_warning(
    images: int, before: tuple[float, float | None], after: tuple[float, float | None], expected: list[str]
) -> None:
    scores = [TwoStageScores(70.0, fine, None if at is None else 0.5, at, None) for fine, at in (before, after)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_loss(Quantised(images, 400, "accuracy", *scores))
    assert len(caught) == len(expected)
    assert all(text in str(each.message) for text, each in zip(expected, caught, strict=True))
