"""Measure the stages of one request: `with watch("backbone"): ...` -> milliseconds by stage."""

from __future__ import annotations

import time


class Stopwatch:
    """Adds up the time of named blocks, in `ms`. Each request has its own; it is not thread-safe."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    def __call__(self, stage: str) -> _Timed:
        """A context manager that adds the time of its block to `stage`."""
        return _Timed(self, stage)

    def add(self, stage: str, ms: float) -> None:
        """Add milliseconds that were measured elsewhere, such as on a GPU."""
        self.ms[stage] = self.ms.get(stage, 0.0) + ms


class _Timed:
    """One timed block. A class, because `contextlib.contextmanager` takes three times as long per block."""

    __slots__ = ("_stage", "_start", "_watch")

    def __init__(self, watch: Stopwatch, stage: str) -> None:
        self._watch, self._stage = watch, stage

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._watch.add(self._stage, (time.perf_counter() - self._start) * 1e3)
