"""The interface of an engine on a device: it runs a part on device addresses of its inputs and outputs.

Implemented by `tensorrt.py` and `onnxruntime.py`; used by `plan.py` and `host.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from arcflow_runtime.engines.base import LayerTime
from arcflow_runtime.gpu.device import Stream

#: Name of an input or output -> its shape.
Shapes = Mapping[str, tuple[int, ...]]


class Context(Protocol):
    """An execution context: a loaded part prepared for inputs of fixed shapes; used by one thread at a time.

    `workspace_bytes` is how much memory `set_workspace` must be given before the first run.
    """

    workspace_bytes: int

    def set_workspace(self, address: int, nbytes: int) -> None:
        """Use this memory for activations. Contexts that never run at the same time may share it."""
        ...

    def enqueue(self, addresses: Mapping[str, int], stream: Stream) -> None:
        """Enqueue one run.

        Args:
            addresses: the device address of every input and output, each a multiple of `device.ALIGNMENT`.
            stream: where to enqueue it.

        Raises:
            EngineError: the run failed; the message names the part.
        """
        ...

    def obstacle(self, stream: Stream) -> str | None:
        """The reason why runs in `stream` cannot be captured in a graph, or None. Valid after the first run."""
        ...

    def close(self) -> None:
        """Free the context; everything enqueued must have finished. Closing twice is allowed."""
        ...


class DeviceEngine(Protocol):
    """A part of a bundle loaded on a device. Any thread may make contexts, one thread at a time."""

    def context(self, inputs: Shapes, stream: Stream) -> Context:
        """Make a context for inputs of these shapes.

        Raises:
            EngineError: the engine does not accept these shapes, or memory ran out.
        """
        ...

    def close(self) -> None:
        """Free the part, whose contexts must be closed. Closing twice is allowed."""
        ...


@runtime_checkable
class TimesLayers(Protocol):
    """An engine that was loaded with layer timing."""

    def layer_times(self) -> list[LayerTime]:
        """The layers of every run so far, in order."""
        ...


@runtime_checkable
class UnloadsWeights(Protocol):
    """An engine whose weights can be freed and loaded again while its contexts stay valid."""

    def unload_weights(self) -> bool:
        """Free the weights; False if this engine cannot. Everything enqueued must have finished."""
        ...

    def load_weights(self) -> None:
        """Load the weights again.

        Raises:
            EngineError: they cannot be loaded.
        """
        ...
