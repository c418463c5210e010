"""Run engines of TensorRT and TensorRT-RTX: a built engine and its record -> contexts that run on device addresses.

Implements `engine.py`; used by `tensorrt_backend.py`.
"""

from __future__ import annotations

import mmap
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.engine_record import Profile, accepts
from arcflow_runtime.disk.external_data import checked_graph
from arcflow_runtime.disk.manifest import DType
from arcflow_runtime.engines.base import LayerTime
from arcflow_runtime.engines.store import BuiltEngine
from arcflow_runtime.engines.tensorrt_library import Library
from arcflow_runtime.errors import EngineError
from arcflow_runtime.gpu.device import Stream
from arcflow_runtime.gpu.engine import Shapes
from arcflow_runtime.gpu.lane import SAVE_MEMORY, Lane, OutOfDeviceMemory, out_of_memory
from arcflow_runtime.gpu.runtime_cache import RuntimeCacheFile
from arcflow_runtime.gpu.shapes import output_shapes

_SHOWN_ERRORS = 3
_OWN_WEIGHTS = {"STRIP_PLAN", "WEIGHT_STREAMING"}
#: Says in the libraries' messages that memory ran out, as in "Error Code 1: Cuda Runtime (out of memory)", "OutOfMemory
#: (Requested size was 4096 bytes.)", "GPU memory allocation failed for persistent buffer" and "Failed to allocate
#: weight streaming device memory". An allocation that fails only because of a capture is worded differently.
_NO_MEMORY = re.compile(r"out ?of ?memory|could not be allocated|allocation failed|failed to allocate", re.IGNORECASE)
#: Device memory that the budget for streamed weights leaves free beside the engine's activations: for the buffers of
#: `denoiser.MAX_PLANS` plans of 40 MB each, rounded up for contexts and kernels.
RESERVE_BYTES = 512 << 20
_DTYPES: dict[DType, str] = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "uint8": "UINT8",
}


@dataclass(frozen=True)
class TensorRTOptions:
    """How to run engines.

    `own_graphs`: TensorRT-RTX captures each engine's runs itself, in place of one graph of the whole job. `profile`:
    time every layer. `cache`: folder of runtime caches; None for the user's cache folder. `unloadable`: load the
    weights apart from the rest, where the library and the engine allow it, so that they can be freed alone.
    """

    own_graphs: bool = False
    profile: bool = False
    cache: Path | None = None
    unloadable: bool = False


