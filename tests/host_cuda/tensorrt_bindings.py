"""A stand-in for the module `tensorrt_rtx`, whose library needs a real GPU: engines run on the driver of host memory.

It stands for what the runtime sees of TensorRT: objects that allocate device memory and free it when they are dropped,
calls that return None or False and log why, and runs that are enqueued in a stream. An engine is a JSON text that names
an ONNX graph, which ONNX Runtime runs when the stream reaches it. It does not stand for compiled kernels, tactics or
numbers in other precisions than float32.

`state` holds what tests inspect and change. test_gpu_tensorrt.py checks that the real library has every name used here.
The messages about memory are the real library's.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort

from arcflow_runtime.maths.dtypes import NUMPY
from tests.host_cuda.control import Driver

__version__ = "1.7.1"

#: Device memory of a context, beside the workspace that the caller gives it.
CONTEXT_BYTES = 4096
_OUT_OF_MEMORY = 2

state = SimpleNamespace()


def reset() -> None:
    """Set `state` to its defaults.

    Changed by tests: `capturable`, `refit_errors` and `missing` weights of a refit, `outputs` (dtypes by name), `log`
    (of an engine or weights that cannot be loaded), `streamable` (a size of weights that is reported and not
    allocated), `run_bytes` (device memory that a run of a graph allocates for itself, by the graph's name), `failing`
    (a function that is called before each run and returns an error to log, or None). Recorded: `refits`, `budgets`,
    `configs`, `contexts`, the runtime `cached` that was read, and the parts whose deferred `weights` were loaded or
    unloaded.
    """
    state.__dict__.update(
        refits=[], budgets=[], configs=[], contexts=0, capturable=True, refit_errors=[], missing=[], cached=b"",
        outputs={}, log=None, weights=[], streamable=None, run_bytes={}, failing=lambda graph: None,
    )  # fmt: skip


reset()


class ILogger:
    ERROR = 1

    def __init__(self) -> None:
        pass


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    BF16 = 2
    INT64 = 3
    UINT8 = 4


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY = 0
    EAGER = 1


class CudaGraphStrategy(enum.Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class IProfiler:
    def __init__(self) -> None:
        pass


_TYPES = {
    "tensor(float)": (DataType.FLOAT, "float32"),
    "tensor(int64)": (DataType.INT64, "int64"),
    "tensor(uint8)": (DataType.UINT8, "uint8"),
}


class _Memory:
    """Device memory that is freed with this object."""

    address = 0

    def __init__(self, nbytes: int) -> None:
        from cuda.bindings import driver as cuda

        error, address = cuda.cuMemAlloc(nbytes)
        if int(error):
            raise _AllocationError(int(error), error.name, nbytes)
        self.address = int(address)

    def __del__(self) -> None:
        from cuda.bindings import driver as cuda

        if self.address:
            cuda.cuMemFree(self.address)


class _AllocationError(Exception):
    def log(self, logger) -> None:
        code, name, nbytes = self.args
        what = "out of memory" if code == _OUT_OF_MEMORY else name
        logger.log(ILogger.ERROR, f"[defaultAllocator.cpp::allocate::57] Error Code 1: Cuda Runtime ({what})")
        if code == _OUT_OF_MEMORY:
            logger.log(ILogger.ERROR, f"Error Code 2: OutOfMemory (Requested size was {nbytes} bytes.)")


class Runtime:
    defer_weights_loading = False

    def __init__(self, logger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, data):
        if state.log is not None:
            self.logger.log(ILogger.ERROR, state.log)
            return None
        try:
            return ICudaEngine(
                json.loads(bytes(data)), self.logger, bytes(data) if self.defer_weights_loading else None
            )
        except _AllocationError as e:
            e.log(self.logger)
            return None


class ICudaEngine:
    def __init__(self, about: dict, logger, deferred: bytes | None) -> None:
        self._graph, self._logger, self._deferred = about["graph"], logger, deferred
        self._session = None if about["stripped"] else _session(self._graph)
        described = self._session or _session(self._graph)
        self._inputs = {i.name: i for i in described.get_inputs()}
        self._tensors = self._inputs | {o.name: o for o in described.get_outputs()}
        self._names = list(self._tensors)
        self.num_io_tensors = len(self._names)
        self._bytes = Path(self._graph).stat().st_size
        self._streams, self._open_contexts = about["streams"], 0
        # Streamed weights are in host memory until the budget is set.
        self._budget = self.streamable_weights_size
        self._weights = None if self._streams or deferred is not None else _Memory(self._bytes)

    @property
    def weights_loaded(self) -> bool:
        return self._deferred is None or self._weights is not None

    def load_weights(self, blob) -> bool:
        assert bytes(blob) == self._deferred and not self.weights_loaded
        try:
            if state.log is not None:
                self._logger.log(ILogger.ERROR, state.log)
                return False
            self._weights = _Memory(self._bytes)
        except _AllocationError as e:
            e.log(self._logger)
            return False
        state.weights.append((Path(self._graph).name, "load"))
        return True

    def unload_weights(self) -> bool:
        assert self._deferred is not None and self.weights_loaded
        self._weights = None
        state.weights.append((Path(self._graph).name, "unload"))
        return True

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return state.outputs.get(name) or _TYPES[self._tensors[name].type][0]

    @property
    def streamable_weights_size(self) -> int:
        if not self._streams:
            return 0
        return self._bytes if state.streamable is None else state.streamable

    def get_weight_streaming_automatic_budget(self) -> int:
        """The binding returns 32 bits of it."""
        from cuda.bindings import driver as cuda

        _, free, _ = cuda.cuMemGetInfo()
        return ctypes.c_int32(min(self.streamable_weights_size, free)).value

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, value: int) -> None:
        state.budgets.append((Path(self._graph).stem, value))
        if self._open_contexts or value < 0:
            why = "cannot be modified while there are active IExecutionContexts" if self._open_contexts else "is wrong"
            self._logger.log(ILogger.ERROR, f"The weight streaming budget {why}.")
            return
        self._weights = None
        resident = min(value, self.streamable_weights_size)
        try:
            if resident and state.streamable is None:
                self._weights = _Memory(resident)
            self._budget = resident
        except _AllocationError as e:
            e.log(self._logger)
            text = "Failed to allocate weight streaming device memory. Please try reducing the weight streaming budget."
            self._logger.log(ILogger.ERROR, text)
            self._budget = 0

    @property
    def weight_streaming_scratch_memory_size(self) -> int:
        return self.streamable_weights_size // 16 if self._budget < self.streamable_weights_size else 0

    @property
    def device_memory_size_v2(self) -> int:
        return (1 << 16) + self.weight_streaming_scratch_memory_size

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, how):
        strategy = how._strategy if isinstance(how, IRuntimeConfig) else how
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        if isinstance(how, IRuntimeConfig):
            state.configs.append(how)
        state.contexts += 1
        try:
            return IExecutionContext(self)
        except _AllocationError as e:
            e.log(self._logger)
            return None


class IRuntimeConfig:
    cuda_graph_strategy = dynamic_shapes_kernel_specialization_strategy = None

    def set_execution_context_allocation_strategy(self, strategy) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache) -> bool:
        assert isinstance(cache, IRuntimeCache)
        return True


class IRuntimeCache:
    def __init__(self) -> None:
        self._content = b""

    def deserialize(self, data) -> bool:
        self._content = bytes(data)
        state.cached = self._content
        return True

    def serialize(self) -> bytes:
        return self._content or b"compiled"


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._memory = _Memory(CONTEXT_BYTES)
        self._engine, self._shapes, self._addresses = engine, {}, {}
        self._workspace = self._profile = self.profiler = None
        self._kept: list[object] = []
        engine._open_contexts += 1

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # a context that could not be made
            self._engine._open_contexts -= 1

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        from cuda.bindings import driver as cuda

        self._profile = index
        return int(cuda.cuStreamGetFlags(stream)[0]) == 0

    def set_input_shape(self, name: str, shape) -> bool:
        assert self._profile is not None, "the profile comes first"
        self._shapes[name] = tuple(shape)
        return name in self._engine._inputs

    def infer_shapes(self) -> list[str]:
        return [n for n in self._engine._inputs if n not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        zeros = {n: np.zeros(s, _dtype(self._engine, n)) for n, s in self._shapes.items()}
        return _session(self._engine._graph).run([name], zeros)[0].shape

    def update_device_memory_size_for_shapes(self) -> int:
        scratch = self._engine.weight_streaming_scratch_memory_size if state.streamable is None else 0
        return 64 * int(np.prod(next(iter(self._shapes.values())))) + scratch

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self.update_device_memory_size_for_shapes()
        self._workspace = (memory, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return address % 256 == 0

    def is_stream_capturable(self, stream: int) -> bool:
        return state.capturable

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine = self._engine
        ready = engine._session is not None and engine.weights_loaded and self._workspace is not None
        if not ready or set(self._addresses) != set(engine._names):
            engine._logger.log(ILogger.ERROR, "not ready")
            return False
        if (error := state.failing(Path(engine._graph).stem)) is not None:
            engine._logger.log(ILogger.ERROR, error)
            return False
        try:
            if nbytes := state.run_bytes.get(Path(engine._graph).stem):
                _Memory(nbytes)  # freed at once: the library frees it in stream order, and nothing here writes to it
        except _AllocationError as e:
            e.log(engine._logger)
            return False
        # Not `self`, which would then not be freed as soon as it is dropped.
        addresses, workspace, shapes = dict(self._addresses), self._workspace, dict(self._shapes)

        def run() -> None:
            ctypes.memset(_at(*workspace), 0xFF, workspace[1])
            feeds = {n: _array(addresses[n], s, _dtype(engine, n)) for n, s in shapes.items()}
            outputs = [n for n in engine._names if n not in engine._inputs]
            for name, value in zip(outputs, engine._session.run(outputs, feeds), strict=True):
                _array(addresses[name], value.shape, str(value.dtype))[...] = value

        if _driver().enqueue(stream_handle, run, self._kept):
            engine._logger.log(ILogger.ERROR, "Error Code 1: Cuda Runtime (operation failed)")
            return False
        if self.profiler is not None:
            for layer in ("first", "second"):
                self.profiler.report_layer_time(layer, 0.25)
        return True


class Refitter:
    def __init__(self, engine: ICudaEngine, logger) -> None:
        self._engine = engine

    def get_missing_weights(self) -> list[str]:
        return state.missing

    def refit_cuda_engine(self) -> bool:
        self._engine._session = _session(self._engine._graph)
        return True


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger) -> None:
        self.num_errors = len(state.refit_errors)

    def refit_from_file(self, model: str) -> bool:
        state.refits.append(model)
        return not state.refit_errors

    def get_error(self, index: int):
        return SimpleNamespace(desc=lambda: state.refit_errors[index])


@functools.cache
def _driver() -> Driver:
    return Driver()


@functools.cache
def _session(graph: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _at(address: int, nbytes: int) -> int:
    found = _driver().at(address, nbytes)
    assert found is not None, _driver().fault()
    return found


def _array(address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    nbytes = int(np.prod(shape)) * np.dtype(NUMPY[dtype]).itemsize
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(_at(address, nbytes)), NUMPY[dtype]).reshape(shape)


def _dtype(engine: ICudaEngine, name: str) -> str:
    return _TYPES[engine._tensors[name].type][1]
