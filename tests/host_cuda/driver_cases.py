"""The driver made of host memory itself: what it delays, what it refuses, and with which CUDA errors."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from cuda.bindings import driver as cuda

from arcflow_runtime.gpu.kernels import cache_folder, cached_code
from tests.host_cuda.control import Code, Driver, Live, When

Mode = cuda.CUstreamCaptureMode
Result = cuda.CUresult
BYTES = 256


def ok(result):
    """The value of a call that must succeed, or a tuple if there are several."""
    error, *values = result
    assert error == Result.CUDA_SUCCESS, error
    return values[0] if len(values) == 1 else tuple(values)


def error(result):
    """The name of a call's error without CUDA_ERROR_."""
    return result[0].name.removeprefix("CUDA_").removeprefix("ERROR_")


def host(array):
    return array.ctypes.data


class Pinned:
    """Page-locked memory as an array."""

    def __init__(self, value):
        self.address = int(ok(cuda.cuMemHostAlloc(BYTES, 0)))
        self.array = np.ctypeslib.as_array((ctypes.c_uint8 * BYTES).from_address(self.address))
        self.array[:] = value


@pytest.fixture(autouse=True)
def context(driver):
    """Makes the device's context current."""
    ok(cuda.cuInit(0))
    ok(cuda.cuCtxSetCurrent(ok(cuda.cuDevicePrimaryCtxRetain(0))))


@pytest.fixture
def stream():
    made = ok(cuda.cuStreamCreate(int(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)))
    yield made
    cuda.cuStreamDestroy(made)


@pytest.fixture
def other():
    made = ok(cuda.cuStreamCreate(int(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)))
    yield made
    cuda.cuStreamDestroy(made)


@pytest.fixture
def memory():
    made = int(ok(cuda.cuMemAlloc(BYTES)))
    yield made
    cuda.cuMemFree(made)


@pytest.fixture
def event():
    return ok(cuda.cuEventCreate(0))


def read(address):
    """Copy from the device, in the default stream."""
    out = np.zeros(BYTES, np.uint8)
    ok(cuda.cuMemcpyDtoH(host(out), address, BYTES))
    return out


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


# Captures


@pytest.fixture
def begin(stream):
    """A function (mode) that begins a capture in `stream`; a capture that a test leaves open is ended after it."""

    def begin(mode=Mode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL):
        ok(cuda.cuStreamBeginCapture(stream, mode))

    yield begin
    failed, graph = cuda.cuStreamEndCapture(stream)
    if not failed:
        cuda.cuGraphDestroy(graph)


def end(stream):
    """End the capture and instantiate its graph."""
    graph = ok(cuda.cuStreamEndCapture(stream))
    executable = ok(cuda.cuGraphInstantiate(graph, 0))
    ok(cuda.cuGraphDestroy(graph))
    return executable


def test_a_launch_runs_what_was_captured(begin, stream, memory, driver):
    source, target = Pinned(1), Pinned(0)
    begin()
    ok(cuda.cuMemcpyHtoDAsync(memory, source.address, BYTES, stream))
    ok(cuda.cuMemcpyDtoHAsync(target.address, memory, BYTES, stream))
    executable = end(stream)
    ok(cuda.cuStreamSynchronize(stream))
    assert (target.array == 0).all()
    for value in (3, 4):
        source.array[:] = value
        ok(cuda.cuGraphLaunch(executable, stream))
        assert (target.array != value).all()
        ok(cuda.cuStreamSynchronize(stream))
        assert (target.array == value).all()
    assert (driver.calls("run:graph"), driver.calls("run:copy")) == (2, 4)
    ok(cuda.cuGraphExecDestroy(executable))


def test_a_graph_in_a_graph(begin, stream, memory):
    begin()
    ok(cuda.cuMemsetD8Async(memory, 7, BYTES, stream))
    inner = end(stream)
    begin()
    ok(cuda.cuMemsetD8Async(memory, 8, BYTES, stream))
    ok(cuda.cuGraphLaunch(inner, stream))
    outer = end(stream)
    ok(cuda.cuGraphExecDestroy(inner))  # the outer graph has a copy
    ok(cuda.cuGraphLaunch(outer, stream))
    ok(cuda.cuStreamSynchronize(stream))
    assert (read(memory) == 7).all()
    ok(cuda.cuGraphExecDestroy(outer))


def test_external_events_are_reached_at_every_launch(begin, stream, memory):
    external = int(cuda.CUevent_record_flags.CU_EVENT_RECORD_EXTERNAL)
    start, done = ok(cuda.cuEventCreate(0)), ok(cuda.cuEventCreate(0))
    begin()
    ok(cuda.cuEventRecordWithFlags(start, stream, external))
    ok(cuda.cuMemsetD8Async(memory, 7, BYTES, stream))
    ok(cuda.cuEventRecordWithFlags(done, stream, external))
    executable = end(stream)
    assert error(cuda.cuEventElapsedTime(start, done)) == "INVALID_HANDLE"
    for _ in range(2):
        ok(cuda.cuGraphLaunch(executable, stream))
        assert error(cuda.cuEventElapsedTime(start, done)) == "NOT_READY"
        ok(cuda.cuEventSynchronize(done))
        assert ok(cuda.cuEventElapsedTime(start, done)) > 0
    ok(cuda.cuGraphExecDestroy(executable))


