"""Engines by name: a backend's name -> the object that opens a bundle's parts with it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from arcflow_runtime.errors import EngineError

if TYPE_CHECKING:
    from arcflow_runtime.engines.base import Backend

#: Each module has a function `create(threads) -> Backend`.
BACKENDS = {
    "onnxruntime": "arcflow_runtime.engines.onnxruntime",
    "onnxruntime-cuda": "arcflow_runtime.gpu.onnxruntime_backend",
    "tensorrt": "arcflow_runtime.gpu.tensorrt_backend",
    "tensorrt-rtx": "arcflow_runtime.gpu.tensorrt_rtx_backend",
}
DEFAULT_BACKEND = "onnxruntime"


def open_backend(name: str, threads: int | None = None) -> Backend:
    """The backend called `name`.

    Args:
        name: a key of `BACKENDS`.
        threads: CPU threads per engine; None lets the engine choose.

    Raises:
        EngineError: no backend has this name.
    """
    if name not in BACKENDS:
        raise EngineError(f"backend must be one of {sorted(BACKENDS)}, got {name!r}")
    backend: Backend = importlib.import_module(BACKENDS[name]).create(threads)
    return backend
