"""What the GPU pipeline asks of a device: memory, copies, streams, events and captured graphs, by address.

Addresses are ints that may be offset. Work given to a stream runs in order and after the call returns.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from arcflow_runtime.gpu.kernels import NoiseShape, UpdateShape

#: Every region starts at a multiple of this, as TensorRT wants of its tensors.
ALIGNMENT = 256


class Memory(Protocol):
    """An allocation; `address` is a multiple of `ALIGNMENT`."""

    address: int
    nbytes: int

    def close(self) -> None:
        """Free it; the caller has seen to it that nothing uses it any more. Closing twice is allowed."""
        ...


class PinnedMemory(Memory, Protocol):
    """Page-locked memory of the host, of which copies are asynchronous."""

    @property
    def array(self) -> np.ndarray:
        """The memory as [nbytes] uint8."""
        ...


class Event(Protocol):
    """A point in a stream's work."""

    def wait(self) -> None:
        """Wait until the point is reached.

        Raises:
            EngineError: work before it failed.
        """
        ...

    def ms_since(self, earlier: Event) -> float:
        """Milliseconds on the device between two points that have been reached."""
        ...


class Graph(Protocol):
    """Captured work that is launched as one."""

    def launch(self) -> None:
        """Enqueue the work in the stream that it was captured from."""
        ...

    def close(self) -> None:
        """Free the graph. Closing twice is allowed."""
        ...


class Stream(Protocol):
    """A queue of work; used by one thread at a time."""

    handle: int

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Enqueue a copy between any two addresses, of the device or pinned."""
        ...

    def record(self, event: Event) -> None:
        """Enqueue an event; in a capture it becomes part of the graph and is reached at every launch."""
        ...

    def wait(self) -> None:
        """Wait until all work enqueued so far is done.

        Raises:
            EngineError: the work failed.
        """
        ...

    def begin_capture(self) -> None:
        """From now on, work is recorded instead of run.

        Raises:
            CaptureError: the stream cannot capture.
        """
        ...

    def end_capture(self) -> Graph:
        """Stop recording and make the graph.

        Raises:
            CaptureError: something enqueued cannot be captured; the stream works again as before.
        """
        ...

    def abort_capture(self) -> None:
        """Stop recording and forget what was recorded."""
        ...


class Kernels(Protocol):
    """The closed-form step (`update.py`) and the noise (`noise.py`) on a device; arguments as for `kernels.Kernels`."""

    def update(
        self,
        stream: Stream,
        shape: UpdateShape,
        means: int,
        logweights: int,
        loggammas: int,
        latents: int,
        next_latents: int,
        engine_input: int,
        sigmas: int,
        step: int,
    ) -> None:
        """Enqueue one step."""
        ...

    def noise(self, stream: Stream, shape: NoiseShape, streams: int, latents: int, engine_input: int) -> None:
        """Enqueue the noise of a batch."""
        ...


class Device(Protocol):
    """A GPU."""

    name: str

    def use(self) -> None:
        """Make the device the calling thread's; cheap enough to call before every use."""
        ...

    def allocate(self, nbytes: int) -> Memory:
        """Memory of the device.

        Raises:
            OutOfMemory: there is not as much.
        """
        ...

    def allocate_pinned(self, nbytes: int) -> PinnedMemory:
        """Page-locked memory of the host.

        Raises:
            OutOfMemory: there is not as much.
        """
        ...

    def free_bytes(self) -> int:
        """Memory of the device that is free."""
        ...

    def driver_version(self) -> str:
        """The driver's version, such as "13.0"."""
        ...

    def make_stream(self) -> Stream:
        """A new stream."""
        ...

    def make_event(self) -> Event:
        """A new event that measures time."""
        ...

    def kernels(self) -> Kernels:
        """The kernels.

        Raises:
            EngineError: there are none for this device.
        """
        ...


class OutOfMemory(Exception):
    """An allocation failed; whoever knows what it was for makes an `EngineError` of it."""


class CaptureError(Exception):
    """Work cannot be captured as a graph; the caller enqueues it plainly."""