@pytest.mark.parametrize("joins", [False, True])
def test_branches_of_a_graph_run_in_an_order_that_shows_what_is_missing(joins, begin, stream, other, memory, event):
    """The copy is captured last, and runs before the memset unless it depends on it."""
    target, back = Pinned(0), ok(cuda.cuEventCreate(0))
    begin()
    ok(cuda.cuEventRecord(event, stream))
    ok(cuda.cuStreamWaitEvent(other, event, 0))
    ok(cuda.cuMemsetD8Async(memory, 7, BYTES, stream))
    if joins:
        ok(cuda.cuEventRecord(event, stream))
        ok(cuda.cuStreamWaitEvent(other, event, 0))
    ok(cuda.cuMemcpyDtoHAsync(target.address, memory, BYTES, other))
    ok(cuda.cuEventRecord(back, other))
    ok(cuda.cuStreamWaitEvent(stream, back, 0))
    executable = end(stream)
    ok(cuda.cuGraphLaunch(executable, stream))
    ok(cuda.cuStreamSynchronize(stream))
    assert (target.array == (7 if joins else 0xFF)).all()
    ok(cuda.cuGraphExecDestroy(executable))


def test_host_functions_run_in_order_and_cannot_call_the_driver(begin, stream, memory, driver):
    seen = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def look(_):
        seen.append((ctypes.string_at(driver.at(memory, BYTES), 1)[0], error(cuda.cuMemGetInfo())))

    def enqueue():
        ok(cuda.cuMemsetD8Async(memory, 7, BYTES, stream))
        ok(cuda.cuLaunchHostFunc(stream, cuda.CUhostFn(_ptr=ctypes.addressof(look)), 0))
        ok(cuda.cuMemsetD8Async(memory, 8, BYTES, stream))

    enqueue()
    begin()
    enqueue()
    executable = end(stream)
    ok(cuda.cuGraphLaunch(executable, stream))
    assert seen == []
    ok(cuda.cuStreamSynchronize(stream))
    assert seen == [(7, "NOT_PERMITTED")] * 2
    ok(cuda.cuGraphExecDestroy(executable))


def captured_event(stream):
    made = ok(cuda.cuEventCreate(0))
    ok(cuda.cuEventRecord(made, stream))
    return made


#: Calls that invalidate a capture, and their errors.
FORBIDDEN = {
    "waiting for the stream": (cuda.cuStreamSynchronize, "STREAM_CAPTURE_UNSUPPORTED"),
    "asking the stream": (cuda.cuStreamQuery, "STREAM_CAPTURE_UNSUPPORTED"),
    "waiting for the device": (lambda s: cuda.cuCtxSynchronize(), "STREAM_CAPTURE_UNSUPPORTED"),
    "waiting for a captured event": (lambda s: cuda.cuEventSynchronize(captured_event(s)), "CAPTURED_EVENT"),
    "asking a captured event": (lambda s: cuda.cuEventQuery(captured_event(s)), "CAPTURED_EVENT"),
    "allocating": (lambda s: cuda.cuMemAlloc(1), "STREAM_CAPTURE_UNSUPPORTED"),
    "freeing": (lambda s: cuda.cuMemFree(0), "STREAM_CAPTURE_UNSUPPORTED"),
    "page-locking": (lambda s: cuda.cuMemHostAlloc(1, 0), "STREAM_CAPTURE_UNSUPPORTED"),
    "asking an event": (lambda s: cuda.cuEventQuery(ok(cuda.cuEventCreate(0))), "STREAM_CAPTURE_UNSUPPORTED"),
    "waiting for work that is not captured": (lambda s: wait_for_other_work(s), "STREAM_CAPTURE_ISOLATION"),
}


def wait_for_other_work(stream):
    other = ok(cuda.cuStreamCreate(int(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)))
    outside = captured_event(other)
    ok(cuda.cuStreamDestroy(other))
    return cuda.cuStreamWaitEvent(stream, outside, 0)


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_a_capture_forbids_breaks_it(what, begin, stream, memory):
    call, expected = FORBIDDEN[what]
    begin()
    assert error(call(stream)) == expected
    assert ok(cuda.cuStreamIsCapturing(stream)).name == "CU_STREAM_CAPTURE_STATUS_INVALIDATED"
    assert error(cuda.cuMemsetD8Async(memory, 1, BYTES, stream)) == "STREAM_CAPTURE_INVALIDATED"
    assert error(cuda.cuStreamEndCapture(stream)) == "STREAM_CAPTURE_INVALIDATED"
    assert error(cuda.cuStreamEndCapture(stream)) == "ILLEGAL_STATE"
    ok(cuda.cuMemsetD8Async(memory, 1, BYTES, stream))  # the stream works again
    ok(cuda.cuStreamSynchronize(stream))
    assert (read(memory) == 1).all()


