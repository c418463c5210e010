"""The service's metrics in Prometheus' format, named after those of vLLM where it has the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)
_STAGE_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, *_SECONDS)
_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 32)
#: About what eight images bring.
_MAX_NOTED = 128


class Metrics:
    """Counters and gauges of requests, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._noted: deque[tuple[Counter | Histogram, float, tuple[str, ...]]] = deque()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        self.requests = counter("arcflow_requests", "Requests for images that were answered.", "status")
        self.left = counter("arcflow_requests_left", "Requests whose client left before the answer.")
        self.images = counter("arcflow_images", "Images that were generated.", "model")
        self.e2e = self._histogram("arcflow_e2e_latency_seconds", "From a request's arrival to its answer.", _SECONDS)
        self.queue = self._histogram("arcflow_queue_seconds", "From a request's arrival to its start.", _SECONDS)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge that is read when the metrics are asked for, so that it cannot fall behind."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def note(self, metric: Counter | Histogram, value: float, *labels: str) -> None:
        """Add `value` to a metric, at the latest when the metrics are asked for.

        Prometheus' client takes several microseconds for each, and ten times that after an engine has filled the
        processor's caches. So the values of several requests are added together, and few requests wait for that.
        """
        self._noted.append((metric, value, labels))
        if len(self._noted) >= _MAX_NOTED:
            self._add_noted()

    def _add_noted(self) -> None:
        while self._noted:
            try:
                metric, value, labels = self._noted.popleft()
            except IndexError:  # another thread was quicker
                return
            one = metric.labels(*labels) if labels else metric
            if isinstance(one, Counter):
                one.inc(value)
            else:
                one.observe(value)

    def render(self) -> bytes:
        """Everything, as text."""
        self._add_noted()
        return generate_latest(self.registry)


class LaneMetrics(Metrics):
    """Those, and what the lanes of this process do."""

    def __init__(self) -> None:
        super().__init__()
        self.batch = self._histogram("arcflow_batch_size", "Images generated together.", _BATCHES)
        self.stage = self._histogram("arcflow_stage_seconds", "Time of one stage for a batch.", _STAGE_SECONDS, "stage")
