"""Memory, copies, events and captured graphs of a GPU, through the runtime's own interface to CUDA."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from arcflow_runtime.gpu.device import CaptureError, OutOfMemory
from arcflow_runtime.gpu.kernels import UpdateShape

pytestmark = pytest.mark.gpu
BYTES = 1 << 20


@pytest.fixture
def stream(device):
    return device.make_stream()


@pytest.fixture
def pinned(device):
    """Two halves of `BYTES` each."""
    made = device.allocate_pinned(2 * BYTES)
    yield made
    made.close()


@pytest.fixture
def block(device):
    made = device.allocate(BYTES)
    yield made
    made.close()


def there_and_back(stream, block, pinned):
    stream.copy(block.address, pinned.address, BYTES)
    stream.copy(pinned.address + BYTES, block.address, BYTES)


def test_a_graph_replays_copies_and_events(device, stream, block, pinned):
    start, end = device.make_event(), device.make_event()
    stream.begin_capture()
    stream.record(start)
    there_and_back(stream, block, pinned)
    stream.record(end)
    graph = stream.end_capture()
    for value in (1, 2):
        pinned.array[:BYTES] = value
        graph.launch()
        stream.wait()
        assert (pinned.array[BYTES:] == value).all()
        assert end.ms_since(start) > 0
    graph.close()


def test_a_stream_is_usable_after_an_aborted_capture(stream, block, pinned):
    stream.begin_capture()
    there_and_back(stream, block, pinned)
    stream.abort_capture()
    pinned.array[:BYTES], pinned.array[BYTES:] = 3, 4
    stream.wait()
    assert (pinned.array[BYTES:] == 4).all(), "what was captured must not run"
    there_and_back(stream, block, pinned)
    stream.wait()
    assert (pinned.array[BYTES:] == 3).all()


def test_an_allocation_in_a_capture_fails_and_the_stream_recovers(device, stream, block, pinned):
    """In another thread, allocations are allowed meanwhile: captures are thread-local."""
    stream.begin_capture()
    elsewhere = []

    def allocate():
        device.use()
        elsewhere.append(device.allocate(BYTES))

    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
    there_and_back(stream, block, pinned)
    with pytest.raises(Exception, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        device.allocate(BYTES).close()
    with pytest.raises(CaptureError, match="CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"):
        stream.end_capture()
    elsewhere[0].close()
    pinned.array[:BYTES] = 5
    there_and_back(stream, block, pinned)
    stream.wait()
    assert (pinned.array[BYTES:] == 5).all()


def test_more_memory_than_there_is(device):
    with pytest.raises(OutOfMemory):
        device.allocate(1 << 50)
    device.allocate(BYTES).close()


def test_a_graph_replays_kernels_bit_for_bit(kernels, memory, sized):
    """Updates in place, plain and as a graph, from the same latents."""
    rng = np.random.default_rng(0)
    tokens, updates = sized(4096, 32), sized(20, 4)
    shape = UpdateShape(tokens, 16, 64, 4, "float32", "bfloat16")
    heads = [memory.put(rng.standard_normal((tokens, n), np.float32)) for n in (16 * 64, 16 * 4, 15 * 4)]
    start = rng.standard_normal((tokens, 64), np.float32)
    sigmas = memory.put(np.array([1, 0.75, 0]))
    latents, source = memory.put(start), memory.put(start)
    second = memory.empty(start.nbytes // 2)
    stream = memory.stream

    def enqueue():
        stream.copy(latents, source, start.nbytes)
        for i in range(updates):
            kernels.update(stream, shape, *heads, latents, latents, second, sigmas, i % 2)

    enqueue()
    plain = memory.get(latents, start), memory.get(second, start.view(np.uint16)[:, ::2])
    assert np.isfinite(plain[0]).all()
    assert (plain[0] != start).any()
    stream.begin_capture()
    enqueue()
    graph = stream.end_capture()
    for _ in range(3):
        memory.stream.copy(latents, heads[0], start.nbytes)  # the graph must write every number
        graph.launch()
        replayed = memory.get(latents, start), memory.get(second, start.view(np.uint16)[:, ::2])
        for x, y in zip(plain, replayed, strict=True):
            np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8))
    graph.close()
