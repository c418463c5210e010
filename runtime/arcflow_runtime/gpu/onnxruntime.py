"""Run parts on a GPU with ONNX Runtime: a session -> contexts that run on device addresses (see `engine.py`).

`OrtArrayEngine` runs a session on numpy arrays, for an installation without cuda-core. Used by
`onnxruntime_backend.py`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Literal

import numpy as np
import onnxruntime as ort

from arcflow_runtime.disk.manifest import DType, Manifest, Part
from arcflow_runtime.engines.cpu import first_line
from arcflow_runtime.errors import EngineError
from arcflow_runtime.gpu.device import Stream
from arcflow_runtime.gpu.engine import Shapes
from arcflow_runtime.gpu.loras import pad_inputs
from arcflow_runtime.gpu.shapes import output_shapes
from arcflow_runtime.maths.dtypes import NUMPY

#: Dtype -> TensorProto.DataType. ONNX Runtime's Python API names bfloat16 only by this number.
_ONNX: dict[DType, int] = {"float32": 1, "uint8": 2, "int64": 7, "float16": 10, "bfloat16": 16}
DeviceType = Literal["cuda", "cpu"]


class OrtEngine:
    """A session that runs on addresses of `device_type` memory; implements `engine.DeviceEngine`."""

    def __init__(self, manifest: Manifest, part: str, session: ort.InferenceSession, device_type: DeviceType) -> None:
        self.manifest, self.part, self.device_type = manifest, part, device_type
        self._session: ort.InferenceSession | None = session

    def context(self, inputs: Shapes, stream: Stream) -> OrtContext:
        """Make a context for inputs of these shapes; see `DeviceEngine.context`."""
        if self._session is None:
            raise EngineError(f"{self.part}: the engine is closed; load the pipeline again")
        return OrtContext(self, self._session, inputs)

    def close(self) -> None:
        """Free the session."""
        self._session = None


class OrtContext:
    """A session with fixed input shapes; implements `engine.Context`. ONNX Runtime allocates its own activations."""

    workspace_bytes = 0

    def __init__(self, engine: OrtEngine, session: ort.InferenceSession, inputs: Shapes) -> None:
        spec = engine.manifest.parts[engine.part]
        outputs = output_shapes(engine.manifest, engine.part, inputs)
        self._engine = engine
        self._session: ort.InferenceSession | None = session
        dtypes = {s.name: s.dtype for s in spec.inputs} | spec.slot_dtypes
        self._inputs = [(name, _ONNX[dtype], inputs[name]) for name, dtype in dtypes.items()]
        self._outputs = [(s.name, _ONNX[s.dtype], outputs[s.name]) for s in spec.outputs]
        self._options = ort.RunOptions()
        # No synchronisation after a run: the next work is enqueued in the same stream.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def set_workspace(self, address: int, nbytes: int) -> None:
        """Do nothing: `workspace_bytes` is 0."""

    def enqueue(self, addresses: Mapping[str, int], stream: Stream) -> None:
        """See `Context.enqueue`; `stream` is the one that the session was opened with."""
        assert self._session is not None, "a closed context is never enqueued"
        binding, where = self._session.io_binding(), self._engine.device_type
        for name, dtype, shape in self._inputs:
            binding.bind_input(name, where, 0, dtype, shape, addresses[name])
        for name, dtype, shape in self._outputs:
            binding.bind_output(name, where, 0, dtype, shape, addresses[name])
        try:
            self._session.run_with_iobinding(binding, self._options)
        except Exception as e:  # ONNX Runtime's exceptions have no common base class except Exception
            shapes = {name: list(shape) for name, _, shape in self._inputs}
            raise EngineError(f"{self._engine.part}: ONNX Runtime failed on inputs {shapes}: {first_line(e)}") from e

    def obstacle(self, stream: Stream) -> str | None:
        """ONNX Runtime allocates memory during a run, which a capture forbids."""
        return "ONNX Runtime's runs cannot be captured"

    def close(self) -> None:
        """See `Context.close`."""
        self._session = None


class OrtArrayEngine:
    """A session that runs on host arrays, bfloat16 included; implements `Engine`."""

    def __init__(self, part: str, spec: Part, session: ort.InferenceSession) -> None:
        self._part, self._spec = part, spec
        self._session: ort.InferenceSession | None = session

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph; see `Engine.run`."""
        session = self._session
        if session is None:
            raise EngineError(f"{self._part}: the engine is closed; load the pipeline again")
        binding, slots = session.io_binding(), self._spec.lora
        dtypes = {spec.name: spec.dtype for spec in self._spec.inputs} | self._spec.slot_dtypes
        if slots is not None:
            inputs = {**inputs, **pad_inputs(slots, inputs)}
        try:
            for name, dtype in dtypes.items():
                value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(inputs[name], _ONNX[dtype])
                binding.bind_ortvalue_input(name, value)
            for spec in self._spec.outputs:
                binding.bind_output(spec.name, "cpu")
            session.run_with_iobinding(binding)
            outputs = binding.get_outputs()
        except Exception as e:  # ONNX Runtime's exceptions have no common base class except Exception
            shapes = {name: f"{x.dtype}{list(x.shape)}" for name, x in inputs.items()}
            raise EngineError(f"{self._part}: ONNX Runtime failed on inputs {shapes}: {first_line(e)}") from e
        return {s.name: _to_array(v, s.dtype) for s, v in zip(self._spec.outputs, outputs, strict=True)}

    def close(self) -> None:
        """Free the session, after any run in another thread has finished."""
        self._session = None


def _to_array(value: ort.OrtValue, dtype: DType) -> np.ndarray:
    """Copy a host tensor to an array; `OrtValue.numpy` does not support bfloat16."""
    nbytes = value.tensor_size_in_bytes()
    data = ctypes.string_at(value.data_ptr(), nbytes) if nbytes else b""
    return np.frombuffer(bytearray(data), NUMPY[dtype]).reshape(value.shape())
