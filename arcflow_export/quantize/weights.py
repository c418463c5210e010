"""Convert some of a part's stored weights to other number formats, with their scales.

The file is read twice, once for the ranges and once for the values, and is never in memory as a whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO

import torch

from arcflow_export.checkpoint.merge import BLOCK_BYTES, PlainWeights
from arcflow_export.checkpoint.tensors import DTYPES, TensorIndex, TensorRef, uncache
from arcflow_export.errors import QuantizeError
from arcflow_export.models.layers import Parameter
from arcflow_export.quantize.format import StoredTensor

_SUFFIX = ".weight"
#: As in `write.py`: pages are dropped from the page cache each time that this many bytes have been read.
_UNCACHE_BYTES = 512 << 20


def scan_weights(
    path: Path, layers: Iterable[str], progress: Callable[[int], None], rows: Iterable[str] = ()
) -> tuple[str, dict[str, torch.Tensor]]:
    """Read a weights file once, from start to end, for its hash and the ranges of some weights.

    Args:
        path: a valid safetensors file.
        layers: linears whose weights `<layer>.weight` are [in, out].
        progress: called with the number of bytes read.
        rows: tables whose weights `<name>.weight` are [rows, width].

    Returns:
        SHA-256 of the file, and by name the largest absolute weights: of each output channel of a layer, [out] float32,
        and of each row of a table, [rows] float32.

    Raises:
        QuantizeError: a layer's weight holds NaN or Inf.
    """
    by_row = {f"{name}{_SUFFIX}" for name in rows}
    wanted = {f"{layer}{_SUFFIX}" for layer in layers} | by_row
    digest = hashlib.sha256()
    with path.open("rb") as f:
        size = f.read(8)
        header = f.read(int.from_bytes(size, "little"))
        digest.update(size + header)
        entries = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
        # Allocate all results first. A small array kept between two large blocks would keep the allocator from reusing
        # the first block's memory for the second, and memory would grow with the number of layers.
        found = {
            key.removesuffix(_SUFFIX): torch.zeros(entries[key]["shape"][key not in by_row])
            for key in entries
            if key in wanted
        }
        row_sizes = [
            entries[key]["shape"][1] * DTYPES[entries[key]["dtype"]].itemsize for key in entries if key in wanted
        ]
        buffer = bytearray(max([BLOCK_BYTES, *row_sizes]))
        dropped = 0
        for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            row_bytes, first = 1, 0
            if key in wanted:
                row_bytes = entry["shape"][1] * DTYPES[entry["dtype"]].itemsize
            for block in _read(f, buffer, stop - start, max(1, BLOCK_BYTES // row_bytes) * row_bytes):
                digest.update(block)
                progress(len(block))
                if key in wanted:
                    weight = torch.frombuffer(block, dtype=DTYPES[entry["dtype"]]).view(-1, entry["shape"][1])
                    amax = found[key.removesuffix(_SUFFIX)]
                    if key in by_row:
                        amax[first : first + len(weight)] = weight.abs().amax(1)
                        first += len(weight)
                    else:
                        torch.maximum(amax, weight.abs().amax(0).float(), out=amax)
            if stop - dropped > _UNCACHE_BYTES:
                uncache(path)
                dropped = stop
    for layer, amax in found.items():
        if not torch.isfinite(amax).all():
            raise QuantizeError(f"{path}: tensor '{layer}{_SUFFIX}' holds NaN or Inf; export the bundle again")
    return digest.hexdigest(), found


class QuantizedWeights(PlainWeights):
    """A part's weights with those of quantised linears replaced by their stored tensors, and the others as stored."""

    def __init__(self, index: TensorIndex, quantized: Mapping[str, Sequence[StoredTensor]], by_input: Iterable[str]):
        """Prepare the source; reads nothing.

        Args:
            index: the stored weights.
            quantized: layer -> the tensors that replace its weight; the first has the weight's name.
            by_input: the same layers, ordered so that layers that read the same tensor are adjacent.
        """
        super().__init__(index)
        self._weights = {t.name: f"{layer}{_SUFFIX}" for layer, found in quantized.items() for t in found}
        self._tensors = {t.name: t for found in quantized.values() for t in found}
        # Tensors of one kind are together in the file, those of weights before those of inputs.
        kinds = zip_longest(*(found[1:] for found in quantized.values()))
        self._added = [t for kind in kinds for t in kind if t is not None and not t.of_input]
        self._added += [t for layer in by_input for t in quantized[layer] if t.of_input]

    def parameters(self) -> list[Parameter]:
        """Every tensor to write: the stored ones in their order, with the weights replaced, then the added ones."""
        return [
            *(self._parameter(key, self._tensors.get(key, ref)) for key, ref in self.index.items()),
            *(self._parameter(t.name, t) for t in self._added),
        ]

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of tensor `key`."""
        return self._tensors[key].shape if key in self._tensors else super().shape(key)

    def blocks(self, key: str, dtype: torch.dtype, transpose: bool = False) -> Iterator[torch.Tensor]:
        """Yield tensor `key` block by block; `dtype` must be the dtype that this source has for it."""
        assert not transpose
        if key not in self._tensors:
            yield from super().blocks(key, dtype)
            return
        tensor = self._tensors[key]
        assert dtype == tensor.dtype
        if tensor.value is not None:
            yield tensor.value
            return
        assert tensor.encode is not None
        weight = self._weights[key]
        yield from tensor.encode(super().blocks(weight, self.index[weight].dtype))

    def _parameter(self, key: str, tensor: StoredTensor | TensorRef) -> Parameter:
        return Parameter(key, tensor.shape, tensor.dtype, key=key)


def _read(file: BinaryIO, buffer: bytearray, num_bytes: int, block_bytes: int) -> Iterator[memoryview]:
    """Read `num_bytes` in blocks of `block_bytes` (the last may be shorter); each is valid until the next is read."""
    while num_bytes:
        block = memoryview(buffer)[: min(block_bytes, num_bytes)]
        read = file.readinto(block)  # type: ignore[attr-defined]
        if not read:
            raise QuantizeError("the weights file ended early; if it was changed just now, run the command again")
        num_bytes -= read
        yield block[:read]
