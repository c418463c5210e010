"""`device.py` with cuda-python: memory, copies, streams, events and graphs of one GPU.

`cuda.core` does it, and the driver's own functions from `cuda.bindings` where things go by address or need a flag.

Written for cuda-core 1.2 and cuda-bindings 13. Device memory comes from `cuMemAlloc` and not from a pool: what is freed
is at once free for the engines' libraries too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from arcflow_runtime.errors import EngineError
from arcflow_runtime.gpu.device import (
    CaptureError,
    Device,
    Event,
    Graph,
    Kernels,
    Memory,
    OutOfMemory,
    PinnedMemory,
    Stream,
)
from arcflow_runtime.gpu.kernels import load_kernels
from arcflow_runtime.installing import install_command


def open_device() -> Device:
    """The first GPU that `CUDA_VISIBLE_DEVICES` leaves.

    Raises:
        EngineError: cuda-python is not installed, or there is no driver or no GPU.
    """
    try:
        import cuda.core
    except ImportError as e:
        command = install_command("arcflow_runtime", "cuda")
        raise EngineError(f"running on a GPU needs cuda-core; run: {command} ({e})") from None
    try:
        device = cuda.core.Device(0)
        device.set_current()
    except Exception as e:  # the loader's and cuda.core's errors share no public base
        raise EngineError(
            f"the CUDA driver finds no GPU here ({_first_line(e)}); check that nvidia-smi lists one"
        ) from None
    return CudaDevice(device)


class CudaDevice:
    """A `cuda.core.Device`; see `device.Device`."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self.name: str = device.name

    def use(self) -> None:
        """See `Device.use`."""
        from cuda.core import Device

        with _as_engine_error():
            Device(self._device.device_id).set_current()  # these objects belong to a thread each

    def allocate(self, nbytes: int) -> Memory:
        """See `Device.allocate`."""
        from cuda.bindings import driver

        error, address = driver.cuMemAlloc(nbytes)
        if error == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise OutOfMemory(error.name)
        return _Memory(int(_call((error, address))), nbytes)

    def allocate_pinned(self, nbytes: int) -> PinnedMemory:
        """See `Device.allocate_pinned`."""
        from cuda.core import LegacyPinnedMemoryResource

        try:
            return _Pinned(LegacyPinnedMemoryResource().allocate(nbytes))
        except Exception as e:
            raise OutOfMemory(_first_line(e)) from None

    def free_bytes(self) -> int:
        """See `Device.free_bytes`."""
        from cuda.bindings import driver

        free, _ = _call(driver.cuMemGetInfo())
        return int(free)

    def driver_version(self) -> str:
        """See `Device.driver_version`."""
        from cuda.bindings import driver

        version = int(_call(driver.cuDriverGetVersion()))
        return f"{version // 1000}.{version % 1000 // 10}"

    def make_stream(self) -> Stream:
        """See `Device.make_stream`."""
        with _as_engine_error():
            return _Stream(self._device.create_stream())

    def make_event(self) -> Event:
        """See `Device.make_event`."""
        from cuda.core import EventOptions

        # A thread that waits leaves its core to others.
        with _as_engine_error():
            return _Event(self._device.create_event(EventOptions(timing_enabled=True, blocking_sync=True)))

    def kernels(self) -> Kernels:
        """See `Device.kernels`."""
        return load_kernels(self._device)


class _Memory:
    def __init__(self, address: int, nbytes: int) -> None:
        self.address, self.nbytes = address, nbytes

    def close(self) -> None:
        from cuda.bindings import driver

        if self.address:
            driver.cuMemFree(self.address)  # fails only where the driver has given up this process's memory as a whole
            self.address = 0


class _Pinned:
    def __init__(self, buffer: Any) -> None:
        self._buffer = buffer
        self.address, self.nbytes = int(buffer.handle), int(buffer.size)
        self._array = np.ctypeslib.as_array((ctypes.c_uint8 * self.nbytes).from_address(self.address))

    @property
    def array(self) -> np.ndarray:
        return self._array

    def close(self) -> None:
        with suppress(Exception):  # as for `_Memory`
            self._buffer.close()


class _Event:
    def __init__(self, event: Any) -> None:
        self.event = event

    def wait(self) -> None:
        with _as_engine_error():
            self.event.sync()

    def ms_since(self, earlier: Event) -> float:
        assert isinstance(earlier, _Event)
        with _as_engine_error():
            return float(self.event - earlier.event)


class _Graph:
    def __init__(self, executable: Any, stream: int) -> None:
        self._executable, self._stream = executable, stream

    def launch(self) -> None:
        from cuda.bindings import driver

        _call(driver.cuGraphLaunch(self._executable, self._stream))

    def close(self) -> None:
        from cuda.bindings import driver

        if self._executable is not None:
            driver.cuGraphExecDestroy(self._executable)
            self._executable = None


class _Stream:
    def __init__(self, stream: Any) -> None:
        self.core = stream  # which `kernels.Kernels` launches into
        self._capturing = False
        self.handle = int(stream.handle)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        from cuda.bindings import driver

        if nbytes:
            _call(driver.cuMemcpyAsync(target, source, nbytes, self.handle))

    def record(self, event: Event) -> None:
        from cuda.bindings import driver

        assert isinstance(event, _Event)
        # In a capture, only an external event can be asked for its time.
        flags = driver.CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL if self._capturing else 0
        _call(driver.cuEventRecordWithFlags(event.event.handle, self.handle, int(flags)))

    def wait(self) -> None:
        with _as_engine_error():
            self.core.sync()

    # The driver's own functions: a `GraphBuilder` raises when it is closed after a capture that an error has broken, and
    # ends a later capture of the stream when it is collected.

    def begin_capture(self) -> None:
        from cuda.bindings import driver

        # Of this thread only: others may allocate meanwhile. An engine that does so itself ends the capture.
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _captured(driver.cuStreamBeginCapture(self.handle, mode))
        self._capturing = True

    def end_capture(self) -> Graph:
        from cuda.bindings import driver

        self._capturing = False
        graph = _captured(driver.cuStreamEndCapture(self.handle))
        try:
            return _Graph(_captured(driver.cuGraphInstantiate(graph, 0)), self.handle)
        finally:
            driver.cuGraphDestroy(graph)

    def abort_capture(self) -> None:
        from cuda.bindings import driver

        self._capturing = False
        error, graph = driver.cuStreamEndCapture(self.handle)
        if not int(error):  # else an error has broken the capture, which is ended all the same and has no graph
            driver.cuGraphDestroy(graph)


def _call(result: tuple[Any, ...]) -> Any:
    """The values of a driver's function, one by itself.

    Raises:
        EngineError: it failed.
    """
    error, *values = result
    if int(error):
        raise EngineError(f"the CUDA driver failed: {error.name}; load the pipeline again")
    return values[0] if len(values) == 1 else tuple(values)


def _captured(result: tuple[Any, ...]) -> Any:
    """The same in a capture; raises `CaptureError` instead."""
    error, *values = result
    if int(error):
        raise CaptureError(error.name)
    return values[0] if values else None


@contextmanager
def _as_engine_error() -> Iterator[None]:
    """What `cuda.core` raises, which has no public base, as an `EngineError`."""
    try:
        yield
    except Exception as e:
        raise EngineError(f"the GPU failed: {_first_line(e)}; load the pipeline again") from e


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
