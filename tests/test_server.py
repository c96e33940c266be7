"""The server answers as the predictor does, and refuses in one line whatever it cannot answer."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
import schemathesis.specs.openapi.schemas  # before threads: Python 3.11 may fail to parse in two (cpython 106905)
import torch
from conftest import Outcome
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis.checks import CHECKS
from starlette.testclient import TestClient
from torch import Tensor

from cfvit import Prediction, Predictor, eval_transform, load, open_image
from cfvit.deploy import Queues, Settings
from cfvit.deploy.scheduler import Scheduler
from cfvit.deploy.server import Server, create_app
from cfvit.plots.explain import explain

MODEL = "/v2/models/colours"
INFER = f"{MODEL}/infer"
SLOW = (HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large)
SOON = 60.0
"""Seconds after which something that should happen at once has not."""

Use = Callable[[httpx.AsyncClient, Any], Awaitable[None]]


class HeldEngine:
    """An engine that does not begin a batch before it is let go; it fails when it is told to."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.model, self.weight = engine, engine.model, engine.weight
        self.go, self.begun, self.fails = threading.Event(), threading.Event(), False
        self.seen = 0

    def coarse(self, images: Tensor) -> Any:
        self.seen += len(images)
        self.begun.set()
        assert self.go.wait(SOON)
        if self.fails:
            raise RuntimeError("out of memory\nand more lines")
        return self.engine.coarse(images)

    def fine(self, images: Tensor, state: Any) -> Any:
        return self.engine.fine(images, state)


@pytest.fixture(scope="module")
def predictor(colour_model: Path) -> Predictor:
    return Predictor(load(colour_model), compile=False)


@pytest.fixture
def held(predictor: Predictor) -> Predictor:
    """A predictor whose engine is held after the first batch, which the server's start computes."""
    engine = HeldEngine(predictor.engine)
    engine.go.set()
    held = Predictor(engine, predictor.threshold)
    held.macs = predictor.macs  # else counted again
    return held


@pytest.fixture(scope="module")
def photos(colours: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((colours / "val").rglob("*.png"))]


@pytest.fixture(scope="module")
def tensors(predictor: Predictor, photos: list[bytes]) -> Tensor:
    transform = eval_transform(predictor.model.data_config)
    return torch.stack([transform(open_image(photo)) for photo in photos])


@pytest.fixture(scope="module")
def expected(predictor: Predictor, tensors: Tensor) -> Prediction:
    answer = predictor(tensors)
    assert 0 < answer.stage.sum() < len(tensors)
    return answer


def serve(predictor: Predictor, use: Use, queues: dict[str, Any] | None = None, **settings: Any) -> None:
    """Runs ``await use(client, service)`` against a server with such settings; its engine is held from then on."""

    async def main() -> None:
        scheduler = Scheduler(predictor.engine, predictor.threshold, Queues(**(queues or {})))
        app = create_app(predictor, Settings(**{"name": "colours", "time_limit": 600.0, **settings}), scheduler)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=SOON) as client:
            engine: Any = predictor.engine
            if isinstance(engine, HeldEngine):
                engine.go.clear()
                engine.begun.clear()
                engine.seen = 0
            await use(client, app.state.service)
            if isinstance(engine, HeldEngine):
                engine.go.set()
            assert await asyncio.to_thread(app.state.service.scheduler.drain, SOON)

    asyncio.run(main())


@contextmanager
def asking(predictor: Predictor, **settings: Any) -> Iterator[TestClient]:
    """A client of a server with such settings, which asks one thing after another."""
    app = create_app(predictor, Settings(name="colours", time_limit=600.0, **settings))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def client(predictor: Predictor) -> Iterator[TestClient]:
    with asking(predictor) as client:
        yield client


async def until(true: Callable[[], bool]) -> None:
    """Waits until something has come about."""
    async with asyncio.timeout(SOON):
        while not true():
            await asyncio.sleep(0.005)


def refusal(response: Any, status: int, match: str) -> None:
    """Checks that a request was refused in one line."""
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert re.search(match, error), error
    assert "\n" not in error


def floats(images: Tensor) -> dict[str, Any]:
    return {"name": "images", "datatype": "FP32", "shape": list(images.shape), "data": images.flatten().tolist()}


def binary(given: dict[str, Any], data: bytes) -> dict[str, Any]:
    """A request by the protocol's binary extension."""
    about = {**given, "parameters": {"binary_data_size": len(data)}}
    header = json.dumps({"inputs": [about]}).encode()
    return {"content": header + data, "headers": {"Inference-Header-Content-Length": str(len(header))}}


