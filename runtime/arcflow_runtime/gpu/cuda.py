"""Implements `device.py` with cuda-python: memory, copies, streams, events and graphs of one GPU.

Uses `cuda.core`, and the driver API in `cuda.bindings` for calls that take addresses or flags. Written for cuda-core
1.2 and cuda-bindings 13. Device memory comes from `cuMemAlloc`, not from a pool, so that freed memory is available to
the engines' libraries at once.
"""

from __future__ import annotations

import ctypes
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
from arcflow_runtime.gpu.kernels import load_kernels
from arcflow_runtime.installing import install_command

_OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"


def open_device() -> Device:
    """Open the first GPU visible under `CUDA_VISIBLE_DEVICES`.

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
    """A GPU as a `cuda.core.Device`; implements `device.Device`."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self.name: str = device.name

    def use(self) -> None:
        """See `Device.use`."""
        from cuda.core import Device

        Device(self._device.device_id).set_current()  # a new object, because each belongs to the thread that made it

    def allocate(self, nbytes: int) -> Memory:
        """See `Device.allocate`."""
        from cuda.bindings import driver

        return _Memory(int(_call(driver.cuMemAlloc(nbytes))), nbytes)

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
        return _Stream(self._device.create_stream())

    def make_event(self) -> Event:
        """See `Device.make_event`."""
        from cuda.core import EventOptions

        # blocking_sync: a waiting thread sleeps and leaves its core to other threads.
        return _Event(self._device.create_event(EventOptions(timing_enabled=True, blocking_sync=True)))

    def kernels(self) -> KernelLauncher:
        """See `Device.kernels`."""
        return load_kernels(self._device)


class _Memory:
    def __init__(self, address: int, nbytes: int) -> None:
        self.address, self.nbytes = address, nbytes

    def close(self) -> None:
        from cuda.bindings import driver

        if self.address:
            _call(driver.cuMemFree(self.address))
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
        self._buffer.close()


class _Event:
    def __init__(self, event: Any) -> None:
        self.event = event

    def wait(self) -> None:
        try:
            self.event.sync()
        except Exception as e:
            raise _failed(e) from e

    def ms_since(self, earlier: Event) -> float:
        assert isinstance(earlier, _Event)
        return float(self.event - earlier.event)


class _CudaGraph:
    def __init__(self, graph: Any, stream: Any) -> None:
        self._graph, self._stream = graph, stream

    def launch(self) -> None:
        try:
            self._graph.launch(self._stream)
        except Exception as e:
            raise _failed(e) from e

    def close(self) -> None:
        self._graph.close()


class _Stream:
    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._builder: Any = None
        self.handle = int(stream.handle)

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle

    def copy(self, target: int, source: int, nbytes: int) -> None:
        from cuda.bindings import driver

        if nbytes:
            _call(driver.cuMemcpyAsync(target, source, nbytes, self.handle))

    def record(self, event: Event) -> None:
        from cuda.bindings import driver

        assert isinstance(event, _Event)
        # An event recorded in a capture has a time only if it is external.
        flags = driver.CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL if self._builder is not None else 0
        _call(driver.cuEventRecordWithFlags(event.event.handle, self.handle, int(flags)))

    def wait(self) -> None:
        try:
            self._stream.sync()
        except Exception as e:
            raise _failed(e) from e

    def begin_capture(self) -> None:
        builder = self._stream.create_graph_builder()
        try:
            # thread_local: other threads may allocate during the capture. If an engine itself allocates, it fails.
            self._builder = builder.begin_building("thread_local")
        except Exception as e:
            raise CaptureError(_first_line(e)) from e

    def end_capture(self) -> Graph:
        builder, self._builder = self._builder, None
        try:
            return _CudaGraph(builder.end_building().complete(), self._stream)
        except Exception as e:
            raise CaptureError(_first_line(e)) from e
        finally:
            builder.close()

    def abort_capture(self) -> None:
        builder, self._builder = self._builder, None
        builder.close()  # ends the capture


def _call(result: tuple[Any, ...]) -> Any:
    """The value of a call to the driver API, or a tuple if there are several.

    Args:
        result: what `cuda.bindings.driver` returned: the error code and the values.

    Raises:
        OutOfMemory: the error is CUDA_ERROR_OUT_OF_MEMORY.
        EngineError: it is any other error.
    """
    error, *values = result
    if int(error):
        if error.name == _OUT_OF_MEMORY:
            raise OutOfMemory(error.name)
        raise EngineError(f"the CUDA driver failed: {error.name}; load the pipeline again")
    return values[0] if len(values) == 1 else tuple(values)


def _failed(error: Exception) -> EngineError:
    return EngineError(f"the GPU failed: {_first_line(error)}; load the pipeline again")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
