"""The stream, lock and workspace shared by all engines of a pipeline on one GPU; the engines never run concurrently."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from arcflow_runtime.errors import EngineError
from arcflow_runtime.gpu.device import Device, Memory, OutOfMemory, PinnedMemory, Stream

_T = TypeVar("_T")


class OutOfDeviceMemory(EngineError, MemoryError):
    """Memory of the GPU, or page-locked memory for it, ran out; the message says what it was for if that is known."""


#: What to do about it.
SAVE_MEMORY = "load with memory='balanced' or 'low' (--memory), or generate fewer or smaller images at once"


class Lane:
    """One stream with a lock and a workspace. A thread holds the lane while it enqueues, not while it waits.

    The workspace holds the engines' activations and is as large as the largest context needs. Each time it is replaced,
    `generation` increases; a caller that sees a new generation passes the new workspace to its contexts.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.generation = 0
        #: Frees what can be made again, and returns False if there was nothing. The denoiser sets it.
        self.make_room: Callable[[], bool] = lambda: False
        self._stream: Stream | None = None
        self._workspace: Memory | None = None
        self._engines = 0
        self._lock = threading.RLock()

    @contextmanager
    def enter(self) -> Iterator[Stream]:
        """Take the lock and yield the stream. The lock is reentrant."""
        with self._lock:
            self.device.use()
            if self._stream is None:
                self._stream = self.device.make_stream()
            yield self._stream

    def free_bytes(self) -> int:
        """Free memory of the device in bytes."""
        with self.enter():
            return self.device.free_bytes()

    def add_engine(self) -> None:
        """Count an engine that was loaded."""
        with self._lock:
            self._engines += 1

    def remove_engine(self) -> None:
        """Count an engine that was freed. With the last one the workspace is freed too."""
        with self._lock:
            self._engines -= 1
            if self._engines == 0:
                self.release_workspace()

    def with_room(self, work: Callable[[], _T]) -> _T:
        """Call `work`, and if memory runs out, once more after `make_room`. The caller does not hold the lane."""
        try:
            return work()
        except OutOfDeviceMemory:
            if not self.make_room():
                raise
        # After the `except`, so that nothing keeps the objects of the first call.
        return work()

    def workspace(self, nbytes: int, what: str) -> Memory:
        """The workspace, replaced by a larger one if it has fewer than `nbytes`; the caller holds the lane.

        Args:
            nbytes: the smallest size.
            what: the part whose activations need it, for the message.

        Raises:
            OutOfDeviceMemory: there is not enough memory.
        """
        if self._workspace is None or self._workspace.nbytes < nbytes:
            self.release_workspace()
            self._workspace = self.allocate(nbytes, f"{what}: activations")
        return self._workspace

    def release_workspace(self) -> None:
        """Wait until the stream is idle, then free the workspace."""
        with self.enter():
            if self._workspace is not None:
                self.settle()
                self._workspace.close()
                self._workspace = None
                self.generation += 1

    def settle(self) -> None:
        """Wait until the stream is idle, so that memory can be freed.

        Errors are ignored: the caller that waits for the failed work gets them, and the memory is freed in any case.
        """
        with self.enter() as stream:
            for _ in range(2):  # a wait that failed may not have waited
                with suppress(EngineError):
                    stream.wait()
                    break

    def allocate(self, nbytes: int, what: str) -> Memory:
        """Allocate device memory.

        Raises:
            OutOfDeviceMemory: there is not enough; the message says `what` it is for, how much is needed and is free.
        """
        try:
            return self.device.allocate(nbytes)
        except OutOfMemory:
            raise OutOfDeviceMemory(out_of_memory(self.device, nbytes, what)) from None

    def allocate_pinned(self, nbytes: int, what: str) -> PinnedMemory:
        """Allocate page-locked host memory.

        Raises:
            OutOfDeviceMemory: there is not enough.
        """
        try:
            return self.device.allocate_pinned(nbytes)
        except OutOfMemory:
            raise OutOfDeviceMemory(
                f"{what}: {nbytes:,} bytes of page-locked host memory cannot be allocated; "
                "generate fewer or smaller images at once"
            ) from None


def out_of_memory(device: Device, nbytes: int, what: str) -> str:
    """The error message for a failed allocation of `nbytes` bytes for `what`."""
    return f"{what} need {nbytes:,} bytes of {device.name}'s memory, {device.free_bytes():,} are free; {SAVE_MEMORY}"