def test_the_default_stream_cannot_be_used_beside_a_capture_that_it_waits_for(memory):
    blocking = ok(cuda.cuStreamCreate(0))
    ok(cuda.cuStreamBeginCapture(blocking, Mode.CU_STREAM_CAPTURE_MODE_RELAXED))
    assert error(cuda.cuStreamIsCapturing(0)) == "STREAM_CAPTURE_IMPLICIT"
    assert ok(cuda.cuStreamIsCapturing(blocking)).name == "CU_STREAM_CAPTURE_STATUS_ACTIVE"
    assert error(cuda.cuMemsetD8Async(memory, 1, BYTES, 0)) == "STREAM_CAPTURE_IMPLICIT"
    assert error(cuda.cuStreamEndCapture(blocking)) == "STREAM_CAPTURE_INVALIDATED"
    ok(cuda.cuStreamDestroy(blocking))


@pytest.mark.parametrize(
    ("mode", "own", "others"),
    [("GLOBAL", True, True), ("THREAD_LOCAL", True, False), ("RELAXED", False, False)],
)
def test_the_mode_says_whose_allocations_break_a_capture(mode, own, others, begin, stream):
    for thread_is_own, breaks in ((True, own), (False, others)):
        begin(getattr(Mode, f"CU_STREAM_CAPTURE_MODE_{mode}"))
        results = []

        def allocate(results=results):
            ok(cuda.cuCtxSetCurrent(ok(cuda.cuDevicePrimaryCtxRetain(0))))
            results.append(cuda.cuMemAlloc(BYTES))

        if thread_is_own:
            allocate()
        else:
            thread = threading.Thread(target=allocate)
            thread.start()
            thread.join()
        failed, graph = cuda.cuStreamEndCapture(stream)
        if not failed:
            ok(cuda.cuGraphDestroy(graph))
            ok(cuda.cuMemFree(results[0][1]))
        assert error(results[0]) == ("STREAM_CAPTURE_UNSUPPORTED" if breaks else "SUCCESS")
        assert failed.name == ("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED" if breaks else "CUDA_SUCCESS")


def test_a_thread_may_allow_itself_more(begin, stream):
    begin(Mode.CU_STREAM_CAPTURE_MODE_GLOBAL)
    before = ok(cuda.cuThreadExchangeStreamCaptureMode(Mode.CU_STREAM_CAPTURE_MODE_RELAXED))
    address = ok(cuda.cuMemAlloc(BYTES))
    assert ok(cuda.cuThreadExchangeStreamCaptureMode(before)) == Mode.CU_STREAM_CAPTURE_MODE_RELAXED
    ok(cuda.cuGraphExecDestroy(end(stream)))
    ok(cuda.cuMemFree(address))


def test_another_thread_cannot_end_a_capture(begin, stream):
    begin()
    results = []

    def finish():
        ok(cuda.cuCtxSetCurrent(ok(cuda.cuDevicePrimaryCtxRetain(0))))
        results.append(error(cuda.cuStreamEndCapture(stream)))

    thread = threading.Thread(target=finish)
    thread.start()
    thread.join()
    assert results == ["STREAM_CAPTURE_WRONG_THREAD"]


def test_captures_that_are_begun_or_ended_wrongly(begin, stream, other, event):
    assert error(cuda.cuStreamBeginCapture(0, Mode.CU_STREAM_CAPTURE_MODE_RELAXED)) == "STREAM_CAPTURE_UNSUPPORTED"
    assert error(cuda.cuStreamEndCapture(stream)) == "ILLEGAL_STATE"
    begin()
    assert error(cuda.cuStreamBeginCapture(stream, Mode.CU_STREAM_CAPTURE_MODE_RELAXED)) == "ILLEGAL_STATE"
    ok(cuda.cuEventRecord(event, stream))
    ok(cuda.cuStreamWaitEvent(other, event, 0))
    assert error(cuda.cuStreamEndCapture(other)) == "STREAM_CAPTURE_UNMATCHED"


def test_a_branch_that_does_not_come_back(begin, stream, other, memory, event):
    begin()
    ok(cuda.cuEventRecord(event, stream))
    ok(cuda.cuStreamWaitEvent(other, event, 0))
    ok(cuda.cuMemsetD8Async(memory, 7, BYTES, other))
    assert error(cuda.cuStreamEndCapture(stream)) == "STREAM_CAPTURE_UNJOINED"
    assert ok(cuda.cuStreamIsCapturing(other)).name == "CU_STREAM_CAPTURE_STATUS_NONE"


def test_two_captures_cannot_meet(begin, stream, other, event):
    begin()
    ok(cuda.cuStreamBeginCapture(other, Mode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
    ok(cuda.cuEventRecord(event, stream))
    assert error(cuda.cuStreamWaitEvent(other, event, 0)) == "STREAM_CAPTURE_MERGE"
    for each in (stream, other):
        assert error(cuda.cuStreamEndCapture(each)) == "STREAM_CAPTURE_INVALIDATED"


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
