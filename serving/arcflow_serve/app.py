"""The web application: HTTP requests -> jobs of an `Engine`, and their events -> replies as OpenAI's API gives them."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

import fastapi_offline
from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arcflow_runtime.errors import RequestError
from arcflow_runtime.maths.noise import MAX_SEED
from arcflow_serve.encode_image import Encoding
from arcflow_serve.errors import (
    BAD_MEDIA_TYPE,
    FAILED,
    NOT_FOUND,
    TIMED_OUT,
    TOO_LARGE,
    UNAVAILABLE,
    ServiceError,
    bad_request,
)
from arcflow_serve.jobs import BatchKey, Event, Failed, Finished, Job
from arcflow_serve.keys import Keys
from arcflow_serve.models import Model
from arcflow_serve.replies import Answer, error_event
from arcflow_serve.schema import GenerationRequest, parse_request
from arcflow_serve.service import Engine
from arcflow_serve.settings import Settings

_log = logging.getLogger("arcflow.serve")
#: A status of our own for the metrics: the client left before the answer.
_LEFT = 499
#: Most bytes that are read and dropped of a body that is too large, so that the client gets to read the answer.
_MAX_DROPPED_BYTES = 64 << 20
#: What the page may load: nothing but what it holds itself, and this service.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_FAVICON = (
    b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3" fill="#4051b5"/>'
    b'<path d="M3 12A6 6 0 0 1 13 12" fill="none" stroke="#fff" stroke-width="2"/></svg>'
)
_ERRORS = {"description": "An error, in OpenAI's shape."}


def create_app(engine: Engine, settings: Settings) -> ASGIApp:
    """The application, which passes every checked request to `engine`."""
    app = FastAPI(
        title="ArcFlow", description="OpenAI's images API for ArcFlow bundles.", docs_url=None, redoc_url=None
    )
    keys = Keys(settings.api_keys)
    _add_errors(app)
    _add_pages(app)
    _add_state(app, engine)
    _add_models(app, engine, keys)
    generation = Generation(engine, settings, keys)
    app.add_api_route(
        "/v1/images/generations",
        generation.handle,
        methods=["POST"],
        summary="Generate images",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": GenerationRequest.model_json_schema()}},
            }
        },
        responses=dict.fromkeys((400, 401, 404, 408, 413, 415, 429, 500, 503), _ERRORS),
    )
    return WithRequestId(app)


class WithRequestId:
    """Gives every reply a request id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_request_id()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id)]
            await send(message)

        await self._app(scope, receive, send_with_id)


