"""A fake GPU in host memory: implements `gpu/device.py`, with a backend that runs engines with ONNX Runtime on the CPU.

Work in a stream runs as late as a GPU may run it: when something waits for it. Copies and engines then use the
addresses that they were given when enqueued. A captured graph runs its recorded work again. Memory is filled with NaN
before its first use and after it is freed. Operations that a GPU forbids during a capture fail here too.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time

import numpy as np
import onnxruntime as ort

from arcflow_runtime.engines.onnxruntime import open_session
from arcflow_runtime.gpu.denoiser import DeviceDenoiser
from arcflow_runtime.gpu.device import ALIGNMENT, CaptureError, OutOfMemory
from arcflow_runtime.gpu.host import HostEngine
from arcflow_runtime.gpu.lane import Lane
from arcflow_runtime.gpu.onnxruntime import OrtEngine
from arcflow_runtime.maths.dtypes import NUMPY, cast, to_float32
from arcflow_runtime.maths.noise import pack, randn
from arcflow_runtime.maths.update import update


def at(address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A view of the array at an address."""
    nbytes = int(np.prod(shape)) * np.dtype(NUMPY[dtype]).itemsize
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), NUMPY[dtype]).reshape(shape)


class HostMemory:
    # Freed memory is kept, so that access after the free reads NaN and does not crash.
    _kept: list[np.ndarray] = []  # noqa: RUF012

    def __init__(self, device: HostDevice, nbytes: int, pinned: bool) -> None:
        assert nbytes > 0
        self._device, self.nbytes, self._pinned = device, nbytes, pinned
        raw = np.full(nbytes + ALIGNMENT, 0xFF, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        self.array = raw[start : start + nbytes]
        self.address = self.array.ctypes.data
        self.closed = False

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._device.live.discard(self)
            self.array[:] = 0xFF
            if self.nbytes < 1 << 20:
                self._kept.append(self.array)


class HostEvent:
    def __init__(self) -> None:
        self.stream: HostStream | None = None
        self.seconds = float("nan")

    def wait(self) -> None:
        assert self.stream is not None, "an event must be recorded before it is waited for"
        self.stream.drain()

    def ms_since(self, earlier: HostEvent) -> float:
        assert earlier.seconds <= self.seconds, "both events must have been reached"
        return (self.seconds - earlier.seconds) * 1e3


class HostGraph:
    def __init__(self, stream: HostStream, work: list) -> None:
        self.stream, self.work, self.launches = stream, work, 0
        self.closed = False

    def launch(self) -> None:
        assert not self.closed
        self.launches += 1
        self.stream.device.launches += 1
        for op in self.work:
            self.stream.call(op)

    def close(self) -> None:
        self.closed = True


class HostStream:
    by_handle: dict[int, HostStream] = {}  # noqa: RUF012
    _handles = itertools.count(1000)

    def __init__(self, device: HostDevice) -> None:
        self.device, self.handle = device, next(self._handles)
        self.by_handle[self.handle] = self
        self._queue: list = []
        self._captured: list | None = None
        self._lock = threading.RLock()

    def call(self, op) -> None:
        if self._captured is not None:
            self._captured.append(op)
        else:
            with self._lock:
                self._queue.append(op)
                self.device.enqueued += 1

    def drain(self) -> None:
        with self._lock:
            queue, self._queue = self._queue, []
            for op in queue:
                op()

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self.call(lambda: ctypes.memmove(target, source, nbytes))

    def record(self, event: HostEvent) -> None:
        event.stream = self

        def reach() -> None:
            event.seconds = time.perf_counter()

        self.call(reach)

    def wait(self) -> None:
        assert self._captured is None, "waiting is forbidden during a capture"
        self.drain()

    def begin_capture(self) -> None:
        if self.device.refuse_capture:
            raise CaptureError("the stream cannot capture")
        self._captured = []
        self.device.capturing = True

    def end_capture(self) -> HostGraph:
        work, self._captured = self._captured, None
        self.device.capturing = False
        self.device.captures += 1
        return HostGraph(self, work)

    def abort_capture(self) -> None:
        self._captured, self.device.capturing = None, False


class HostKernels:
    def update(
        self, stream, shape, means, logweights, loggammas, latents, next_latents, engine_input, sigmas, step
    ) -> None:
        n, k, d, p = shape.tokens, shape.modes, shape.channels, shape.sub_pixels

        def run() -> None:
            heads = [
                to_float32(at(address, (1, n, modes, width), shape.heads))
                for address, modes, width in ((means, k, d), (logweights, k, p), (loggammas, k - 1, p))
            ]
            start, end = at(sigmas, (step + 2,), "float64")[-2:]
            x = update(at(latents, (1, n, d), "float32"), *heads, start, start, end)
            at(next_latents, (1, n, d), "float32")[...] = x
            if engine_input:
                at(engine_input, (1, n, d), shape.engine_input)[...] = cast(x, shape.engine_input)

        stream.call(run)

    def noise(self, stream, shape, streams, latents, engine_input) -> None:
        def run() -> None:
            numbers = shape.channels * shape.height * shape.width
            tokens = (shape.images, numbers // (shape.channels * shape.patch**2), shape.channels * shape.patch**2)
            image = (1, shape.channels, shape.height, shape.width)
            images = []
            for seed, first in at(streams, (shape.images, 2), "int64").tolist():
                assert 0 <= seed < 1 << 32
                assert first % 16 == numbers % 16 == 0
                images.append(pack(randn(seed, (first + numbers,))[first:].reshape(image), shape.patch))
            x = np.concatenate(images)
            at(latents, tokens, "float32")[...] = x
            if engine_input:
                at(engine_input, tokens, shape.engine_input)[...] = cast(x, shape.engine_input)

        stream.call(run)


class HostDevice:
    """A fake GPU. `capacity` limits the memory that may be allocated at once; counters record the work for tests."""

    def __init__(self, capacity: int | None = None) -> None:
        self.name = "Host 1"
        self.capacity = capacity
        self.live: set[HostMemory] = set()
        self.capturing = self.refuse_capture = False
        self.captures = self.launches = self.enqueued = 0
        self.threads: set[int] = set()

    def use(self) -> None:
        self.threads.add(threading.get_ident())

    def allocate(self, nbytes: int) -> HostMemory:
        assert not self.capturing, "allocating is forbidden during a capture"
        if self.capacity is not None and nbytes > self.free_bytes():
            raise OutOfMemory("no memory")
        memory = HostMemory(self, nbytes, pinned=False)
        self.live.add(memory)
        return memory

    def allocate_pinned(self, nbytes: int) -> HostMemory:
        assert not self.capturing, "allocating is forbidden during a capture"
        memory = HostMemory(self, nbytes, pinned=True)
        self.live.add(memory)
        return memory

    def used_bytes(self) -> int:
        return sum(m.nbytes for m in self.live if not m._pinned)

    def free_bytes(self) -> int:
        return (self.capacity or 0) - self.used_bytes()

    def driver_version(self) -> str:
        return "13.0"

    def make_stream(self) -> HostStream:
        return HostStream(self)

    def make_event(self) -> HostEvent:
        return HostEvent()

    def kernels(self) -> HostKernels:
        return HostKernels()


class HostContext:
    """An `OrtContext` that runs when its stream is waited for, and overwrites its whole workspace."""

    def __init__(self, backend: HostBackend, engine: OrtEngine, inputs, stream) -> None:
        self._inner, self._backend, self._part = engine.context(inputs, stream), backend, engine.part
        self._workspace: tuple[int, int] | None = None
        self.workspace_bytes = backend.workspace_bytes(engine.part, inputs)
        backend.contexts.append((engine.part, dict(inputs)))
        backend.open_contexts += 1
        self._open = True

    def set_workspace(self, address: int, nbytes: int) -> None:
        self._workspace = (address, nbytes)

    def enqueue(self, addresses, stream) -> None:
        assert all(a % ALIGNMENT == 0 for a in addresses.values())
        if self.workspace_bytes:
            assert self._workspace is not None and self._workspace[1] >= self.workspace_bytes
            live = {(m.address, m.nbytes) for m in self._backend.device.live}
            assert self._workspace in live, "the workspace was freed"
        workspace = self._workspace
        self._backend.enqueues.append(self._part)

        def run() -> None:
            if workspace is not None:
                at(workspace[0], (workspace[1],), "uint8")[...] = 0xFF
            self._inner.enqueue(addresses, stream)

        stream.call(run)

    def obstacle(self, stream) -> str | None:
        return self._backend.obstacles.get(self._part)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._backend.open_contexts -= 1


class HostDeviceEngine:
    def __init__(self, backend: HostBackend, inner: OrtEngine) -> None:
        self._backend, self._inner = backend, inner

    def context(self, inputs, stream) -> HostContext:
        return HostContext(self._backend, self._inner, inputs, stream)

    def close(self) -> None:
        self._backend.opened.discard(self._inner.part)
        self._inner.close()


class HostBackend:
    """A backend that runs a real bundle's parts on a `HostDevice`.

    Tests set `limits`, the engines' check of input shapes, and `obstacles`, a part's reason not to be captured.
    """

    def __init__(self, device: HostDevice | None = None, max_plans: int = 8) -> None:
        self.device = device or HostDevice()
        self.lane = Lane(self.device)
        self.max_plans = max_plans
        self.limits = lambda part, shapes: None
        self.obstacles: dict[str, str] = {}
        self.opened: set[str] = set()
        self.opens: list[str] = []
        self.most_open = self.open_contexts = 0
        self.contexts: list[tuple[str, dict]] = []
        self.enqueues: list[str] = []
        self.denoiser: DeviceDenoiser | None = None
        self.workspace_bytes = lambda part, inputs: 64 * int(np.prod(next(iter(inputs.values()))))

    def check(self, bundle) -> None:
        pass

    def open(self, bundle, part: str) -> HostEngine:
        def load() -> HostDeviceEngine:
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            session = open_session(bundle, part, options, ["CPUExecutionProvider"])
            self.opened.add(part)
            self.opens.append(part)
            self.most_open = max(self.most_open, len(self.opened))
            return HostDeviceEngine(self, OrtEngine(bundle.manifest, part, session, "cpu"))

        return HostEngine(self.lane, bundle.manifest, part, load)

    def open_denoiser(self, bundle, parts) -> DeviceDenoiser:
        limits = lambda part, shapes: self.limits(part, shapes)  # noqa: E731
        self.denoiser = DeviceDenoiser(bundle, parts, self.lane, limits, self.max_plans)
        return self.denoiser
