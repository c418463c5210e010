"""cuda-python behind `gpu/device.py`: the functions used exist, and what is said without it or without a GPU.

What needs a GPU is in tests/gpu/.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from arcflow_runtime import EngineError
from arcflow_runtime.engines.gpus import find_gpu
from arcflow_runtime.gpu.cuda import open_device


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


@pytest.mark.skipif(find_gpu() is not None, reason="there is a GPU")
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
