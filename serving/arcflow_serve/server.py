"""Run the web application with uvicorn: limits on slow clients, and a shutdown that loses no request.

uvicorn closes its listener at SIGTERM. Here it stays open until every accepted request has been answered: new requests
get status 503, and `/ready` tells a load balancer to send them elsewhere.
"""

from __future__ import annotations

import asyncio
import functools
import json
import socket
import time
from types import FrameType
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from arcflow_runtime.errors import RequestError
from arcflow_serve.errors import BAD_REQUEST, TIMED_OUT, UNAVAILABLE, ServiceError
from arcflow_serve.generation import LEFT
from arcflow_serve.replies import new_request_id
from arcflow_serve.service import Service
from arcflow_serve.settings import Settings

#: They are answered also when there are as many connections as allowed, so that a busy process is not taken for a dead
#: one; and that many connections are accepted for them.
_PROBES, _MORE_CONNECTIONS = ("/health", "/ready", "/metrics"), 16
_REASONS = {BAD_REQUEST: "Bad Request", TIMED_OUT: "Request Timeout", UNAVAILABLE: "Service Unavailable"}
#: A request's line and headers together. What is read in one piece may be more.
MAX_HEADER_BYTES = 64 << 10
#: After a refusal, what the client still sends is read and dropped for this time, so that it gets to read the reply.
_LINGER_S = 2.0
_CLOSING_S = 10


class Server(uvicorn.Server):
    """Serves until a signal, and then until every accepted request has been answered."""

    def __init__(self, app: ASGIApp, service: Service, settings: Settings) -> None:
        config = uvicorn.Config(
            app,
            http=functools.partial(Protocol, settings),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            # A client could name any address in x-forwarded-for, and so take the turns of several.
            proxy_headers=False,
            timeout_graceful_shutdown=_CLOSING_S,
        )
        super().__init__(config)
        self._service, self._drain_timeout_s = service, settings.drain_timeout_s
        self._drain_until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start to drain at the first signal, and stop at once at the second."""
        self._drain_until = time.monotonic() + (self._drain_timeout_s if self._drain_until is None else 0)
        self._service.drain()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the service."""
        if self._drain_until is not None and (self._service.drained or time.monotonic() >= self._drain_until):
            self.should_exit = True
        if self.should_exit:
            # Requests that are left get an answer before their connections are closed.
            await asyncio.to_thread(self._service.close)
        return await super().on_tick(counter)


