"""Merge base tensors, adapter and LoRAs, one tensor at a time: W' = W + sum_i scale_i * B_i A_i.

The exporter reads all weights through these classes, in blocks of a few MiB.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from arcflow_export.checkpoint.adapter import LoraPair
from arcflow_export.checkpoint.tensors import TensorIndex, TensorRef, uncache
from arcflow_export.errors import SourceError

#: A tensor is converted in blocks of about this many bytes of float32. A block this small is still in the last-level
#: cache for the next pass over it, and the allocator reuses its memory instead of faulting in new pages.
BLOCK_BYTES = 16 << 20
#: Threads that convert blocks. One more thread hashes and writes; it cannot keep up with more than these.
_WORKERS = min(4, os.cpu_count() or 1)


class WeightSource(Protocol):
    """The interface through which the exporter reads a component's weights."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of tensor `key`; raises `SourceError` if there is none."""
        ...

    def blocks(self, key: str, dtype: torch.dtype, transpose: bool = False) -> Iterator[torch.Tensor]:
        """Yield tensor `key` in `dtype`, as consecutive contiguous blocks of dimension 0; raises on NaN or Inf.

        With `transpose`, a matrix's blocks are [in, rows] instead of [rows, in].
        """
        ...

    def uncache(self) -> None:
        """Let the kernel drop the pages read so far from the page cache."""
        ...


class PlainWeights:
    """A component's stored weights, cast to the requested dtype."""

    def __init__(self, index: TensorIndex):
        self.index = index

    def ref(self, key: str) -> TensorRef:
        """The stored tensor that `key` comes from."""
        return self.index[key]

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of tensor `key`."""
        return self.ref(key).shape

    def blocks(self, key: str, dtype: torch.dtype, transpose: bool = False) -> Iterator[torch.Tensor]:
        """Yield tensor `key` in `dtype`, block by block."""
        yield from _convert(self.ref(key), lambda _, block: cast(block, dtype, key), transpose)

    def uncache(self) -> None:
        """Let the kernel drop the pages read so far from the page cache."""
        for path in self.index.files:
            uncache(path)


class MergedWeights(PlainWeights):
    """Merged weights: the base's tensors, full tensors that replace or add to them, and LoRA products in float32."""

    def __init__(self, index: TensorIndex, full: Mapping[str, TensorRef], loras: Mapping[str, list[LoraPair]]):
        super().__init__(index)
        self.full = full
        self.loras = loras

    def ref(self, key: str) -> TensorRef:
        """The stored tensor that `key` comes from: the adapter's own, else the base's."""
        return self.full[key] if key in self.full else self.index[key]

    def blocks(self, key: str, dtype: torch.dtype, transpose: bool = False) -> Iterator[torch.Tensor]:
        """Yield tensor `key`, merged in float32 and rounded once to `dtype`, block by block."""
        pairs = self.loras.get(key.removesuffix(".weight"), []) if key.endswith(".weight") else []
        if not pairs:
            yield from super().blocks(key, dtype, transpose)
            return
        factors = [(_finite(p.a).float(), _finite(p.b).float(), p.scale) for p in pairs]

        def merge(start: int, block: torch.Tensor) -> torch.Tensor:
            merged = block.to(torch.float32, copy=True)
            for a, b, scale in factors:
                merged.addmm_(b[start : start + len(block)], a, alpha=scale)
            if not all(map(torch.isfinite, torch.aminmax(merged))):
                raise SourceError(
                    f"tensor {key!r} is beyond float32's range after merging; use a smaller scale for the LoRAs"
                )
            return cast(merged, dtype, key)

        yield from _convert(self.ref(key), merge, transpose)


def cast(block: torch.Tensor, dtype: torch.dtype, key: str) -> torch.Tensor:
    """`block` in `dtype`, rounded to nearest even.

    Raises:
        SourceError: a finite value overflows `dtype`.
    """
    if block.dtype == dtype:
        return block
    out = block.to(dtype)
    # Only a cast to float16 or from float64 can overflow; all other dtypes have float32's range.
    if (dtype == torch.float16 or block.dtype == torch.float64) and not torch.isfinite(out).all():
        worst = block.flatten()[block.abs().argmax()].item()
        advice = "export with --dtype bfloat16 or float32" if dtype == torch.float16 else "the file is damaged"
        name, largest = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
        raise SourceError(f"tensor {key!r} has the value {worst:.6g}, beyond {name}'s {largest:g}; {advice}")
    return out


def _convert(
    ref: TensorRef, convert: Callable[[int, torch.Tensor], torch.Tensor], transpose: bool
) -> Iterator[torch.Tensor]:
    """Check a stored tensor for NaN and Inf and convert it, in blocks of dimension 0, in order.

    Args:
        ref: the tensor.
        convert: takes the index of a block's first row and the stored block; called from several threads.
        transpose: transpose every block.
    """

    def run(start: int, block: torch.Tensor) -> torch.Tensor:
        _check_finite(block, ref)  # first access to the mapped block, so the disk is read here, in this thread
        block = convert(start, block)
        return block.t().contiguous() if transpose else block

    if ref.numel * 4 <= BLOCK_BYTES or len(ref.shape) < 2:
        yield run(0, ref.read())
        return
    rows = max(1, BLOCK_BYTES // (4 * (ref.numel // ref.shape[0])))
    ranges = [(start, min(start + rows, ref.shape[0])) for start in range(0, ref.shape[0], rows)]
    pending: deque[Future[torch.Tensor]] = deque()
    with ThreadPoolExecutor(_WORKERS) as pool:
        for (start, _), block in zip(ranges, ref.rows(ranges), strict=True):
            pending.append(pool.submit(run, start, block))
            if len(pending) > _WORKERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _finite(ref: TensorRef) -> torch.Tensor:
    tensor = ref.read()
    _check_finite(tensor, ref)
    return tensor


def _check_finite(block: torch.Tensor, ref: TensorRef) -> None:
    # One pass without a temporary. A NaN makes both results NaN; an Inf is the smallest or the largest value.
    if not block.numel() or all(map(torch.isfinite, torch.aminmax(block))):
        return
    bad = int((~torch.isfinite(block)).sum())
    raise SourceError(
        f"{ref.path}: tensor {ref.key!r} holds {bad} NaN or Inf values; the file is damaged or the training diverged"
    )
