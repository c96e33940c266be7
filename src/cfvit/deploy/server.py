"""Answers over HTTP: an interface of its own, and the Open Inference Protocol. Needs ``cfvit[serve]``."""

from __future__ import annotations

import asyncio
import base64
import functools
import hmac
import io
import json
import logging
import math
import os
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
import uvicorn
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

import cfvit
from cfvit.data import ImageError, eval_transform, open_image
from cfvit.deploy import Settings, protocol
from cfvit.deploy.scheduler import Answer, RefusedError, Scheduler
from cfvit.errors import CfvitError, first_line, first_problem
from cfvit.inference.engines.exported import EXPORT_FILE, WEIGHTS_FILE, ExportedEngine
from cfvit.inference.predictor import Predictor
from cfvit.inference.stream import COARSE, FINE
from cfvit.modeling.exit import goes_on
from cfvit.modeling.tokens import num_informative, rank_cells

STAGES = ("coarse", "fine")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Formats that are decoded. Pillow knows more, some of them through other programs."""

POLLED = frozenset(["/stats", "/metrics", "/v2/health/live", "/v2/health/ready"])
"""Addresses that pages and probes ask again and again. If all is well, such requests are not logged."""

RECENT = 60.0
"""Seconds that `/stats` looks back."""

PAGE = Path(__file__).parent / "page"

BROWSER_RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
"""What is served of onnxruntime-web."""

CONTENT_SECURITY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may load: its own files, and pictures that it gets with an answer."""

FILE: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
FORM = {"type": "object", "properties": {"image": {"type": "array", "items": FILE["schema"]}}, "required": ["image"]}
UPLOAD = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM}, "image/*": FILE}}}
"""What the OpenAPI schema says of a body with one image or several."""

log = logging.getLogger("cfvit.serve")


