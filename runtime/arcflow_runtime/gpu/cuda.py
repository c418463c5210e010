"""Implements `device.py` with cuda-python: memory, copies, streams, events and graphs of one GPU.

Uses `cuda.core`, and the driver API in `cuda.bindings` for calls that take addresses or flags. Written for cuda-core
1.2 and cuda-bindings 13. Device memory comes from `cuMemAlloc`, not from a pool, so that freed memory is available to
the engines' libraries at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

from arcflow_runtime.errors import EngineError
from arcflow_runtime.gpu.device import (
    CaptureError,
    Device,
    Event,
    Graph,
    KernelLauncher,
    Memory,
    OutOfMemory,
    PinnedMemory,
    Stream,
)
from arcflow_runtime.gpu.kernels import CudaKernels, load_kernels
from arcflow_runtime.gpu.lane import OutOfDeviceMemory
from arcflow_runtime.installing import install_command

_OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
#: After these, every call of this process fails (cuda.h: "the process must be terminated and relaunched").
_LOST = {
    "CUDA_ERROR_ASSERT",
    "CUDA_ERROR_CONTAINED",
    "CUDA_ERROR_HARDWARE_STACK_ERROR",
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_INVALID_PC",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_MISALIGNED_ADDRESS",
    "CUDA_ERROR_TENSOR_MEMORY_LEAK",
}


def open_device() -> Device:
    """Open the first GPU visible under `CUDA_VISIBLE_DEVICES`.

    Raises:
        OutOfDeviceMemory: the GPU has no memory left for this process.
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
        return CudaDevice(device)
    except Exception as e:  # the loader's and cuda.core's errors share no public base
        if (what := _what_failed(e)) == _OUT_OF_MEMORY:
            raise OutOfDeviceMemory(
                "the GPU's memory is full, so this process cannot use it; end other programs that nvidia-smi lists"
            ) from None
        raise EngineError(f"the CUDA driver finds no GPU here ({what}); check that nvidia-smi lists one") from None


def _failed(what: str) -> EngineError:
    """The error to raise; `what` is the name of a CUDA error, or a sentence."""
    if what == _OUT_OF_MEMORY:
        return OutOfDeviceMemory(f"the GPU failed: {what}; generate fewer or smaller images at once")
    then = "start this process again" if what in _LOST else "load the pipeline again"
    return EngineError(f"the GPU failed: {what}; {then}")


def _what_failed(error: Exception) -> str:
    """What `_failed` takes, from an error of `cuda.core`."""
    text = str(error).strip() or type(error).__name__
    return text.partition(":")[0] if text.startswith("CUDA_ERROR_") else text.splitlines()[0]