class Protocol(HttpToolsProtocol):
    """One connection; a client that is too slow, or not HTTP, is told so and leaves its place."""

    def __init__(self, settings: Settings, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = settings
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._refused = False
        #: True for a connection beyond the limit.
        self._only_probes = False
        #: True while the next bytes belong to a request's line or headers; between requests it is False.
        self._in_head = True
        #: Bytes since a request began, or since the last bytes of its body. The parser may hold all of them.
        self._unparsed_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse a connection beyond the limit, and give the others time for their headers."""
        super().connection_made(transport)
        self._replies = _Joined(transport, self.loop)
        # Then `pause_writing` is called whenever something is left that the client has not read.
        transport.set_write_buffer_limits(high=0)
        beyond = len(self.connections) - self._settings.max_connections
        self._only_probes = beyond > 0
        if beyond > _MORE_CONNECTIONS:
            self._refuse_connection()
            return
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers, and tell the application that the client has left."""
        for timer in (self._header_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        if self.cycle is not None and not self.cycle.response_complete and callable(left := self.cycle.scope.get(LEFT)):
            left()

    def data_received(self, data: bytes) -> None:
        """Parse what the client sends."""
        if self._refused:
            return
        self._unparsed_bytes += len(data)
        try:
            self._parse(data)
            if self._unparsed_bytes > MAX_HEADER_BYTES:
                raise httptools.HttpParserError("the headers are too long")
        except httptools.HttpParserError:
            if not self._refused:
                self.send_400_response("")
            return
        if self._in_head or not self.cycle.response_complete:
            # What comes between requests, and the rest of a body that was answered already, does not keep it open.
            self._unset_keepalive_if_required()
        self._watch_headers()

    def _parse(self, data: bytes) -> None:
        """Call the methods `on_...` with what is in `data`.

        A client may offer another protocol, and RFC 9110, 7.8 lets a server go on with HTTP/1.1. The parser stops after
        such headers, so a new one reads them again without the offer, and then the rest.

        Raises:
            HttpParserError: it is not HTTP, or the method is CONNECT, which asks for a tunnel.
        """
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                method, version = self.parser.get_method(), self.parser.get_http_version().encode()
                if method == b"CONNECT":
                    raise httptools.HttpParserError("tunnels are not supported") from None
                headers = b"".join(b"%s: %s\r\n" % (k, v) for k, v in self.headers if k != b"upgrade")
                data = b"%s %s HTTP/%s\r\n%s\r\n" % (method, self.url, version, headers) + data[offer.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                # As uvicorn sets it: data after the last request of a connection is ignored.
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def on_message_begin(self) -> None:
        """Called at the first byte of a request."""
        super().on_message_begin()
        self._in_head = True
        self._unparsed_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called with each header, and with each trailer after the body, which nothing needs."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the application, unless the headers are to be read again."""
        if not self.parser.should_upgrade():
            self._in_head = False
            if self._only_probes and self.url.partition(b"?")[0].decode("latin-1") not in _PROBES:
                self._refuse_connection()
                raise ConnectionRefusedError  # ends the parser
            super().on_headers_complete()
            self.cycle.transport = self._replies  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        """Called with each part of the body."""
        self._unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Called after the last byte of a request."""
        if not self.parser.should_upgrade():
            self._unparsed_bytes = 0
            super().on_message_complete()
            if not self.pipeline:
                # uvicorn may have paused it because of a long body. A client that leaves must be noticed.
                self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """Called when the application has given the last part of a reply."""
        self._replies.flush()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Called if the client does not send HTTP."""
        message = f"the request must be valid HTTP/1.1 with at most {MAX_HEADER_BYTES} bytes of headers"
        self._refuse(ServiceError(BAD_REQUEST, "invalid_http", message))

    def pause_writing(self) -> None:
        """Called when the client reads more slowly than the service writes."""
        super().pause_writing()
        self._watch_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Called when the client has read."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def _watch_headers(self) -> None:
        """Time a client that has begun to send a request's headers, or has just connected."""
        if self._in_head and self._header_timer is None:
            self._header_timer = self.loop.call_later(self._settings.body_timeout_s, self._headers_are_late)
        elif not self._in_head and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _headers_are_late(self) -> None:
        message = f"the headers must arrive within {self._settings.body_timeout_s:g} s"
        self._refuse(ServiceError(TIMED_OUT, "header_timeout", message))

    def _watch_reader(self, unread_bytes: int) -> None:
        self._write_timer = self.loop.call_later(self._settings.write_timeout_s, self._reader_is_late, unread_bytes)

    def _reader_is_late(self, unread_bytes: int) -> None:
        now = self.transport.get_write_buffer_size()
        if now < unread_bytes:
            self._watch_reader(now)
        else:
            self.transport.abort()

    def _refuse_connection(self) -> None:
        message = f"{self._settings.max_connections} connections may be open at most; try again later"
        self._refuse(ServiceError(UNAVAILABLE, "too_many_connections", message, retry_after_s=1))

    def _refuse(self, error: ServiceError) -> None:
        """Answer without the application, and close the connection a little later."""
        self._refused = True
        self._unset_keepalive_if_required()
        if self._header_timer is not None:
            self._header_timer.cancel()
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            # The reply to an earlier request is under way, and this one would be in the middle of it.
            self.transport.abort()
            return
        body = json.dumps(error.body()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        headers |= error.headers() | {"x-request-id": new_request_id().decode()}
        head = f"HTTP/1.1 {error.status} {_REASONS[error.status]}\r\n" + "".join(
            f"{k}: {v}\r\n" for k, v in headers.items()
        )
        self.transport.write(head.encode() + b"\r\n" + body)
        self.loop.call_later(_LINGER_S, self.transport.close)


class _Joined:
    """A connection's transport for replies. uvicorn writes headers and body apart; they are sent together.

    Otherwise they would take two system calls, and the client would wake twice.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Send `data` with what else is written before the event loop goes on."""
        if not self._parts:
            self._loop.call_soon(self.flush)
        self._parts.append(data)

    def flush(self) -> None:
        """Send now what was written."""
        parts, self._parts = self._parts, []
        if parts:
            self._transport.writelines(parts)

    def close(self) -> None:
        """Close the connection once everything is sent."""
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """True if the connection was closed."""
        return self._transport.is_closing()


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address, not listening yet.

    Raises:
        RequestError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except (OSError, OverflowError) as e:
        raise RequestError(
            f"--host and --port must be a free address of this machine, got {host} and {port} ({e}); choose another"
        ) from None
    return bound


def url_of(bound: socket.socket) -> str:
    """The address of a bound socket for a browser."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
