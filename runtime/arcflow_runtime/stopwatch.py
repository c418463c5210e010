"""Time the stages of one request: named blocks -> milliseconds per name."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up the time of named blocks; one per request, not shared between threads."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time of the `with` block to `stage`, in milliseconds."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, (time.perf_counter() - start) * 1e3)

    def add(self, stage: str, ms: float) -> None:
        """Add milliseconds that were measured otherwise, such as on a device."""
        self.ms[stage] = self.ms.get(stage, 0.0) + ms
