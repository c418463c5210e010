"""The interface between the GPU pipeline and what runs a part on a device: addresses of inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from arcflow_runtime.engines.base import LayerTime
from arcflow_runtime.gpu.device import Stream

#: An input's or output's name -> its shape.
Shapes = Mapping[str, tuple[int, ...]]


class Context(Protocol):
    """A loaded part made ready for inputs of fixed shapes; used by one thread at a time.

    `workspace_bytes` is what `set_workspace` wants before the first run.
    """

    workspace_bytes: int

    def set_workspace(self, address: int, nbytes: int) -> None:
        """Use this memory for activations; contexts that never run at the same time share it."""
        ...

    def enqueue(self, addresses: Mapping[str, int], stream: Stream) -> None:
        """Enqueue one run. `addresses` has every input and output, each a multiple of `device.ALIGNMENT`.

        Raises:
            EngineError: the engine refuses; the message names the part.
        """
        ...

    def obstacle(self, stream: Stream) -> str | None:
        """Why runs in `stream` cannot be captured in a graph, after the first run; None where they can."""
        ...

    def close(self) -> None:
        """Free it; nothing enqueued may be unfinished. Closing twice is allowed."""
        ...


class DeviceEngine(Protocol):
    """A part of a bundle loaded on a device. It is safe to make contexts from several threads, one at a time."""

    def context(self, inputs: Shapes, stream: Stream) -> Context:
        """Make the part ready for inputs of these shapes.

        Raises:
            EngineError: the engine does not take them, or memory ran out.
        """
        ...

    def close(self) -> None:
        """Free the part; its contexts are closed before. Closing twice is allowed."""
        ...


@runtime_checkable
class TimesLayers(Protocol):
    """An engine that was loaded so that it times its layers."""

    def layer_times(self) -> list[LayerTime]:
        """The layers of every run so far, in order."""
        ...
