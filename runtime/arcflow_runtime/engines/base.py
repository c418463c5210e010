"""Interfaces of engines and backends. An engine runs one part of a bundle: named arrays in -> named arrays out.

Implemented by `onnxruntime.py` and `openvino.py` here, and by the `*_backend.py` modules in `gpu/`; used through
`parts.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.engines.modes import EngineBytes, MemoryRules


class Engine(Protocol):
    """One loaded part of a bundle, ready to run; safe to call from several threads."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph.

        Args:
            inputs: one array per input in the part's manifest entry, of its dtype and shape; `maths/dtypes.py` says
                how bfloat16 is stored. Inputs of LoRA slots may be left out: those layers run without a LoRA.

        Returns:
            One array per output in the part's manifest entry.

        Raises:
            EngineError: the engine failed; the message names the part.
        """
        ...

    def close(self) -> None:
        """Free the engine's memory. Calling it twice is allowed; running afterwards is an error."""
        ...


@runtime_checkable
class StreamedEngine(Protocol):
    """An engine that does not keep all its weights in memory, and reads them once per call of `run_all`."""

    def run_all(self, batches: Sequence[Mapping[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
        """Run the graph on several sets of inputs and yield the outputs of each in order; see `Engine.run`."""
        ...


@runtime_checkable
class UnloadableEngine(Engine, Protocol):
    """An engine whose weights can leave the device and come back, while its compiled kernels stay."""

    def unload_weights(self) -> bool:
        """Free the memory of the weights; False if this engine cannot. Running needs `load_weights` first."""
        ...

    def load_weights(self) -> None:
        """Load the weights again.

        Raises:
            EngineError: they cannot be loaded, for example because memory ran out.
        """
        ...


class Backend(Protocol):
    """Loads parts of bundles as engines of one library, such as ONNX Runtime."""

    def check(self, bundle: Bundle) -> None:
        """Raise `EngineError` if this backend cannot run `bundle`; called before any part is loaded."""
        ...

    def open(self, bundle: Bundle, part: str) -> Engine:
        """Load the part named `part`."""
        ...


@runtime_checkable
class UnloadingBackend(Protocol):
    """A backend that can load parts so that their weights can be unloaded; see `UnloadableEngine`."""

    def open_unloadable(self, bundle: Bundle, part: str) -> Engine:
        """Load the part named `part`. An engine for which this is impossible is loaded as by `Backend.open`."""
        ...


@runtime_checkable
class MeasuredBackend(Protocol):
    """A backend that knows the memory of its device."""

    memory_rules: MemoryRules

    def free_bytes(self) -> int | None:
        """Free bytes of the memory that parts are loaded into; None if that is unknown."""
        ...

    def built_bytes(self, bundle: Bundle, part: str) -> EngineBytes | None:
        """What the part's built engine takes; None if the backend runs the part's graph without one."""
        ...


@dataclass(frozen=True)
class LayerTime:
    """The time of one layer in one run.

    `operator` is "" if unknown. `start_us` counts from an arbitrary origin, the same for all layers of an engine.
    """

    layer: str
    operator: str
    start_us: float
    duration_us: float


class ProfiledEngine(Engine, Protocol):
    """An engine that times its layers."""

    def layer_times(self) -> list[LayerTime]:
        """The layers of every run so far, in order. The engine cannot run afterwards."""
        ...


@runtime_checkable
class ProfilingBackend(Protocol):
    """A backend that can time layers."""

    def open_profiled(self, bundle: Bundle, part: str) -> ProfiledEngine:
        """Load the part named `part` with layer timing, which may slow it down."""
        ...
