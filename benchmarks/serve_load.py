"""Send requests to a server in closed and open loops: a send function -> latencies; and what they add up to."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pycurl

#: Most requests of an open loop that are under way at a time; more would measure the client's threads.
OPEN_THREADS = 128
TIMEOUT_S = 300.0
#: A PNG begins so.
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Reply:
    """The answer to one request; `batch_size` is the number of images generated together, 0 for an error."""

    status: int
    batch_size: int


#: (number of the request) -> reply. Called from several threads; the number is the seed, and makes the prompt new.
Send = Callable[[int], Reply]


def prompt_of(number: int) -> str:
    """A prompt that no other request has, so that no server can reuse its text states."""
    return f"{number} red circles"


@dataclass(frozen=True)
class Load:
    """How requests come: from `clients` that each wait for their image, or else `rate_per_s` at random times."""

    clients: int | None = None
    rate_per_s: float | None = None


@dataclass(frozen=True)
class Sample:
    """What some requests of a load took: milliseconds and reply of each, and the seconds of all."""

    results: Sequence[tuple[float, Reply]]
    seconds: float


def send_all(send: Send, load: Load, numbers: range) -> Sample:
    """Send the requests with these numbers."""
    if load.clients is not None:
        return _closed_loop(send, load.clients, numbers)
    assert load.rate_per_s is not None
    return _open_loop(send, load.rate_per_s, numbers)


def _closed_loop(send: Send, clients: int, numbers: range) -> Sample:
    """Each client sends its next request when the last one is answered."""
    left = iter(numbers)
    lock = threading.Lock()

    def numbers_left() -> Iterator[int]:
        while True:
            with lock:
                number = next(left, None)
            if number is None:
                return
            yield number

    def client(_: int) -> list[tuple[float, Reply]]:
        return [_timed(send, number, time.perf_counter()) for number in numbers_left()]

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        results = [one for found in pool.map(client, range(clients)) for one in found]
    return Sample(results, time.perf_counter() - started)


def _open_loop(send: Send, rate_per_s: float, numbers: range) -> Sample:
    """Requests come at random times, `rate_per_s` on average, whether or not the earlier ones are answered.

    A latency counts from the time at which the request was due, so that waiting for a busy server counts too.
    """
    gaps = random.Random(numbers.start)
    started = due = time.perf_counter()
    pending = []
    with ThreadPoolExecutor(OPEN_THREADS) as pool:
        for number in numbers:
            due += gaps.expovariate(rate_per_s)
            time.sleep(max(0.0, due - time.perf_counter()))
            pending.append(pool.submit(_timed, send, number, due))
        results = [one.result() for one in pending]
    return Sample(results, time.perf_counter() - started)


def _timed(send: Send, number: int, since: float) -> tuple[float, Reply]:
    reply = send(number)
    return (time.perf_counter() - since) * 1e3, reply


def summary(load: Load, samples: Sequence[Sample]) -> dict[str, Any]:
    """Latencies are those of answered requests; the other statuses are counted."""
    loop: dict[str, Any] = {"loop": "closed", "clients": load.clients}
    if load.clients is None:
        loop = {"loop": "open", "rate_per_s": load.rate_per_s}
    results = [one for sample in samples for one in sample.results]
    seconds = sum(sample.seconds for sample in samples)
    answered = sorted(ms for ms, reply in results if reply.status == 200)
    sizes = Counter(reply.batch_size for _, reply in results if reply.status == 200)
    return {
        **loop,
        "requests": len(results),
        "seconds": seconds,
        "statuses": {str(k): n for k, n in sorted(Counter(reply.status for _, reply in results).items())},
        "images_per_s": len(answered) / seconds,
        "p50_ms": statistics.median(answered) if answered else None,
        # The smallest latency that at least 99 % of the requests do not exceed.
        "p99_ms": answered[-(-len(answered) * 99 // 100) - 1] if answered else None,
        "images_by_batch_size": {str(size): n for size, n in sorted(sizes.items())},
        # Each batch of n images is counted n times among them.
        "mean_batch_size": len(answered) / sum(n / size for size, n in sizes.items()) if answered else None,
    }


def http_sender(url: str, size_px: int, steps: int) -> Send:
    """Requests to OpenAI's images API at `url`; each thread keeps one connection open.

    Raises:
        ValueError: an answer with status 200 has no PNG.
    """
    post = _poster(f"{url}/v1/images/generations")

    def send(number: int) -> Reply:
        body = {"prompt": prompt_of(number), "size": f"{size_px}x{size_px}", "seed": number}
        status, content, _ = post(body | {"num_inference_steps": steps})
        if status != 200:
            return Reply(status, 0)
        (image,) = json.loads(content)["data"]
        if not base64.b64decode(image["b64_json"][:32]).startswith(_PNG):
            raise ValueError(f"{url} must answer with a PNG, got {image['b64_json'][:32]!r}")
        return Reply(200, image["batch_size"])

    return send


def triton_sender(url: str, model: str, size_px: int, steps: int) -> Send:
    """Requests to Triton's HTTP interface at `url`, whose pixels come back raw; each thread keeps one connection open.

    Raises:
        ValueError: an answer with status 200 has other outputs than an image of this size.
    """
    post = _poster(f"{url}/v2/models/{model}/infer")

    def send(number: int) -> Reply:
        given = {
            "prompt": ("BYTES", prompt_of(number)),
            "seed": ("UINT64", number),
            "width": ("INT32", size_px),
            "height": ("INT32", size_px),
            "num_inference_steps": ("INT32", steps),
        }
        inputs = [{"name": k, "shape": [1, 1], "datatype": kind, "data": [value]} for k, (kind, value) in given.items()]
        body = {
            "inputs": inputs,
            "outputs": [{"name": "image", "parameters": {"binary_data": True}}, {"name": "batch_size"}],
        }
        status, content, headers = post(body)
        if status != 200:
            return Reply(status, 0)
        match = re.search(rb"(?im)^inference-header-content-length: *(\d+)", headers)
        assert match is not None, "Triton gives it if an output is binary"
        length = int(match[1])
        outputs = {output["name"]: output for output in json.loads(content[:length])["outputs"]}
        if outputs["image"]["shape"] != [1, size_px, size_px, 3] or len(content) - length != size_px**2 * 3:
            raise ValueError(f"{url} must answer with an image of {size_px} px, got {outputs['image']}")
        return Reply(200, outputs["batch_size"]["data"][0])

    return send


def _poster(url: str) -> Callable[[object], tuple[int, bytes, bytes]]:
    """A function that posts JSON to `url` and gives status, body and headers; each thread keeps one connection open.

    libcurl, because the clients take their time from the same cores as the server.
    """
    own = threading.local()

    def post(body: object) -> tuple[int, bytes, bytes]:
        if not hasattr(own, "curl"):
            own.curl = curl = pycurl.Curl()
            curl.setopt(pycurl.URL, url)
            curl.setopt(pycurl.HTTPHEADER, ["content-type: application/json", "expect:"])
            curl.setopt(pycurl.TIMEOUT, int(TIMEOUT_S))
            curl.setopt(pycurl.NOSIGNAL, 1)
        content, headers = io.BytesIO(), io.BytesIO()
        own.curl.setopt(pycurl.POSTFIELDS, json.dumps(body))
        own.curl.setopt(pycurl.WRITEDATA, content)
        own.curl.setopt(pycurl.HEADERFUNCTION, headers.write)
        own.curl.perform()
        return own.curl.getinfo(pycurl.RESPONSE_CODE), content.getvalue(), headers.getvalue()

    return post


def memory_of(pid: int) -> dict[str, int]:
    """Resident memory in bytes of a process and of all that it started, added up: now, and each one's peak."""
    total = {"resident_bytes": 0, "peak_resident_bytes": 0}
    for one in family_of(pid):
        try:
            status = Path(f"/proc/{one}/status").read_text()
        except OSError:  # it has just ended
            continue
        found = {key: int(value) << 10 for key, value in re.findall(r"^(Vm\w+):\s+(\d+) kB$", status, re.MULTILINE)}
        total["resident_bytes"] += found.get("VmRSS", 0)
        total["peak_resident_bytes"] += found.get("VmHWM", 0)
    return total


def family_of(pid: int) -> list[int]:
    """A process and all that it started, and those started, that still run."""
    found = [pid]
    for one in found:
        for file in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                found += map(int, file.read_text().split())
            except OSError:  # it has just ended
                continue
    return found
