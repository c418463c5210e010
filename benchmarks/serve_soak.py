"""Send as many requests to `arcflow serve` as it answers in an hour, and check that nothing is left of them.

    python benchmarks/serve_soak.py BUNDLE --json benchmarks/results/serve_soak.json

The count, not the time, ends it: 360,000 requests are an hour at 100 images per second, which the shapes student
reaches on two cores. Prompts, sizes, seeds and numbers of images vary; some requests are streams, some are wrong, and
some clients leave early. Memory, threads and open files of the service are read after every --every requests. The exit
code is 1 if one of them has grown, if an answer is wrong, or if the service's counters differ from what was sent.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from machine import describe
from tqdm import tqdm

HOUR = 360_000
CLIENTS = 8
#: Requests of each size before the count, and the images of each. Those of all clients but one fit in the queue.
WARM_UP, MAX_N = 40, 8
SIZES = ("64x64", "32x48", "16x16")
WORDS = ("red", "blue", "green", "purple", "circle", "star", "heart", "cross", "large", "small")
PATH = "/v1/images/generations"
#: Of the median of the second quarter, when caches and the allocator's arenas are full.
MOST_GROWTH = 0.05
TIMEOUT_S, STOP_S = 120, 60


@dataclass
class Soak:
    """The clients of one service, and what they saw."""

    host: str
    pid: int
    statuses: Counter[int] = field(default_factory=Counter)
    left: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)

    def run(self, requests: int, every: int) -> None:
        """Send all requests, and add a row after every `every`, when no request is open."""
        numbers = itertools.count()
        with tqdm(total=requests, desc="requests", disable=None) as progress, ThreadPoolExecutor(CLIENTS) as pool:
            for start in range(0, requests, every):
                end = min(start + every, requests)
                for done in pool.map(self._send, itertools.islice(numbers, end - start)):
                    if done is None:
                        self.left += 1
                    else:
                        self.statuses[done] += 1
                    progress.update()
                self.rows.append({"requests": float(end)} | self._state())

    def warm_up(self) -> int:
        """Let every lane meet the largest batches of each size, whose memory it keeps; the number of requests."""
        bodies = [{"prompt": WORDS[0], "size": size, "n": MAX_N} for size in SIZES for _ in range(WARM_UP)]
        with ThreadPoolExecutor(CLIENTS - 1) as pool:
            for status, text in pool.map(self._post, bodies):
                if status != 200:
                    raise ValueError(f"a request before the count must get its images, got {status}: {text[:300]!r}")
        return len(bodies)

    def _ask(self, body: dict[str, Any]) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self.host, timeout=TIMEOUT_S)
        connection.request("POST", PATH, json.dumps(body), {"content-type": "application/json"})
        return connection

    def _post(self, body: dict[str, Any]) -> tuple[int, bytes]:
        with closing(self._ask(body)) as connection:
            response = connection.getresponse()
            return response.status, response.read()

    def _send(self, number: int) -> int | None:
        """One request; its status, or None if the client left.

        Raises:
            ValueError: the status or the answer is not what the request must get.
        """
        chosen = random.Random(number)
        kind = chosen.choices(("image", "stream", "wrong", "leave"), (85, 5, 5, 5))[0]
        n = chosen.choice((1, 1, 1, 2, 3))
        body: dict[str, Any] = {"prompt": " ".join(chosen.sample(WORDS, 3)), "size": chosen.choice(SIZES), "n": n}
        body["seed"] = number
        if kind == "wrong":
            body |= chosen.choice(({"size": "17x16"}, {"n": 0}, {"model": "none"}, {"width": 3}, {"prompt": 5}))
        elif kind == "stream":
            body |= {"stream": True, "partial_images": 1}
        if kind == "leave":
            with closing(self._ask(body)):
                time.sleep(chosen.random() * 0.02)
            return None
        status, text = self._post(body)
        if kind == "wrong":
            well = status in (400, 404) and bool(json.loads(text)["error"]["message"])
        elif kind == "stream":
            well = status == 200 and text.count(b"event: image_generation.completed") == n
        else:
            well = status == 200 and [x["seed"] for x in json.loads(text)["data"]] == [number + i for i in range(n)]
        if not well:
            raise ValueError(f"request {number}, {kind}, must get its answer, got {status}: {text[:300]!r}")
        return status

    def _state(self) -> dict[str, float]:
        """The service's memory, threads, files and gauges, once it has noticed the clients that left."""
        until = time.monotonic() + 30
        while (found := self.metrics()).get("arcflow_requests_running", 0) + found.get("arcflow_requests_waiting", 0):
            if time.monotonic() > until:
                raise ValueError("no request must be open 30 s after every client is done; see the service's log")
            time.sleep(0.05)
        status = Path(f"/proc/{self.pid}/status").read_text()
        (kib,) = re.findall(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
        (threads,) = re.findall(r"^Threads:\s+(\d+)$", status, re.MULTILINE)
        # The fewest of several reads: the service may be about to close the connection that asked for its metrics.
        files = min(self._open_files() for _ in range(5))
        return {"resident_bytes": int(kib) << 10, "threads": int(threads), "files": files, "time_s": time.monotonic()}

    def _open_files(self) -> int:
        time.sleep(0.02)
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def metrics(self) -> dict[str, float]:
        """The service's samples without labels, and the sums over the labels of the others."""
        connection = http.client.HTTPConnection(self.host, timeout=TIMEOUT_S)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        found: dict[str, float] = {}
        for name, value in re.findall(r"^(\w+)(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE):
            found[name] = found.get(name, 0.0) + float(value)
        return found


def growths(rows: list[dict[str, float]]) -> dict[str, float]:
    """The last quarter's median over the second quarter's, minus 1, of memory, threads and files."""
    quarter = max(1, len(rows) // 4)
    found = {}
    for name in ("resident_bytes", "threads", "files"):
        values = [row[name] for row in rows]
        early, late = (statistics.median(x) for x in (values[quarter : 2 * quarter] or values[:1], values[-quarter:]))
        found[name] = late / early - 1
    return found


def main() -> int:
    """Run, print the growth, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=HOUR, help="(default: %(default)s)")
    parser.add_argument("--every", type=int, default=2000, help="requests between two rows (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    command = [sys.executable, "-m", "arcflow_runtime.cli", "serve", str(args.bundle), "--port", "0"]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            soak = Soak(urlsplit(url).netloc, process.pid)
            before = soak.warm_up()
            soak.run(args.requests, args.every)
            metrics = soak.metrics()
        finally:
            process.terminate()
            code = process.wait(STOP_S)
    found = growths(soak.rows)
    counted = int(metrics["arcflow_requests_total"]) - before
    for name, growth in found.items():
        print(f"{name}: {soak.rows[0][name]:g} at first, {soak.rows[-1][name]:g} at last, {growth:+.2%}")
    print(f"{counted} answers counted, {soak.left} clients left, exit code {code}")
    if args.json:
        results = {"rows": soak.rows, "growth": found, "left": soak.left, "exit_code": code}
        results |= {"statuses": {str(k): n for k, n in sorted(soak.statuses.items())}}
        results |= {"seconds": time.perf_counter() - started}
        data = {"command": " ".join(sys.argv), "machine": describe(), "results": results}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(data, indent=2) + "\n")
    # A client that leaves is counted once, by the status of its answer or as one that left.
    well = counted == args.requests and not code and metrics["arcflow_lanes_lost"] == 0
    return int(not well or any(growth > MOST_GROWTH for growth in found.values()))


if __name__ == "__main__":
    sys.exit(main())