class CudaDevice:
    """A GPU as a `cuda.core.Device`; implements `device.Device`."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self.name: str = device.name

    def use(self) -> None:
        """See `Device.use`."""
        from cuda.core import Device

        with _as_engine_error():
            Device(self._device.device_id).set_current()  # a new object: each belongs to the thread that made it

    def allocate(self, nbytes: int) -> Memory:
        """See `Device.allocate`."""
        from cuda.bindings import driver

        return _Memory(int(_allocated(driver.cuMemAlloc(nbytes))), nbytes)

    def allocate_pinned(self, nbytes: int) -> PinnedMemory:
        """See `Device.allocate_pinned`."""
        from cuda.bindings import driver

        return _Pinned(int(_allocated(driver.cuMemHostAlloc(nbytes, 0))), nbytes)

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

        # blocking_sync: a waiting thread sleeps and leaves its core to other threads.
        with _as_engine_error():
            return _Event(self._device.create_event(EventOptions(timing_enabled=True, blocking_sync=True)))

    def kernels(self) -> KernelLauncher:
        """See `Device.kernels`."""
        with _as_engine_error():
            return _kernels_of(self._device.device_id)


@lru_cache
def _kernels_of(device_id: int) -> CudaKernels:
    """The kernels on a GPU, loaded once per process because `cuda.core` never unloads code."""
    from cuda.core import Device

    return load_kernels(Device(device_id))


class _Memory:
    def __init__(self, address: int, nbytes: int) -> None:
        self.address, self.nbytes = address, nbytes

    def close(self) -> None:
        from cuda.bindings import driver

        if self.address:
            driver.cuMemFree(self.address)  # can fail only after an error in `_LOST`
            self.address = 0


class _Pinned:
    def __init__(self, address: int, nbytes: int) -> None:
        self.address, self.nbytes = address, nbytes
        self._array = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    @property
    def array(self) -> np.ndarray:
        return self._array

    def close(self) -> None:
        from cuda.bindings import driver

        if self.address:
            driver.cuMemFreeHost(self.address)  # can fail as in `_Memory`
            self.address = 0


class _Event:
    def __init__(self, event: Any) -> None:
        self.event = event

    def wait(self) -> None:
        with _as_engine_error():
            self.event.sync()

    def ms_since(self, earlier: Event) -> float:
        from cuda.bindings import driver

        assert isinstance(earlier, _Event)
        return float(_call(driver.cuEventElapsedTime(earlier.event.handle, self.event.handle)))


class _CudaGraph:
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
        self.core = stream  # for the launches in `kernels.py`
        self._capturing = False
        self.handle = int(stream.handle)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        from cuda.bindings import driver

        if nbytes:
            _call(driver.cuMemcpyAsync(target, source, nbytes, self.handle))

    def record(self, event: Event) -> None:
        from cuda.bindings import driver

        assert isinstance(event, _Event)
        # An event recorded in a capture has a time only if it is external.
        flags = driver.CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL if self._capturing else 0
        _call(driver.cuEventRecordWithFlags(event.event.handle, self.handle, int(flags)))

    def wait(self) -> None:
        with _as_engine_error():
            self.core.sync()

    # The captures call the driver directly. A `cuda.core` GraphBuilder raises in `close` if an error has broken the
    # capture, and its destructor can then end a later capture of the same stream.

    def begin_capture(self) -> None:
        from cuda.bindings import driver

        # Thread-local: other threads may allocate during the capture. If an engine itself allocates, it fails.
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        _call(driver.cuStreamBeginCapture(self.handle, mode), CaptureError)
        self._capturing = True

    def end_capture(self) -> Graph:
        from cuda.bindings import driver

        self._capturing = False
        graph = _call(driver.cuStreamEndCapture(self.handle), CaptureError)
        try:
            return _CudaGraph(_call(driver.cuGraphInstantiate(graph, 0), CaptureError), self.handle)
        finally:
            driver.cuGraphDestroy(graph)

    def abort_capture(self) -> None:
        from cuda.bindings import driver

        self._capturing = False
        error, graph = driver.cuStreamEndCapture(self.handle)
        if not int(error):  # a broken capture is ended too, but gives no graph
            driver.cuGraphDestroy(graph)


def _call(result: tuple[Any, ...], raised: Callable[[str], Exception] = _failed) -> Any:
    """The value of a call to the driver API, or a tuple if there are several.

    Args:
        result: what `cuda.bindings` returned: the error code, then the values.
        raised: makes the exception from the error's name.

    Raises:
        EngineError: the call failed, unless `raised` makes another exception.
    """
    error, *values = result
    if int(error):
        raise raised(error.name)
    return values[0] if len(values) == 1 else tuple(values)


def _allocated(result: tuple[Any, ...]) -> Any:
    """As `_call`, but raises OutOfMemory for CUDA_ERROR_OUT_OF_MEMORY."""
    return _call(result, lambda name: OutOfMemory(name) if name == _OUT_OF_MEMORY else _failed(name))


@contextmanager
def _as_engine_error() -> Iterator[None]:
    """Raise the errors of `cuda.core`, which have no public base class, as `EngineError`."""
    try:
        yield
    except EngineError:
        raise
    except Exception as e:
        raise _failed(_what_failed(e)) from e
