"""Time the stages of one request: named blocks -> milliseconds per name."""

from __future__ import annotations

import time


class Stopwatch:
    """Adds up the time of named blocks; one per request, not shared between threads."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    def __call__(self, stage: str) -> _Timed:
        """Add the time of the `with` block to `stage`, in milliseconds."""
        return _Timed(self, stage)

    def add(self, stage: str, ms: float) -> None:
        """Add milliseconds that were measured otherwise, such as on a device."""
        self.ms[stage] = self.ms.get(stage, 0.0) + ms


class _Timed:
    """One block. A generator as context manager takes three times as long, and a picture has a dozen blocks."""

    __slots__ = ("_stage", "_start", "_watch")

    def __init__(self, watch: Stopwatch, stage: str) -> None:
        self._watch, self._stage = watch, stage

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._watch.add(self._stage, (time.perf_counter() - self._start) * 1e3)
