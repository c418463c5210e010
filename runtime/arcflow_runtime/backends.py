"""Open a backend by name: "onnxruntime", "tensorrt", ... -> a `Backend`, which loads a bundle's parts as engines.

Called by `Pipeline.load`, the commands and the exporter's checks.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from arcflow_runtime.errors import EngineError

if TYPE_CHECKING:
    from arcflow_runtime.engines.base import Backend

#: Backend name -> its module, which has a function `create(threads) -> Backend`.
BACKENDS = {
    "onnxruntime": "arcflow_runtime.engines.onnxruntime",
    "onnxruntime-cuda": "arcflow_runtime.gpu.onnxruntime_backend",
    "tensorrt": "arcflow_runtime.gpu.tensorrt_backend",
    "tensorrt-rtx": "arcflow_runtime.gpu.tensorrt_rtx_backend",
}
DEFAULT_BACKEND = "onnxruntime"


def open_backend(name: str, threads: int | None = None) -> Backend:
    """Open the backend `name`.

    Args:
        name: a key of `BACKENDS`.
        threads: CPU threads per engine; None lets the engine choose.

    Raises:
        EngineError: there is no backend of this name.
        RequestError: `threads` is invalid for this backend.
    """
    if name not in BACKENDS:
        raise EngineError(f"backend must be one of {sorted(BACKENDS)}, got {name!r}")
    backend: Backend = importlib.import_module(BACKENDS[name]).create(threads)
    return backend