def encoded(files: list[bytes]) -> dict[str, Any]:
    data = [base64.b64encode(file).decode() for file in files]
    return {"name": "files", "datatype": "BYTES", "shape": [len(files)], "data": data}


def test_300_mixed_requests_at_once_get_the_predictors_answers(
    predictor: Predictor, photos: list[bytes], tensors: Tensor, expected: Prediction
) -> None:
    choose = random.Random(0)
    labels = expected.logits.argmax(1)
    cost = (predictor.macs.coarse / 1e9, predictor.macs.both / 1e9)

    async def ask(client: httpx.AsyncClient, kind: int) -> None:
        chosen = choose.sample(range(len(photos)), choose.randint(1, 4))
        files = [photos[number] for number in chosen]
        if kind == 0:
            response = await client.post("/predict", content=files[0])
            chosen = chosen[:1]
        elif kind == 1:
            response = await client.post("/predict", files=[("image", ("a.png", file)) for file in files])
        elif kind == 2:
            response = await client.post(INFER, json={"inputs": [floats(tensors[chosen])], "id": "a"})
        elif kind == 3:
            response = await client.post(INFER, json={"inputs": [encoded(files)]})
        elif kind == 4:
            about = {"name": "images", "datatype": "FP32", "shape": [len(chosen), *tensors.shape[1:]]}
            response = await client.post(INFER, **binary(about, tensors[chosen].numpy().tobytes()))
        else:
            data = b"".join(len(file).to_bytes(4, "little") + file for file in files)
            about = {"name": "files", "datatype": "BYTES", "shape": [len(files)]}
            response = await client.post(INFER, **binary(about, data))
        answer = response.raise_for_status().json()
        if kind < 2:
            answers = answer["predictions"]
            assert [each["index"] for each in answers] == labels[chosen].tolist()
            assert [each["label"] for each in answers] == [predictor.model.label_of(i) for i in labels[chosen].tolist()]
            assert [each["gmacs"] for each in answers] == [cost[stage] for stage in expected.stage[chosen]]
            assert {each["eta"] for each in answers} == {predictor.threshold}
            stage, confidence = ([each[name] for each in answers] for name in ("stage", "confidence"))
        else:
            outputs = {each["name"]: each for each in answer["outputs"]}
            stage, confidence = (outputs[name]["data"] for name in ("stage", "confidence"))
            logits = torch.tensor(outputs["logits"]["data"]).view(outputs["logits"]["shape"])
            torch.testing.assert_close(logits, expected.logits[chosen], atol=1e-4, rtol=0)
            assert answer["parameters"] == {"eta": predictor.threshold}
        assert stage == expected.stage[chosen].tolist()
        assert confidence == pytest.approx(expected.confidence[chosen].tolist(), abs=1e-4)

    async def use(client: httpx.AsyncClient, service: Any) -> None:
        await asyncio.gather(*(ask(client, number % 6) for number in range(300)))

    serve(predictor, use, {"max_waiting": 1200})


def test_the_inference_protocol_tells_of_the_model(client: TestClient, photos: list[bytes]) -> None:
    assert client.get("/v2").json()["name"] == "cfvit"
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == client.get(f"{MODEL}/ready").json()
    about = client.get(MODEL).json()
    assert about["inputs"][0] == {"name": "images", "datatype": "FP32", "shape": [-1, 3, 32, 32]}
    outputs = {each["name"]: each for each in about["outputs"]}
    assert "versions" not in about, "none has an address"
    asked = {"id": "17", "inputs": [encoded(photos[:2])], "outputs": [{"name": "label"}, {"name": "stage"}]}
    answer = client.post(INFER, json=asked).raise_for_status().json()
    assert (answer["id"], answer["model_name"]) == ("17", "colours")
    assert [each["name"] for each in answer["outputs"]] == ["stage", "label"]
    for each in answer["outputs"]:
        assert each["datatype"] == outputs[each["name"]]["datatype"]
        assert each["shape"] == [2] and len(each["data"]) == 2


def test_unknown_addresses_are_told_which_there_are(client: TestClient) -> None:
    known = f"POST /predict, .*GET /stats, .*GET {MODEL}, .*PUT {MODEL}/parameters, POST {INFER}$"
    other = "/v2/models/other"
    unknown = [("GET", "/stat"), ("POST", "/nowhere"), ("DELETE", "/app.css/x"), ("PUT", f"{other}/parameters")]
    unknown += [("GET", other), ("POST", f"{other}/infer"), ("GET", f"{other}/infer"), ("POST", "/app.css")]
    for method, path in unknown:
        refusal(client.request(method, path), 404, f"there is no {method} {path} here, but GET /, {known}")
    response = client.get("/predict")
    refusal(response, 405, "/predict takes POST, not GET")
    assert response.headers["Allow"] == "POST"
    refusal(client.post(f"{MODEL}/parameters"), 405, "takes PUT, not POST")


