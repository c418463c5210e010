"""torch on the CPU in the place of torch on a GPU, for benchmarks/gpu/torch_engine.py on the driver of host memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from arcflow_runtime.gpu.device import Stream
from tests.host_cuda.control import Driver


class HostCard:
    """Implements `torch_engine.Card`."""

    def __init__(self) -> None:
        self._driver = Driver()

    def tensor(self, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """See `Card.tensor`. Valid while work runs."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        here = self._driver.at(address, nbytes)
        assert here is not None, self._driver.fault()
        return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(here), dtype=dtype).view(shape)

    def enqueue(self, stream: Stream, work: Callable[[], None], kept: list[Any]) -> None:
        """See `Card.enqueue`."""
        error = self._driver.enqueue(stream.handle, work, kept)
        assert error == 0, error
