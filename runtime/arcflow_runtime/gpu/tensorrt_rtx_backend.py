"""The backend "tensorrt-rtx", which is `tensorrt_backend.py` with the library TensorRT-RTX."""

from __future__ import annotations

from arcflow_runtime.gpu import tensorrt_backend


def create(threads: int | None) -> tensorrt_backend.TensorRTBackend:
    """Create the backend; see `tensorrt_backend.create`."""
    return tensorrt_backend.create(threads, "tensorrt-rtx")
