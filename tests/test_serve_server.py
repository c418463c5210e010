"""The service's edges: keys, limits, slow and broken clients, shutdown, settings, and `--check`."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
from PIL import Image

from arcflow_runtime import Pipeline, RequestError, cli
from arcflow_runtime.engines.gpus import Gpu
from arcflow_serve import generation, keys, server, settings
from arcflow_serve.encode_image import Encoding
from arcflow_serve.service import Service
from arcflow_serve.settings import Settings
from tests.conftest import SHAPES_OPTIONS
from tests.serving import GENERATE, Gate, alone, command, images_of, raw, serve, wait_until, wrap

FIRST, SECOND = "first-client-0001", "second-client-0002"
SMALL = {"prompt": "x", "size": "16x16", "seed": 1}


@pytest.fixture(scope="module")
def bundle(bundles):
    return bundles("shapes", **SHAPES_OPTIONS)


def head(length: int, *lines: str) -> bytes:
    fixed = [f"POST {GENERATE} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {length}"]
    return "\r\n".join([*fixed, *lines, "", ""]).encode()


def parse(answer: bytes) -> tuple[int, dict]:
    top, _, body = answer.partition(b"\r\n\r\n")
    return int(top.split()[1]), json.loads(body)


# Keys


def test_a_client_cannot_name_another_address(bundle, monkeypatch):
    clients, submit = [], Service.submit

    def record(self, job):
        clients.append(job.client)
        submit(self, job)

    monkeypatch.setattr(Service, "submit", record)
    with serve([bundle]) as running:
        assert running.post(SMALL, headers={"x-forwarded-for": "1.2.3.4"}).status_code == 200
    assert clients == ["127.0.0.1"]


def test_keys(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("ARCFLOW_API_KEYS", f"{SECOND},")
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n{FIRST}\n")
    read = keys.read_keys(file)
    assert read == (FIRST, SECOND)
    with serve([bundle], api_keys=read) as running:
        base = running.url + "/v1"
        for key in read:
            assert openai.OpenAI(api_key=key, base_url=base).images.generate(prompt="x", size="16x16").data
        for key in ("other", FIRST + "x", FIRST[:-1], "\u2603"):
            with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)) as error:
                openai.OpenAI(api_key=key, base_url=base, max_retries=0).images.generate(prompt="x")
            if isinstance(error.value, openai.AuthenticationError):
                assert error.value.code == "invalid_api_key"
                assert error.value.type == "authentication_error"
        with running.client() as client:
            for path in ("/v1/models", "/v1/models/x"):
                response = client.get(path)
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.json()["error"]["message"] == (
                    "this service needs one of its API keys as 'Authorization: Bearer KEY', got none"
                )
            # Nothing is read of a body before the key is known.
            assert client.post(GENERATE, content=b"\xff").status_code == 401
            for path in ("/", "/health", "/ready", "/metrics", "/docs"):
                assert client.get(path).status_code == 200


def test_every_key_is_compared_in_constant_time(monkeypatch):
    compared, compare_digest = [], hmac.compare_digest

    def compare(a, b):
        compared.append((len(a), len(b)))
        return compare_digest(a, b)

    monkeypatch.setattr(keys.hmac, "compare_digest", compare)
    known = keys.Keys([FIRST, SECOND])
    assert known.client(f"Bearer {FIRST}") == "key 1"
    assert known.client(f"bearer {SECOND}") == "key 2"
    # Digests, whose length says nothing of the key's, and all of them also when the first one matches.
    assert compared == [(32, 32)] * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# none\n", "{} must have at least one API key, one a line; got none"),
        (
            f"{FIRST}\nshort\n",
            "API key 2 must have at least 16 printable characters without spaces; make one with: openssl rand -hex 24",
        ),
        (
            "with spaces in the key\n",
            "API key 1 must have at least 16 printable characters without spaces; make one with: openssl rand -hex 24",
        ),
    ],
)
def test_files_of_keys_that_are_refused(tmp_path, monkeypatch, text, message):
    monkeypatch.delenv("ARCFLOW_API_KEYS", raising=False)
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(RequestError) as error:
        keys.read_keys(file)
    assert str(error.value) == message.format(file)


# Clients that are slow, large or broken


@pytest.fixture(scope="module")
def impatient(bundle):
    limits = {"body_timeout_s": 0.3, "write_timeout_s": 0.4, "max_body_bytes": 2000, "max_connections": 40}
    with pytest.MonkeyPatch.context() as patch, serve([bundle], **limits) as running:
        patch.setattr(server, "_LINGER_S", 1.0)
        yield running
        assert running.post(SMALL).status_code == 200


@pytest.mark.parametrize(
    ("sent", "status", "code", "message"),
    [
        (
            head(100, "connection: close") + b'{"prompt":',
            408,
            "body_timeout",
            "the body must arrive within 0.3 s, got 10 bytes of it",
        ),
        (b"POST /v1/images/gen", 408, "header_timeout", "the headers must arrive within 0.3 s"),
        (b"", 408, "header_timeout", "the headers must arrive within 0.3 s"),
        (
            b"nonsense\r\n\r\n",
            400,
            "invalid_http",
            "the request must be valid HTTP/1.1 with at most 65536 bytes of headers",
        ),
        (
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            400,
            "invalid_http",
            "the request must be valid HTTP/1.1 with at most 65536 bytes of headers",
        ),
        (
            b"GET / HTTP/1.1\r\nhost: x\r\nlarge: " + b"x" * 10_000_000 + b"\r\n\r\n",
            400,
            "invalid_http",
            "the request must be valid HTTP/1.1 with at most 65536 bytes of headers",
        ),
        (
            head(3000, "connection: close") + b" " * 3000,
            413,
            "body_too_large",
            "the body must have at most 2000 bytes, got more",
        ),
        (
            head(10_000_000, "connection: close") + b" " * 10_000_000,
            413,
            "body_too_large",
            "the body must have at most 2000 bytes, got more",
        ),
    ],
    ids=[
        "half a body",
        "half of the headers",
        "nothing",
        "no HTTP",
        "TLS",
        "10 MB of headers",
        "a large body",
        "a body of 10 MB",
    ],
)
def test_broken_requests_get_an_answer(impatient, sent, status, code, message):
    found, body = parse(raw(impatient.port, sent))
    assert found == status
    assert body["error"]["code"] == code
    assert body["error"]["message"] == message


def test_headers_that_trickle_in_after_a_good_request(impatient):
    """The time of a keep-alive connection must not stand for that of its next headers."""
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /heal")
        started = time.monotonic()
        rest = b"".join(iter(lambda: connection.recv(65536), b""))
        assert b"header_timeout" in rest
        # 0.3 s and the time in which the connection lingers, below uvicorn's 5 s between requests.
        assert time.monotonic() - started < 4.5


@pytest.mark.parametrize(
    ("first", "status", "more"),
    [
        (b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n", 200, b"\r\n"),
        (head(1_000_000).replace(b"application/json", b"text/plain"), 415, b"x"),
        (head(1_000_000).replace(b"POST", b"PUT"), 405, b"x"),
    ],
    ids=["empty lines", "a body of another type", "a body that nobody wants"],
)
def test_what_follows_an_answer_does_not_keep_the_connection(impatient, monkeypatch, first, status, more):
    monkeypatch.setattr(impatient.server.config, "timeout_keep_alive", 0.5)
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=20) as connection:
        connection.sendall(first)
        assert connection.recv(65536).startswith(b"HTTP/1.1 %d" % status)
        wait_until(lambda: len(impatient.server.server_state.connections) == 1)
        for _ in range(100):
            with contextlib.suppress(ConnectionError):
                connection.sendall(more)
            time.sleep(0.1)
            if not impatient.server.server_state.connections:
                return
    raise AssertionError("the connection is still open after 10 s")


@pytest.mark.parametrize("pieces", [1, 40])
@pytest.mark.parametrize("chunked", [False, True])
def test_an_offer_of_another_protocol_is_passed_over(impatient, pieces, chunked):
    """Java's client offers HTTP/2 with its first request, and RFC 9110 lets a server go on with HTTP/1.1."""
    body = json.dumps(SMALL).encode()
    offers = ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABk")
    offer = head(len(body), *offers) + body
    if chunked:
        offer = head(0, "transfer-encoding: chunked", *offers).replace(b"content-length: 0\r\n", b"")
        offer += b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for sent in (offer, offer, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"):
            size = -(-len(sent) // pieces)
            for start in range(0, len(sent), size):
                connection.sendall(sent[start : start + size])
                time.sleep(0.002)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert answer.status == 200
            answer.read()


def test_offers_sent_at_once_are_passed_over(impatient):
    body = json.dumps(SMALL).encode()
    offer = head(len(body), "connection: Upgrade", "upgrade: h2c") + body
    sent = offer + offer + b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    assert raw(impatient.port, sent).count(b"HTTP/1.1 200 OK\r\n") == 3


def test_trailers_are_dropped_and_bounded(impatient):
    """They must not become headers, such as a key, and must not fill the memory."""
    seen, app = [], impatient.server.config.loaded_app

    async def look(scope, receive, send):
        await app(scope, receive, send)
        seen.append(dict(scope["headers"]))

    start = (
        b"POST /health HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n1\r\nx\r\n0\r\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(impatient.server.config, "loaded_app", look)
        assert parse(raw(impatient.port, start + b"authorization: Bearer k\r\n\r\n"))[0] == 405
    assert seen == [{b"host": b"x", b"transfer-encoding": b"chunked", b"connection": b"close"}]
    sent = start.replace(b"/health", GENERATE.encode()).replace(b"host", b"content-type: application/json\r\nhost")
    # The request is under way, so that the connection can only be closed; the time for its body is not over.
    assert raw(impatient.port, sent + b"a: " + b"x" * 10_000_000) == b""


@pytest.mark.parametrize(
    "sent",
    [
        head(5, "transfer-encoding: chunked") + b"0\r\n\r\n",
        head(5, "content-length: 6") + b"{}    ",
        head(0, "a: b\nc: d"),
        b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
    ids=["two lengths", "two different lengths", "a line that ends early", "a tunnel", "an address", "bytes in a path"],
)
def test_what_proxies_could_read_in_another_way_is_refused(impatient, sent):
    status, body = parse(raw(impatient.port, sent))
    assert status == 400 and body["error"]["code"] == "invalid_http"


def test_what_is_written_at_once_is_sent_at_once():
    sent = []

    class Transport:
        def writelines(self, parts):
            sent.append(list(parts))

        def close(self):
            sent.append("closed")

    async def write():
        replies = server._Joined(Transport(), asyncio.get_running_loop())
        replies.write(b"headers")
        replies.write(b"body")
        await asyncio.sleep(0)
        assert sent == [[b"headers", b"body"]]
        replies.write(b"the end")
        replies.close()
        assert sent[1:] == [[b"the end"], "closed"]

    asyncio.run(write())


def test_an_error_in_the_service_itself(impatient, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("a fault of ours")

    with monkeypatch.context() as patch:
        patch.setattr(generation, "accept", fail)
        response = impatient.post(SMALL)
    assert response.status_code == 500
    error = response.json()["error"]
    assert (error["code"], error["message"]) == (
        "internal_error",
        "the service failed; the log of the service says more",
    )
    assert "a fault of ours" in caplog.text
    assert f"request {response.headers['x-request-id']} failed" in caplog.text
    assert 'arcflow_requests_total{status="500"} 1.0' in httpx2.get(impatient.url + "/metrics").text
    assert impatient.post(SMALL).status_code == 200


def test_requests_sent_at_once_are_answered_in_order(impatient):
    body = json.dumps(SMALL).encode()
    sent = head(len(body)) + body + b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    first, second = raw(impatient.port, sent).split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert b'"b64_json"' in first and b'"status": "ok"' in second


def test_who_does_not_read_loses_the_connection(impatient):
    connections = impatient.server.server_state.connections
    path = b"GET /docs/static/swagger-ui-bundle.js HTTP/1.1\r\nhost: x\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", impatient.port))
            # More than the kernel's buffers hold.
            connection.sendall(path * 10)
        wait_until(lambda: len(connections) >= 5)
        assert impatient.post(SMALL).status_code == 200
        wait_until(lambda: not connections, 20)


def test_who_does_not_read_the_end_loses_the_connection(impatient):
    """Less is left than uvicorn's own limit, below which it calls nobody."""
    connections = impatient.server.server_state.connections
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", impatient.port))
        wait_until(lambda: len(connections) == 1)
        (service,) = connections
        service.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection.sendall(b"GET /docs/static/swagger-ui-bundle.js HTTP/1.1\r\nhost: x\r\n\r\n")
        wait_until(lambda: service.transport.get_write_buffer_size() > 0)
        while service.transport.get_write_buffer_size() > 16 << 10:
            connection.recv(4096)
            time.sleep(0.0005)
        assert service.transport.get_write_buffer_size() > 0
        wait_until(lambda: not connections, 20)


def test_who_reads_slowly_gets_everything(impatient):
    expected = httpx2.get(impatient.url + "/docs/static/swagger-ui-bundle.js").content
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        connection.connect(("127.0.0.1", impatient.port))
        connection.sendall(b"GET /docs/static/swagger-ui-bundle.js HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        parts, started = [], time.monotonic()
        while part := connection.recv(20_000):
            parts.append(part)
            time.sleep(0.01)
    assert b"".join(parts).partition(b"\r\n\r\n")[2] == expected
    assert time.monotonic() - started > 0.4


def test_more_connections_than_allowed(impatient):
    wait_until(lambda: not impatient.server.server_state.connections)
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(socket.create_connection(("127.0.0.1", impatient.port)))
        for path in (b"/health", b"/ready", b"/metrics?x=1"):
            sent = b"GET %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % path
            assert raw(impatient.port, sent).startswith(b"HTTP/1.1 200")
        asked = json.dumps(SMALL).encode()
        refused = [raw(impatient.port, head(len(asked)) + asked)]
        for _ in range(17):
            stack.enter_context(socket.create_connection(("127.0.0.1", impatient.port)))
        refused.append(raw(impatient.port, b""))
    for answer in refused:
        status, body = parse(answer)
        assert status == 503
        assert body["error"]["message"] == "40 connections may be open at most; try again later"
    wait_until(lambda: not impatient.server.server_state.connections)


# Shutdown


def test_sigterm_under_load_loses_nothing(bundle):
    """Every request that was accepted is answered with its image; later ones are sent elsewhere, in words."""
    with command(bundle, "--max-batch", "1", "--lanes", "1") as running, Pipeline.load(bundle, threads=1) as pipe:
        with ThreadPoolExecutor(41) as pool, httpx2.Client(base_url=running.url, timeout=60) as client:
            bodies = [SMALL | {"seed": i, "n": 4, "size": "64x64"} for i in range(15)]
            # One client for all: each new one takes a tenth of a second, in which the first image would be finished.
            futures = [pool.submit(client.post, GENERATE, json=b) for b in bodies]
            wait_until(lambda: "arcflow_requests_waiting 14" in client.get("/metrics").text)
            running.process.send_signal(signal.SIGTERM)
            wait_until(lambda: client.get("/ready").status_code == 503)
            assert client.get("/ready").json()["reasons"] == ["the service is shutting down"]
            assert client.get("/health").status_code == 200
            refused = client.post(GENERATE, json=SMALL)
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["code"] == "shutting_down"
            for i, future in enumerate(futures):
                images = images_of(future.result())
                assert [x.tobytes() for x in images] == [alone(pipe, "x", i + j) for j in range(4)]
        assert running.process.wait(20) == 0
        assert "Traceback" not in running.process.stderr.read()


def test_a_second_signal_ends_at_once_and_answers(bundle):
    gate = Gate()
    with (
        serve([bundle], lambda s: wrap(s, gate), lanes=1, max_batch=1) as running,
        ThreadPoolExecutor(3) as pool,
    ):
        futures = [pool.submit(running.post, SMALL) for _ in range(3)]
        wait_until(lambda: running.metric("arcflow_requests_waiting") == 2)
        for _ in range(2):
            running.server.handle_exit(signal.SIGINT, None)
        for future in futures:
            response = future.result()
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "shutting_down"
        gate.open.set()


def test_the_time_to_drain_is_limited(bundle):
    gate = Gate()
    with (
        serve([bundle], lambda s: wrap(s, gate), drain_timeout_s=0.3) as running,
        ThreadPoolExecutor(1) as pool,
    ):
        future = pool.submit(running.post, SMALL)
        wait_until(lambda: gate.held == 1)
        running.server.handle_exit(signal.SIGTERM, None)
        assert future.result().json()["error"]["code"] == "shutting_down"
        gate.open.set()


def test_an_idle_service_ends_with_code_0(bundle):
    for sent in (signal.SIGTERM, signal.SIGINT):
        with command(bundle) as running:
            assert running.models == bundle.name
            assert running.url.startswith("http://127.0.0.1:")
            running.process.send_signal(sent)
            assert running.process.wait(20) == 0


# The command


def test_check(bundle, capsys):
    assert cli.main(["serve", str(bundle), "--check"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{bundle.name}: 16x16 in ")
    assert said.endswith(" s, the image of the pipeline alone\n")


def test_check_with_a_key(bundle, monkeypatch):
    monkeypatch.setenv("ARCFLOW_API_KEYS", FIRST)
    assert cli.main(["serve", str(bundle), "--check"]) == 0


def test_check_finds_another_image(bundle, monkeypatch, capsys):
    encode = Encoding.encode

    def other(self, image, text):
        return encode(self, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), text)

    monkeypatch.setattr("arcflow_serve.encode_image.Encoding.encode", other)
    assert cli.main(["serve", str(bundle), "--check"]) == 1
    assert capsys.readouterr().err == (
        f"arcflow serve: error: model {bundle.name!r}: the image must be the one of the pipeline alone, got another; "
        "report this as a bug\n"
    )


def test_a_port_that_is_taken(bundle, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["serve", str(bundle), "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"arcflow serve: error: --host and --port must be a free address of this machine, got 127.0.0.1 and {port} ("
    )


def test_the_address_that_is_printed_can_be_connected_to(bundle, monkeypatch, capsys):
    """Also before the server has started."""

    async def connect(self, sockets):
        with socket.create_connection(sockets[0].getsockname(), timeout=20):
            pass

    monkeypatch.setattr(server.Server, "serve", connect)
    assert cli.main(["serve", str(bundle), "--port", "0"]) == 0
    assert capsys.readouterr().out.startswith("serving ")


def test_no_bundle(capsys):
    assert cli.main(["serve", "nowhere"]) == 1
    assert "nowhere is not a directory" in capsys.readouterr().err


def test_an_open_address_without_keys_is_warned_of(bundle):
    with command(bundle, "--host", "0.0.0.0") as running:
        running.process.send_signal(signal.SIGTERM)
        _, said = running.process.communicate(timeout=20)
    assert f"http://0.0.0.0:{running.port} can be reached from other machines and has no API keys" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lanes": 0}, "--lanes must be at least 1, got 0"),
        ({"max_batch": 0}, "--max-batch must be at least 1, got 0"),
        ({"threads": 0}, "--threads must be at least 1, got 0"),
        ({"max_px": 0}, "--max-px must be at least 1, got 0"),
        ({"deadline_s": 0}, "--deadline must be a number of seconds above 0, got 0"),
        ({"hang_timeout_s": float("nan")}, "--hang-timeout must be a number of seconds above 0, got nan"),
        (
            {"max_n": 10, "max_queue": 5},
            "--max-n must be at most --max-queue, got 10 and 5: "
            "a request that is larger than the queue could never be accepted",
        ),
        (
            {"lanes": 2, "threads": 3},
            "--lanes times --threads must be at most 4, the number of cores, got 2 * 3; "
            "more threads than cores slow each other down",
        ),
    ],
)
def test_settings_that_are_refused(monkeypatch, changes, message):
    monkeypatch.setattr(settings, "cores", lambda: 4)
    with pytest.raises(RequestError) as error:
        Settings(**changes)
    assert str(error.value) == message


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "auto"])
@pytest.mark.parametrize(("cores", "lanes", "threads"), [(1, 1, 1), (2, 2, 1), (3, 2, 1), (16, 2, 8)])
def test_lanes_share_the_cores(monkeypatch, backend, cores, lanes, threads):
    monkeypatch.setattr(settings, "cores", lambda: cores)
    monkeypatch.setattr(settings, "find_gpu", lambda: None)
    found = Settings(backend)
    assert (found.lanes, found.engine_threads) == (lanes, threads)


def test_a_gpus_backend_chooses_its_threads(monkeypatch):
    monkeypatch.setattr(settings, "find_gpu", lambda: Gpu("a GPU", "sm89"))
    for backend in ("auto", "tensorrt", "tensorrt-rtx", "onnxruntime-cuda"):
        assert Settings(backend).engine_threads is None


def test_limits_of_steps_and_size(bundle):
    with serve([bundle], max_steps=2, max_px=32, max_prompt_chars=3, max_n=2) as running:
        for change, message in {
            ("num_inference_steps", 3): "num_inference_steps must be at most 2, got 3",
            ("size", "48x16"): "size must be at most 32 pixels on each side, got 48",
            ("prompt", "four"): "prompt must have at most 3 characters, got 4",
            ("n", 3): "n must be at most 2, got 3",
        }.items():
            response = running.post(SMALL | dict([change]))
            assert response.status_code == 400
            assert response.json()["error"]["message"] == message
            assert response.json()["error"]["param"] == change[0]


def test_the_bundles_own_steps_are_limited_too(bundle):
    with serve([bundle], max_steps=1) as running:
        response = running.post(SMALL)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "num_inference_steps"
        assert response.json()["error"]["message"] == (
            "num_inference_steps must be given, at most 1: the bundle's own 2 are more than this service allows"
        )
        assert running.post(SMALL | {"num_inference_steps": 1}).status_code == 200


def test_the_service_never_imports_torch(bundle):
    code = (
        "import sys\n"
        "from arcflow_runtime import cli\n"
        f"assert cli.main(['serve', {str(bundle)!r}, '--check']) == 0\n"
        "assert not {'torch', 'diffusers', 'transformers', 'arcflow_export'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_stay_within_the_cores(bundle):
    before = set(threading.enumerate())
    with serve([bundle]) as running:
        for i in range(20):
            assert running.post(SMALL | {"n": 2, "seed": i}).status_code == 200
        names = [t.name for t in set(threading.enumerate()) - before]
    assert names.count("arcflow-lane") == settings.default_lanes()
    assert names.count("arcflow-keeper") == 1
    # Beside them only the thread of the server itself.
    assert len(names) == settings.default_lanes() + 2
