"""Run the image service for a test: in this process, with its engines within reach, or as the command."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx2
from PIL import Image

from arcflow_runtime import Pipeline
from arcflow_serve.app import create_app
from arcflow_serve.models import open_models
from arcflow_serve.server import Server, bind
from arcflow_serve.service import Service
from arcflow_serve.settings import Settings

GENERATE = "/v1/images/generations"
WAIT_S = 60.0


@dataclass(frozen=True)
class Running:
    """A service in this process."""

    service: Service
    server: Server
    url: str
    port: int

    def client(self, **options) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=WAIT_S, **options)

    def post(self, body: Mapping, **options) -> httpx2.Response:
        with self.client() as client:
            return client.post(GENERATE, json=body, **options)

    def metric(self, name: str, **labels: str) -> float:
        """A sample as a scrape sees it."""
        with self.client() as client:
            return sample(client.get("/metrics").text, name, **labels)


def sample(text: str, name: str, **labels: str) -> float:
    inner = ",".join(f'{k}="{v}"' for k, v in labels.items())
    (value,) = re.findall(rf"^{name}{re.escape('{' + inner + '}') if inner else ''} (\S+)$", text, re.MULTILINE) or [
        "0"
    ]
    return float(value)


@contextmanager
def serve(paths: Sequence[Path], prepare=None, **settings) -> Iterator[Running]:
    """A service on a free port; `prepare(service)` is called before its lanes start."""
    chosen = Settings(**settings)
    service = Service(open_models(paths, chosen), chosen)
    if prepare is not None:
        prepare(service)
    service.start()
    bound = bind("127.0.0.1", 0)
    server = Server(create_app(service, chosen), service, chosen)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])), daemon=True)
    thread.start()
    port = bound.getsockname()[1]
    wait_until(lambda: server.started)
    try:
        yield Running(service, server, f"http://127.0.0.1:{port}", port)
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive(), "the service does not end"


@contextmanager
def command(*arguments, environment: Mapping[str, str] | None = None) -> Iterator[SimpleNamespace]:
    """`arcflow serve` as a process; .url is its address."""
    line = [sys.executable, "-m", "arcflow_runtime.cli", "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(environment or {})
    )
    try:
        said = process.stdout.readline()
        match = re.fullmatch(r"serving (.*) on (http://\S+:(\d+))\n", said)
        assert match, said + process.stderr.read()
        running = SimpleNamespace(process=process, models=match[1], url=match[2], port=int(match[3]))
        wait_until(lambda: answers(running.url))
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()


def answers(url: str) -> bool:
    try:
        return httpx2.get(url + "/health").status_code == 200
    except httpx2.TransportError:
        return False


def wait_until(true, timeout_s: float = WAIT_S) -> None:
    until = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.005)


def image_of(encoded: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    image.load()
    return image


def images_of(response: httpx2.Response) -> list[Image.Image]:
    assert response.status_code == 200, response.text
    return [image_of(x["b64_json"]) for x in response.json()["data"]]


def alone(pipe: Pipeline, prompt: str, seed: int, **options) -> bytes:
    """The pixels that the pipeline gives without a service; one list of seeds, as for an image of a batch."""
    return pipe([prompt], seed=[seed], **options).images[0].tobytes()


def preview_alone(pipe: Pipeline, prompt: str, seed: int, **options) -> bytes:
    """The pixels of the first preview that the pipeline gives without a service."""
    found = []
    pipe([prompt], seed=[seed], callback_on_preview=lambda step, images: found.append(images[0].tobytes()), **options)
    return found[0]


class Wrapped:
    """A pipeline that calls `before(prompts)` ahead of each batch."""

    def __init__(self, pipeline: Pipeline, before) -> None:
        self._pipeline, self._before = pipeline, before

    def __call__(self, prompts, **arguments):
        self._before(tuple(prompts))
        return self._pipeline(prompts, **arguments)

    def __getattr__(self, name):
        return getattr(self._pipeline, name)


def wrap(service: Service, before) -> None:
    """Let every pipeline of a service, and those that are loaded later, call `before(prompts)`."""
    for model in service.models.values():
        model._load = partial(_load_wrapped, model._load, before)
        model._pipeline = Wrapped(model._pipeline, before)


def _load_wrapped(load, before) -> Wrapped:
    return Wrapped(load(), before)


class Gate:
    """Holds every batch until `open` is set, and records the prompts of those that passed."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.held = 0
        self.batches: list[tuple[str, ...]] = []

    def __call__(self, prompts) -> None:
        self.held += 1
        assert self.open.wait(WAIT_S)
        self.batches.append(prompts)


def raw(port: int, data: bytes, timeout_s: float = WAIT_S) -> bytes:
    """Send bytes and read until the service closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        connection.settimeout(timeout_s)
        # The service may close before everything was sent; its answer is read all the same.
        with contextlib.suppress(OSError):
            connection.sendall(data)
        parts = []
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                parts.append(part)
        return b"".join(parts)
