"""cuda-python behind `gpu/device.py`. What needs a GPU skips without one; that the functions used exist is checked.

On a GPU: `pip install '.[gpu]'` and either TensorRT, TensorRT-RTX or onnxruntime-gpu, then `pytest -m gpu`.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from arcflow_runtime import EngineError, Pipeline
from arcflow_runtime.backends import open_backend
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.engines.gpus import find_gpu
from arcflow_runtime.engines.onnxruntime import OnnxRuntimeBackend
from arcflow_runtime.gpu.cuda import open_device

GPU = find_gpu()
needs_gpu = pytest.mark.skipif(GPU is None, reason="needs an NVIDIA GPU; the CUDA driver finds none here")
SIZE = {"height": 64, "width": 64, "seed": 1, "output_type": "latents"}


def test_the_functions_used_exist():
    core = pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    driver = importlib.import_module("cuda.bindings.driver")
    used = {
        core.Device: ("set_current", "create_stream", "create_event", "name", "device_id", "arch"),
        core.Stream: ("handle", "sync"),
        core.Event: ("sync", "handle"),
        driver: (
            *("cuMemAlloc", "cuMemFree", "cuMemHostAlloc", "cuMemFreeHost", "cuMemcpyAsync", "cuMemGetInfo"),
            *("cuEventRecordWithFlags", "cuEventElapsedTime"),
            *("cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphLaunch", "cuGraphDestroy"),
            "cuGraphExecDestroy",
        ),
    }
    for owner, names in used.items():
        for name in names:
            assert hasattr(owner, name), f"{owner}.{name}"
    assert int(driver.CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL) == 1
    assert core.EventOptions(timing_enabled=True, blocking_sync=True).timing_enabled


@pytest.mark.skipif(GPU is not None, reason="there is a GPU")
def test_no_gpu():
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    with pytest.raises(
        EngineError, match=r"^the CUDA driver finds no GPU here \(.*\); check that nvidia-smi lists one$"
    ):
        open_device()


def test_no_cuda_core(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(EngineError, match=r"^running on a GPU needs cuda-core; run: pip install .*\[gpu\]'"):
        open_device()


def test_nothing_of_it_is_imported_for_a_cpu():
    code = (
        "import sys\nfrom arcflow_runtime import Pipeline\nimport arcflow_runtime.engines.onnxruntime\n"
        "bad = [m for m in sys.modules if m.split('.')[0] in ('cuda', 'nvtx') or m.startswith('arcflow_runtime.gpu')]\n"
        "assert not bad, bad"
    )
    path = str(Path(__file__).parent.parent / "runtime")
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": path})


@pytest.mark.gpu
@needs_gpu
def test_copies_capture_and_replay():
    device = open_device()
    stream = device.make_stream()
    memory, pinned = device.allocate(1 << 20), device.allocate_pinned(2 << 20)
    half = 1 << 20
    stream.begin_capture()
    start, end = device.make_event(), device.make_event()
    stream.record(start)
    stream.copy(memory.address, pinned.address, half)
    stream.copy(pinned.address + half, memory.address, half)
    stream.record(end)
    graph = stream.end_capture()
    for value in (1, 2):
        pinned.array[:half] = value
        graph.launch()
        stream.wait()
        assert (pinned.array[half:] == value).all()
        assert end.ms_since(start) > 0
    graph.close()
    stream.begin_capture()
    stream.abort_capture()
    stream.copy(memory.address, pinned.address, half)
    stream.wait()
    memory.close()
    pinned.close()


def _pipelines(root):
    """The backends that work here, opened; building what TensorRT needs."""
    for name in ("tensorrt-rtx", "tensorrt", "onnxruntime-cuda"):
        backend = open_backend(name)
        try:
            if name.startswith("tensorrt"):
                subprocess.run(["arcflow", "build", str(root), "--backend", name], check=True, capture_output=True)
            yield name, Pipeline(Bundle.open(root), backend)
        except (EngineError, subprocess.CalledProcessError):
            continue


@pytest.fixture(scope="module")
def float32_root(bundles, tmp_path_factory):
    root = tmp_path_factory.mktemp("gpu") / "bundle"
    # TensorRT has no float32 kernels for attention as one operator.
    shutil.copytree(bundles("shapes", max_px=64, max_sequence_length=12, opset=20), root)
    return root


@pytest.mark.gpu
@needs_gpu
def test_pictures_on_a_gpu(float32_root):
    """Within 1e-3 of ONNX Runtime on the CPU, in float32: another order of summation through two calls; and a graph
    gives the very bits of plain enqueues."""
    with Pipeline(Bundle.open(float32_root), OnnxRuntimeBackend(None)) as plain:
        wanted = plain("a red circle", **SIZE).images
    ran = []
    for name, pipe in _pipelines(float32_root):
        with pipe:
            first, second, third = (pipe("a red circle", **SIZE).images for _ in range(3))
            np.testing.assert_allclose(first, wanted, rtol=0, atol=1e-3, err_msg=name)
            np.testing.assert_array_equal(second, first, err_msg=name)
            np.testing.assert_array_equal(third, first, err_msg=name)
            ran.append(name)
    if not ran:
        pytest.skip("neither TensorRT, TensorRT-RTX nor ONNX Runtime's CUDA provider works here")
