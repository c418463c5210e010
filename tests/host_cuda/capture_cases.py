"""Captures and graphs of the driver made of host memory: what they record, and what CUDA forbids meanwhile."""

from __future__ import annotations

import ctypes
import threading

import pytest
from cuda.bindings import driver as cuda

from tests.host_cuda.checked import BYTES, Pinned, end, error, ok, read

Mode = cuda.CUstreamCaptureMode
pytestmark = pytest.mark.usefixtures("context")


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
