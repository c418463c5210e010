"""torch modules as engines of the runtime: a part on device addresses, its kernels enqueued in the runtime's stream.

`CudaCard` is for a GPU; the tests have a card for the driver made of host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Protocol

import torch
from torch import nn

from arcflow_runtime.disk.manifest import Manifest
from arcflow_runtime.gpu.device import Stream
from arcflow_runtime.gpu.engine import Shapes
from arcflow_runtime.gpu.shapes import output_shapes


class Card(Protocol):
    """Where tensors are, and how torch's work gets into a stream."""

    def tensor(self, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The memory at an address as a tensor."""
        ...

    def enqueue(self, stream: Stream, work: Callable[[], None], kept: list[Any]) -> None:
        """Enqueue the work in the stream; `kept` receives what must live as long as it may run."""
        ...


class CudaCard:
    """The GPU that torch uses, with a memory pool for the activations.

    The pool is used by one engine at a time in one stream. So a captured graph and plain calls may share it: memory
    that torch frees is only given to later work in the same stream.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.MemPool()

    @cache  # noqa: B019 - as many entries as tensors; a tensor cannot be made from an address during a capture
    def tensor(self, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """See `Card.tensor`."""
        memory = _DeviceMemory(address, torch.Size(shape).numel() * dtype.itemsize)
        return torch.as_tensor(memory, device="cuda").view(dtype).view(shape)

    def enqueue(self, stream: Stream, work: Callable[[], None], kept: list[Any]) -> None:
        """See `Card.enqueue`."""
        with torch.cuda.stream(_external(stream.handle)), torch.cuda.use_mem_pool(self._pool):
            work()


@cache
def _external(handle: int) -> torch.cuda.ExternalStream:
    return torch.cuda.ExternalStream(handle)


class _DeviceMemory:
    """Bytes on the device, for `torch.as_tensor`."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
        }


class TorchEngine:
    """A module as a part; implements `engine.DeviceEngine`. `obstacle` is what its contexts say against a graph."""

    def __init__(self, manifest: Manifest, part: str, module: nn.Module, card: Card, obstacle: str | None) -> None:
        self.manifest, self.part, self.module, self.card, self.obstacle = manifest, part, module, card, obstacle

    def context(self, inputs: Shapes, stream: Stream) -> TorchContext:
        """See `DeviceEngine.context`."""
        return TorchContext(self, inputs)

    def close(self) -> None:
        """See `DeviceEngine.close`."""


class TorchContext:
    """See `TorchEngine`; implements `engine.Context`. torch allocates the activations itself."""

    workspace_bytes = 0

    def __init__(self, engine: TorchEngine, inputs: Shapes) -> None:
        spec = engine.manifest.parts[engine.part]
        shapes = {**inputs, **output_shapes(engine.manifest, engine.part, inputs)}
        self._engine = engine
        self._inputs = [s.name for s in spec.inputs]
        self._form = {s.name: (tuple(shapes[s.name]), getattr(torch, s.dtype)) for s in spec.inputs + spec.outputs}
        self._kept: list[Any] = []

    def set_workspace(self, address: int, nbytes: int) -> None:
        """Do nothing: `workspace_bytes` is 0."""

    def enqueue(self, addresses: Mapping[str, int], stream: Stream) -> None:
        """See `Context.enqueue`."""
        engine, given = self._engine, dict(addresses)

        def work() -> None:
            tensors = {name: engine.card.tensor(at, *self._form[name]) for name, at in given.items()}
            with torch.no_grad():  # as the torch loop does: torch.compile compiles again for inference_mode
                made = engine.module(**{name: tensors[name] for name in self._inputs})
                for name, value in made.items():
                    tensors[name].copy_(value)

        engine.card.enqueue(stream, work, self._kept)

    def obstacle(self, stream: Stream) -> str | None:
        """See `Context.obstacle`."""
        return self._engine.obstacle

    def close(self) -> None:
        """See `Context.close`."""