def test_what_is_asked_again_and_again_is_not_logged(
    held: Predictor, photos: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    async def use(client: httpx.AsyncClient, service: Any) -> None:
        held.engine.go.set()  # pyright: ignore[reportAttributeAccessIssue]
        for path in ("/stats", "/metrics", "/v2/health/live", "/v2/health/ready", "/v2"):
            assert (await client.get(path)).status_code == 200
        assert (await client.post("/predict", content=photos[0])).status_code == 200
        service.draining = True
        assert (await client.get("/v2/health/ready")).status_code == 503

    with caplog.at_level("INFO", "cfvit.serve"):
        serve(held, use)
    logged = [vars(record)["fields"] for record in caplog.records]
    assert [each["path"] for each in logged] == ["/v2", "/predict", "/v2/health/ready"]


def test_an_answer_says_how_long_its_image_waited_and_was_computed(held: Predictor, photos: list[bytes]) -> None:
    async def use(client: httpx.AsyncClient, service: Any) -> None:
        inside = [asyncio.create_task(client.post("/predict", content=photos[n])) for n in range(2)]
        await until(lambda: service.scheduler.waiting == 2)
        held.engine.go.set()  # pyright: ignore[reportAttributeAccessIssue]
        answers = [(await each).raise_for_status().json() for each in inside]
        for answer in answers:
            (image,) = answer["predictions"]
            assert image["milliseconds_computing"] > 0
            assert image["milliseconds_waiting"] >= 0
            spent = image["milliseconds_waiting"] + image["milliseconds_computing"]
            assert spent <= answer["milliseconds"] + 1e-6

    serve(held, use, {"coarse_batch": 1, "coarse_wait": 0})


@contextmanager
def listening(predictor: Predictor, **settings: Any) -> Iterator[int]:
    """The port of a server that listens on a socket, which a few checks need; it ends with the context."""
    app = create_app(predictor, Settings(name="colours", **settings))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(app, 0.0)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(SOON)
            assert not thread.is_alive()


def test_a_body_that_drips_is_cut_off_and_its_connection_closed(predictor: Predictor) -> None:
    with listening(predictor, time_limit=0.3) as port, socket.create_connection(("127.0.0.1", port), SOON) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
        client.settimeout(0.07)
        answer = b""
        for _ in range(300):
            try:
                received = client.recv(4096)
            except TimeoutError:
                if not answer:  # what is sent after one may reset the connection before it is read
                    client.send(b"x")
                continue
            if not received:
                break
            answer += received
        else:
            pytest.fail("the connection stays open")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the body did not come within 0.3 s" in answer


def test_the_key_is_asked_for_on_a_socket(predictor: Predictor, photos: list[bytes]) -> None:
    with (
        listening(predictor, api_key="secret") as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SOON) as client,
    ):
        for value, status in (
            (None, 401),
            ("secret", 401),
            ("Bearer wrong", 401),
            ("Bearer", 401),
            ("Basic secret", 401),
            ("Bearer secret", 200),
            ("bearer secret", 200),
        ):
            headers = {} if value is None else {"Authorization": value}
            assert client.post("/predict", content=photos[0], headers=headers).status_code == status, value


def test_headers_without_end_are_cut_off(predictor: Predictor) -> None:
    """They would fill the memory: nobody counts them before they are complete."""
    with listening(predictor) as port, socket.create_connection(("127.0.0.1", port), SOON) as client:
        client.sendall(b"GET /stats HTTP/1.1\r\nHost: localhost\r\n" + b"X: " + 100_000 * b"a")
        assert client.recv(4096).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("key", ["", "clé", "padded ", "two\nlines"])
