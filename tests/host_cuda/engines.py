"""A backend for the driver made of host memory: ONNX Runtime on the CPU in the place of a GPU's engines."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping

import numpy as np
import onnxruntime as ort
from cuda.bindings.driver import CUresult

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.engines.onnxruntime import open_session
from arcflow_runtime.engines.parts import Parts
from arcflow_runtime.errors import EngineError
from arcflow_runtime.gpu.cuda import open_device
from arcflow_runtime.gpu.denoiser import DeviceDenoiser
from arcflow_runtime.gpu.device import ALIGNMENT, Stream
from arcflow_runtime.gpu.engine import Shapes
from arcflow_runtime.gpu.host import HostEngine
from arcflow_runtime.gpu.lane import Lane
from arcflow_runtime.gpu.onnxruntime import OrtEngine
from arcflow_runtime.gpu.shapes import output_shapes
from arcflow_runtime.maths.dtypes import NUMPY
from tests.host_cuda.control import Driver

#: Workspace per element of a part's first input, so that larger images need more.
_WORKSPACE_BYTES = 64


class EngineContext:
    """An execution context, see `engine.Context`. A run overwrites the whole workspace."""

    def __init__(self, backend: HostCudaBackend, engine: OrtEngine, inputs: Shapes, stream: Stream) -> None:
        spec, manifest = engine.manifest.parts[engine.part], engine.manifest
        shapes = {**inputs, **output_shapes(manifest, engine.part, inputs)}
        dtypes = {s.name: s.dtype for s in spec.inputs + spec.outputs} | spec.slot_dtypes
        self._nbytes = {n: int(np.prod(shapes[n])) * np.dtype(NUMPY[dtype]).itemsize for n, dtype in dtypes.items()}
        self._backend, self._part = backend, engine.part
        self._inner = engine.context(inputs, stream)
        self._workspace = (0, 0)
        self._kept: list[object] = []
        self.workspace_bytes = backend.workspace_bytes(engine.part, inputs)
        backend.contexts.append((engine.part, dict(inputs)))
        backend.open_contexts.add(self)

    def set_workspace(self, address: int, nbytes: int) -> None:
        """See `Context.set_workspace`."""
        self._workspace = (address, nbytes)

    def enqueue(self, addresses: Mapping[str, int], stream: Stream) -> None:
        """See `Context.enqueue`."""
        assert set(addresses) == set(self._nbytes)
        assert all(a % ALIGNMENT == 0 for a in addresses.values())
        address, nbytes = self._workspace
        assert nbytes >= self.workspace_bytes, "no workspace was given"
        driver, given = self._backend.driver, dict(addresses)

        def run() -> None:
            if nbytes:
                ctypes.memset(found(address, nbytes), 0xFF, nbytes)
            self._inner.enqueue({name: found(at, self._nbytes[name]) for name, at in given.items()}, stream)

        def found(at: int, size: int) -> int:
            here = driver.at(at, size)
            assert here is not None, driver.fault()
            return here

        self._backend.enqueues.append(self._part)
        self._backend.before_enqueue(self._part, stream)
        if error := driver.enqueue(stream.handle, run, self._kept):
            raise EngineError(f"{self._part}: the engine fails: {CUresult(error).name}; load the bundle again")

    def obstacle(self, stream: Stream) -> str | None:
        """See `Context.obstacle`."""
        return self._backend.obstacles.get(self._part)

    def close(self) -> None:
        """See `Context.close`."""
        self._backend.open_contexts.discard(self)
        self._inner.close()


class PartEngine:
    """A loaded part, see `engine.DeviceEngine`."""

    def __init__(self, backend: HostCudaBackend, inner: OrtEngine) -> None:
        self._backend, self._inner = backend, inner

    def context(self, inputs: Shapes, stream: Stream) -> EngineContext:
        """See `DeviceEngine.context`."""
        return EngineContext(self._backend, self._inner, inputs, stream)

    def close(self) -> None:
        """See `DeviceEngine.close`."""
        self._backend.opened.discard(self._inner.part)
        self._inner.close()


class HostCudaBackend:
    """Runs a real bundle's parts on the real `CudaDevice`.

    Tests read what happened, and change how the engines behave:

    - `opens` lists the parts in the order in which they were loaded. `opened` are those loaded now, `most_open` the
      most at one time. `contexts` lists every context with its input shapes, and `open_contexts` are those open now.
      `enqueues` lists the part of every run.
    - `before_enqueue(part, stream)` is called before each run of a part, to do what an engine's library might do there.
      `limits(part, shapes)` is the engines' check of shapes. `obstacles` is a part's reason not to be captured.
      `workspace_bytes(part, inputs)` is the workspace of a context.
    """

    def __init__(self, driver: Driver, max_plans: int = 8) -> None:
        self.driver = driver
        self.lane = Lane(open_device())
        self.opens: list[str] = []
        self.opened: set[str] = set()
        self.most_open = 0
        self.contexts: list[tuple[str, dict[str, tuple[int, ...]]]] = []
        self.open_contexts: set[EngineContext] = set()
        self.enqueues: list[str] = []
        self.before_enqueue: Callable[[str, Stream], None] = lambda part, stream: None
        self.limits: Callable[[str, Shapes], str | None] = lambda part, shapes: None
        self.obstacles: dict[str, str] = {}
        self.workspace_bytes: Callable[[str, Shapes], int] = lambda part, inputs: (
            _WORKSPACE_BYTES * int(np.prod(next(iter(inputs.values()))))
        )
        self.denoiser: DeviceDenoiser | None = None
        self._max_plans = max_plans

    def check(self, bundle: Bundle) -> None:
        """See `Backend.check`."""

    def open(self, bundle: Bundle, part: str) -> HostEngine:
        """See `Backend.open`."""

        def load() -> PartEngine:
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            session = open_session(bundle, part, options, ["CPUExecutionProvider"])
            self.opens.append(part)
            self.opened.add(part)
            self.most_open = max(self.most_open, len(self.opened))
            return PartEngine(self, OrtEngine(bundle.manifest, part, session, "cpu"))

        return HostEngine(self.lane, bundle.manifest, part, load)

    def open_denoiser(self, bundle: Bundle, parts: Parts) -> DeviceDenoiser:
        """See `DenoisingBackend.open_denoiser`."""
        limits = lambda part, shapes: self.limits(part, shapes)  # noqa: E731
        self.denoiser = DeviceDenoiser(bundle, parts, self.lane, limits, self._max_plans)
        return self.denoiser
