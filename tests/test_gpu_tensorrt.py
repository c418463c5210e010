"""TensorRT's backends without a GPU; tests/host_cuda/tensorrt_cases.py has those that run engines."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import replace

import pytest

from arcflow_runtime import EngineError, Pipeline, RequestError
from arcflow_runtime.backends import open_backend
from arcflow_runtime.engines import store
from arcflow_runtime.engines import tensorrt_library as library
from tests.host_cuda import tensorrt_bindings as bindings


@pytest.fixture
def root(bundles):
    return bundles("flux-tiny")


def test_no_gpu_and_no_library_are_errors_before_anything_else(root, monkeypatch):
    monkeypatch.setattr(store, "find_gpu", lambda: None)
    for name in ("tensorrt", "tensorrt-rtx"):
        monkeypatch.setitem(sys.modules, library.LIBRARIES[name].module, None)
        with pytest.raises(EngineError, match=rf"^{name} is not installed; run: pip install '{name}>="):
            Pipeline.load(root, backend=name)
    with pytest.raises(RequestError, match=r"^threads is for backends that run on a CPU, got 2 for tensorrt-rtx"):
        open_backend("tensorrt-rtx", 2)


def test_no_gpu(root, monkeypatch):
    changed = {n: replace(x, module=bindings.__name__) for n, x in library.LIBRARIES.items()}
    monkeypatch.setattr(store, "LIBRARIES", changed)
    monkeypatch.setattr(store, "find_gpu", lambda: None)
    text = (
        "tensorrt-rtx engines run on an NVIDIA GPU, and the CUDA driver finds none here; "
        "check that nvidia-smi lists one"
    )
    with pytest.raises(EngineError, match=f"^{re.escape(text)}$"):
        Pipeline.load(root, backend="tensorrt-rtx")


def test_the_real_library_has_what_is_used():
    """Every class, member and method of the stand-in exists in TensorRT-RTX 1.7."""
    real = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    classes = [c for c in vars(bindings).values() if inspect.isclass(c) and c.__module__ == bindings.__name__]
    public = [c for c in classes if not c.__name__.startswith("_")]
    assert len(public) > 10
    for stand_in in public:
        found = getattr(real, stand_in.__name__)
        for member in vars(stand_in):
            assert member.startswith("_") or hasattr(found, member), f"{stand_in.__name__}.{member}"
    assert hasattr(real.ICudaEngine, "num_io_tensors")
    assert hasattr(real.IProfiler, "report_layer_time")
    assert hasattr(real.IExecutionContext, "profiler")
    assert hasattr(real.ParserError, "desc")
    assert real.ILogger.ERROR < real.ILogger.WARNING
