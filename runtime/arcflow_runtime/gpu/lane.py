"""One stream, one lock and one workspace for all engines of a pipeline, which never run at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from arcflow_runtime.errors import EngineError
from arcflow_runtime.gpu.device import Device, Memory, OutOfMemory, PinnedMemory, Stream


class OutOfDeviceMemory(EngineError):
    """An allocation on the device failed; the message names what it was for."""


class Lane:
    """Who enqueues holds the lane; waiting for the device needs no lane.

    Engines' activations lie in one workspace, as large as the largest context wants. When it grows, `generation`
    does too, and whoever gave the old one to a context gives it the new one.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.generation = 0
        self._stream: Stream | None = None
        self._workspace: Memory | None = None
        self._lock = threading.RLock()

    @contextmanager
    def enter(self) -> Iterator[Stream]:
        """Give the stream to this thread; it may enter again while it holds it."""
        with self._lock:
            self.device.use()
            if self._stream is None:
                self._stream = self.device.make_stream()
            yield self._stream

    def workspace(self, nbytes: int, what: str) -> Memory:
        """The workspace, grown to `nbytes` if it is smaller; the caller holds the lane.

        Raises:
            OutOfDeviceMemory: it cannot grow; `what` names whose activations these are.
        """
        if self._workspace is None or self._workspace.nbytes < nbytes:
            self.release_workspace()
            self._workspace = self.allocate(nbytes, f"{what}: activations")
        return self._workspace

    def release_workspace(self) -> None:
        """Free the workspace once the stream is idle."""
        with self.enter():
            if self._workspace is not None:
                self.settle()
                self._workspace.close()
                self._workspace = None
                self.generation += 1

    def settle(self) -> None:
        """Wait until all that was enqueued is done, before something is freed.

        An error does not keep anything from being freed: whoever waited for the work was told, or the next one will be.
        """
        with self.enter() as stream, suppress(EngineError):
            stream.wait()

    def allocate(self, nbytes: int, what: str) -> Memory:
        """Memory of the device.

        Raises:
            OutOfDeviceMemory: names `what` the memory was for, what was asked and what is free.
        """
        try:
            return self.device.allocate(nbytes)
        except OutOfMemory:
            raise OutOfDeviceMemory(out_of_memory(self.device, nbytes, what)) from None

    def allocate_pinned(self, nbytes: int, what: str) -> PinnedMemory:
        """Page-locked memory of the host.

        Raises:
            OutOfDeviceMemory: the host does not give as much.
        """
        try:
            return self.device.allocate_pinned(nbytes)
        except OutOfMemory:
            raise OutOfDeviceMemory(
                f"{what}: the host gives no {nbytes:,} bytes of page-locked memory; draw fewer or smaller pictures"
            ) from None


def out_of_memory(device: Device, nbytes: int, what: str) -> str:
    """What to say when the device has no `nbytes` for `what`."""
    return (
        f"{what} need {nbytes:,} bytes of {device.name}'s memory, {device.free_bytes():,} are free; "
        "load with low_memory=True (--low-memory), or draw fewer or smaller pictures at once"
    )
