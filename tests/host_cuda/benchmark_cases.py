"""benchmarks/update_kernel.py on the driver made of host memory: what it times are launches of graphs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from arcflow_runtime.gpu.kernels import UpdateShape
from tests.host_cuda.control import Live


@pytest.fixture
def bench(driver, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent.parent / "benchmarks"))
    import update_kernel

    yield update_kernel.Bench()
    for name in ("update_kernel", "machine"):
        sys.modules.pop(name)


@pytest.mark.slow
def test_the_host_launches_one_graph_for_all_launches_of_a_kernel(bench, driver):
    """Each kernel is launched twice by the host, as a warm-up and for the capture, and replayed in every run."""
    runs = 3
    shape = UpdateShape(2, 16, 64, 4, "float32", "bfloat16")
    before = [driver.live(kind) for kind in (Live.DEVICE_BYTES, Live.PINNED_BYTES, Live.EXECUTABLES)]
    driver.reset()
    row = bench.measure(shape, runs, 50_000)
    assert row["launches"] >= 20
    assert driver.calls("cuLaunchKernelEx") == 2 * row["launches"]
    graphs = driver.calls("cuGraphLaunch")
    assert graphs >= 2 * runs
    assert driver.calls("run:kernel") == row["launches"] * (1 + graphs // 2)
    assert [driver.live(kind) for kind in (Live.DEVICE_BYTES, Live.PINNED_BYTES, Live.EXECUTABLES)] == before


@pytest.mark.slow
def test_no_buffer_is_used_twice_before_all_others(bench, driver, monkeypatch):
    """A graph goes through whole rounds of buffers, which together are larger than the cache."""
    shape = UpdateShape(2, 16, 64, 4, "float32", "bfloat16")
    used = []
    launch = bench.kernels.update
    monkeypatch.setattr(
        bench.kernels,
        "update",
        lambda stream, shape, means, *rest: (used.append(means), launch(stream, shape, means, *rest)),
    )
    row = bench.measure(shape, 2, 50_000)
    sets = len(set(used))
    assert sets == -(-50_000 // row["moved_bytes"])
    assert row["launches"] % sets == 0
    assert used == used[:sets] * (len(used) // sets)
