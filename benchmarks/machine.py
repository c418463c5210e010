"""Describe the machine on which a benchmark ran."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("arcflow", "torch", "diffusers", "transformers", "onnxruntime", "numpy", "onnx-ir", "onnxscript")
#: What a benchmark on a GPU names besides.
GPU_PACKAGES = ("cuda-bindings", "cuda-core", "nvidia-cuda-nvrtc", "onnxruntime-gpu", "tensorrt", "triton")


def describe(more: Sequence[str] = ()) -> dict[str, Any]:
    """CPU model, cores, memory, kernel, and the versions of Python, and of `PACKAGES` and `more` that are installed."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: version for name in (*PACKAGES, *more) if (version := _version(name)) is not None},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
