"""`arcflow serve --check`: start the service on a free port, generate an image over HTTP, compare it, and stop."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from arcflow_runtime.errors import ArcFlowError
from arcflow_serve.app import create_app
from arcflow_serve.models import Model, open_models
from arcflow_serve.server import Server, bind
from arcflow_serve.service import Service
from arcflow_serve.settings import Settings

_SEED = 42
_START_S = 30.0


class CheckError(ArcFlowError):
    """The service did not answer as it should."""


def check_service(paths: Sequence[Path], settings: Settings) -> list[str]:
    """Check every bundle, and return a line about each.

    Raises:
        ArcFlowError: the service cannot be started, or an answer is wrong.
    """
    bound = bind("127.0.0.1", 0)
    models = open_models(paths, settings)
    service = Service(models, settings)
    service.start()
    server = Server(create_app(service, settings), service, settings)
    thread = threading.Thread(target=lambda: server.run([bound]), name="arcflow-check")
    thread.start()
    try:
        key = settings.api_keys[0] if settings.api_keys else None
        port = bound.getsockname()[1]
        _wait_until_started(server)
        _ask(port, "GET", "/ready", None, key, settings.deadline_s)
        return [_check_model(port, model, key, settings.deadline_s) for model in models.values()]
    finally:
        server.should_exit = True
        thread.join()


def _wait_until_started(server: Server) -> None:
    until = time.monotonic() + _START_S
    while not server.started:
        if time.monotonic() > until:
            raise CheckError(f"the service did not start within {_START_S:g} s")
        time.sleep(0.01)


def _check_model(port: int, model: Model, key: str | None, timeout_s: float) -> str:
    multiple = model.manifest.latents.vae_scale_factor * model.manifest.latents.patch_size
    ranges = model.manifest.ranges
    width, height = (-(-r.min // multiple) * multiple for r in (ranges.width_px, ranges.height_px))
    asked = {"model": model.name, "prompt": "a red circle", "size": f"{width}x{height}", "seed": _SEED}
    started = time.perf_counter()
    reply = _ask(port, "POST", "/v1/images/generations", asked, key, timeout_s)
    seconds = time.perf_counter() - started
    image = Image.open(io.BytesIO(base64.b64decode(reply["data"][0]["b64_json"])))
    with model.use() as pipeline:
        # A list of seeds, as for the pictures of a batch.
        expected = pipeline(["a red circle"], height, width, seed=[_SEED]).images[0]
    assert isinstance(expected, Image.Image), "the pipeline's default output"
    if image.size != expected.size or image.tobytes() != expected.tobytes():
        raise CheckError(
            f"model {model.name!r}: the image must be the one of the pipeline alone, got another; report this as a bug"
        )
    return f"{model.name}: {width}x{height} in {seconds:.2f} s, the image of the pipeline alone"


def _ask(port: int, method: str, path: str, body: object, key: str | None, timeout_s: float) -> dict:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise CheckError(f"{method} {path} must be answered with status 200, got {response.status}: {text[:500]!r}")
    found: dict = json.loads(text)
    return found