class TensorRTEngine:
    """A deserialised engine; implements `engine.DeviceEngine`."""

    def __init__(
        self,
        library: Library,
        lane: Lane,
        bundle: Bundle,
        built: BuiltEngine,
        options: TensorRTOptions,
        share: tuple[int, int] = (1, 1),
    ) -> None:
        """Load the engine, and its weights from the bundle if it was built without them; the caller holds the lane.

        Args:
            library: which of the two libraries.
            lane: its device and stream.
            bundle: what the part belongs to.
            built: the engine's file and record.
            options: how to run it.
            share: what part of the free memory the engine may take if its weights are streamed, as a fraction
                (numerator, denominator). The rest is for engines that are loaded later.

        Raises:
            BundleError: the graph reads weights from outside the part's weights file.
            EngineError: the library cannot load the engine, or its inputs or outputs differ from the manifest's.
        """
        key = built.record.key
        self.part, self.profiles = key.part, key.profiles
        self._library, self._lane, self._bundle, self._options = library, lane, bundle, options
        self._trt = library.load()
        self._logger = _make_logger(self._trt)
        # TensorRT 11 has no such function, and stripped or streamed weights are loaded in another way.
        self._deferred = options.unloadable and library.ahead_of_time and not {*key.flags} & _OWN_WEIGHTS
        self._flags, self._allocates = key.flags, built.record.allocates_when_run
        graph = checked_graph(bundle, self.part) if "STRIP_PLAN" in self._flags else None
        self._runtime = self._trt.Runtime(self._logger)
        self._engine = self._deserialize(built)
        self._profiler = _make_profiler(self._trt) if options.profile else None
        self._check_tensors()
        if graph is not None:
            self._refit(graph)
        self._streams = "WEIGHT_STREAMING" in self._flags and self._set_streaming_budget(*share)
        self._cache_file: RuntimeCacheFile | None = None
        self._cache: Any = None
        if library.ahead_of_time:
            parts = (built.record.sha256, key.builder_version, lane.device.driver_version(), lane.device.name)
            self._cache_file = RuntimeCacheFile(parts, options.cache)

    def context(self, inputs: Shapes, stream: Stream) -> TensorRTContext:
        """Make a context for inputs of these shapes; see `DeviceEngine.context`."""
        if (wrong := shape_mismatch(self.part, self.profiles, inputs)) is not None:
            raise EngineError(wrong)
        context = self._create_context()
        if context is None:
            raise self.error("an execution context cannot be created")
        index = next(i for i, p in enumerate(self.profiles) if accepts(p, inputs))
        if not context.set_optimization_profile_async(index, stream.handle):
            raise self.error(f"profile {index} cannot be set")
        stream.wait()
        for name, shape in inputs.items():
            if not context.set_input_shape(name, shape):
                raise self.error(f"{name} cannot have shape {list(shape)}")
        try:
            missing = context.infer_shapes()
        except RuntimeError as e:  # the binding raises it for every failure but missing shapes
            raise self.error(f"the shapes cannot be inferred: {e}") from e
        if missing:
            raise self.error(f"the shapes of {missing} cannot be inferred")
        for name, shape in output_shapes(self._bundle.manifest, self.part, inputs).items():
            found = tuple(context.get_tensor_shape(name))
            if found != shape:
                raise self.error(f"output {name} must have shape {list(shape)}, got {list(found)}")
        if self._profiler is not None:
            context.profiler = self._profiler
        return TensorRTContext(self, context)

    def obstacle(self, context: Any, stream: Stream) -> str | None:
        """The reason why runs of `context` cannot be captured, or None."""
        if self._streams:
            return "its weights are streamed from the host"
        if self._allocates:
            return "it allocates memory in each run"
        if self._options.own_graphs:
            return f"{self._library.name} captures its runs itself"
        if self._options.profile:
            return "its layers are timed"
        if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(stream.handle):
            return f"{self._library.name} says that its work cannot be captured"
        return None

    @property
    def is_open(self) -> bool:
        """False once `close` was called."""
        return self._engine is not None

    def save_cache(self) -> None:
        """Write the kernels that were compiled so far to the cache on disk."""
        if self._cache is None or self._cache_file is None:
            return
        if (data := self._cache.serialize()) is not None:
            self._cache_file.write(bytes(memoryview(data)))

    def layer_times(self) -> list[LayerTime]:
        """Every layer of every run so far; the engine must be loaded with `TensorRTOptions.profile`."""
        assert self._profiler is not None, "loaded with TensorRTOptions.profile"
        return list(self._profiler.layers)

    def unload_weights(self) -> bool:
        """See `UnloadsWeights`."""
        return self._deferred and bool(self._engine.unload_weights())

    def load_weights(self) -> None:
        """See `UnloadsWeights`."""
        # The library wants the bytes that the engine was made of. The file stays mapped, so these are the same bytes
        # even if `arcflow build` has replaced it.
        if not self._engine.load_weights(self._data):
            raise self._load_error(len(self._data), "the weights cannot be loaded")

    def close(self) -> None:
        """Free the engine; see `DeviceEngine.close`."""
        if self._engine is not None:
            self.save_cache()
        self._cache = self._engine = self._runtime = None
        self._data.close()

    def error(self, what: str) -> EngineError:
        """An error that names this part and ends with the messages that the library logged.

        It is an `OutOfDeviceMemory` if one of them says so.
        """
        logged = self._logger.take()
        text = f"{self.part}: {self._library.name}: {what}"
        lines = "".join(f"\n  {line}" for line in logged[:_SHOWN_ERRORS])
        if not any(map(_NO_MEMORY.search, logged)):
            return EngineError(text + lines)
        device = self._lane.device
        free = f"{device.free_bytes():,} bytes of {device.name}'s memory are free"
        return OutOfDeviceMemory(f"{text} for lack of memory; {free}; {SAVE_MEMORY}{lines}")

    def _deserialize(self, built: BuiltEngine) -> Any:
        with built.path.open("rb") as f:
            self._data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        if self._deferred:
            self._runtime.defer_weights_loading = True
        engine = self._runtime.deserialize_cuda_engine(self._data)
        if engine is None or (self._deferred and not engine.load_weights(self._data)):
            what = f"{built.path} cannot be loaded; build it again with `arcflow build`"
            raise self._load_error(built.record.bytes, what)
        if not self._deferred:
            self._data.close()
        return engine

    def _load_error(self, nbytes: int, what: str) -> EngineError:
        """The error of a failed load of weights of `nbytes` bytes: out of memory, or `what` with the library's log."""
        logged = self._logger.take()
        if any(map(_NO_MEMORY.search, logged)):
            return OutOfDeviceMemory(out_of_memory(self._lane.device, nbytes, f"{self.part}: weights"))
        self._logger.errors = logged
        return self.error(what)

    def _set_streaming_budget(self, taken: int, of: int) -> bool:
        """Keep as many of the weights on the device as `taken` / `of` of its memory hold.

        That is of the memory that is free, less activations and `RESERVE_BYTES`. The library's automatic budget is not
        used, because its binding returns only 32 bits of it.

        Returns:
            True if the other weights are streamed, False if all are on the device.

        Raises:
            OutOfDeviceMemory: the library cannot allocate the memory.
            EngineError: it does not accept the budget.
        """
        engine, size = self._engine, int(self._engine.streamable_weights_size)
        engine.weight_streaming_budget_v2 = 0  # so that the activations below include the buffer to stream through
        reserve = int(engine.device_memory_size_v2) + RESERVE_BYTES
        budget = min(size, max(0, self._lane.device.free_bytes() - reserve) * taken // of)
        engine.weight_streaming_budget_v2 = budget
        if (found := int(engine.weight_streaming_budget_v2)) == budget:
            return budget < size
        logged = self._logger.take()
        if any(map(_NO_MEMORY.search, logged)):
            raise OutOfDeviceMemory(out_of_memory(self._lane.device, budget, f"{self.part}: weights"))
        self._logger.errors = logged
        raise self.error(f"the budget for streamed weights must be {budget:,} bytes, got {found:,}")

    def _check_tensors(self) -> None:
        spec, trt, engine = self._bundle.manifest.parts[self.part], self._trt, self._engine
        dtypes = {s.name: s.dtype for s in spec.inputs + spec.outputs} | spec.slot_dtypes
        expected = {name: getattr(trt.DataType, _DTYPES[dtype]) for name, dtype in dtypes.items()}
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        found = {name: engine.get_tensor_dtype(name) for name in names}
        if found != expected:
            raise self.error(
                f"inputs and outputs must be {_shown(expected)}, as in the manifest, got {_shown(found)}; "
                "build the engine again with `arcflow build`"
            )

    def _refit(self, graph: Path) -> None:
        """Read the weights from the part's graph and weights files into the engine (E6)."""
        spec = self._bundle.manifest.parts[self.part]
        refitter = self._trt.Refitter(self._engine, self._logger)
        parser = self._trt.OnnxParserRefitter(refitter, self._logger)
        # Parsed by path, because the external weights are beside the graph.
        if not parser.refit_from_file(str(graph)):
            errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise self.error(f"{spec.weights} does not fit the engine: {'; '.join(errors[:_SHOWN_ERRORS])}")
        if missing := refitter.get_missing_weights():
            raise self.error(f"{spec.weights} lacks weights of the engine, such as {missing[0]!r}")
        if not refitter.refit_cuda_engine():
            raise self.error(f"the engine cannot be refitted with the weights of {spec.weights}")

    def _create_context(self) -> Any:
        trt = self._trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._library.ahead_of_time:
            return self._engine.create_execution_context(strategy)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # EAGER compiles kernels for the exact shapes before the first run. Otherwise a captured graph would keep the
        # generic kernels that run until the compilation is done.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        strategies = trt.CudaGraphStrategy
        own = self._options.own_graphs
        config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if own else strategies.DISABLED
        if self._cache is None and self._cache_file is not None:
            self._cache = config.create_runtime_cache()
            if (kept := self._cache_file.read()) is not None:
                self._cache.deserialize(kept)
        config.set_runtime_cache(self._cache)
        return self._engine.create_execution_context(config)


class TensorRTContext:
    """One execution context, which gets its workspace from the caller; implements `engine.Context`."""

    def __init__(self, engine: TensorRTEngine, context: Any) -> None:
        self._engine, self._context = engine, context
        self._ran = False
        self.workspace_bytes: int = context.update_device_memory_size_for_shapes()

    def set_workspace(self, address: int, nbytes: int) -> None:
        """See `Context.set_workspace`."""
        self._context.set_device_memory(address, nbytes)

    def enqueue(self, addresses: Mapping[str, int], stream: Stream) -> None:
        """See `Context.enqueue`."""
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise self._engine.error(f"{name} cannot be at address {address:#x}")
        if not self._context.execute_async_v3(stream.handle):
            raise self._engine.error("the run failed")
        if not self._ran:
            self._ran = True
            self._engine.save_cache()

    def obstacle(self, stream: Stream) -> str | None:
        """See `Context.obstacle`."""
        return self._engine.obstacle(self._context, stream)

    def close(self) -> None:
        """See `Context.close`."""
        self._context = None


def shape_mismatch(part: str, profiles: tuple[Profile, ...], inputs: Shapes) -> str | None:
    """Why an engine with these profiles does not accept inputs of these shapes, or None if it does."""
    if any(accepts(p, inputs) for p in profiles):
        return None
    first = profiles[0]
    wrong = next((n for n, s in inputs.items() if not accepts({n: first[n]}, {n: s})), next(iter(inputs)))
    others = f", and {len(profiles) - 1} more profiles" if len(profiles) > 1 else ""
    return (
        f"{part}: the engine takes {wrong} from {list(first[wrong].min)} to {list(first[wrong].max)}{others}, "
        f"got {list(inputs[wrong])}"
    )


def _shown(dtypes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {dtype.name}" for name, dtype in sorted(dtypes.items()))


def _make_logger(trt: ModuleType) -> Any:
    class Logger(trt.ILogger):  # type: ignore[name-defined]
        """Collects error messages until `take` returns them, and drops messages of lower severity."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self._lock = threading.Lock()

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                with self._lock:
                    self.errors.append(message.strip())

        def take(self) -> list[str]:
            with self._lock:
                errors, self.errors = self.errors, []
            return errors

    return Logger()


def _make_profiler(trt: ModuleType) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[name-defined]
        """Collects layer times. The library reports durations only, so a layer is taken to end when it is reported."""

        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.layers: list[LayerTime] = []
            self._end_us = 0.0

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            start = max(self._end_us, time.perf_counter_ns() / 1e3 - ms * 1e3)
            self._end_us = start + ms * 1e3
            self.layers.append(LayerTime(layer_name, "", start, ms * 1e3))

    return Profiler()