class Metrics:
    """What ``/metrics`` shows, and what ``/stats`` computes from the last minute."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        given: dict[str, Any] = {"registry": self.registry}
        times = {"buckets": [0.001 * 2**i for i in range(15)], **given}
        sizes = {"buckets": [1, 2, 4, 8, 16, 32, 64, 128], **given}
        self.requests = Counter("cfvit_requests", "HTTP requests", ["route", "status"], **given)
        self.refusals = Counter("cfvit_refusals", "requests refused, by the limit", ["limit"], **given)
        self.images = Counter("cfvit_images", "images answered", ["stage"], **given)
        self.batch_images = Histogram("cfvit_batch_images", "images in a batch", ["stage"], **sizes)
        self.batch_seconds = Histogram("cfvit_batch_seconds", "time of a batch", ["stage"], **times)
        self.image_seconds = Histogram("cfvit_image_seconds", "from request to answer, by stage", ["stage"], **times)
        self.queues = Gauge("cfvit_queue_images", "images that wait for a stage", ["stage"], **given)
        self.eta = Gauge("cfvit_eta", "eta as it was set, and of the last batch", ["which"], **given)
        self.answered: dict[str, int] = dict.fromkeys(STAGES, 0)
        self.recent: deque[tuple[float, float]] = deque(maxlen=100_000)

    def count_batch(self, stage: int, count: int, seconds: float) -> None:
        """Counts a batch of the scheduler."""
        self.batch_images.labels(STAGES[stage]).observe(count)
        self.batch_seconds.labels(STAGES[stage]).observe(seconds)

    def count_answers(self, answers: Sequence[Answer], seconds: float) -> None:
        """Counts the images of an answered request, which took so long."""
        for stage in (STAGES[answer.stage] for answer in answers):
            self.images.labels(stage).inc()
            self.image_seconds.labels(stage).observe(seconds)
            self.answered[stage] += 1
        self.recent.append((time.monotonic(), seconds))

    def latest(self) -> list[float]:
        """Seconds that each request of the last minute took, rising."""
        while self.recent and self.recent[0][0] < time.monotonic() - RECENT:
            self.recent.popleft()
        return sorted(seconds for _, seconds in self.recent)


class Service:
    """One model behind HTTP. `create_app` puts its methods at addresses.

    Args:
        scheduler: a `Scheduler`, or an object with its methods. As many requests may be in work as images may wait in
            it.

    Attributes:
        draining: whether new work is refused, while what is in the server is still answered.
        requests: how many requests with work for the model are in the server.
    """

    def __init__(self, predictor: Predictor, settings: Settings, scheduler: Any) -> None:
        self.settings, self.model, self.macs = settings, predictor.model, predictor.macs
        Predictor(predictor.engine, 1.0)(torch.zeros(1, 3, *self.model.image_size))  # the first batches are slow
        self.metrics, self.scheduler = Metrics(), scheduler
        self.max_images = min(settings.max_images, scheduler.max_waiting)  # more would never be let in
        scheduler.watch = self.metrics.count_batch
        self.decoders = ThreadPoolExecutor(settings.decoders, "cfvit-decoder")
        self.transform = eval_transform(self.model.data_config)
        self.draining, self.requests, self.images, self.started = False, 0, 0, time.monotonic()

    async def predict(self, request: Request) -> protocol.Predictions:
        """Classify images: one as the body, or several as the files of a multipart form."""
        start = time.monotonic()
        self._require_no_eta(request.query_params)
        answers = await self._answers(request, await self._uploaded(request))
        predictions = [
            protocol.PredictedImage(
                label=self.model.label_of(index := int(answer.logits.argmax())),
                index=index,
                confidence=answer.confidence,
                stage=answer.stage,
                gmacs=self.macs.expected(answer.stage) / 1e9,
                eta=answer.eta,
                milliseconds_waiting=1e3 * answer.waited,
                milliseconds_computing=1e3 * sum(answer.seconds),
            )
            for answer in answers
        ]
        return protocol.Predictions(predictions=predictions, milliseconds=1e3 * (time.monotonic() - start))

    def _require_no_eta(self, given: Mapping[str, Any]) -> None:
        """Refuses an eta of a request's own, which would be ignored: batches are of many requests."""
        if "eta" in given:
            raise CfvitError(
                "eta is one for all requests: leave it out (only /explain takes it), or set it by PUT "
                f"/v2/models/{self.settings.name}/parameters"
            )

    async def explain(
        self, request: Request, eta: Annotated[float | None, Query(ge=0, le=1, allow_inf_nan=False)] = None
    ) -> protocol.Explained:
        """Show what both stages make of one image, and which of them answers at eta, by default the server's."""
        (file,) = await self._uploaded(request, most=1)
        image = await self._in_thread(self._decode, file, "")
        (answer,) = await self._answers(request, [image], both=True)
        about, macs, state = self.model, self.macs, answer.state
        rows, columns = about.grid
        chosen, _ = rank_cells(state.class_attention, num_informative(about.config.informative_ratio, rows * columns))
        eta = answer.eta if eta is None else eta
        stage = int(goes_on(torch.tensor([answer.coarse_confidence]), eta))
        return protocol.Explained(
            grid=[rows, columns],
            class_attention=state.class_attention[0].tolist(),
            split=torch.zeros(rows * columns, dtype=torch.bool).index_fill(0, chosen[0].cpu(), True).tolist(),
            view=await self._in_thread(self._view, image),
            coarse=self._guesses(state.logits[0].cpu() / about.exit.coarse_temperature),
            fine=self._guesses(answer.logits / about.exit.fine_temperature),
            coarse_confidence=answer.coarse_confidence,
            fine_confidence=answer.confidence,
            eta=eta,
            stage=stage,
            gmacs=macs.expected(stage) / 1e9,
            gmacs_coarse=macs.coarse / 1e9,
            gmacs_both=macs.both / 1e9,
            gmacs_plain=macs.backbone / 1e9,
            milliseconds_coarse=1e3 * answer.seconds[COARSE],
            milliseconds_fine=1e3 * answer.seconds[FINE],
        )

    async def infer(self, request: Request) -> JSONResponse:
        """Classify by the Open Inference Protocol: tensors as JSON, or behind it by the protocol's binary extension."""
        length, most = request.headers.get("inference-header-content-length"), self.max_images
        size, body = self.model.image_size, await request.body()
        asked, images = await self._in_thread(protocol.read_request, body, length, size, most)
        self._require_no_eta(asked.parameters)
        known = (await self.describe()).outputs
        names = [info.name for info in known]
        wanted = names if asked.outputs is None else [output.name for output in asked.outputs]
        if unknown := set(wanted) - set(names):
            raise CfvitError(f"outputs {sorted(unknown)} are not known: ask for some of {names}")
        answers = await self._answers(request, images)
        values = {
            "logits": [value for answer in answers for value in answer.logits.tolist()],
            "confidence": [answer.confidence for answer in answers],
            "stage": [answer.stage for answer in answers],
            "label": [self.model.label_of(int(answer.logits.argmax())) for answer in answers],
        }
        outputs = [
            {**info.model_dump(), "shape": [len(answers), *info.shape[1:]], "data": values[info.name]}
            for info in known
            if info.name in wanted
        ]
        named = {} if asked.id is None else {"id": asked.id}
        eta = {"eta": min(answer.eta for answer in answers)}
        return JSONResponse({"model_name": self.settings.name, **named, "parameters": eta, "outputs": outputs})

    async def describe(self) -> protocol.ModelMetadata:
        """Tell what the model takes and gives."""
        tensors = {
            "images": ("FP32", [-1, 3, *self.model.image_size]),
            "files": ("BYTES", [-1]),
            "logits": ("FP32", [-1, self.model.config.num_classes]),
            "confidence": ("FP32", [-1]),
            "stage": ("INT64", [-1]),
            "label": ("BYTES", [-1]),
        }
        infos = [protocol.TensorInfo(name=n, datatype=kind, shape=shape) for n, (kind, shape) in tensors.items()]
        platform = f"cfvit_{getattr(self.model, 'format', 'torch')}"
        return protocol.ModelMetadata(name=self.settings.name, platform=platform, inputs=infos[:2], outputs=infos[2:])

    async def server(self) -> dict[str, Any]:
        """Tell what this server is."""
        return {"name": "cfvit", "version": cfvit.__version__, "extensions": []}

    async def live(self) -> dict[str, bool]:
        """Tell that the server runs."""
        return {"live": True}

    async def ready(self) -> JSONResponse:
        """Tell whether the server takes new work: status 200 if it does, 503 if it is ending."""
        return JSONResponse({"ready": not self.draining}, 503 if self.draining else 200)

    async def set_parameters(self, parameters: protocol.Parameters) -> protocol.Parameters:
        """Change eta for all images to come. Allowed if the server was started so."""
        if not self.settings.allow_parameters:
            raise HTTPException(403, "parameters are fixed: start the server with --allow-parameters")
        self.scheduler.eta = self.scheduler.eta_now = parameters.eta
        log.info("eta is set", extra={"fields": {"eta": parameters.eta}})
        return parameters

    async def stats(self) -> protocol.Stats:
        """Tell the figures of the last minute."""
        latest = self.metrics.latest()
        p50, p95 = (1e3 * latest[int(share * len(latest))] if latest else None for share in (0.5, 0.95))
        return protocol.Stats(
            model=self.settings.name,
            images=self.metrics.answered,
            queues=dict(zip(STAGES, self.scheduler.lengths, strict=True)),
            waiting=self.scheduler.waiting,
            eta=self.scheduler.eta,
            eta_now=self.scheduler.eta_now,
            requests_per_second=len(latest) / min(RECENT, time.monotonic() - self.started),
            p50_ms=p50,
            p95_ms=p95,
            ready=not self.draining,
            browser=self.settings.browser_runtime is not None,
        )

    async def show_metrics(self) -> Response:
        """Tell counts and times in Prometheus' text format."""
        for name, length in zip(STAGES, self.scheduler.lengths, strict=True):
            self.metrics.queues.labels(name).set(length)
        self.metrics.eta.labels("set").set(self.scheduler.eta)
        self.metrics.eta.labels("now").set(self.scheduler.eta_now)
        return Response(generate_latest(self.metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def check_key(
        self, given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))] = None
    ) -> None:
        """Refuses requests without the key; in constant time."""
        key = self.settings.api_key or ""
        if not (given and hmac.compare_digest(given.credentials.encode(), key.encode())):
            header = {"WWW-Authenticate": "Bearer"}
            raise HTTPException(401, "no key, or a wrong one: send Authorization: Bearer KEY", header)

    def _in_thread(self, call: Callable[..., Any], *given: Any) -> asyncio.Future[Any]:
        """Calls a function that keeps a processor busy, on one of the decoding threads."""
        return asyncio.get_running_loop().run_in_executor(self.decoders, call, *given)

    async def _uploaded(self, request: Request, most: int | None = None) -> list[bytes]:
        """The image files of a request, as they came."""
        most = self.max_images if most is None else most
        if not request.headers.get("content-type", "").lower().startswith("multipart/"):
            if body := await request.body():
                return [body]
            raise CfvitError("the body is empty: send an image file, or several in a multipart form")
        parser = Form(request.headers, request.stream(), max_files=most, max_fields=most)
        parser.spool_max_size = self.settings.most_bytes  # kept in memory, which this bounds
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise CfvitError(f"the form cannot be read ({error.message}): give at most {most} files") from error
        if not parser.ended:
            raise CfvitError("the form is cut off, and so may be its last file: end it with its boundary and --")
        files = [await part.read() for _, part in form.multi_items() if isinstance(part, UploadFile)]
        if not files:
            raise CfvitError("the form has no file: send each image as a file, as in curl -F image=@photo.jpg")
        return files

    def _decode(self, image: bytes | Tensor, name: str) -> Tensor:
        """A normalised image ``[3, H, W]``."""
        if isinstance(image, Tensor):
            return image
        most = round(1e6 * self.settings.max_pixels)
        try:
            return self.transform(open_image(image, max_pixels=most, formats=FORMATS))
        except ImageError as error:
            raise HTTPException(422, f"{name}{error}") from error

    async def _answers(self, request: Request, images: Sequence[bytes | Tensor], both: bool = False) -> list[Answer]:
        """Decodes and answers a request's images, if there is room, as long as its client is there."""
        start, count = time.monotonic(), len(images)
        if self.images + count > self.scheduler.max_waiting:
            self.metrics.refusals.labels("images").inc()
            message = f"{self.images} images wait, and {self.scheduler.max_waiting} may: try again later"
            raise RefusedError(message, self.scheduler.retry_after())
        names = [f"image {number + 1}: " if count > 1 else "" for number in range(count)]

        async def work() -> list[Answer]:
            decoded = await asyncio.gather(*map(functools.partial(self._in_thread, self._decode), images, names))
            return await asyncio.gather(*map(asyncio.wrap_future, self.scheduler.submit(decoded, both)))

        self.images += count
        try:
            answers = await while_connected(request, work())
        finally:
            self.images -= count
        for name, answer in zip(names, answers, strict=True):
            if answer.confidence < 0:
                raise HTTPException(422, f"{name}the answer is not a number: values are too large, or weights damaged")
        self.metrics.count_answers(answers, time.monotonic() - start)
        return answers

    def _view(self, image: Tensor) -> str:
        """A normalised image as a PNG in base64."""
        mean, std = (torch.tensor(self.model.data_config[name]).view(3, 1, 1) for name in ("mean", "std"))
        pixels = ((image * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG", compress_level=1)
        return base64.b64encode(png.getvalue()).decode()

    def _guesses(self, logits: Tensor) -> list[protocol.Guess]:
        best = logits.float().softmax(dim=-1).topk(min(5, len(logits)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [protocol.Guess(label=self.model.label_of(index), probability=value) for index, value in pairs]


class Form(MultiPartParser):
    """Reads a multipart form. starlette would leave out a file that is cut off, without a word."""

    ended = False

    def on_end(self) -> None:
        """Its last boundary was read."""
        self.ended = True


async def while_connected(request: Request, work: Coroutine[Any, Any, list[Answer]]) -> list[Answer]:
    """The result of work, which is cancelled when the client leaves.

    Raises:
        ClientDisconnect: it has left. The request's body must have been read before.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


class Page(StaticFiles):
    """The files of the page, which may load and ask nothing but this server."""

    def file_response(self, *args: Any, **given: Any) -> Response:
        """A file, as starlette serves it, with what a browser may do with it."""
        response = super().file_response(*args, **given)
        response.headers["Content-Security-Policy"] = CONTENT_SECURITY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-cache"  # asks each time whether the file is still the same
        return response


class RequestLimits:
    """Middleware for every request: takes or refuses it, limits its time, counts it and logs it."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        service, start, status, size, read = self.service, time.monotonic(), 0, 0, False
        length, most = Headers(scope=scope).get("content-length", ""), service.settings.most_bytes
        promised = int(length) if length.isdecimal() else 0

        async def watched_receive() -> Message:
            nonlocal read, size
            message = await receive() if promised <= most else {}
            read = read or not message.get("more_body", False)
            size += len(message.get("body", b""))
            if max(size, promised) > most:
                raise HTTPException(413, f"the body has more than {most} bytes: send less")
            return message

        async def watched_send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        works = scope["method"] in ("POST", "PUT")
        service.requests += works
        try:
            if works and (service.draining or service.requests > service.scheduler.max_waiting):
                await self._refusal("draining" if service.draining else "requests")(scope, receive, watched_send)
                return
            async with asyncio.timeout(service.settings.time_limit):
                await self.app(scope, watched_receive, watched_send)
        except TimeoutError:
            if status == 0:
                await self._refusal("time" if read else "body time")(scope, receive, watched_send)
        finally:
            service.requests -= works
            route = getattr(scope.get("route"), "path", "other")
            service.metrics.requests.labels(route, str(status or 500)).inc()
            fields = {"method": scope["method"], "path": scope["path"], "status": status or 500}
            if status != 200 or route not in POLLED:
                log.info("request", extra={"fields": {**fields, "ms": round(1e3 * (time.monotonic() - start), 1)}})

    def _refusal(self, limit: str) -> JSONResponse:
        scheduler, seconds = self.service.scheduler, f"{self.service.settings.time_limit:g} s"
        busy = f"{scheduler.max_waiting} requests are in work"
        status, message, close = {
            "draining": (503, "the server is ending: ask another one", True),
            "requests": (503, f"{busy}, and no more may be: try again later", False),
            "time": (503, f"not answered within {seconds}: try again later", False),
            "body time": (408, f"the body did not come within {seconds}: send it faster", True),
        }[limit]
        self.service.metrics.refusals.labels(limit).inc()
        headers = {"Connection": "close"} if close else {}
        return error_response(status, message, headers, scheduler.retry_after() if status == 503 else None)


def error_response(
    status: int, message: str, headers: Mapping[str, str] | None = None, retry_after: float | None = None
) -> JSONResponse:
    """An answer that says in one line what is wrong, and after how many seconds to try again."""
    later = {} if retry_after is None else {"Retry-After": str(math.ceil(retry_after))}
    return JSONResponse({"error": " ".join(message.split())}, status, {**(headers or {}), **later})


def answer_error(request: Request, error: Exception) -> Response:
    """The answer to an exception: what is wrong, in one line. For an unknown address it lists those that exist."""
    match error:
        case HTTPException(status_code=404 | 405):
            path, routes = request.url.path, [each for each in request.app.routes if isinstance(each, APIRoute)]
            known = [(method, each) for each in routes for method in sorted(each.methods or ())]
            if allowed := ", ".join(method for method, route in known if route.path == path):
                return error_response(405, f"{path} takes {allowed}, not {request.method}", {"Allow": allowed})
            addresses = ", ".join(f"{method} {route.path}" for method, route in known if route.include_in_schema)
            return error_response(404, f"there is no {request.method} {path} here, but GET /, {addresses}")
        case HTTPException():
            return error_response(error.status_code, error.detail, error.headers)
        case RequestValidationError():
            return error_response(422, first_problem(error.errors()))
        case RefusedError():
            return error_response(503, str(error), None, error.retry_after)
        case CfvitError():
            return error_response(400, str(error))
        case ClientDisconnect():
            return Response(status_code=499)  # for the log alone: nobody reads it
    return error_response(500, f"the server failed ({first_line(error)}): its log says where")


def create_app(predictor: Predictor, settings: Settings, scheduler: Any = None) -> FastAPI:
    """The application of a `Service`, which is its ``app.state.service``. Its end drains the scheduler.

    Args:
        scheduler: by default a `Scheduler` of the predictor's engine and threshold.
    """
    service = Service(predictor, settings, scheduler or Scheduler(predictor.engine, predictor.threshold))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.scheduler.drain)
        service.decoders.shutdown()

    app = FastAPI(
        title="cfvit",
        version=cfvit.__version__,
        description="Coarse-to-fine vision transformers: easy images at a glance, hard ones read again.",
        docs_url=None,  # this page and the next would load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    app.add_middleware(RequestLimits, service=service)
    for kind in (HTTPException, RequestValidationError, CfvitError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, answer_error)

    def route(method: str, path: str, answer: Callable[..., Any], statuses: Sequence[int] = (), **given: Any) -> None:
        responses: dict[int | str, dict[str, Any]] = {status: {"model": protocol.Failure} for status in statuses}
        app.add_api_route(path, answer, methods=[method], responses=responses, **given)

    key: dict[str, Any] = {"dependencies": [Depends(service.check_key)]} if settings.api_key else {}
    model = f"/v2/models/{settings.name}"
    limits = (400, 401, 408, 413, 422, 503)
    route("POST", "/predict", service.predict, limits, openapi_extra=UPLOAD, **key)
    route("POST", "/explain", service.explain, limits, openapi_extra=UPLOAD, **key)
    route("GET", "/stats", service.stats, (401,), **key)
    route("GET", "/metrics", service.show_metrics, (401,), response_class=Response, **key)
    route("GET", "/v2", service.server, (401,), **key)
    route("GET", "/v2/health/live", service.live)
    route("GET", "/v2/health/ready", service.ready, (503,))
    route("GET", model, service.describe, (401,), **key)
    route("GET", f"{model}/ready", service.ready, (503,))
    route("PUT", f"{model}/parameters", service.set_parameters, (400, 401, 403, 408, 413, 422, 503), **key)
    infer = {"requestBody": {"required": True, "content": {"application/json": {"schema": protocol.infer_schema()}}}}
    route("POST", f"{model}/infer", service.infer, limits, openapi_extra=infer, response_model=protocol.Inferred, **key)

    if settings.browser_runtime is not None:
        _offer_graphs(app, predictor.engine, settings.browser_runtime, **key)
    app.mount("/", Page(directory=PAGE, html=True))
    return app


def _offer_graphs(app: FastAPI, engine: Any, runtime: Path, **key: Any) -> None:
    """Serves what the page needs to run the model in the browser."""
    if not (isinstance(engine, ExportedEngine) and engine.model.format == "onnx"):
        raise CfvitError("a browser runs models that were exported to ONNX: cfvit export, and give its folder")

    def offer(address: str, path: Path, **given: Any) -> None:
        if not path.is_file():
            raise CfvitError(f"{path} is missing, which runs models in a browser: give dist/ of onnxruntime-web")
        app.add_api_route(address, lambda: FileResponse(path), include_in_schema=False, **given)

    for name in BROWSER_RUNTIME:
        offer(f"/runtime/{name}", runtime / name)
    for name in (EXPORT_FILE, "coarse.onnx", "fine.onnx", WEIGHTS_FILE):
        offer(f"/graphs/{name}", engine.folder / name, **key)


class JsonLines(logging.Formatter):
    """A record of the log as JSON on one line."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {"time": self.formatTime(record), "level": record.levelname.lower(), "event": record.getMessage()}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps({**entry, **getattr(record, "fields", {})})


class Server(uvicorn.Server):
    """Ends in order on SIGTERM or Ctrl-C: readiness fails, what is inside is answered, and then the socket closes.

    uvicorn itself would close its socket first. A second signal ends it at once.

    Args:
        app: of `create_app`.
        notice: seconds for which new work is refused before the socket closes, so that balancers can look away.
    """

    def __init__(self, app: FastAPI, notice: float) -> None:
        self.service, self.notice, self.ends = app.state.service, notice, math.inf
        # h11 takes 64 kB of headers at most; httptools, which uvicorn prefers where it is installed, without end
        config = uvicorn.Config(app, http="h11", log_config=None, access_log=False, server_header=False)
        config.timeout_graceful_shutdown = math.ceil(self.service.settings.time_limit)
        config.timeout_keep_alive = 75  # longer than balancers keep an idle connection, which else fails now and then
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to end. uvicorn calls this for a signal."""
        if self.service.draining:
            os._exit(128 + sig)  # all else would wait for something
        self.service.draining = True
        self.ends = time.monotonic() + self.notice

    async def on_tick(self, counter: int) -> bool:
        """Whether to close the socket now. uvicorn calls this ten times a second."""
        if self.service.requests == 0 and time.monotonic() >= self.ends:
            self.should_exit = True
        return await super().on_tick(counter)


def serve(app: FastAPI, host: str, port: int, notice: float = 1.0) -> None:
    """Serves what `create_app` gives until a signal ends it, and then returns.

    Raises:
        CfvitError: the address cannot be had.
    """
    service = app.state.service
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]  # behind it Python tells the address once more
        raise CfvitError(f"cannot listen on {host}, port {port} ({reason}): choose another --port or --host") from error
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for logger in (log, logging.getLogger("uvicorn")):  # a configuration would close handlers of other libraries
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
    fields = {"model": service.settings.name, "eta": service.scheduler.eta}
    fields |= {"host": host, "port": listener.getsockname()[1]}
    log.info("serving", extra={"fields": fields})
    Server(app, notice).run([listener])
