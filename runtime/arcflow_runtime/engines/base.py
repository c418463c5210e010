"""The interface of what runs one part of a bundle: named arrays in -> named arrays out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from arcflow_runtime.disk.bundle import Bundle


class Engine(Protocol):
    """One loaded part of a bundle, ready to run; safe to call from several threads."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph.

        Args:
            inputs: one array per input of the part's manifest entry, of its dtype and shape; bfloat16 as in `dtypes`.

        Returns:
            One array per output of the part's manifest entry.

        Raises:
            EngineError: the engine failed; the message names the part.
        """
        ...

    def close(self) -> None:
        """Free the engine's memory. Calling it twice is allowed; running afterwards is an error."""
        ...


@runtime_checkable
class StreamedEngine(Protocol):
    """An engine whose weights are not all in memory: it reads them once for any number of inputs."""

    def run_all(self, batches: Sequence[Mapping[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
        """Run the graph on several sets of inputs; give each one's outputs in turn. See `Engine.run`."""
        ...


class Backend(Protocol):
    """Opens parts of bundles as engines."""

    def check(self, bundle: Bundle) -> None:
        """Raise `EngineError` if this backend cannot run `bundle`, before anything is loaded."""
        ...

    def open(self, bundle: Bundle, part: str) -> Engine:
        """Load part `part` of `bundle`."""
        ...


@dataclass(frozen=True)
class LayerTime:
    """One layer of one run: `operator` is "" where unknown; `start_us` counts from any point common to the engine."""

    layer: str
    operator: str
    start_us: float
    duration_us: float


class ProfiledEngine(Engine, Protocol):
    """An engine that times its layers."""

    def layer_times(self) -> list[LayerTime]:
        """The layers of every run so far, in order; it cannot run afterwards."""
        ...


@runtime_checkable
class ProfilingBackend(Protocol):
    """A backend that can time layers."""

    def open_profiled(self, bundle: Bundle, part: str) -> ProfiledEngine:
        """Load `part` so that it times its layers; it may run slower."""
        ...
