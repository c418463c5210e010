"""Lanes of the pipeline in one process, without HTTP, PNG or limits: what a service could reach at best.

`benchmarks/serve.py` starts it. The clients are threads of the same process, so they cost it some time too.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from serve_load import Load, Reply, prompt_of, send_all

from arcflow_runtime import Pipeline

MAX_BATCH = 8


class Lanes:
    """Threads that each take what waits, at most `MAX_BATCH` images and no more than their share."""

    def __init__(self, bundle: Path, lanes: int, threads: int | None, size_px: int, steps: int) -> None:
        self._pipeline = Pipeline.load(bundle, threads=threads)
        self._size_px, self._steps = size_px, steps
        self._waiting: deque[tuple[int, Future[Reply]]] = deque()
        self._changed, self._idle, self._closed = threading.Condition(), 0, False
        self._threads = [threading.Thread(target=self._run, name=f"lane-{i}") for i in range(lanes)]
        for thread in self._threads:
            thread.start()

    def send(self, number: int) -> Reply:
        """Wait for one image."""
        done: Future[Reply] = Future()
        with self._changed:
            self._waiting.append((number, done))
            self._changed.notify()
        return done.result()

    def close(self) -> None:
        """End the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._pipeline.close()

    def _run(self) -> None:
        while batch := self._take():
            try:
                self._generate(batch)
                reply = Reply(200, len(batch))
                for _, done in batch:
                    done.set_result(reply)
            except Exception as e:
                for _, done in batch:
                    done.set_exception(e)

    def _take(self) -> list[tuple[int, Future[Reply]]]:
        with self._changed:
            self._idle += 1
            self._changed.wait_for(lambda: self._waiting or self._closed)
            count = min(MAX_BATCH, -(-len(self._waiting) // self._idle))
            self._idle -= 1
            return [self._waiting.popleft() for _ in range(count)]

    def _generate(self, batch: list[tuple[int, Future[Reply]]]) -> None:
        self._pipeline(
            [prompt_of(number) for number, _ in batch],
            self._size_px,
            self._size_px,
            num_inference_steps=self._steps,
            seed=[number for number, _ in batch],
        )


def main() -> int:
    """Read which lanes to make, and then loads, each a line of JSON; answer each load with a line."""
    given: dict[str, Any] = json.loads(sys.stdin.readline())
    lanes = Lanes(Path(given["bundle"]), given["lanes"], given["threads"], given["size_px"], given["steps"])
    try:
        for line in sys.stdin:
            asked: dict[str, Any] = json.loads(line)
            sample = send_all(lanes.send, Load(**asked["load"]), range(*asked["numbers"]))
            results = [(ms, reply.status, reply.batch_size) for ms, reply in sample.results]
            print(json.dumps({"results": results, "seconds": sample.seconds}), flush=True)
    finally:
        lanes.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
