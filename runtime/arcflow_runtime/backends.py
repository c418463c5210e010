"""Open a backend by name: "onnxruntime", "tensorrt", ... -> a `Backend`, which loads a bundle's parts as engines.

Called by `Pipeline.load`, the commands and the exporter's checks.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

from arcflow_runtime.engines.gpus import find_gpu
from arcflow_runtime.errors import EngineError

if TYPE_CHECKING:
    from arcflow_runtime.disk.bundle import Bundle
    from arcflow_runtime.engines.base import Backend

_log = logging.getLogger("arcflow")

#: Backend name -> its module, which has a function `create(threads) -> Backend`.
BACKENDS = {
    "onnxruntime": "arcflow_runtime.engines.onnxruntime",
    "openvino": "arcflow_runtime.engines.openvino",
    "onnxruntime-cuda": "arcflow_runtime.gpu.onnxruntime_backend",
    "tensorrt": "arcflow_runtime.gpu.tensorrt_backend",
    "tensorrt-rtx": "arcflow_runtime.gpu.tensorrt_rtx_backend",
}
DEFAULT_BACKEND = "onnxruntime"
#: In place of a backend's name: the fastest that is installed and runs the bundle on this machine.
AUTO = "auto"
#: Backends that run on the CPU.
ON_CPU = ("onnxruntime", "openvino")
_ON_GPU = ("tensorrt-rtx", "tensorrt", "onnxruntime-cuda")


def choices() -> list[str]:
    """What an option `--backend` accepts."""
    return [*sorted(BACKENDS), AUTO]


def open_backend(name: str, threads: int | None = None) -> Backend:
    """Open the backend `name`.

    Args:
        name: a key of `BACKENDS`.
        threads: CPU threads per engine; None lets the engine choose.

    Raises:
        EngineError: there is no backend of this name, or its library is not installed.
        RequestError: `threads` is invalid for this backend.
    """
    if name not in BACKENDS:
        raise EngineError(f"backend must be one of {choices()}, got {name!r}")
    backend: Backend = importlib.import_module(BACKENDS[name]).create(threads)
    return backend


def open_for(bundle: Bundle, name: str, threads: int | None = None) -> Backend:
    """Open the backend `name`, or for "auto" the one that `choose_backend` finds for `bundle`; see both."""
    return choose_backend(bundle, threads) if name == AUTO else open_backend(name, threads)


def choose_backend(bundle: Bundle, threads: int | None = None) -> Backend:
    """Open the fastest backend that runs `bundle` on this machine, and log its name.

    On a GPU that is TensorRT-RTX or TensorRT if engines for the GPU are built, then ONNX Runtime. On a CPU it is ONNX
    Runtime for a bundle in float32, and OpenVINO for other precisions, which it computes faster than float32.

    Args:
        bundle: an opened bundle.
        threads: CPU threads per engine, which chooses a CPU; None lets the engine choose.

    Raises:
        EngineError: no backend runs the bundle; the message has the reason of each.
        RequestError: `threads` is out of range.
    """
    float32 = all(part.precision == "float32" for part in bundle.manifest.parts.values())
    names: tuple[str, ...] = ON_CPU if float32 else ON_CPU[::-1]
    if threads is None and find_gpu() is not None:
        names = _ON_GPU + names
    reasons = []
    for name in names:
        try:
            backend = open_backend(name, threads)
            backend.check(bundle)
        except (EngineError, ModuleNotFoundError) as e:
            reasons.append(f"{name}: {e}")
        else:
            _log.info("backend: %s%s", name, f" ({'; '.join(reasons)})" if reasons else "")
            return backend
    raise EngineError("no backend can run this bundle here: " + "; ".join(reasons))