class Generation:
    """The endpoint that generates images."""

    def __init__(self, engine: Engine, settings: Settings, keys: Keys) -> None:
        self._engine, self._settings, self._keys = engine, settings, keys

    async def handle(self, request: Request) -> Response:
        """Generate images from a prompt, as OpenAI's client asks for them."""
        arrived = time.monotonic()
        try:
            response = await self._answer(request)
        except ServiceError as e:
            response = error_response(e)
        except ClientDisconnect:
            # It left before its request was complete.
            response = self._left()
        if not isinstance(response, EventStream):
            self._count(response.status_code, arrived)
        return response

    async def _answer(self, request: Request) -> Response:
        client = self._keys.client(request.headers.get("authorization"))
        body = await self._body(request)
        asked = parse_request(body)
        events = Events()
        address = request.client.host if request.client else "unknown"
        answer = self._check(asked, client or address, events.deliver)
        job = answer.job
        self._engine.submit(job)
        watch = asyncio.ensure_future(_disconnected(request.receive))
        watch.add_done_callback(lambda _: events.put(None))
        stream = None
        try:
            first = await events.get()
            if first is not None and not isinstance(first, Failed) and asked.stream:
                # Only now, so that an error before the first image has its own status.
                stream = EventStream(self, answer, events, first, watch)
                return stream
            return await self._whole(answer, events, first)
        finally:
            if stream is None:
                watch.cancel()
                self._done(job)

    async def _whole(self, answer: Answer, events: Events, event: Event | None) -> Response:
        """The reply with all images."""
        finished: list[Finished] = []
        while True:
            if event is None:
                return self._left()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                finished.append(event)
                if len(finished) == len(answer.job.seeds):
                    return Response(answer.reply(finished), media_type="application/json")
            event = await events.get()

    def _left(self) -> Response:
        self._engine.metrics.left.inc()
        return Response(status_code=_LEFT)

    def _done(self, job: Job) -> None:
        self._engine.release(job)
        if job.started is not None:
            self._engine.metrics.queue.observe(job.started - job.arrived)

    def _count(self, status: int, arrived: float) -> None:
        self._engine.metrics.requests.labels(str(status)).inc()
        self._engine.metrics.e2e.observe(time.monotonic() - arrived)

    async def _body(self, request: Request) -> bytes:
        """The body, within the limits of size and time."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # Other sites' pages can send forms and plain text from a visitor's browser, but not this type.
            raise ServiceError(
                BAD_MEDIA_TYPE, "unsupported_media_type", f"content-type must be application/json, got {kind!r}"
            )
        limit = self._settings.max_body_bytes
        parts: list[bytes] = []
        size = 0

        async def read() -> None:
            nonlocal size
            async for part in request.stream():
                size += len(part)
                if size <= limit:
                    parts.append(part)
                elif size > _MAX_DROPPED_BYTES:
                    break

        try:
            await asyncio.wait_for(read(), self._settings.body_timeout_s)
        except asyncio.TimeoutError:
            raise ServiceError(
                TIMED_OUT,
                "body_timeout",
                f"the body must arrive within {self._settings.body_timeout_s:g} s, got {size} bytes of it",
            ) from None
        if size > limit:
            raise ServiceError(TOO_LARGE, "body_too_large", f"the body must have at most {limit} bytes, got more")
        return b"".join(parts)

    def _check(self, asked: GenerationRequest, client: str, deliver: Callable[[Event], None]) -> Answer:
        """Check a request against the limits and its model, and make a job of it."""
        limits = self._settings
        model = find_model(self._engine, asked.model)
        if len(asked.prompt) > limits.max_prompt_chars:
            raise bad_request(
                f"prompt must have at most {limits.max_prompt_chars} characters, got {len(asked.prompt)}", "prompt"
            )
        n = 1 if asked.n is None else asked.n
        if n > limits.max_n:
            raise bad_request(f"n must be at most {limits.max_n}, got {n}", "n")
        steps = asked.num_inference_steps
        if steps is not None and steps > limits.max_steps:
            raise bad_request(
                f"num_inference_steps must be at most {limits.max_steps}, got {steps}", "num_inference_steps"
            )
        if asked.seed is not None and asked.seed + n - 1 > MAX_SEED:
            raise bad_request(f"seed must leave room for {n} images below 2**64, got {asked.seed}", "seed")
        if asked.background == "transparent":
            raise bad_request("background must be 'opaque' or 'auto': images have no alpha channel", "background")
        if asked.partial_images and not asked.stream:
            raise bad_request("partial_images must be given together with stream=true", "partial_images")
        if asked.loras and not model.takes_loras:
            raise bad_request(
                "loras is not supported by this version: a LoRA is merged when a bundle is exported, with "
                "arcflow export --lora",
                "loras",
            )
        encoding = _encoding(asked)
        request = _checked(model, asked)
        size = max(request.height_px, request.width_px)
        if limits.max_px is not None and size > limits.max_px:
            raise bad_request(f"size must be at most {limits.max_px} pixels on each side, got {size}", "size")
        key = BatchKey(
            model.name,
            request.height_px,
            request.width_px,
            request.num_inference_steps,
            request.guidance_scale,
            bool(asked.partial_images) and request.num_inference_steps > 1,
            tuple(sorted((asked.loras or {}).items())),
        )
        job = Job(
            client=client,
            key=key,
            prompt=asked.prompt,
            seeds=tuple(secrets.randbits(32) if asked.seed is None else asked.seed + i for i in range(n)),
            encoding=encoding,
            deadline=time.monotonic() + limits.deadline_s,
            deliver=deliver,
        )
        text_tokens, cuts = model.tokens(asked.prompt)
        space = model.manifest.latents
        token_px = space.vae_scale_factor * space.patch_size
        image_tokens = request.height_px * request.width_px // token_px**2
        return Answer(asked, job, (*asked.ignored(), *request.warnings, *cuts), text_tokens, image_tokens)


class Events:
    """The events of one job in the event loop; None means that the client has left."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self.get = self._queue.get
        self.put = self._queue.put_nowait

    def deliver(self, event: Event) -> None:
        """Add an event from another thread."""
        try:
            self._loop.call_soon_threadsafe(self.put, event)
        except RuntimeError:
            # The loop was closed: the process is ending, and nobody waits for the answer.
            _log.info("an event came after the end of the event loop")


