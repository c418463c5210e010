"""Python binding of host_cuda.h: the controls of the driver made of host memory that this process loaded."""

from __future__ import annotations

import ctypes
import enum
import traceback
from collections.abc import Callable

from tests.host_cuda.build import NAME


class Code(enum.IntEnum):
    """The errors that tests inject; the names are those of cuda.h without CUDA_ERROR_."""

    OUT_OF_MEMORY = 2
    UNKNOWN = 999
    LAUNCH_FAILED = 719
    LAUNCH_OUT_OF_RESOURCES = 701
    STREAM_CAPTURE_UNSUPPORTED = 900
    STREAM_CAPTURE_INVALIDATED = 901


class When(enum.IntFlag):
    """See `host_cuda_when` in host_cuda.h."""

    ALWAYS = 0
    IN_CAPTURE = 1
    LOST = 2


class Live(enum.IntEnum):
    """See `host_cuda_kind` in host_cuda.h."""

    DEVICE_BYTES = 0
    PINNED_BYTES = 1
    STREAMS = 2
    EVENTS = 3
    GRAPHS = 4
    EXECUTABLES = 5
    MODULES = 6
    PENDING = 7


_Work = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)


class Driver:
    """The controls of this process's `libcuda.so.1`."""

    def __init__(self) -> None:
        """Load `libcuda.so.1`.

        Raises:
            OSError: it is missing, or it is not the driver made of host memory.
        """
        self._library = ctypes.CDLL(NAME)
        if not hasattr(self._library, "host_cuda_reset"):
            raise OSError(
                f"{NAME} must be the driver made of host memory; set LD_LIBRARY_PATH to the folder that build.py wrote"
            )
        self._library.host_cuda_calls.restype = ctypes.c_long
        self._library.host_cuda_live.restype = ctypes.c_size_t
        self._library.host_cuda_at.restype = ctypes.c_void_p
        for name in ("host_cuda_log", "host_cuda_fault"):
            getattr(self._library, name).restype = ctypes.c_char_p

    def reset(self) -> None:
        """See `host_cuda_reset`."""
        self._library.host_cuda_reset()

    def set_memory(self, nbytes: int) -> None:
        """See `host_cuda_set_memory`."""
        self._library.host_cuda_set_memory(ctypes.c_size_t(nbytes))

    def fail(self, function: str, nth: int, error: Code, when: When = When.ALWAYS) -> None:
        """See `host_cuda_fail`."""
        self._library.host_cuda_fail(function.encode(), ctypes.c_long(nth), int(error), int(when))

    def pending_failures(self) -> int:
        """See `host_cuda_failures_pending`."""
        return int(self._library.host_cuda_failures_pending())

    def calls(self, function: str) -> int:
        """See `host_cuda_calls`."""
        return int(self._library.host_cuda_calls(function.encode()))

    def log(self) -> list[str]:
        """See `host_cuda_log`."""
        return self._library.host_cuda_log().decode().split()

    def fault(self) -> str:
        """See `host_cuda_fault`."""
        return self._library.host_cuda_fault().decode()

    def live(self, kind: Live) -> int:
        """See `host_cuda_live`."""
        return int(self._library.host_cuda_live(int(kind)))

    def at(self, address: int, nbytes: int) -> int | None:
        """See `host_cuda_at`."""
        return self._library.host_cuda_at(ctypes.c_uint64(address), ctypes.c_size_t(nbytes))

    def enqueue(self, stream: int, work: Callable[[], None], kept: list[object]) -> int:
        """Enqueue `work` in a stream; see `host_cuda_enqueue`. An exception in it is printed, and loses the context.

        Args:
            stream: the stream's handle.
            work: called each time that the stream or a captured graph runs it.
            kept: receives an object that must live as long as `work` may be called.

        Returns:
            The `CUresult` of the call.
        """

        def run(_: int) -> int:
            try:
                work()
            except Exception:
                traceback.print_exc()
                return 1
            return 0

        function = _Work(run)
        kept.append(function)
        return int(self._library.host_cuda_enqueue(ctypes.c_void_p(stream), function, None))
