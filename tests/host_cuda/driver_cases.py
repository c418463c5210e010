"""The driver made of host memory itself: what it delays, what it refuses, and with which CUDA errors."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda.bindings import driver as cuda

from arcflow_runtime.gpu.kernel_code import cache_folder, cached_code
from tests.host_cuda.checked import BYTES, Pinned, error, host, ok, read
from tests.host_cuda.control import Code, Driver, Live, When

pytestmark = pytest.mark.usefixtures("context")


# Delayed work and poisoned memory


def test_work_waits_for_a_wait(stream, memory, driver):
    source, target = Pinned(1), Pinned(0)
    ok(cuda.cuMemcpyHtoDAsync(memory, source.address, BYTES, stream))
    ok(cuda.cuMemcpyDtoHAsync(target.address, memory, BYTES, stream))
    assert (target.array == 0).all()
    assert driver.live(Live.PENDING) == 2
    source.array[:] = 2  # a copy reads when it runs
    ok(cuda.cuStreamSynchronize(stream))
    assert (target.array == 2).all()


def test_a_wait_for_an_event_runs_no_more_than_it_needs(stream, memory, event):
    source, target, late = Pinned(1), Pinned(0), Pinned(0)
    ok(cuda.cuMemcpyHtoDAsync(memory, source.address, BYTES, stream))
    ok(cuda.cuMemcpyDtoHAsync(target.address, memory, BYTES, stream))
    ok(cuda.cuEventRecord(event, stream))
    ok(cuda.cuMemcpyDtoHAsync(late.address, memory, BYTES, stream))
    ok(cuda.cuEventSynchronize(event))
    assert ((target.array == 1).all(), (late.array == 0).all()) == (True, True)


def test_a_query_goes_on_step_by_step(stream, memory, event):
    source = Pinned(1)
    for _ in range(2):
        ok(cuda.cuMemcpyHtoDAsync(memory, source.address, BYTES, stream))
    ok(cuda.cuEventRecord(event, stream))
    assert [error(cuda.cuEventQuery(event)) for _ in range(4)] == ["NOT_READY", "NOT_READY", "SUCCESS", "SUCCESS"]


def test_streams_are_ordered_by_events_only(stream, other, memory, event):
    source, target = Pinned(1), Pinned(0)
    ok(cuda.cuMemcpyHtoDAsync(memory, source.address, BYTES, stream))
    ok(cuda.cuEventRecord(event, stream))
    ok(cuda.cuMemcpyDtoHAsync(target.address, memory, BYTES, other))
    ok(cuda.cuStreamSynchronize(other))
    assert (target.array == 0xFF).all()  # the fill of new memory: nothing made the copy wait
    ok(cuda.cuStreamWaitEvent(other, event, 0))
    ok(cuda.cuMemcpyDtoHAsync(target.address, memory, BYTES, other))
    ok(cuda.cuStreamSynchronize(other))
    assert (target.array == 1).all()


def test_the_default_stream_takes_turns_with_blocking_streams(memory):
    blocking = ok(cuda.cuStreamCreate(0))
    ok(cuda.cuMemsetD8Async(memory, 5, BYTES, blocking))
    assert (read(memory) == 5).all()
    ok(cuda.cuStreamDestroy(blocking))


def test_new_memory_is_nan(memory):
    assert np.isnan(read(memory).view(np.float32)).all()


def test_pageable_memory_is_read_at_once_and_written_before_the_call_returns(stream, memory):
    source, target = np.ones(BYTES, np.uint8), np.zeros(BYTES, np.uint8)
    ok(cuda.cuMemcpyHtoDAsync(memory, host(source), BYTES, stream))
    source[:] = 2
    ok(cuda.cuMemcpyDtoHAsync(host(target), memory, BYTES, stream))
    assert (target == 1).all()


def test_the_host_cannot_read_the_device():
    code = (
        "import ctypes\nfrom cuda.bindings import driver as cuda\ncuda.cuInit(0)\n"
        "cuda.cuCtxSetCurrent(cuda.cuDevicePrimaryCtxRetain(0)[1])\n"
        "ctypes.string_at(int(cuda.cuMemAlloc(4)[1]), 4)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == -signal.SIGSEGV


# Addresses


@pytest.mark.parametrize(("offset", "nbytes"), [(1, BYTES), (0, BYTES + 1), (BYTES + 1, 1), (-1, 1)])
def test_a_copy_outside_of_an_allocation_is_refused(offset, nbytes, stream, memory):
    source = np.zeros(2 * BYTES, np.uint8)
    assert error(cuda.cuMemcpyHtoDAsync(memory + offset, host(source), nbytes, stream)) == "INVALID_VALUE"


def test_what_is_freed_before_it_is_used_loses_the_context(stream, driver):
    memory = int(ok(cuda.cuMemAlloc(BYTES)))
    ok(cuda.cuMemsetD8Async(memory, 1, BYTES, stream))
    ok(cuda.cuMemFree(memory))
    assert error(cuda.cuMemsetD8Async(memory, 1, BYTES, stream)) == "INVALID_VALUE"
    for _ in range(2):
        assert error(cuda.cuStreamSynchronize(stream)) == "ILLEGAL_ADDRESS"
    assert error(cuda.cuMemAlloc(1)) == "ILLEGAL_ADDRESS"
    assert driver.fault() == f"memset's target: {BYTES} bytes are not in one live allocation"
    driver.reset()
    ok(cuda.cuMemFree(ok(cuda.cuMemAlloc(1))))


def test_memory_is_freed_once_and_addresses_are_not_given_again_soon(memory):
    assert error(cuda.cuMemFree(memory + 1)) == "INVALID_VALUE"
    first = int(ok(cuda.cuMemAlloc(BYTES)))
    ok(cuda.cuMemFree(first))
    assert error(cuda.cuMemFree(first)) == "INVALID_VALUE"
    second = int(ok(cuda.cuMemAlloc(BYTES)))
    assert second != first
    ok(cuda.cuMemFree(second))


def test_there_is_as_much_memory_as_was_set(driver):
    free, total = ok(cuda.cuMemGetInfo())
    driver.set_memory(total - free + 1000)
    assert error(cuda.cuMemAlloc(1001)) == "OUT_OF_MEMORY"
    address = ok(cuda.cuMemAlloc(1000))
    assert ok(cuda.cuMemGetInfo()) == (0, total - free + 1000)
    ok(cuda.cuMemFree(address))


# Injected failures


def test_the_nth_call_fails(driver):
    driver.fail("cuMemAlloc", 2, Code.OUT_OF_MEMORY)
    first = ok(cuda.cuMemAlloc(1))
    assert error(cuda.cuMemAlloc(1)) == "OUT_OF_MEMORY"
    second = ok(cuda.cuMemAlloc(1))
    assert driver.calls("cuMemAlloc") == 3
    for address in (first, second):
        ok(cuda.cuMemFree(address))


def test_a_call_in_a_capture_fails_and_breaks_it(begin, stream, memory, driver):
    driver.fail("cuMemsetD8Async", 1, Code.UNKNOWN, When.IN_CAPTURE)
    ok(cuda.cuMemsetD8Async(memory, 1, BYTES, stream))
    begin()
    assert error(cuda.cuMemsetD8Async(memory, 1, BYTES, stream)) == "UNKNOWN"
    assert error(cuda.cuStreamEndCapture(stream)) == "STREAM_CAPTURE_INVALIDATED"


def test_work_fails_when_it_runs(stream, memory, driver):
    driver.fail("run:memset", 2, Code.LAUNCH_FAILED)
    for _ in range(2):
        ok(cuda.cuMemsetD8Async(memory, 1, BYTES, stream))
    assert error(cuda.cuStreamSynchronize(stream)) == "LAUNCH_FAILED"
    driver.reset()


def test_engines_of_other_code_run_in_order(stream, memory, driver: Driver):
    seen, kept = [], []

    def work():
        found = driver.at(memory, BYTES)
        seen.append(ctypes.string_at(found, 1)[0])
        ctypes.memset(found, 9, BYTES)

    ok(cuda.cuMemsetD8Async(memory, 7, BYTES, stream))
    assert driver.enqueue(int(stream), work, kept) == 0
    assert seen == []
    ok(cuda.cuStreamSynchronize(stream))
    assert seen == [7]
    assert (read(memory) == 9).all()
    assert driver.at(memory, BYTES + 1) is None


def test_an_engine_that_fails_loses_the_context(stream, driver, capfd):
    def work():
        raise ValueError("of the engine")

    assert driver.enqueue(int(stream), work, kept := []) == 0
    assert error(cuda.cuStreamSynchronize(stream)) == "LAUNCH_FAILED"
    assert "ValueError: of the engine" in capfd.readouterr().err
    assert kept
    driver.reset()


# Code


def test_the_functions_that_the_cpp_library_loads_are_there():
    source = Path(__file__).parent.parent.parent / "runtime" / "cpp" / "src" / "trt_cuda.cpp"
    names = set(re.findall(r"\bcu[A-Z]\w+\b(?=\))", source.read_text(encoding="utf-8")))
    assert {"cuInit", "cuMemAlloc_v2", "cuGraphLaunch"} <= names
    library = ctypes.CDLL("libcuda.so.1")
    assert [name for name in sorted(names) if not hasattr(library, name)] == []


def test_only_code_for_a_gpu_is_loaded_and_has_only_its_own_kernels():
    _, cubin = cached_code("89", cache_folder())
    library = ok(cuda.cuLibraryLoadData(cubin, [], [], 0, [], [], 0))
    ok(cuda.cuLibraryGetKernel(library, b"arcflow_noise_float16"))
    assert error(cuda.cuLibraryGetKernel(library, b"arcflow_noise_float64")) == "NOT_FOUND"
    ok(cuda.cuLibraryUnload(library))
    assert error(cuda.cuModuleLoadData(b"no code" + bytes(64))) == "INVALID_IMAGE"
