"""TensorRT-RTX; everything is as in `tensorrt.py`."""

from __future__ import annotations

from . import tensorrt


def create(threads: int | None) -> tensorrt.TensorRTBackend:
    """The backend; see `tensorrt.create`."""
    return tensorrt.create(threads, "tensorrt-rtx")
