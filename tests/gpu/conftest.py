"""Fixtures of the tests that run on a GPU. They need the runtime, numpy, pytest, cuda-core and cuda-bindings only."""

from __future__ import annotations

import pytest

from arcflow_runtime.engines.gpus import find_gpu
from tests.gpu.on_device import OnDevice


@pytest.fixture(scope="session")
def device():
    """The GPU as the runtime opens it. Skips without a GPU; a GPU that cannot be opened is an error."""
    if find_gpu() is None:
        pytest.skip("needs an NVIDIA GPU; the CUDA driver finds none here")
    from arcflow_runtime.gpu.cuda import open_device

    return open_device()


@pytest.fixture(scope="session")
def sized(device):
    """A function (size on a GPU, size on the driver made of host memory) -> the one that applies.

    That driver, `tests/host_cuda/`, runs each thread of a kernel as a fibre of the CPU.
    """
    on_host = device.name == "Host memory"
    return lambda gpu, host: host if on_host else gpu


@pytest.fixture(scope="session")
def kernels(device):
    """The runtime's kernels, loaded on the GPU."""
    return device.kernels()


@pytest.fixture
def memory(device):
    """Arrays on the GPU, and a stream; freed after the test."""
    memory = OnDevice(device)
    yield memory
    memory.close()
