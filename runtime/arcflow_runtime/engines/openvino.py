"""OpenVINO on the CPU: a part's ONNX graph and its safetensors weights -> an engine.

Each operator computes in the dtype that the graph gives it, or in float32 where the CPU has no instructions for that
dtype. OpenVINO calls this an inference precision of float32. A lower one would also be applied to operators that the
graph keeps in float32, such as norms: the heads of the tiny FLUX student in bfloat16 were then 12 % from float32 in
place of 0.6 %. Without an inference precision, images would depend on the machine.

Compiled models are not cached on disk. OpenVINO's cache holds all weights a second time (144 MB for a backbone of 144
MB) and reads them into memory that the system cannot take back, while a model that is compiled from its graph maps the
bundle's file. It saves a third of a loading time that does not grow with the weights: 0.30 s of processor time in place
of 0.45.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Mapping, Sequence, Set
from itertools import compress
from typing import Any

import numpy as np

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.external_data import checked_graph
from arcflow_runtime.disk.manifest import Part, TensorSpec
from arcflow_runtime.disk.quant_formats import check_runs, formats_of
from arcflow_runtime.engines.base import LayerTime
from arcflow_runtime.engines.cpu import check_names, check_threads, first_line
from arcflow_runtime.engines.host_memory import available_bytes
from arcflow_runtime.engines.modes import OPENVINO, OPENVINO_WIDENED
from arcflow_runtime.engines.slots import empty_slots
from arcflow_runtime.errors import EngineError
from arcflow_runtime.installing import install_command

try:
    import openvino as ov
except ModuleNotFoundError:
    command = install_command("arcflow_runtime", "openvino")
    raise EngineError(f"the backend openvino needs openvino, which is not installed; run: {command}") from None

_log = logging.getLogger("arcflow")
_DEVICE = "CPU"
#: Dtype of an input or output -> OpenVINO's type.
_TYPES = {
    "float32": ov.Type.f32,
    "float16": ov.Type.f16,
    "bfloat16": ov.Type.bf16,
    "int64": ov.Type.i64,
    "uint8": ov.Type.u8,
}
#: Precision of a part -> what OpenVINO calls it in the list of a CPU's capabilities.
_CAPABILITIES = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}


class OpenVinoEngine:
    """One part as a compiled model, which several threads may run at the same time."""

    def __init__(self, name: str, part: Part, model: ov.CompiledModel) -> None:
        self._name = name
        self._part = part
        self._dtypes = {spec.name: spec.dtype for spec in part.inputs} | part.slot_dtypes
        self._empty = empty_slots(part)
        self._model: ov.CompiledModel | None = model
        # A request has memory of its own, so each run takes one. Appending to a list and popping from it are atomic.
        self._requests: list[ov.InferRequest] = []

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph; see `Engine.run`."""
        model = self._model
        if model is None:
            raise EngineError(f"{self._name}: the engine is closed; load the pipeline again")
        try:
            request = self._requests.pop() if self._requests else model.create_infer_request()
        except IndexError:  # another thread took the last one
            request = model.create_infer_request()
        try:
            given = {**self._empty, **inputs}
            for name, dtype in self._dtypes.items():
                request.set_tensor(name, _tensor(given[name], dtype))
            self._infer(request)
            outputs = {spec.name: _array(request.get_tensor(spec.name), spec) for spec in self._part.outputs}
        except RuntimeError as e:
            shapes = {name: f"{x.dtype}{list(x.shape)}" for name, x in inputs.items()}
            raise EngineError(f"{self._name}: OpenVINO failed on inputs {shapes}: {last_line(e)}") from e
        self._requests.append(request)  # one that failed is not used again
        return outputs

    def _infer(self, request: ov.InferRequest) -> None:
        request.infer()

    def close(self) -> None:
        """Free the model, after any run in another thread has finished."""
        self._model = None
        self._requests.clear()


class OpenVinoProfiledEngine(OpenVinoEngine):
    """An `OpenVinoEngine` that times its layers; for one thread.

    OpenVINO gives the duration of each layer, not its start. Layers are placed one after the other from the start of
    their run. The operator's name ends with the dtype that it was computed in, such as "FullyConnected bf16".
    """

    def __init__(self, name: str, part: Part, model: ov.CompiledModel) -> None:
        super().__init__(name, part, model)
        self._runs: list[list[LayerTime]] = []

    def _infer(self, request: ov.InferRequest) -> None:
        start_us = time.perf_counter_ns() / 1e3
        super()._infer(request)
        run = []
        for layer in request.get_profiling_info():
            duration_us = layer.real_time.total_seconds() * 1e6
            operator = f"{layer.node_type} {layer.exec_type.rpartition('_')[2]}"
            run.append(LayerTime(layer.node_name, operator, start_us, duration_us))
            start_us += duration_us
        self._runs.append(run)

    def layer_times(self) -> list[LayerTime]:
        """The layers of every run so far; see `ProfiledEngine`."""
        self.close()
        # Constants, and layers that were fused into others, are listed with a time of 0 in every run.
        ran = [any(layer.duration_us for layer in layers) for layers in zip(*self._runs, strict=True)]
        return [layer for run in self._runs for layer in compress(run, ran)]


