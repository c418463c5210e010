"""ONNX Runtime on the CPU: a part's ONNX graph and its safetensors weights -> an engine."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.external_data import checked_graph
from arcflow_runtime.disk.manifest import Part
from arcflow_runtime.disk.quant_formats import check_runs
from arcflow_runtime.engines.base import LayerTime
from arcflow_runtime.engines.cpu import check_names, check_threads, first_line
from arcflow_runtime.engines.host_memory import available_bytes
from arcflow_runtime.engines.modes import ONNX_RUNTIME_CPU
from arcflow_runtime.engines.slots import empty_slots
from arcflow_runtime.errors import EngineError

# ONNX Runtime warns about dynamic shapes, which a user cannot act on; errors are raised as exceptions.
_LOG_ERRORS_ONLY = 3
# ONNX Runtime appends this to a node's name in the event that times its kernel.
_KERNEL_SUFFIX = "_kernel_time"


class OnnxRuntimeEngine:
    """One part in an ONNX Runtime session, which several threads may run at the same time."""

    def __init__(self, name: str, part: Part, session: ort.InferenceSession) -> None:
        self._name = name
        self._outputs = [spec.name for spec in part.outputs]
        self._without_loras = empty_slots(part)
        self._session: ort.InferenceSession | None = session

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph; see `Engine.run`."""
        session = self._session
        if session is None:
            raise EngineError(f"{self._name}: the engine is closed; load the pipeline again")
        try:
            outputs = session.run(self._outputs, {**self._without_loras, **inputs})
        except Exception as e:  # ONNX Runtime's exceptions have no common base class except Exception
            shapes = {name: f"{x.dtype}{list(x.shape)}" for name, x in inputs.items()}
            raise EngineError(f"{self._name}: ONNX Runtime failed on inputs {shapes}: {first_line(e)}") from e
        return dict(zip(self._outputs, outputs, strict=True))

    def close(self) -> None:
        """Free the session, after any run in another thread has finished."""
        self._session = None


class OnnxRuntimeProfiledEngine(OnnxRuntimeEngine):
    """An `OnnxRuntimeEngine` that times its layers.

    ONNX Runtime writes the times to a file in `folder`, which is removed once they are read or the engine is closed.
    """

    def __init__(self, name: str, part: Part, session: ort.InferenceSession, folder: Path) -> None:
        super().__init__(name, part, session)
        self._folder = folder

    def layer_times(self) -> list[LayerTime]:
        """The layers of every run so far; see `ProfiledEngine`."""
        session = self._session
        assert session is not None, "read before closing"
        origin_us = session.get_profiling_start_time_ns() / 1e3
        events = json.loads(Path(session.end_profiling()).read_bytes())
        self.close()
        return [
            LayerTime(
                event["name"].removesuffix(_KERNEL_SUFFIX),
                event["args"]["op_name"],
                origin_us + event["ts"],
                event["dur"],
            )
            for event in events
            if event.get("cat") == "Node" and event["name"].endswith(_KERNEL_SUFFIX)
        ]

    def close(self) -> None:
        """Free the session and remove its folder."""
        if self._session is not None:
            self._session.end_profiling()
        super().close()
        shutil.rmtree(self._folder, ignore_errors=True)


class OnnxRuntimeBackend:
    """Opens parts with ONNX Runtime's CPU provider."""

    memory_rules = ONNX_RUNTIME_CPU

    def __init__(self, threads: int | None) -> None:
        check_threads(threads)
        self._threads = threads

    def check(self, bundle: Bundle) -> None:
        """Check that no part is in bfloat16 or NVFP4, for which ONNX Runtime has no CPU kernels.

        Raises:
            EngineError: a part is; the message names it.
        """
        check_runs(bundle.manifest, "onnxruntime", "which ONNX Runtime cannot run on a CPU")
        for name, part in bundle.manifest.parts.items():
            dtypes = {part.precision} | {spec.dtype for spec in part.inputs + part.outputs}
            if "bfloat16" in dtypes:
                raise EngineError(
                    f"{name} is in bfloat16, which ONNX Runtime cannot run on a CPU; "
                    "export the bundle with --dtype float32"
                )

    def open(self, bundle: Bundle, part: str) -> OnnxRuntimeEngine:
        """Load a part; the session reads its external weights from the file beside the graph.

        Raises:
            BundleError: the graph's external data is not in the part's weights file.
            EngineError: the graph cannot be loaded, or its inputs or outputs differ from the manifest's.
        """
        session = open_session(bundle, part, session_options(self._threads), ["CPUExecutionProvider"])
        return OnnxRuntimeEngine(part, bundle.manifest.parts[part], session)

    def free_bytes(self) -> int | None:
        """Available memory of this machine; see `MeasuredBackend`."""
        return available_bytes()

    def built_bytes(self, bundle: Bundle, part: str) -> None:
        """None: parts run without built engines."""

    def open_profiled(self, bundle: Bundle, part: str) -> OnnxRuntimeProfiledEngine:
        """Load a part with layer timing; see `ProfilingBackend`."""
        folder, options = tempfile.mkdtemp(prefix="arcflow-profile-"), session_options(self._threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / part)
        try:
            session = open_session(bundle, part, options, ["CPUExecutionProvider"])
        except BaseException:
            shutil.rmtree(folder)
            raise
        return OnnxRuntimeProfiledEngine(part, bundle.manifest.parts[part], session, Path(folder))


def session_options(threads: int | None) -> ort.SessionOptions:
    """Options for a session on the CPU with `threads` threads (None: one per core)."""
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_ERRORS_ONLY
    options.intra_op_num_threads = threads or 0
    # Each part has its own thread pool. Idle threads must not spin, because the next part needs their cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without VNNI, products of uint8 and int8 (B15) would saturate in 16 bits. No effect on other CPUs.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def open_session(
    bundle: Bundle, part: str, options: ort.SessionOptions, providers: list[str | tuple[str, dict[str, str]]]
) -> ort.InferenceSession:
    """Load a part's graph with these execution providers.

    Raises:
        BundleError: the graph's external data is not in the part's weights file.
        EngineError: the graph cannot be loaded, or its inputs or outputs differ from the manifest's.
    """
    spec = bundle.manifest.parts[part]
    graph = checked_graph(bundle, part)
    options.log_severity_level = _LOG_ERRORS_ONLY
    # Without this, a file whose name ends in .ort would be read in a format that `checked_graph` did not check.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    try:
        session = ort.InferenceSession(str(graph), options, providers=providers)
    except Exception as e:  # ONNX Runtime's exceptions have no common base class except Exception
        raise EngineError(f"{part}: ONNX Runtime cannot load {spec.graph}: {first_line(e)}") from e
    check_names(bundle, part, (x.name for x in session.get_inputs()), (x.name for x in session.get_outputs()))
    return session


def create(threads: int | None) -> OnnxRuntimeBackend:
    """Create the backend with `threads` CPU threads per engine (None: one per core).

    Raises:
        RequestError: `threads` is below 1 or above the number of cores.
    """
    return OnnxRuntimeBackend(threads)
