"""The endpoint that generates images: an HTTP request -> a job of an `Engine` -> a reply or server-sent events."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Awaitable
from functools import partial
from typing import TypeAlias

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from arcflow_serve.accept import accept
from arcflow_serve.errors import BAD_MEDIA_TYPE, FAILED, TIMED_OUT, TOO_LARGE, ServiceError
from arcflow_serve.jobs import Event, Failed, Finished, Job
from arcflow_serve.keys import Keys
from arcflow_serve.replies import Answer, error_event, error_response, unexpected
from arcflow_serve.schema import parse_request
from arcflow_serve.service import Engine
from arcflow_serve.settings import Settings

_log = logging.getLogger("arcflow.serve")
#: Where the ASGI scope has the request id.
REQUEST_ID = "arcflow.request_id"
#: Where the ASGI scope has a function that the server calls when the client has left. Ray's cancels the task instead.
LEFT = "arcflow.left"
#: A status of our own for the metrics: the client left before the answer.
_LEFT = 499
#: Most bytes that are read and dropped of a body that is too large, so that the client gets to read the answer.
_MAX_DROPPED_BYTES = 64 << 20
#: The events of one job; None means that the client has left.
Events: TypeAlias = "asyncio.Queue[Event | None]"


class Generation:
    """The endpoint that generates images."""

    def __init__(self, engine: Engine, settings: Settings, keys: Keys) -> None:
        self._engine, self._settings, self._keys = engine, settings, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as an ASGI application."""
        response = await self.handle(Request(scope, receive))
        await response(scope, receive, send)

    async def handle(self, request: Request) -> Response:
        """Generate images from a prompt, as OpenAI's client asks for them."""
        arrived = time.monotonic()
        try:
            response = await self._answer(request)
        except ServiceError as e:
            log_failure(request.scope, e)
            response = error_response(e)
        except ClientDisconnect:
            # It left before its request was complete.
            response = self.left()
        except asyncio.CancelledError:
            # Ray's way to say that the client has left.
            self.count(self.left().status_code, arrived)
            raise
        except Exception as e:
            response = unexpected(e, request.scope[REQUEST_ID])
        if not isinstance(response, EventStream):
            self.count(response.status_code, arrived)
        return response

    async def _answer(self, request: Request) -> Response:
        client = self._keys.client(request.headers.get("authorization"))
        body = await _read_body(request, self._settings)
        asked = parse_request(body)
        events: Events = asyncio.Queue()
        deliver = partial(_deliver, asyncio.get_running_loop(), events)
        address = request.client.host if request.client else "unknown"
        answer = accept(self._engine.models, self._settings, asked, client or address, deliver)
        job = answer.job
        self._engine.submit(job)
        request.scope[LEFT] = partial(events.put_nowait, None)
        stream = None
        try:
            first = await events.get()
            if first is not None and not isinstance(first, Failed) and asked.stream:
                # Only now, so that an error before the first image has its own status.
                stream = EventStream(self, answer, events, first)
                return stream
            return await self._whole(answer, events, first)
        finally:
            if stream is None:
                self.release(job)

    async def _whole(self, answer: Answer, events: Events, event: Event | None) -> Response:
        """The reply with all images."""
        finished: list[Finished] = []
        while True:
            if event is None:
                return self.left()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                finished.append(event)
                if len(finished) == len(answer.job.seeds):
                    return Response(answer.reply(finished), media_type="application/json")
            event = await events.get()

    def left(self) -> Response:
        """Count a client that left; the response that nobody reads."""
        self._engine.metrics.note(self._engine.metrics.left, 1)
        return Response(status_code=_LEFT)

    def release(self, job: Job) -> None:
        """Forget a job, and count the time for which it waited."""
        self._engine.release(job)
        if job.started is not None:
            self._engine.metrics.note(self._engine.metrics.queue, job.started - job.arrived)

    def count(self, status: int, arrived: float) -> None:
        """Count an answer."""
        metrics = self._engine.metrics
        metrics.note(metrics.requests, 1, str(status))
        metrics.note(metrics.e2e, time.monotonic() - arrived)


def _deliver(loop: asyncio.AbstractEventLoop, events: Events, event: Event) -> None:
    """Hand an event to the event loop from another thread."""
    try:
        loop.call_soon_threadsafe(events.put_nowait, event)
    except RuntimeError:
        # The loop was closed: the process is ending, and nobody waits for the answer.
        _log.info("an event came after the end of the event loop")


class EventStream(Response):
    """A reply as server-sent events, which releases its job whatever happens."""

    def __init__(self, generation: Generation, answer: Answer, events: Events, first: Event) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._generation, self._answer, self._events, self._first = generation, answer, events, first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        job, status = self._answer.job, 200
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            status = await self._send_events(scope, send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except asyncio.CancelledError:
            status = self._generation.left().status_code
            raise
        finally:
            self._generation.release(job)
            self._generation.count(status, job.arrived)

    async def _send_events(self, scope: Scope, send: Send) -> int:
        """Send every event; the status for the metrics."""
        unfinished, previews = len(self._answer.job.seeds), [0] * len(self._answer.job.seeds)
        most = self._answer.request.partial_images or 0
        event: Event | None = self._first
        while unfinished:
            chunk = b""
            if event is None:
                return self._generation.left().status_code
            if isinstance(event, Failed):
                log_failure(scope, event.error)
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


async def _read_body(request: Request, settings: Settings) -> bytes:
    """The body, within the limits of size and time.

    Raises:
        ServiceError: it is not JSON, too large or too late.
        ClientDisconnect: the client has left.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Other sites' pages can send forms and plain text from a visitor's browser, but not this type.
        raise ServiceError(
            BAD_MEDIA_TYPE, "unsupported_media_type", f"content-type must be application/json, got {kind!r}"
        )
    limit = settings.max_body_bytes
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
        await _within(read(), settings.body_timeout_s)
    except asyncio.TimeoutError:
        if size <= limit:
            raise ServiceError(
                TIMED_OUT,
                "body_timeout",
                f"the body must arrive within {settings.body_timeout_s:g} s, got {size} bytes of it",
            ) from None
    if size > limit:
        raise ServiceError(TOO_LARGE, "body_too_large", f"the body must have at most {limit} bytes, got more")
    return b"".join(parts)


async def _within(wait: Awaitable[None], seconds: float) -> None:
    """Wait, or raise `asyncio.TimeoutError`."""
    if sys.version_info < (3, 11):
        await asyncio.wait_for(wait, seconds)
    else:
        # Without the task that wait_for makes.
        async with asyncio.timeout(seconds):
            await wait


def log_failure(scope: Scope, error: ServiceError) -> None:
    """Log an error of the service, not one of the client, with the id that the client was given."""
    if error.status >= FAILED:
        _log.error("request %s failed with %s: %s", scope[REQUEST_ID], error.code, error)