class OpenVinoBackend:
    """Opens parts with OpenVINO's CPU plugin."""

    def __init__(self, threads: int | None) -> None:
        check_threads(threads)
        self._threads = threads
        self.memory_rules = OPENVINO
        self._core = _core()
        self._capabilities = frozenset(self._core.get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES"))

    def check(self, bundle: Bundle) -> None:
        """Check that no part is in a format that it rounds wrongly, and log which parts it computes in float32.

        Raises:
            EngineError: a part is quantised to such a format; the message names it.
        """
        parts = bundle.manifest.parts
        check_runs(
            bundle.manifest,
            "openvino",
            "which OpenVINO does not round correctly on a CPU; use the bundle that it was quantised from, or "
            "--backend onnxruntime",
        )
        for precision in sorted({p.precision for p in parts.values()} - {"float32"}):
            if not self._has(precision):
                self.memory_rules = OPENVINO_WIDENED
                names = ", ".join(name for name, part in parts.items() if part.precision == precision)
                _log.warning(
                    f"this CPU has no {precision} instructions, so OpenVINO computes {names} in float32, which is "
                    "slower and needs more memory"
                )

    def open(self, bundle: Bundle, part: str) -> OpenVinoEngine:
        """Load a part. Its weights are mapped; the first run copies those of linears in the CPU's order.

        Raises:
            BundleError: the graph's external data is not in the part's weights file.
            EngineError: the graph cannot be loaded, or its inputs or outputs differ from the manifest's.
        """
        return OpenVinoEngine(part, bundle.manifest.parts[part], self._compiled(bundle, part, self._properties()))

    def open_profiled(self, bundle: Bundle, part: str) -> OpenVinoProfiledEngine:
        """Load a part with layer timing; see `ProfilingBackend`."""
        model = self._compiled(bundle, part, self._properties() | {"PERF_COUNT": True})
        return OpenVinoProfiledEngine(part, bundle.manifest.parts[part], model)

    def _compiled(self, bundle: Bundle, part: str, properties: dict[str, Any]) -> ov.CompiledModel:
        spec = bundle.manifest.parts[part]
        graph = checked_graph(bundle, part)
        try:
            model = self._core.read_model(str(graph))
            inputs = {s.name for s in spec.inputs} | spec.slot_dtypes.keys()
            outputs = {s.name for s in spec.outputs}
            check_names(bundle, part, _names(model.inputs, inputs), _names(model.outputs, outputs))
            if "int8" in formats_of(spec):
                from arcflow_runtime.engines import openvino_int8

                openvino_int8.multiply_stored_weights(model, part)
                properties = properties | openvino_int8.PROPERTIES
            return self._core.compile_model(model, _DEVICE, properties)
        except RuntimeError as e:
            raise EngineError(f"{part}: OpenVINO cannot load {spec.graph}: {last_line(e)}") from e

    def free_bytes(self) -> int | None:
        """Available memory of this machine; see `MeasuredBackend`."""
        return available_bytes()

    def built_bytes(self, bundle: Bundle, part: str) -> None:
        """None: parts run without built engines."""

    def _has(self, precision: str) -> bool:
        return _CAPABILITIES[precision] in self._capabilities

    def _properties(self) -> dict[str, Any]:
        properties: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "EXECUTION_MODE_HINT": "ACCURACY",
            "INFERENCE_PRECISION_HINT": ov.Type.f32,
            "NUM_STREAMS": 1,
            # Each part has threads of its own. If they were pinned, those of all parts would share the first cores.
            "ENABLE_CPU_PINNING": False,
        }
        if self._threads is not None:
            # A stream runs one call at a time. As many run side by side as there are cores for their threads.
            streams = (os.cpu_count() or 1) // self._threads
            properties |= {"NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": streams * self._threads}
        return properties


@functools.cache
def _core() -> ov.Core:
    """OpenVINO with its CPU plugin, loaded once and until the process ends.

    A library that the plugin loads sets an alternate signal stack for the calling thread. If another thread unloaded
    the plugin, that stack would be gone, and the next signal, such as a Ctrl-C, would end the process.
    """
    return ov.Core()


def create(threads: int | None) -> OpenVinoBackend:
    """Create the backend with `threads` CPU threads per engine (None: one per core).

    Raises:
        RequestError: `threads` is below 1 or above the number of cores.
    """
    return OpenVinoBackend(threads)


def last_line(error: Exception) -> str:
    """The last line of OpenVINO's message, which says what failed; those before it name its source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else first_line(error)


def _tensor(array: np.ndarray, dtype: str) -> ov.Tensor:
    """A tensor that shares memory with `array`."""
    return ov.Tensor(array, list(array.shape), _TYPES[dtype])


def _array(tensor: ov.Tensor, spec: TensorSpec) -> np.ndarray:
    """A copy of a tensor as an array. OpenVINO shows bfloat16 as float16 with the same bits; here it is uint16."""
    data = tensor.data
    return (data.view(np.uint16) if spec.dtype == "bfloat16" else data).copy()


def _names(ports: Sequence[Any], known: Set[str]) -> list[str]:
    """The name of each port. A tensor may have several; if one of them is in the manifest, it is that one."""
    return [min(port.get_names() & known or port.get_names() or {""}) for port in ports]
