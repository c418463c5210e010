"""Base tensors, adapter and LoRAs -> merged tensors, read one at a time: W' = W + sum_i scale_i * B_i A_i."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from .adapter import LoraPair
from .errors import SourceError
from .tensors import TensorIndex, TensorRef

#: A tensor is converted in blocks of about this many bytes of float32, which bounds resident memory.
BLOCK_BYTES = 128 << 20


class WeightSource(Protocol):
    """Where the exporter reads a component's weights."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of tensor `key`; raises `SourceError` if there is none."""
        ...

    def blocks(self, key: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Tensor `key` in `dtype`, as consecutive blocks of dimension 0; checked for NaN and Inf."""
        ...


class PlainWeights:
    """A component's weights as stored, cast to the wanted dtype."""

    def __init__(self, index: TensorIndex):
        self.index = index

    def ref(self, key: str) -> TensorRef:
        """The stored tensor that `key` comes from."""
        return self.index[key]

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of tensor `key`."""
        return self.ref(key).shape

    def blocks(self, key: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Tensor `key` in `dtype`, block by block."""
        ref = self.ref(key)
        for start, stop in _row_blocks(ref.shape):
            block = ref.read() if stop is None else ref.rows(start, stop)
            _check_finite(block, ref)
            yield cast(block, dtype, key)


class MergedWeights(PlainWeights):
    """A student's transformer: base, full tensors that replace or add, LoRA products summed in float32."""

    def __init__(self, index: TensorIndex, full: Mapping[str, TensorRef], loras: Mapping[str, list[LoraPair]]):
        super().__init__(index)
        self.full = full
        self.loras = loras

    def ref(self, key: str) -> TensorRef:
        """The stored tensor that `key` comes from: the adapter's own, else the base's."""
        return self.full[key] if key in self.full else self.index[key]

    def blocks(self, key: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Tensor `key` merged in float32 and rounded once to `dtype`, block by block."""
        pairs = self.loras.get(key.removesuffix(".weight"), []) if key.endswith(".weight") else []
        if not pairs:
            yield from super().blocks(key, dtype)
            return
        ref = self.ref(key)
        factors = [(_finite(p.a).float(), _finite(p.b).float(), p.scale) for p in pairs]
        for start, stop in _row_blocks(ref.shape):
            block = ref.read() if stop is None else ref.rows(start, stop)
            _check_finite(block, ref)
            merged = block.to(torch.float32, copy=True)
            for a, b, scale in factors:
                merged.addmm_(b[start:stop], a, alpha=scale)
            yield cast(merged, dtype, key)


def cast(block: torch.Tensor, dtype: torch.dtype, key: str) -> torch.Tensor:
    """`block` in `dtype`, rounded to nearest even.

    Raises:
        SourceError: a finite value overflows `dtype`.
    """
    if block.dtype == dtype:
        return block
    out = block.to(dtype)
    # Only float16 has a smaller range than the checkpoints' dtypes.
    if dtype == torch.float16 and not torch.isfinite(out).all():
        worst = block.abs().max().item()
        raise SourceError(
            f"tensor {key!r} has the value {worst:.6g}, beyond float16's 65504; export with --dtype bfloat16 or float32"
        )
    return out


def _row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int | None]]:
    numel = int(torch.Size(shape).numel())
    if numel * 4 <= BLOCK_BYTES or len(shape) < 2:
        yield 0, None
        return
    rows = max(1, BLOCK_BYTES // (4 * (numel // shape[0])))
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])


def _finite(ref: TensorRef) -> torch.Tensor:
    tensor = ref.read()
    _check_finite(tensor, ref)
    return tensor


def _check_finite(block: torch.Tensor, ref: TensorRef) -> None:
    # One pass without a temporary: any NaN or Inf makes the sum non-finite. Overflow of the sum alone is possible,
    # so a non-finite sum is looked at again element by element.
    if torch.isfinite(block.sum(dtype=torch.float32)) or torch.isfinite(block).all():
        return
    bad = int((~torch.isfinite(block)).sum())
    raise SourceError(
        f"{ref.path}: tensor {ref.key!r} holds {bad} NaN or Inf values; the file is damaged or the training diverged"
    )
