"""Run an ArcFlow bundle: prompt -> image, without torch.

from arcflow_runtime import Pipeline
image = Pipeline.load("bundle")("a red circle", seed=42).images[0]
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arcflow_runtime.disk.bundle import Bundle
    from arcflow_runtime.errors import ArcFlowError, BundleError, EngineError, LoraError, RequestError, SourceError
    from arcflow_runtime.generate.pipeline import Pipeline, PipelineOutput

__all__ = [
    "ArcFlowError",
    "Bundle",
    "BundleError",
    "EngineError",
    "LoraError",
    "Pipeline",
    "PipelineOutput",
    "RequestError",
    "SourceError",
]

# From version 1.29 on, ONNX Runtime sends telemetry to Microsoft and keeps a device id, unless this is set before it is
# imported. Whoever wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Modules are imported on first use of a name, so that `arcflow --help` does not import numpy.
_MODULES = {
    "ArcFlowError": "arcflow_runtime.errors",
    "Bundle": "arcflow_runtime.disk.bundle",
    "BundleError": "arcflow_runtime.errors",
    "EngineError": "arcflow_runtime.errors",
    "LoraError": "arcflow_runtime.errors",
    "Pipeline": "arcflow_runtime.generate.pipeline",
    "PipelineOutput": "arcflow_runtime.generate.pipeline",
    "RequestError": "arcflow_runtime.errors",
    "SourceError": "arcflow_runtime.errors",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
