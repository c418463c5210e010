"""Arrays in a GPU's memory through the runtime's own `Device`: numpy array -> address -> numpy array."""

from __future__ import annotations

from typing import Any

import numpy as np

from arcflow_runtime.gpu.device import Device, Memory


class OnDevice:
    """Copies arrays to and from a device, in a stream of its own."""

    def __init__(self, device: Device) -> None:
        self.device, self.stream = device, device.make_stream()
        self._kept: list[Memory] = []

    def empty(self, nbytes: int) -> int:
        """The address of new memory with unknown contents."""
        self._kept.append(self.device.allocate(max(nbytes, 1)))
        return self._kept[-1].address

    def put(self, x: np.ndarray[Any, Any]) -> int:
        """The address of a copy of `x`."""
        address = self.empty(x.nbytes)
        pinned = self.device.allocate_pinned(max(x.nbytes, 1))
        try:
            pinned.array[: x.nbytes] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
            self.stream.copy(address, pinned.address, x.nbytes)
            self.stream.wait()
        finally:
            pinned.close()
        return address

    def get(self, address: int, like: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The array at `address`, of the shape and dtype of `like`, after all work in the stream."""
        pinned = self.device.allocate_pinned(max(like.nbytes, 1))
        try:
            self.stream.copy(pinned.address, address, like.nbytes)
            self.stream.wait()
            return pinned.array[: like.nbytes].copy().view(like.dtype).reshape(like.shape)
        finally:
            pinned.close()

    def close(self) -> None:
        """Free everything."""
        self.stream.wait()
        for memory in self._kept:
            memory.close()
        self._kept.clear()
