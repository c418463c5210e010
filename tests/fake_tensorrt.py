"""A fake of the module `tensorrt_rtx` that runs engines on a `HostDevice`.

An engine is a JSON text that names an ONNX graph, which ONNX Runtime runs. `state` holds what tests inspect and change.
`test_gpu_tensorrt.py` checks that the real library has every name used here.
"""

from __future__ import annotations

import enum
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
from host_device import HostStream, at

__version__ = "1.7.1"

state = SimpleNamespace()


def reset() -> None:
    state.__dict__.update(
        refits=[], budgets=[], configs=[], contexts=0, capturable=True, refit_errors=[], missing=[], cached=b"",
        outputs={}, log=None, weights=[],
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


class Runtime:
    defer_weights_loading = False

    def __init__(self, logger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, data):
        if state.log is not None:
            self.logger.log(ILogger.ERROR, state.log)
            return None
        about = json.loads(bytes(data))
        engine = ICudaEngine(about["graph"], about["stripped"], self.logger)
        if self.defer_weights_loading:
            engine._deferred, engine.weights_loaded = bytes(data), False
        return engine


class ICudaEngine:
    _deferred: bytes | None = None
    weights_loaded = True

    def load_weights(self, blob) -> bool:
        if state.log is not None:
            self.logger.log(ILogger.ERROR, state.log)
            return False
        assert bytes(blob) == self._deferred and not self.weights_loaded
        self.weights_loaded = True
        state.weights.append((Path(self.graph).name, "load"))
        return True

    def unload_weights(self) -> bool:
        assert self._deferred is not None and self.weights_loaded
        self.weights_loaded = False
        state.weights.append((Path(self.graph).name, "unload"))
        return True

    def __init__(self, graph: str, stripped: bool, logger) -> None:
        self.graph, self.logger = graph, logger
        self.session = None if stripped else _session(graph)
        described = self.session or _session(graph)
        self.inputs = {i.name: i for i in described.get_inputs()}
        self.tensors = self.inputs | {o.name: o for o in described.get_outputs()}
        self.names = list(self.tensors)
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return state.outputs.get(name) or _TYPES[self.tensors[name].type][0]

    def get_weight_streaming_automatic_budget(self) -> int:
        return 12345

    @property
    def weight_streaming_budget_v2(self) -> int:
        return state.budgets[-1]

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, value: int) -> None:
        state.budgets.append(value)

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, how):
        strategy = how.strategy if isinstance(how, IRuntimeConfig) else how
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        if isinstance(how, IRuntimeConfig):
            state.configs.append(how)
        state.contexts += 1
        return IExecutionContext(self)


class IRuntimeConfig:
    cuda_graph_strategy = dynamic_shapes_kernel_specialization_strategy = None

    def set_execution_context_allocation_strategy(self, strategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache) -> bool:
        assert isinstance(cache, IRuntimeCache)
        return True


class IRuntimeCache:
    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, data) -> bool:
        self.content = bytes(data)
        state.cached = self.content
        return True

    def serialize(self) -> bytes:
        return self.content or b"compiled"


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self.engine, self.shapes, self.addresses = engine, {}, {}
        self.memory = None
        self.profile = None
        self.profiler = None

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return stream in HostStream.by_handle

    def set_input_shape(self, name: str, shape) -> bool:
        assert self.profile is not None, "the profile comes first"
        self.shapes[name] = tuple(shape)
        return name in self.engine.inputs

    def infer_shapes(self) -> list[str]:
        return [n for n in self.engine.inputs if n not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        zeros = {n: np.zeros(s, _dtype(self.engine, n)) for n, s in self.shapes.items()}
        return _session(self.engine.graph).run([name], zeros)[0].shape

    def update_device_memory_size_for_shapes(self) -> int:
        return 64 * int(np.prod(next(iter(self.shapes.values()))))

    def set_device_memory(self, address: int, nbytes: int) -> None:
        assert nbytes >= self.update_device_memory_size_for_shapes()
        self.memory = (address, nbytes)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address % 256 == 0

    def is_stream_capturable(self, stream: int) -> bool:
        return state.capturable

    def execute_async_v3(self, stream: int) -> bool:
        loaded = self.engine.session is not None and self.engine.weights_loaded
        if not loaded or self.memory is None or set(self.addresses) != set(self.engine.names):
            self.engine.logger.log(ILogger.ERROR, "not ready")
            return False
        addresses, memory = dict(self.addresses), self.memory

        def run() -> None:
            at(memory[0], (memory[1],), "uint8")[...] = 0xFF
            feeds = {n: at(addresses[n], s, _TYPES[self.engine.tensors[n].type][1]) for n, s in self.shapes.items()}
            outputs = [n for n in self.engine.names if n not in self.engine.inputs]
            for name, value in zip(outputs, self.engine.session.run(outputs, feeds), strict=True):
                at(addresses[name], value.shape, str(value.dtype))[...] = value

        HostStream.by_handle[stream].call(run)
        if self.profiler is not None:
            for layer in ("first", "second"):
                self.profiler.report_layer_time(layer, 0.25)
        return True


class Refitter:
    def __init__(self, engine: ICudaEngine, logger) -> None:
        self.engine = engine

    def get_missing_weights(self) -> list[str]:
        return state.missing

    def refit_cuda_engine(self) -> bool:
        self.engine.session = _session(self.engine.graph)
        return True


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger) -> None:
        self.num_errors = len(state.refit_errors)

    def refit_from_file(self, model: str) -> bool:
        state.refits.append(model)
        return not state.refit_errors

    def get_error(self, index: int):
        return SimpleNamespace(desc=lambda: state.refit_errors[index])


def _session(graph: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _dtype(engine: ICudaEngine, name: str) -> str:
    return _TYPES[engine.tensors[name].type][1]
