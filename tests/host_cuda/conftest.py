"""Fixtures of the `*_cases.py`, which run in a process with the driver; tests/test_host_cuda.py starts it."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import pytest
from cuda.bindings import driver as cuda

from arcflow_runtime import Pipeline
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.engines.onnxruntime import OnnxRuntimeBackend
from tests.host_cuda.checked import BYTES, ok
from tests.host_cuda.control import Driver, Live
from tests.host_cuda.engines import HostCudaBackend

#: What closing a pipeline must free. Streams and events are freed with their Python objects.
_CLOSED = (Live.DEVICE_BYTES, Live.PINNED_BYTES, Live.EXECUTABLES, Live.GRAPHS)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: `make check` runs these, not `make test`")


@pytest.fixture
def driver():
    """The driver's controls, reset, with 8 GiB of device memory."""
    driver = Driver()
    driver.reset()
    driver.set_memory(8 << 30)
    yield driver
    driver.reset()


@pytest.fixture(scope="session")
def open_bundle():
    """A function (name) -> `Bundle`, of the bundles that tests/test_host_cuda.py exported."""
    roots = json.loads(os.environ["HOST_CUDA_BUNDLES"])
    return lambda name: Bundle.open(Path(roots[name]))


@pytest.fixture(scope="session")
def plain(open_bundle):
    """A dict: a bundle's name -> its pipeline on the CPU, opened on first use."""

    class Plain(dict):
        def __missing__(self, name):
            self[name] = Pipeline(open_bundle(name), OnnxRuntimeBackend(1))
            return self[name]

    return Plain()


@pytest.fixture
def on_gpu(open_bundle, driver):
    """A function (bundle or its name, memory mode, backend) -> pipeline. Checks at the end that everything is freed.

    Without a backend it makes a `HostCudaBackend`, which gets the other arguments.
    """
    made = []
    before = {kind: driver.live(kind) for kind in Live}

    def make(bundle="flux", memory="resident", backend=None, **arguments):
        backend = backend or HostCudaBackend(driver, **arguments)
        pipe = Pipeline(open_bundle(bundle) if isinstance(bundle, str) else bundle, backend, memory)
        pipe.backend = backend
        made.append(pipe)
        return pipe

    def left(kinds):
        gc.collect()
        return {kind.name: driver.live(kind) for kind in kinds if driver.live(kind) > before[kind]}

    yield make
    for pipe in made:
        pipe.close()
        if isinstance(pipe.backend, HostCudaBackend):
            assert (pipe.backend.opened, pipe.backend.open_contexts) == (set(), set())
    assert left(_CLOSED) == {}
    made.clear()
    pipe = None
    assert left((Live.EVENTS, Live.STREAMS)) == {}


@pytest.fixture
def context(driver):
    """Makes the device's context current."""
    ok(cuda.cuInit(0))
    ok(cuda.cuCtxSetCurrent(ok(cuda.cuDevicePrimaryCtxRetain(0))))


@pytest.fixture
def stream(context):
    made = ok(cuda.cuStreamCreate(int(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)))
    yield made
    cuda.cuStreamDestroy(made)


@pytest.fixture
def other(context):
    made = ok(cuda.cuStreamCreate(int(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)))
    yield made
    cuda.cuStreamDestroy(made)


@pytest.fixture
def memory(context):
    made = int(ok(cuda.cuMemAlloc(BYTES)))
    yield made
    cuda.cuMemFree(made)


@pytest.fixture
def event(context):
    made = ok(cuda.cuEventCreate(0))
    yield made
    cuda.cuEventDestroy(made)


@pytest.fixture
def begin(stream):
    """A function (mode) that begins a capture in `stream`; a capture that a test leaves open is ended after it."""

    def begin(mode=cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL):
        ok(cuda.cuStreamBeginCapture(stream, mode))

    yield begin
    failed, graph = cuda.cuStreamEndCapture(stream)
    if not failed:
        cuda.cuGraphDestroy(graph)
