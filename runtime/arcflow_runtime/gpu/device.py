"""The interface between the GPU pipeline and CUDA: memory, copies, streams, events, captured graphs, kernels.

`cuda.py` implements it. Addresses are ints to which byte offsets may be added. Work enqueued in a stream runs in order;
a call may return before its work has run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

    from arcflow_runtime.gpu.kernels import EulerShape, NoiseShape, UpdateShape

#: Every region starts at a multiple of this many bytes, as TensorRT requires of its tensors.
ALIGNMENT = 256


class Memory(Protocol):
    """An allocation; `address` is a multiple of `ALIGNMENT`."""

    address: int
    nbytes: int

    def close(self) -> None:
        """Free the memory, which nothing may still use. Closing twice is allowed."""
        ...


class PinnedMemory(Memory, Protocol):
    """Page-locked host memory, which the GPU can copy from and to asynchronously."""

    @property
    def array(self) -> np.ndarray:
        """The memory as [nbytes] uint8."""
        ...


class Event(Protocol):
    """A point in a stream's sequence of work."""

    def wait(self) -> None:
        """Wait until the stream has reached this point.

        Raises:
            EngineError: work before it failed.
        """
        ...

    def ms_since(self, earlier: Event) -> float:
        """Milliseconds on the device between `earlier` and this event; both must have been reached."""
        ...


class Graph(Protocol):
    """Captured work, launched with one call."""

    def launch(self) -> None:
        """Enqueue all the work in the stream that it was captured from."""
        ...

    def close(self) -> None:
        """Free the graph. Closing twice is allowed."""
        ...


class Stream(Protocol):
    """A queue of work; used by one thread at a time."""

    handle: int

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Enqueue a copy between two addresses, each on the device or in pinned memory."""
        ...

    def record(self, event: Event) -> None:
        """Enqueue an event. In a capture it becomes part of the graph and is recorded at every launch."""
        ...

    def wait(self) -> None:
        """Wait until all work enqueued so far is done.

        Raises:
            EngineError: the work failed.
        """
        ...

    def begin_capture(self) -> None:
        """Start to record work instead of running it.

        Raises:
            CaptureError: the stream cannot capture.
        """
        ...

    def end_capture(self) -> Graph:
        """Stop recording and return the graph.

        Raises:
            CaptureError: some of the work cannot be captured; the stream is usable again.
        """
        ...

    def abort_capture(self) -> None:
        """Stop recording and discard what was recorded."""
        ...


class KernelLauncher(Protocol):
    """The steps (`maths/update.py`, `maths/euler.py`) and the noise (`maths/noise.py`) as kernels on a device.

    `kernels.CudaKernels` documents the arguments.
    """

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
        """Enqueue one closed-form update."""
        ...

    def euler(
        self,
        stream: Stream,
        shape: EulerShape,
        velocity: int,
        negative: int,
        latents: int,
        next_latents: int,
        engine_input: int,
        sigmas: int,
        scale: int,
        step: int,
    ) -> None:
        """Enqueue one step of a straight student."""
        ...

    def noise(self, stream: Stream, shape: NoiseShape, streams: int, latents: int, engine_input: int) -> None:
        """Enqueue the noise of a batch."""
        ...


class Device(Protocol):
    """A GPU."""

    name: str

    def use(self) -> None:
        """Make this the current device of the calling thread. It is cheap, and called before every use."""
        ...

    def allocate(self, nbytes: int) -> Memory:
        """Allocate device memory.

        Raises:
            OutOfMemory: there is not enough.
        """
        ...

    def allocate_pinned(self, nbytes: int) -> PinnedMemory:
        """Allocate page-locked host memory.

        Raises:
            OutOfMemory: there is not enough.
        """
        ...

    def free_bytes(self) -> int:
        """Free device memory in bytes."""
        ...

    def driver_version(self) -> str:
        """The CUDA driver's version, such as "13.0"."""
        ...

    def make_stream(self) -> Stream:
        """Create a stream."""
        ...

    def make_event(self) -> Event:
        """Create an event that measures time."""
        ...

    def kernels(self) -> KernelLauncher:
        """Load the kernels.

        Raises:
            EngineError: they cannot be loaded or compiled for this device.
        """
        ...


class OutOfMemory(Exception):
    """An allocation failed. The caller, which knows its purpose, turns this into an `EngineError`."""


class CaptureError(Exception):
    """Work cannot be captured as a graph. The caller enqueues it without one."""
