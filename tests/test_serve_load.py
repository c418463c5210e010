"""The service under four times the load that it can take, and fuzzed: no lost answer, no wrong image, no growth."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import time
from collections import Counter
from pathlib import Path

import httpx2
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from arcflow_runtime import Pipeline
from tests.conftest import SHAPES_OPTIONS
from tests.serving import GENERATE, alone, command, image_of, raw, sample, serve

PROMPTS = ("a red circle", "a large blue heart on a black background", "", "a green triangle")
SIZES = ((64, 64), (32, 48), (16, 16))
SEEDS = range(5)
MAX_N = 3
#: Places in the service: two lanes with one image each, and the queue. Four times as many clients ask at once.
QUEUE, LANES = 14, 2
CLIENTS = 4 * (QUEUE + LANES)
FUZZ_S = 60


@pytest.fixture(scope="module")
def bundle(bundles):
    return bundles("shapes", **SHAPES_OPTIONS)


@pytest.fixture(scope="module")
def expected(bundle) -> dict[tuple, bytes]:
    """The pixels of every request that is sent, from the pipeline alone."""
    with Pipeline.load(bundle, threads=1) as pipe:
        return {
            (p, w, h, s): alone(pipe, p, s, width=w, height=h)
            for p in PROMPTS
            for w, h in SIZES
            for s in (*SEEDS, 5, 6)
        }


class Load:
    """Clients that ask as fast as they are answered, and now and then leave early."""

    def __init__(self, running, count: int, expected: dict) -> None:
        self._running, self._left, self._expected = running, count, expected
        self._random = random.Random(1)
        self.statuses: Counter = Counter()
        self.gone = 0
        self.resident: list[int] = []

    async def run(self) -> None:
        limits = httpx2.Limits(max_connections=CLIENTS + 1)
        async with httpx2.AsyncClient(base_url=self._running.url, timeout=120, limits=limits) as client:
            watch = asyncio.create_task(self._watch(client))
            await asyncio.gather(*[self._client(client) for _ in range(CLIENTS)])
            # An assertion that failed in it is raised here.
            with contextlib.suppress(asyncio.CancelledError):
                watch.cancel()
                await watch

    async def _client(self, client: httpx2.AsyncClient) -> None:
        while self._left:
            self._left -= 1
            prompt, (width, height), seed = (self._random.choice(x) for x in (PROMPTS, SIZES, SEEDS))
            n = self._random.choice((1, 1, 1, 2, MAX_N))
            body = {"prompt": prompt, "size": f"{width}x{height}", "seed": seed, "n": n}
            if self._random.random() < 0.05:
                await self._leave(body, self._random.random() * 0.05)
            else:
                response = await client.post(GENERATE, json=body)
                self.statuses[response.status_code] += 1
                self._judge(response, body, (prompt, width, height))

    def _judge(self, response: httpx2.Response, body: dict, what: tuple) -> None:
        if response.status_code == 429:
            assert response.json()["error"]["code"] == "queue_full"
            assert 1 <= int(response.headers["retry-after"]) <= 60
            return
        assert response.status_code == 200, response.text
        data = response.json()["data"]
        assert len(data) == body["n"]
        for i, image in enumerate(data):
            assert image["seed"] == body["seed"] + i
            assert image_of(image["b64_json"]).tobytes() == self._expected[(*what, body["seed"] + i)]

    async def _leave(self, body: dict, after_s: float) -> None:
        self.gone += 1
        data = json.dumps(body).encode()
        lines = [f"POST {GENERATE} HTTP/1.1", "host: x", "content-type: application/json"]
        _, writer = await asyncio.open_connection("127.0.0.1", self._running.port)
        writer.write("\r\n".join([*lines, f"content-length: {len(data)}", "", ""]).encode() + data)
        await writer.drain()
        await asyncio.sleep(after_s)
        writer.close()

    async def _watch(self, client: httpx2.AsyncClient) -> None:
        """The gauges never exceed the places of the service and the number of clients."""
        while True:
            await asyncio.sleep(0.25)
            text = (await client.get("/metrics")).text
            running, waiting = (sample(text, f"arcflow_requests_{x}") for x in ("running", "waiting"))
            assert waiting <= QUEUE
            assert running + waiting <= CLIENTS
            assert sample(text, "arcflow_images_waiting") <= QUEUE
            assert sample(text, "arcflow_lanes") == LANES
            self.resident.append(resident_bytes(self._running.process.pid))


def resident_bytes(pid: int) -> int:
    (kib,) = re.findall(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(kib) << 10


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=(pytest.mark.slow, pytest.mark.lengthy))])
def test_four_times_the_load(bundle, expected, count):
    arguments = ("--max-queue", QUEUE, "--lanes", LANES, "--max-n", MAX_N, "--threads", 1)
    with command(bundle, *arguments) as running, httpx2.Client(base_url=running.url, timeout=120) as client:
        load = Load(running, count, expected)
        asyncio.run(load.run())
        # All have an image or were told to come again, and some of each.
        assert set(load.statuses) == {200, 429}
        assert sum(load.statuses.values()) + load.gone == count
        assert load.gone > 0
        # The service has noticed the last one that left when nothing is open.
        until = time.monotonic() + 30
        while sample(text := client.get("/metrics").text, "arcflow_requests_running") and time.monotonic() < until:
            time.sleep(0.05)
        assert sample(text, "arcflow_requests_running") == sample(text, "arcflow_requests_waiting") == 0
        counted = {s: sample(text, "arcflow_requests_total", status=str(s)) for s in (200, 429, 499)}
        # Who leaves may have been answered before; its answer is then counted by its status.
        assert counted[200] >= load.statuses[200]
        assert counted[429] >= load.statuses[429]
        assert sum(counted.values()) == count
        assert client.get("/health").json() == {"status": "ok", "reasons": []}
        assert sample(text, "arcflow_lanes_lost") == 0
        if count >= 10_000:
            # The first third fills caches and the allocator's arenas.
            third = len(load.resident) // 3
            early, late = (sorted(x)[len(x) // 2] for x in (load.resident[third : 2 * third], load.resident[-third:]))
            assert abs(late - early) <= 0.05 * early


# Fuzzing

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=5,
)
GOOD = {
    "prompt": st.text(max_size=80),
    "model": st.sampled_from([None, "bundle", "other"]),
    "n": st.integers(-1, 4) | st.none(),
    "size": st.sampled_from([None, "auto", "16x16", "64x32", "17x16", "100000x10000", "x", "0x0", "999999x999999"]),
    "seed": st.integers(-(2**70), 2**70) | st.none(),
    "num_inference_steps": st.integers(-1, 5),
    "guidance_scale": st.floats() | st.none(),
    "loras": st.dictionaries(st.text(max_size=3), st.floats(), max_size=2),
    "response_format": st.sampled_from(["b64_json", "url", "path"]),
    "output_format": st.sampled_from(["png", "jpeg", "webp", "gif"]),
    "output_compression": st.integers(-1, 101),
    "background": st.sampled_from(["auto", "opaque", "transparent"]),
    "stream": st.booleans(),
    "partial_images": st.integers(-1, 4),
    "quality": st.sampled_from(["low", "high", "best"]),
    "user": st.text(max_size=10),
}
OTHERS = {name: good for name, good in GOOD.items() if name != "prompt"}
BODIES = st.fixed_dictionaries({"prompt": GOOD["prompt"]}, optional=OTHERS) | st.fixed_dictionaries(
    {}, optional={name: good | ANY for name, good in GOOD.items()} | {"unknown": ANY}
)
FUZZ = settings(deadline=None, max_examples=120, suppress_health_check=list(HealthCheck), database=None)


@pytest.fixture(scope="module")
def fuzzed(bundle):
    with (
        serve([bundle], max_n=3, max_steps=4, max_body_bytes=4000, body_timeout_s=0.2) as running,
        httpx2.Client(base_url=running.url, timeout=60) as client,
        Pipeline.load(bundle, threads=1) as pipe,
    ):
        yield running, client
        assert client.get("/health").json() == {"status": "ok", "reasons": []}
        reply = client.post(GENERATE, json={"prompt": "after", "seed": 1})
        assert image_of(reply.json()["data"][0]["b64_json"]).tobytes() == alone(pipe, "after", 1)
        assert running.metric("arcflow_requests_running") == 0


def is_an_answer(response: httpx2.Response) -> None:
    """An image, events, or an error of the client's in OpenAI's shape; never an error of the service."""
    assert response.headers["x-request-id"].startswith("req_")
    if response.status_code == 200:
        if response.headers["content-type"].startswith("text/event-stream"):
            last = response.text.rstrip("\n").rpartition("data: ")[2]
            assert json.loads(last)["type"] == "image_generation.completed"
        else:
            assert all("b64_json" in x or "url" in x for x in response.json()["data"])
        return
    assert response.status_code in (400, 404, 408, 413, 415), response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert 5 < len(error["message"]) < 500


def for_a_minute(test) -> None:
    until = time.monotonic() + FUZZ_S
    while time.monotonic() < until:
        test()


def make_fields(client):
    @FUZZ
    @given(BODIES)
    @example({"prompt": "x", "size": "100000x10000"})
    @example({"prompt": "x", "guidance_scale": float("nan")})
    @example({"prompt": "\x00"})
    def fields(body):
        content = json.dumps(body).encode()
        is_an_answer(client.post(GENERATE, content=content, headers={"content-type": "application/json"}))

    return fields


def make_bytes(client):
    @FUZZ
    @given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode), st.sampled_from(["application/json", "x"]))
    @example(b'{"prompt": ' + b"[" * 3000, "application/json")
    @example(b'{"prompt": "\xff\xfe"}', "application/json")
    @example(b" " * 5000, "application/json")
    def bodies(body, kind):
        is_an_answer(client.post(GENERATE, content=body, headers={"content-type": kind}))

    return bodies


def make_connections(running):
    @settings(FUZZ, max_examples=10)
    @given(st.lists(st.binary(max_size=30), max_size=5).map(b"\r\n".join), st.booleans())
    @example(b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-length: -1", True)
    @example(
        b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffff", True
    )
    def connections(data, ends):
        answer = raw(running.port, data + b"\r\n\r\n" * ends, 20)
        assert answer.startswith(b"HTTP/1.1 4"), answer[:100]

    return connections


@pytest.mark.slow
def test_fields_that_are_made_up(fuzzed):
    make_fields(fuzzed[1])()


def test_bodies_that_are_made_up(fuzzed):
    make_bytes(fuzzed[1])()


@pytest.mark.lengthy
@pytest.mark.slow
def test_a_minute_of_made_up_requests(fuzzed):
    running, client = fuzzed
    tests = [make_fields(client), make_bytes(client), make_connections(running)]
    for_a_minute(lambda: [test() for test in tests])