def test_a_key_that_no_client_could_send_is_refused(
    key: str, colour_model: Path, cfvit_main: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CFVIT_API_KEY", key)
    outcome = cfvit_main("serve", "--model", colour_model, "--host", "203.0.113.7")
    assert (outcome.status, len(outcome.err)) == (2, 1)
    assert "the API key is empty, or no header can carry it: give printable ASCII" in outcome.err[0]


def test_a_port_that_is_taken_is_told_in_one_line(colour_model: Path, cfvit_main: Callable[..., Outcome]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        outcome = cfvit_main("serve", "--model", colour_model, "--port", str(port))
    assert outcome.status == 1
    (line,) = outcome.err
    assert line.startswith(f"cfvit: cannot listen on 127.0.0.1, port {port} (Address already in use): choose another")


GOOD = {"name": "images", "datatype": "FP32", "shape": [1, 3, 32, 32]}
VALUES = [0.0] * (3 * 32 * 32)
WRONG_INPUTS: dict[str, tuple[Any, str]] = {
    "other name": ({**GOOD, "name": "pixels", "data": VALUES}, "give 'images' of FP32"),
    "other datatype": ({**GOOD, "datatype": "INT8", "data": VALUES}, "give 'images' of FP32"),
    "other shape": ({**GOOD, "shape": [1, 3, 8, 8], "data": VALUES}, r"\['n', 3, 32, 32\]"),
    "no shape": ({**GOOD, "shape": [], "data": VALUES}, "of shape"),
    "no images": ({**GOOD, "shape": [0, 3, 32, 32], "data": []}, "n from 1"),
    "huge shape": ({**GOOD, "shape": [10**30, 3, 32, 32], "data": VALUES}, "n from 1|inputs"),
    "negative shape": ({**GOOD, "shape": [-1, 3, 32, 32], "data": VALUES}, "n from 1"),
    "too few values": ({**GOOD, "data": VALUES[1:]}, "3071 values"),
    "words": ({**GOOD, "data": ["0"] * 3072}, "all numbers"),
    "nothing": ({**GOOD, "data": [None] * 3072}, "all numbers"),
    "ragged": ({**GOOD, "data": [[1.0], [1.0, 2.0]]}, "different lengths"),
    "objects": ({**GOOD, "data": [{}] * 3072}, "all numbers"),
    "huge integers": ({**GOOD, "data": [10**400, *VALUES[1:]]}, "all numbers|inputs"),
    "not a number": ({**GOOD, "data": [float("nan"), *VALUES[1:]]}, "not a number|inputs"),
    "infinite": ({**GOOD, "data": [1e300, *VALUES[1:]]}, "infinite"),
    "no data": (GOOD, "no data"),
    "data missing after JSON": ({**GOOD, "parameters": {"binary_data_size": 12288}}, "0 bytes follow"),
    "not base64": ({"name": "files", "datatype": "BYTES", "shape": [1], "data": ["#"]}, "as base64 text"),
    "file of no text": ({"name": "files", "datatype": "BYTES", "shape": [1], "data": [3]}, "as base64 text"),
    "too few files": ({"name": "files", "datatype": "BYTES", "shape": [2], "data": ["aaaa"]}, "1 values"),
}


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_wrong_tensors_are_refused(name: str, client: TestClient) -> None:
    given, match = WRONG_INPUTS[name]
    refusal(client.post(INFER, content=json.dumps({"inputs": [given]})), 400, match)


WRONG_BODIES = [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"inputs": []}', b'{"inputs": [{"name": 3}]}', b"[" * 100_000]


@pytest.mark.parametrize("body", WRONG_BODIES, ids=range(len(WRONG_BODIES)))
def test_what_is_no_request_of_the_protocol_is_refused(body: bytes, client: TestClient) -> None:
    refusal(client.post(INFER, content=body), 400, "Open Inference Protocol")
    for length in ("-1", "x", "9" * 30, str(len(body) + 1)):
        header = {"Inference-Header-Content-Length": length}
        refusal(client.post(INFER, content=body, headers=header), 400, "give the bytes of the JSON")


@pytest.mark.parametrize("data", [b"", b"\0", b"\xff\xff\xff\xff", b"\0\0\0\0\0\0\0\0", b"\1\0\0\0ab"])
def test_binary_files_that_do_not_fit_are_refused(data: bytes, client: TestClient) -> None:
    asked = binary({"name": "files", "datatype": "BYTES", "shape": [1]}, data)
    refusal(client.post(INFER, **asked), 400, "lengths in front")


@pytest.mark.parametrize(("data", "match"), [(b"12345", "bytes in part"), (b"1234", "1 values for the shape")])
def test_binary_numbers_that_do_not_fit_are_refused(data: bytes, match: str, client: TestClient) -> None:
    refusal(client.post(INFER, **binary(GOOD, data)), 400, match)


def test_outputs_that_are_not_known_are_refused(client: TestClient, photos: list[bytes]) -> None:
    asked = {"inputs": [encoded(photos[:1])], "outputs": [{"name": "tokens"}]}
    refusal(client.post(INFER, json=asked), 400, "'tokens'")


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def test_images_that_cannot_be_read_are_refused(predictor: Predictor, photos: list[bytes], tmp_path: Path) -> None:
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"  # Pillow would start Ghostscript
    with asking(predictor, max_pixels=400e-6) as client:
        refusal(client.post("/predict"), 400, "the body is empty")
        for body in (b"\0", b'{"image": "/etc/passwd"}', str(tmp_path).encode(), program):
            refusal(client.post("/predict", content=body), 422, "not an image")
        refusal(client.post("/predict", content=photos[0][:-30]), 422, "damaged")
        refusal(client.post("/predict", content=png(20, 21)), 422, "20 x 21 pixels are more than 400")
        refusal(client.post(INFER, json={"inputs": [encoded([b"no image"])]}), 422, "not an image")
        several = [("image", ("a.png", photos[0])), ("image", ("b.png", b"no image"))]
        refusal(client.post("/predict", files=several), 422, "^image 2: not an image")
        assert client.post("/predict", content=photos[0]).status_code == 200


def test_forms_that_cannot_be_read_are_refused(predictor: Predictor, photos: list[bytes]) -> None:
    with asking(predictor, max_images=2) as client:
        refusal(client.post("/predict", files={"image": (None, "text")}), 400, "has no file")
        for kind in ("multipart/form-data", "multipart/form-data; boundary=x", "multipart/mixed; boundary=\xff"):
            header = [(b"Content-Type", kind.encode("latin-1"))]
            refusal(client.post("/predict", content=b"--x\r\nno form", headers=header), 400, "form")
        refusal(client.post("/predict", files=[("image", ("a", p)) for p in photos[:3]]), 400, "at most 2 files")
        refusal(client.post("/explain", files=[("image", ("a", p)) for p in photos[:2]]), 400, "at most 1 file")
        form = httpx.Request("POST", "http://test", files=[("image", ("a", photo)) for photo in photos[:2]])
        header = {"Content-Type": form.headers["content-type"]}
        refusal(client.post("/predict", content=form.read()[:-50], headers=header), 400, "cut off")


def test_large_bodies_are_refused(predictor: Predictor, photos: list[bytes]) -> None:
    async def parts() -> AsyncIterator[bytes]:  # without a length in front
        for _ in range(20):
            yield bytes(100)

    async def use(client: httpx.AsyncClient, service: Any) -> None:
        for address in ("/predict", "/explain", INFER):
            refusal(await client.post(address, content=bytes(1001)), 413, "1000 bytes")
            refusal(await client.post(address, content=parts()), 413, "1000 bytes")

    serve(predictor, use, max_body=1000 / 2**20)


def test_values_too_large_for_the_model_are_refused(client: TestClient, tensors: Tensor) -> None:
    refusal(client.post(INFER, json={"inputs": [floats(tensors[:1] * 1e37)]}), 422, "not a number")


def test_requests_beyond_the_limit_are_refused_at_once(held: Predictor, photos: list[bytes]) -> None:
    async def use(client: httpx.AsyncClient, service: Any) -> None:
        waiting = [asyncio.create_task(client.post("/predict", content=photos[number])) for number in range(3)]
        await until(lambda: service.scheduler.waiting == 3)
        response = await client.post("/predict", content=photos[0])
        refusal(response, 503, "3 requests are in work")
        assert int(response.headers["Retry-After"]) >= 1
        assert (await client.get("/v2/health/ready")).status_code == 200
        held.engine.go.set()  # pyright: ignore[reportAttributeAccessIssue]
        assert [response.status_code for response in await asyncio.gather(*waiting)] == [200] * 3
        metrics = (await client.get("/metrics")).text
        assert 'cfvit_refusals_total{limit="requests"} 1.0' in metrics

    serve(held, use, {"max_waiting": 3})


def test_images_beyond_the_limit_are_refused_at_once(held: Predictor, photos: list[bytes]) -> None:
    async def use(client: httpx.AsyncClient, service: Any) -> None:
        first = asyncio.create_task(client.post("/predict", files=[("image", ("a", p)) for p in photos[:2]]))
        await until(lambda: service.scheduler.waiting == 2)
        response = await client.post("/predict", files=[("image", ("a", p)) for p in photos[:2]])
        refusal(response, 503, "2 images wait, and 3 may")
        assert int(response.headers["Retry-After"]) >= 1
        held.engine.go.set()  # pyright: ignore[reportAttributeAccessIssue]
        assert (await first).status_code == 200

    serve(held, use, {"max_waiting": 3})


def test_more_images_than_may_wait_are_no_request_to_try_again(predictor: Predictor, photos: list[bytes]) -> None:
    async def use(client: httpx.AsyncClient, service: Any) -> None:
        form = [("image", ("a", photo)) for photo in photos[:4]]
        refusal(await client.post("/predict", files=form), 400, "at most 3 files")
        refusal(await client.post(INFER, json={"inputs": [encoded(photos[:4])]}), 400, "n from 1 to 3")
        assert (await client.post("/predict", files=form[:3])).status_code == 200

    serve(predictor, use, {"max_waiting": 3})


def test_a_client_that_leaves_frees_its_place(held: Predictor, photos: list[bytes]) -> None:
    async def use(client: httpx.AsyncClient, service: Any) -> None:
        app = client._transport.app  # pyright: ignore[reportAttributeAccessIssue]
        left, statuses = asyncio.Event(), []

        async def receive(body: list[bytes]) -> dict[str, Any]:
            if body:
                return {"type": "http.request", "body": body.pop()}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            statuses.append(message.get("status"))

        def ask() -> asyncio.Task[None]:
            body = [photos[0]]
            scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": []}
            return asyncio.create_task(app(scope, lambda: receive(body), send))

        tasks = [ask() for _ in range(3)]
        await until(lambda: service.scheduler.waiting == 3)
        left.set()
        await until(lambda: service.scheduler.waiting == service.requests == service.images == 0)
        await asyncio.gather(*tasks)
        assert 200 not in statuses
        begun = held.engine.seen  # pyright: ignore[reportAttributeAccessIssue]
        held.engine.go.set()  # pyright: ignore[reportAttributeAccessIssue]
        assert (await client.post("/predict", content=photos[0])).status_code == 200
        assert held.engine.seen == begun + 1  # pyright: ignore[reportAttributeAccessIssue]

    serve(held, use, {"max_waiting": 3, "coarse_batch": 1, "coarse_wait": 0})


def test_a_request_has_a_time_limit(held: Predictor, photos: list[bytes]) -> None:
    never = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield photos[0][:10]
        await never.wait()

    async def use(client: httpx.AsyncClient, service: Any) -> None:
        response = await client.post("/predict", content=photos[0])
        refusal(response, 503, "not answered within 0.2 s")
        assert "Retry-After" in response.headers
        refusal(await client.post("/predict", content=slow()), 408, "body did not come within 0.2 s")
        assert service.scheduler.waiting == service.requests == service.images == 0

    serve(held, use, time_limit=0.2)


def test_an_ending_server_answers_what_it_has_and_refuses_the_rest(held: Predictor, photos: list[bytes]) -> None:
    async def use(client: httpx.AsyncClient, service: Any) -> None:
        inside = asyncio.create_task(client.post("/predict", content=photos[0]))
        await until(lambda: service.scheduler.waiting == 1)
        service.draining = True
        assert (await client.get("/v2/health/ready")).status_code == 503
        assert (await client.get("/v2/health/live")).status_code == 200
        response = await client.post("/predict", content=photos[0])
        refusal(response, 503, "the server is ending")
        assert response.headers["Connection"] == "close"
        held.engine.go.set()  # pyright: ignore[reportAttributeAccessIssue]
        assert (await inside).status_code == 200

    serve(held, use)


def test_a_failure_of_the_engine_is_told_and_the_server_goes_on(held: Predictor, photos: list[bytes]) -> None:
    async def use(client: httpx.AsyncClient, service: Any) -> None:
        engine: Any = held.engine
        engine.go.set()
        engine.fails = True
        refusal(await client.post("/predict", content=photos[0]), 500, "the server failed .out of memory.")
        engine.fails = False
        assert (await client.post("/predict", content=photos[0])).status_code == 200

    serve(held, use)


def test_the_key_is_asked_for(predictor: Predictor, photos: list[bytes]) -> None:
    with asking(predictor, api_key="secret") as client:
        for wrong in (
            {},
            {"Authorization": "Bearer other"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer ß"},
        ):
            headers = [(name.encode(), value.encode()) for name, value in wrong.items()]
            for address in ("/predict", "/explain", INFER):
                response = client.post(address, content=photos[0], headers=headers)
                refusal(response, 401, "send Authorization: Bearer KEY")
            for address in ("/stats", "/metrics", MODEL, "/v2"):
                assert client.get(address, headers=headers).status_code == 401
        right = {"Authorization": "Bearer secret"}
        assert client.post("/predict", content=photos[0], headers=right).status_code == 200
        assert client.get("/v2/health/ready").status_code == 200


def test_eta_can_be_changed_where_that_is_allowed(predictor: Predictor, photos: list[bytes]) -> None:
    with asking(predictor, allow_parameters=True) as client:
        for eta, stage in ((0, 0), (1, 1), (0.0, 0)):
            changed = client.put(f"{MODEL}/parameters", json={"eta": eta})
            assert changed.raise_for_status().json() == {"eta": eta}
            assert client.get("/stats").json()["eta"] == eta
            (answer,) = client.post("/predict", content=photos[0]).json()["predictions"]
            assert (answer["stage"], answer["eta"]) == (stage, eta)
        for wrong in ({}, {"eta": 1.1}, {"eta": "0.5"}, {"eta": None}, {"eta": 0.5, "more": 1}, [], 3):
            refusal(client.put(f"{MODEL}/parameters", json=wrong), 422, "body")
        refusal(client.put(f"{MODEL}/parameters", content=b'{"eta": NaN}'), 422, "body")
        assert client.get("/stats").json()["eta"] == 0


def test_eta_is_fixed_otherwise(client: TestClient, predictor: Predictor, photos: list[bytes]) -> None:
    refusal(client.put(f"{MODEL}/parameters", json={"eta": 0}), 403, "--allow-parameters")
    refusal(client.post("/predict", params={"eta": 0}, content=photos[0]), 400, "one for all requests: leave it out")
    asked = {"inputs": [encoded(photos[:1])], "parameters": {"eta": 0}}
    refusal(client.post(INFER, json=asked), 400, "one for all requests: leave it out")
    assert client.get("/stats").json()["eta"] == predictor.threshold


def test_under_load_eta_falls_and_the_answer_tells_so(held: Predictor, photos: list[bytes]) -> None:
    async def use(client: httpx.AsyncClient, service: Any) -> None:
        tasks = [asyncio.create_task(client.post("/predict", content=photo)) for photo in photos]
        await until(lambda: service.scheduler.waiting == len(photos))
        held.engine.go.set()  # pyright: ignore[reportAttributeAccessIssue]
        answers = [(await task).json()["predictions"][0] for task in tasks]
        assert min(answer["eta"] for answer in answers) == 0
        assert {answer["stage"] for answer in answers if answer["eta"] == 0} == {0}
        assert (await client.get("/stats")).json()["eta_now"] == 0
        assert 'cfvit_eta{which="now"} 0.0' in (await client.get("/metrics")).text

    serve(held, use, {"least_eta": 0.0, "target_wait": 1e-3, "coarse_batch": 1, "coarse_wait": 0})


def test_an_image_is_explained(client: TestClient, predictor: Predictor, photos: list[bytes], tensors: Tensor) -> None:
    (shown,) = explain(predictor.engine, tensors[:1], predictor.threshold)
    macs = predictor.macs
    answer = client.post("/explain", content=photos[0]).raise_for_status().json()
    assert answer["grid"] == list(shown.attention.shape)
    np.testing.assert_allclose(answer["class_attention"], shown.attention.flatten(), atol=1e-5)
    assert answer["split"] == shown.split.flatten().tolist()
    for stage, (label, sure) in zip(("coarse", "fine"), shown.answers, strict=True):
        assert answer[stage][0] == {"label": label, "probability": pytest.approx(sure, abs=1e-5)}
        assert answer[f"{stage}_confidence"] == pytest.approx(sure, abs=1e-5)
        assert sum(guess["probability"] for guess in answer[stage]) == pytest.approx(1, abs=1e-5)  # 3 classes
        assert answer[f"milliseconds_{stage}"] > 0
    assert (answer["eta"], answer["stage"]) == (predictor.threshold, shown.stage)
    assert answer["gmacs_plain"] == macs.backbone / 1e9
    for eta, stage, spent in ((0, 0, macs.coarse), (1, 1, macs.both)):
        answer = client.post("/explain", content=photos[0], params={"eta": eta}).json()
        assert (answer["stage"], answer["gmacs"], answer["eta"]) == (stage, spent / 1e9, eta)
    for wrong in ("2", "-0.1", "nan", "x", ""):
        refusal(client.post("/explain", content=photos[0], params={"eta": wrong}), 422, "eta")


def test_figures_count_what_was_answered(predictor: Predictor, photos: list[bytes], expected: Prediction) -> None:
    with asking(predictor) as client:
        before = client.get("/stats").json()
        assert before["p50_ms"] is None and before["requests_per_second"] == 0
        for photo in photos:
            client.post("/predict", content=photo)
        client.post("/predict", content=b"no image")
        stats = client.get("/stats").json()
        fine = int(expected.stage.sum())
        assert stats["images"] == {"coarse": len(photos) - fine, "fine": fine}
        assert stats["queues"] == {"coarse": 0, "fine": 0} and stats["waiting"] == 0 and stats["ready"]
        assert 0 < stats["p50_ms"] <= stats["p95_ms"] and stats["requests_per_second"] > 0
        metrics = client.get("/metrics").text
        assert f'cfvit_images_total{{stage="fine"}} {fine}.0' in metrics
        assert f'cfvit_image_seconds_count{{stage="fine"}} {fine}.0' in metrics
        assert f'cfvit_batch_images_sum{{stage="coarse"}} {len(photos)}.0' in metrics
        assert 'cfvit_requests_total{route="/predict",status="422"} 1.0' in metrics
        assert 'cfvit_queue_images{stage="coarse"} 0.0' in metrics
        assert f'cfvit_eta{{which="set"}} {predictor.threshold}' in metrics


def test_a_signal_ends_the_server_in_order_under_load(colour_model: Path, photos: list[bytes]) -> None:
    command = [sys.executable, "-m", "cfvit", "serve", "--model", str(colour_model), "--port", "0", "--notice", "0.5"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stderr is not None
    try:
        started = json.loads(process.stderr.readline())
        address = f"http://127.0.0.1:{started['port']}"
        log: list[str] = []
        reading = threading.Thread(target=lambda stderr: log.extend(stderr), args=(process.stderr,))
        reading.start()
        outcomes: Counter[str] = Counter()
        ending, many = threading.Event(), threading.Event()

        def load_it(first: int) -> None:
            with httpx.Client(base_url=address, timeout=SOON) as client:
                while True:
                    try:
                        response = client.post("/predict", content=photos[first])
                    except httpx.ConnectError:
                        outcomes["closed"] += 1
                        return
                    except httpx.RemoteProtocolError:  # closed between two requests of a connection
                        outcomes["lost"] += 1
                        return
                    outcomes[str(response.status_code)] += 1
                    if response.status_code == 503:
                        assert ending.is_set() and "ending" in response.text
                        if client.get("/v2/health/ready").status_code != 503:
                            outcomes["ready after all"] += 1
                        return
                    if outcomes["200"] >= 20:
                        many.set()

        threads = [threading.Thread(target=load_it, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        assert many.wait(2 * SOON)
        ending.set()
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(SOON)
        assert process.wait(SOON) == 0
        reading.join(10)
    finally:
        process.kill()
    assert outcomes.keys() == {"200", "503"}, outcomes
    events = [json.loads(line) for line in log]
    answered = [event for event in events if event.get("path") == "/predict" and event["status"] == 200]
    assert len(answered) == outcomes["200"]


def test_a_second_signal_ends_the_server_at_once(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with asking(predictor) as client:
        app: Any = client.app
        for _ in range(2):
            assert ended == []
            Server(app, 60.0).handle_exit(signal.SIGTERM, None)
    assert ended == [143]


def test_what_is_missing_is_said(cfvit_main: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "cfvit.deploy.server")
    outcome = cfvit_main("serve")
    assert (outcome.status, outcome.err) == (1, ["cfvit: serving needs fastapi: install cfvit[serve]"])


@pytest.mark.parametrize(
    ("arguments", "status", "match"),
    [
        (["--name", "a/b"], 2, "stands in addresses"),
        (["--api-key", "missing.txt"], 2, "cannot be read"),
        (["--port", "70000"], 2, "65535"),
        (["--coarse-wait", "inf", "--host", "203.0.113.7"], 2, "for --coarse-wait. Must be <= 1000000"),
        (["--time-limit", "inf"], 2, "for --time-limit. Must be <= 1000000"),
        (["--notice", "inf", "--host", "203.0.113.7"], 2, "for --notice. Must be <= 1000000"),
        (["--threshold", "0.3", "--least-eta", "0.9"], 2, "least eta is 0.9, and eta 0.3"),
        (["--target-wait", "20"], 2, "--target-wait is when eta begins to fall to --least-eta: give both"),
        (["--gmacs", "900"], 2, "--gmacs is 900: an image costs between"),
        (["--model", "missing"], 1, "missing"),
        (["--host", "203.0.113.7"], 1, "cannot listen on 203.0.113.7, port 8000 .*: choose another --port or --host"),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], status: int, match: str, cfvit_main: Callable[..., Outcome], colour_model: Path
) -> None:
    outcome = cfvit_main("serve", *([] if "--model" in arguments else ["--model", colour_model]), *arguments)
    assert outcome.status == status
    assert len(outcome.err) == 1 and re.search(match, outcome.err[0])


def test_whatever_its_interface_allows_is_answered_as_it_says(predictor: Predictor) -> None:
    """Requests by the OpenAPI schema and against it. An image is more than bytes, so what fits may be refused."""
    with listening(predictor, time_limit=SOON, allow_parameters=True, api_key="secret") as port:
        interface: Any = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
        refused = CHECKS.get_one("positive_data_acceptance")
        operations = [found.ok() for found in interface.get_all_operations()]
        assert {f"POST {INFER}", "POST /predict", f"PUT {MODEL}/parameters"} < {each.label for each in operations}
        for operation in operations:

            @settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=SLOW)
            @given(case=operation.as_strategy())
            def check(case: Any) -> None:
                case.call_and_validate(headers={"Authorization": "Bearer secret"}, excluded_checks=[refused])

            check()
