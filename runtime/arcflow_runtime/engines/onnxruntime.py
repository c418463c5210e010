"""ONNX Runtime on the CPU: a part's ONNX graph and its safetensors weights -> an engine."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime as ort

from ..bundle import Bundle, Part
from ..errors import EngineError, RequestError

# Warnings of the optimiser about dynamic shapes mean nothing to a user; errors come as exceptions.
_LOG_ERRORS_ONLY = 3


class OnnxRuntimeEngine:
    """One part in an inference session; ONNX Runtime lets several threads run one session."""

    def __init__(self, name: str, part: Part, session: ort.InferenceSession) -> None:
        self._name = name
        self._outputs = [spec.name for spec in part.outputs]
        self._session: ort.InferenceSession | None = session

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph; see `Engine.run`."""
        session = self._session
        if session is None:
            raise EngineError(f"{self._name}: the engine is closed; load the pipeline again")
        try:
            outputs = session.run(self._outputs, dict(inputs))
        except Exception as e:  # ONNX Runtime's exceptions share no base but Exception
            shapes = {name: f"{x.dtype}{list(x.shape)}" for name, x in inputs.items()}
            raise EngineError(f"{self._name}: ONNX Runtime failed on inputs {shapes}: {_first_line(e)}") from e
        return dict(zip(self._outputs, outputs, strict=True))

    def close(self) -> None:
        """Free the session; a run in progress in another thread finishes first."""
        self._session = None


class OnnxRuntimeBackend:
    """Opens parts with ONNX Runtime's CPU provider."""

    def __init__(self, threads: int | None) -> None:
        if threads is not None and threads < 1:
            raise RequestError(f"threads must be at least 1, got {threads}; leave it out to use every core")
        self._threads = threads

    def check(self, bundle: Bundle) -> None:
        """Refuse parts in bfloat16, for which ONNX Runtime has no CPU kernels.

        Raises:
            EngineError: names the part.
        """
        for name, part in bundle.manifest.parts.items():
            dtypes = {part.precision} | {spec.dtype for spec in part.inputs + part.outputs}
            if "bfloat16" in dtypes:
                raise EngineError(
                    f"{name} is in bfloat16, which ONNX Runtime cannot run on a CPU; "
                    "export the bundle with --dtype float32"
                )

    def open(self, bundle: Bundle, part: str) -> OnnxRuntimeEngine:
        """Load a part; its external weights are read from beside the graph.

        Raises:
            EngineError: the graph cannot be loaded, or its inputs or outputs are not the manifest's.
        """
        spec = bundle.manifest.parts[part]
        options = ort.SessionOptions()
        options.log_severity_level = _LOG_ERRORS_ONLY
        options.intra_op_num_threads = self._threads or 0
        # Each part has its own threads: those of one must not spin on the cores that the next part needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = ort.InferenceSession(str(bundle.path(spec.graph)), options, providers=["CPUExecutionProvider"])
        except Exception as e:  # ONNX Runtime's exceptions share no base but Exception
            raise EngineError(f"{part}: ONNX Runtime cannot load {spec.graph}: {_first_line(e)}") from e
        for kind, said, found in (
            ("inputs", spec.inputs, session.get_inputs()),
            ("outputs", spec.outputs, session.get_outputs()),
        ):
            if {s.name for s in said} != {f.name for f in found}:
                raise EngineError(
                    f"{part}: the {kind} of {spec.graph} must be {sorted(s.name for s in said)}, "
                    f"as in the manifest, got {sorted(f.name for f in found)}; export the bundle again"
                )
        return OnnxRuntimeEngine(part, spec, session)


def create(threads: int | None) -> OnnxRuntimeBackend:
    """The backend, with `threads` CPU threads per engine (None: one per core).

    Raises:
        RequestError: `threads` is below 1.
    """
    return OnnxRuntimeBackend(threads)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
