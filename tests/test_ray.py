"""Answers on a Ray cluster, which is started once: on this machine, with two workers."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from conftest import Outcome
from pydantic import ValidationError

from cfvit import Predictor, eval_transform, load, open_image
from cfvit.data import find_images

Cli = Callable[..., Outcome]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import cfvit.deploy.ray_data  # sets what Ray reads when it is imported  # noqa: F401, I001
    import ray

    ray.init("local", include_dashboard=False, num_cpus=3, log_to_driver=False, object_store_memory=200_000_000)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def photos(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """33 images, and two that cannot be read, one by a name that is no text. Only to be read."""
    folder = tmp_path_factory.mktemp("photos")
    shutil.copytree(colours / "val", folder, dirs_exist_ok=True)
    (folder / "green" / "5.txt.png").write_text("no image")
    (folder / "red" / os.fsdecode(b"\xff.png")).write_text("no image")
    return folder


def _workers() -> list[int]:
    """Processes below this one that are workers which answer."""
    parents, workers = {}, []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if (process / "cmdline").read_bytes().startswith(b"ray::MapWorker(Map(Answer))"):
                workers.append(int(process.name))
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue

    def is_below(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and is_below(parents[pid]))

    return list(filter(is_below, workers))


def test_a_job_that_was_begun_alone_is_ended_on_a_cluster_of_which_a_worker_is_killed(
    cluster: None, photos: Path, colour_model: Path, tmp_path: Path, cfvit_main: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, so that the same images meet in a batch here and there. By their name, workers do not decode."""
    alone, together = tmp_path / "alone.jsonl", tmp_path / "together.jsonl"
    monkeypatch.chdir(photos.parent)  # where no worker is
    given = ("predict", photos.name, "--model", colour_model, "--part-size", 1, "--output")
    undisturbed = cfvit_main(*given, alone)

    def answered() -> list[Path]:
        return sorted(together.with_name("together.jsonl.parts").glob("0*.jsonl"))

    def interrupted(job: object) -> None:
        for part in answered()[5:]:
            part.unlink()
        sys.exit(9)

    with monkeypatch.context() as patch:
        patch.setattr("cfvit.deploy.batch.Job.join", interrupted)
        assert cfvit_main(*given, together).status == 9
    killed: list[int] = []

    def kill_one() -> None:
        while len(answered()) < 8:
            time.sleep(0.01)
        os.kill(_workers()[0], signal.SIGKILL)
        killed.append(len(answered()))

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    outcome = cfvit_main(*given, together, "--ray", "local", "--ray-workers", 2)
    killer.join(1)
    assert killed and killed[0] < 35
    assert outcome.err[0] == "35 images, 5 of them answered before"
    assert outcome.status == undisturbed.status == 1
    assert outcome.err[-1] == undisturbed.err[-1]
    assert together.read_text() == alone.read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--ray", "local"], "add --output"),
        (["--ray", "local", "--output", "a.jsonl", "--scaled-decode"], "--ray decodes whole images"),
        (["--output", "a.jsonl", "--ray", "local", "--ray-workers", "0"], "--ray-workers"),
    ],
)
def test_wrong_usage(words: list[str], says: str, photos: Path, colour_model: Path, cfvit_main: Cli) -> None:
    outcome = cfvit_main("predict", photos, "--model", colour_model, *words)
    assert outcome.status == 2
    assert len(outcome.err) == 1
    assert says in outcome.err[0]


def test_without_ray_it_is_one_line(
    photos: Path, colour_model: Path, tmp_path: Path, cfvit_main: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "cfvit.deploy.ray_data", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    given = ("predict", photos, "--model", colour_model, "--output", tmp_path / "answers.jsonl", "--ray", "local")
    outcome = cfvit_main(*given)
    assert outcome.status == 1
    assert outcome.err == ["cfvit: a Ray cluster needs ray: install cfvit[ray]"]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def served(cluster: None, colour_model: Path) -> Iterator[httpx.Client]:
    """A client of the application that is served on the cluster."""
    from ray import serve

    from cfvit.deploy.ray_serve import Arguments, build

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build(Arguments(model=str(colour_model), coarse_batch=4, fine_batch=2, max_replicas=1)))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        yield client
    serve.shutdown()


@pytest.mark.parametrize("given", [{"coarse_batch": 0}, {"fine_wait": -1}, {"max_replicas": 0}, {"max_waiting": 0}])
def test_serve_refuses_what_cannot_work(given: dict[str, float]) -> None:
    from cfvit.deploy.ray_serve import Arguments

    with pytest.raises(ValidationError, match="greater than"):
        Arguments.model_validate(given)


def test_serve_answers_as_the_predictor(served: httpx.Client, photos: Path, colour_model: Path) -> None:
    """Many at a time, some of which go on to the fine stage."""
    model = load(colour_model)
    files = [path for path in find_images([photos]) if path.stem.isdecimal()]
    transform = eval_transform(model.data_config)
    expected = Predictor(model)(torch.stack([transform(open_image(path)) for path in files]))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda path: served.post("/predict", content=path.read_bytes()), files))
    assert {answer.status_code for answer in answers} == {200}
    rows = [answer.json()["predictions"][0] for answer in answers]
    assert [row["stage"] for row in rows] == expected.stage.tolist()
    assert {row["stage"] for row in rows} == {0, 1}
    assert [row["index"] for row in rows] == expected.logits.argmax(dim=-1).tolist()
    assert [row["confidence"] for row in rows] == pytest.approx(expected.confidence.tolist(), abs=1e-5)


def test_serve_has_the_interface_of_the_server(served: httpx.Client, photos: Path, colour_model: Path) -> None:
    assert served.get("/v2/health/ready").json() == {"ready": True}
    bad = served.post("/predict", content=b"no image")
    assert (bad.status_code, list(bad.json())) == (422, ["error"])
    pair = [("image", (photos / "red" / name).read_bytes()) for name in ("0.png", "1.png")]
    assert len(served.post("/predict", files=pair).json()["predictions"]) == 2
    explained = served.post("/explain", content=pair[0][1]).json()
    assert explained["gmacs_both"] > explained["gmacs_coarse"]
    assert served.get("/stats").json()["model"] == colour_model.name
