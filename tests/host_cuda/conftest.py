"""Fixtures of the `*_cases.py`, which run in a process with the driver; tests/test_host_cuda.py starts it."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

import pytest

from arcflow_runtime import Pipeline
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.engines.onnxruntime import OnnxRuntimeBackend
from tests.host_cuda.control import Driver, Live
from tests.host_cuda.engines import HostCudaBackend

#: What closing a pipeline must free. Streams and events are freed with their Python objects.
_CLOSED = (Live.DEVICE_BYTES, Live.PINNED_BYTES, Live.EXECUTABLES, Live.GRAPHS)


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
    """A function (bundle's name, **`HostCudaBackend`'s arguments) -> pipeline. Checks at the end that all is freed."""
    made = []

    def make(name="flux", low_memory=False, **arguments):
        backend = HostCudaBackend(driver, **arguments)
        pipe = Pipeline(open_bundle(name), backend, low_memory)
        pipe.backend = backend
        made.append(pipe)
        return pipe

    yield make
    for pipe in made:
        pipe.close()
    gc.collect()
    assert {kind.name: driver.live(kind) for kind in _CLOSED} == dict.fromkeys((k.name for k in _CLOSED), 0)
    made.clear()
    pipe = None
    gc.collect()
    assert (driver.live(Live.EVENTS), driver.live(Live.STREAMS)) == (0, 0)
