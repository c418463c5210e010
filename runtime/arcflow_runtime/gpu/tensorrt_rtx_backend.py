"""TensorRT-RTX; everything is as in `tensorrt.py`."""

from __future__ import annotations

from arcflow_runtime.gpu import tensorrt_backend as tensorrt


def create(threads: int | None) -> tensorrt.TensorRTBackend:
    """The backend; see `tensorrt.create`."""
    return tensorrt.create(threads, "tensorrt-rtx")
