"""`benchmarks/serve.py`: its loops against a server whose behaviour is known, and all of it with small counts."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import numpy as np
import pytest

from tests.conftest import SHAPES_OPTIONS, shapes_student
from tests.servers import python_of
from tests.serving import GENERATE, command, image_of

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import serve_load

    return serve_load


class Slow:
    """Answers one request at a time, each after `seconds`; refuses the numbers in `refused`."""

    def __init__(self, load, seconds: float, refused: frozenset[int] = frozenset()) -> None:
        self.load, self.seconds, self.refused = load, seconds, refused
        self.lock, self.numbers, self.at_once, self.most = threading.Lock(), [], 0, 0

    def __call__(self, number: int):
        if number in self.refused:
            return self.load.Reply(429, 0)
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        with self.lock:
            time.sleep(self.seconds)
            self.numbers.append(number)
            self.at_once -= 1
        return self.load.Reply(200, 2)


def measured(load, server: Slow, how, requests: int) -> dict:
    return load.summary(how, [load.send_all(server, how, range(requests))])


def test_closed_loop(load):
    server = Slow(load, 0.01, frozenset({3}))
    found = measured(load, server, load.Load(clients=4), 20)
    assert sorted(server.numbers) == [n for n in range(20) if n != 3]
    assert server.most <= 4
    assert found["statuses"] == {"200": 19, "429": 1}
    # A sleep is never shorter than asked for.
    assert found["seconds"] >= 19 * 0.01
    assert found["images_per_s"] == 19 / found["seconds"]
    assert found["images_by_batch_size"] == {"2": 19} and found["mean_batch_size"] == 2
    assert found["p99_ms"] >= found["p50_ms"] >= 10


def test_an_open_loop_counts_the_time_that_requests_wait(load):
    # Ten times as many requests as the server answers: the last one waits for all before it.
    found = measured(load, Slow(load, 0.02), load.Load(rate_per_s=500), 25)
    assert found["statuses"] == {"200": 25}
    # Whichever is answered last, it was due no later than the last of them.
    gaps = random.Random(0)
    last_due_ms = sum(gaps.expovariate(500) for _ in range(25)) * 1e3
    assert found["p99_ms"] >= 25 * 20 - last_due_ms > 400


def summary(load, results: list) -> dict:
    return load.summary(load.Load(clients=1), [load.Sample(results, 1.0)])


def test_the_parts_of_a_load_are_added_up(load):
    parts = [load.Sample([(1.0, load.Reply(200, 1))] * n, seconds) for n, seconds in ((2, 0.5), (6, 1.5))]
    found = load.summary(load.Load(rate_per_s=4.0), parts)
    assert (found["loop"], found["rate_per_s"]) == ("open", 4.0)
    assert (found["requests"], found["seconds"], found["images_per_s"]) == (8, 2.0, 4.0)


def test_percentiles(load):
    results = [(float(ms), load.Reply(200, 1)) for ms in range(1, 101)]
    found = summary(load, results)
    assert (found["p50_ms"], found["p99_ms"]) == (50.5, 99.0)
    sizes = [(1.0, load.Reply(200, 1))] * 2 + [(1.0, load.Reply(200, 4))] * 4
    assert summary(load, sizes)["mean_batch_size"] == 2  # batches of 1, 1 and 4


def test_a_server_that_refuses_everything_has_no_latency(load):
    found = summary(load, [(1.0, load.Reply(503, 0))])
    assert (found["images_per_s"], found["p50_ms"], found["p99_ms"], found["mean_batch_size"]) == (0, None, None, None)


def run(tmp_path, bundle, *servers: str) -> tuple[dict, str]:
    file = tmp_path / "serve.json"
    counts = ["--clients", "1", "3", "--rate", "100", "--requests", "6", "--rounds", "2", "--warmup", "2"]
    chosen = [x for server in servers for x in ("--only", server)]
    line = [sys.executable, BENCHMARKS / "serve.py", "--bundle", bundle, "--json", file, *counts, *chosen]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())["results"], done.stdout


def check(results: dict, printed: str, servers: list[str]) -> None:
    assert list(results) == servers
    for found in results.values():
        assert [r["loop"] for r in found["runs"]] == ["closed", "closed", "open"]
        assert all(r["statuses"] == {"200": 6} for r in found["runs"])
        assert all(sum(r["images_by_batch_size"].values()) == 6 for r in found["runs"])
        assert found["runs"][0]["mean_batch_size"] == 1
        assert found["peak_resident_bytes"] >= found["resident_bytes"] > 2**20
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3 * len(servers)
    assert {row.count("|") for row in rows} == {9}


@pytest.mark.slow
def test_the_service_and_the_pipeline_alone(tmp_path, bundles):
    check(*run(tmp_path, bundles("shapes", **SHAPES_OPTIONS), "lanes", "service"), ["lanes", "service"])


@pytest.mark.lengthy
@pytest.mark.slow
def test_all_servers(tmp_path, bundles):
    python_of("ray", "ray.serve")
    python_of("triton", "pytriton")
    servers = ["lanes", "service", "ray", "triton", "torch"]
    check(*run(tmp_path, bundles("shapes", **SHAPES_OPTIONS)), servers)


def test_growth_is_that_of_the_last_quarter_over_the_second(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from serve_soak import growths

    memory = [1, 2, 100, 100, 5, 5, 110, 130]
    rows = [{"resident_bytes": value, "threads": 5, "files": 8 + i // 6} for i, value in enumerate(memory)]
    assert growths(rows) == pytest.approx({"resident_bytes": 0.2, "threads": 0, "files": 1 / 8})


@pytest.mark.slow
def test_a_short_soak(tmp_path, bundles):
    file = tmp_path / "soak.json"
    counts = ["--requests", "400", "--every", "50", "--json", file]
    line = [sys.executable, BENCHMARKS / "serve_soak.py", bundles("shapes", **SHAPES_OPTIONS), *counts]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())["results"]
    assert [row["requests"] for row in found["rows"]] == list(range(50, 401, 50))
    assert set(found["statuses"]) <= {"200", "400", "404"}
    assert sum(found["statuses"].values()) + found["left"] == 400
    assert found["left"] > 0 and found["exit_code"] == 0


@pytest.mark.slow
def test_pytorch_serves_the_same_student(bundles, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from fastapi.testclient import TestClient
    from serve_torch import create_app

    from arcflow_export.student.reference import TorchStudent

    body = {"prompt": "a large red circle", "size": "64x64", "seed": 7, "num_inference_steps": 2}
    app = TestClient(create_app(TorchStudent(shapes_student()), SHAPES_OPTIONS["max_sequence_length"]))
    theirs = image_of(app.post(GENERATE, json=body).json()["data"][0]["b64_json"])
    with command(bundles("shapes", **SHAPES_OPTIONS)) as running:
        ours = image_of(httpx2.post(running.url + GENERATE, json=body).json()["data"][0]["b64_json"])
    difference = np.abs(np.asarray(ours, np.int16) - np.asarray(theirs, np.int16))
    # Both compute in float32, whose differences are far below a level: only a value at the edge of two can differ.
    assert difference.max() <= 1 and difference.mean() < 0.01