class EventStream(Response):
    """A reply as server-sent events, which releases its job whatever happens."""

    def __init__(
        self, generation: Generation, answer: Answer, events: Events, first: Event, watch: asyncio.Future[None]
    ) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._generation, self._answer, self._events, self._first = generation, answer, events, first
        self._watch = watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        job, status = self._answer.job, 200
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            status = await self._send_events(send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._watch.cancel()
            self._generation._done(job)
            self._generation._count(status, job.arrived)

    async def _send_events(self, send: Send) -> int:
        """Send every event; the status for the metrics."""
        unfinished, previews = len(self._answer.job.seeds), [0] * len(self._answer.job.seeds)
        most = self._answer.request.partial_images or 0
        event: Event | None = self._first
        while unfinished:
            chunk = b""
            if event is None:
                self._generation._engine.metrics.left.inc()
                return _LEFT
            if isinstance(event, Failed):
                await send({"type": "http.response.body", "body": error_event(event.error.body()), "more_body": True})
                return event.error.status
            if isinstance(event, Finished):
                unfinished -= 1
                chunk = self._answer.event(event, 0)
            elif previews[event.picture] < most:
                chunk = self._answer.event(event, previews[event.picture])
                previews[event.picture] += 1
            if chunk:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            if unfinished:
                event = await self._events.get()
        return 200


def new_request_id() -> bytes:
    """A value for the header x-request-id."""
    return b"req_" + secrets.token_hex(12).encode()


def find_model(engine: Engine, name: str | None) -> Model:
    """The model called `name`, or the first.

    Raises:
        ServiceError: there is none of this name.
    """
    if name is None:
        return next(iter(engine.models.values()))
    if name not in engine.models:
        names = ", ".join(repr(n) for n in engine.models)
        shown = repr(name[:60])
        raise ServiceError(NOT_FOUND, "model_not_found", f"model must be one of {names}, got {shown}", "model")
    return engine.models[name]


def error_response(error: ServiceError) -> Response:
    """An error as OpenAI words it."""
    headers = error.headers() | ({"www-authenticate": "Bearer"} if error.status == 401 else {})
    return Response(json.dumps(error.body()), error.status, headers, "application/json")


def _checked(model: Model, asked: GenerationRequest) -> Any:
    try:
        return model.check(asked.prompt, asked.size_px(), asked.num_inference_steps, asked.guidance_scale, asked.seed)
    except RequestError as e:
        # The message begins with the name of the argument.
        name = str(e).split(" ", 1)[0]
        param = "size" if name in ("height", "width") else name
        raise bad_request(str(e), param if param in GenerationRequest.model_fields else None) from None


def _encoding(asked: GenerationRequest) -> Encoding:
    name = asked.output_format or "png"
    quality = asked.output_compression
    if name == "png" and quality not in (None, 100):
        raise bad_request(
            f"output_compression must be 100 for png, which is lossless, got {quality}; or give output_format",
            "output_compression",
        )
    return Encoding(name, 100 if quality is None else quality)


async def _disconnected(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _add_errors(app: FastAPI) -> None:
    async def on_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = error.status_code
        message = {404: "there is nothing at this address; see /docs", 405: "this address has other methods"}
        code = {404: "not_found", 405: "method_not_allowed"}
        wrapped = ServiceError(status, code.get(status, "http_error"), message.get(status, str(error.detail)))
        response = error_response(wrapped)
        response.headers.update(error.headers or {})
        return response

    async def on_any(_: Request, error: Exception) -> Response:
        _log.error("a request failed", exc_info=error)
        return error_response(
            ServiceError(FAILED, "internal_error", "the service failed; the log of the service says more", retry=False)
        )

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_any)


def _add_pages(app: FastAPI) -> None:
    page = (resources.files("arcflow_serve") / "page" / "index.html").read_bytes()

    async def show_page(_: Request) -> Response:
        headers = {
            "content-security-policy": _PAGE_POLICY,
            "x-content-type-options": "nosniff",
            "cache-control": "no-cache",
        }
        return HTMLResponse(page, headers=headers)

    async def show_favicon(_: Request) -> Response:
        return Response(_FAVICON, media_type="image/svg+xml", headers={"cache-control": "max-age=86400"})

    async def show_docs(_: Request) -> Response:
        assert app.openapi_url is not None
        return get_swagger_ui_html(
            openapi_url=app.openapi_url,
            title="ArcFlow",
            swagger_js_url="/docs/static/swagger-ui-bundle.js",
            swagger_css_url="/docs/static/swagger-ui.css",
            swagger_favicon_url="/favicon.ico",
        )

    for path, handler in {"/": show_page, "/favicon.ico": show_favicon, "/docs": show_docs}.items():
        app.add_route(path, handler, methods=["GET"])
    static = resources.files(fastapi_offline) / "static"
    app.mount("/docs/static", StaticFiles(directory=str(static)))


def _add_state(app: FastAPI, engine: Engine) -> None:
    def state(reasons: list[str], well: str, ill: str) -> Response:
        body = {"status": ill if reasons else well, "reasons": reasons}
        return Response(json.dumps(body), UNAVAILABLE if reasons else 200, media_type="application/json")

    @app.get("/health", summary="Live", description="Status 503 if the process should be started anew.")
    async def health() -> Response:
        return state(engine.not_healthy(), "ok", "failing")

    @app.get("/ready", summary="Ready", description="Status 503 if no requests should be sent now.")
    async def ready() -> Response:
        return state(engine.not_ready(), "ready", "not ready")

    @app.get("/metrics", summary="Metrics", description="In Prometheus' format.")
    async def metrics() -> Response:
        return Response(engine.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_models(app: FastAPI, engine: Engine, keys: Keys) -> None:
    def guarded(handler: Callable[[Request], Any]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                keys.client(request.headers.get("authorization"))
                return Response(json.dumps(handler(request)), media_type="application/json")
            except ServiceError as e:
                return error_response(e)

        return answer

    def every(_: Request) -> Any:
        return {"object": "list", "data": [_describe(m) for m in engine.models.values()]}

    def one(request: Request) -> Any:
        return _describe(find_model(engine, request.path_params["name"]))

    app.add_api_route("/v1/models", guarded(every), methods=["GET"], summary="The bundles")
    app.add_api_route("/v1/models/{name}", guarded(one), methods=["GET"], summary="One bundle")


def _describe(model: Model) -> dict[str, Any]:
    """A model as OpenAI lists it, and what a request may ask of it."""
    m, plain = model.manifest, model.check("", None, None, None, 0)
    limits = {
        "family": m.family,
        "size": f"{plain.width_px}x{plain.height_px}",
        "size_multiple_px": m.latents.vae_scale_factor * m.latents.patch_size,
        "width_px": [m.ranges.width_px.min, m.ranges.width_px.max],
        "height_px": [m.ranges.height_px.min, m.ranges.height_px.max],
        "num_inference_steps": plain.num_inference_steps,
        "guidance_scale": plain.guidance_scale,
        "loras": model.takes_loras,
    }
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "arcflow", "arcflow": limits}
