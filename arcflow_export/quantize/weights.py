"""Convert some of a part's stored weights to FP8, with their scales.

The file is read twice, once for the ranges and once for the values, and is never in memory as a whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from arcflow_export.checkpoint.merge import BLOCK_BYTES, PlainWeights
from arcflow_export.checkpoint.tensors import DTYPES, TensorIndex, uncache
from arcflow_export.errors import QuantizeError
from arcflow_export.quantize.fp8 import encode

_SUFFIX = ".weight"
#: As in `write.py`: pages are dropped from the page cache each time that this many bytes have been read.
_UNCACHE_BYTES = 512 << 20


def scan_weights(
    path: Path, layers: Iterable[str], progress: Callable[[int], None]
) -> tuple[str, dict[str, torch.Tensor]]:
    """Read a weights file once, from start to end, for its hash and the ranges of some weights.

    Args:
        path: a valid safetensors file.
        layers: linears whose weights `<layer>.weight` are [in, out].
        progress: called with the number of bytes read.

    Returns:
        SHA-256 of the file, and for each layer the largest absolute weight of each output channel, [out] float32.

    Raises:
        QuantizeError: a layer's weight holds NaN or Inf.
    """
    wanted = {f"{layer}{_SUFFIX}" for layer in layers}
    digest = hashlib.sha256()
    with path.open("rb") as f:
        size = f.read(8)
        header = f.read(int.from_bytes(size, "little"))
        digest.update(size + header)
        entries = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
        # Allocate all results first. A small array kept between two large blocks would keep the allocator from reusing
        # the first block's memory for the second, and memory would grow with the number of layers.
        found = {key.removesuffix(_SUFFIX): torch.zeros(entries[key]["shape"][1]) for key in entries if key in wanted}
        row_sizes = [
            entries[key]["shape"][1] * DTYPES[entries[key]["dtype"]].itemsize for key in entries if key in wanted
        ]
        buffer = bytearray(max([BLOCK_BYTES, *row_sizes]))
        dropped = 0
        for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            row_bytes = 1
            if key in wanted:
                row_bytes = entry["shape"][1] * DTYPES[entry["dtype"]].itemsize
            for block in _read(f, buffer, stop - start, max(1, BLOCK_BYTES // row_bytes) * row_bytes):
                digest.update(block)
                progress(len(block))
                if key in wanted:
                    weight = torch.frombuffer(block, dtype=DTYPES[entry["dtype"]]).view(-1, entry["shape"][1])
                    amax = found[key.removesuffix(_SUFFIX)]
                    torch.maximum(amax, weight.abs().amax(0).float(), out=amax)
            if stop - dropped > _UNCACHE_BYTES:
                uncache(path)
                dropped = stop
    for layer, amax in found.items():
        if not torch.isfinite(amax).all():
            raise QuantizeError(f"{path}: tensor '{layer}{_SUFFIX}' holds NaN or Inf; export the bundle again")
    return digest.hexdigest(), found


class QuantizedWeights(PlainWeights):
    """A part's weights with those of quantised linears in E4M3, the scales added, and everything else as stored.

    `weight_scales` [out] and `input_scales` [] are given by layer, in the dtype that the graph reads.
    """

    def __init__(
        self,
        index: TensorIndex,
        weight_scales: Mapping[str, torch.Tensor],
        input_scales: Mapping[str, torch.Tensor],
    ):
        super().__init__(index)
        self._weight_scales = {f"{layer}{_SUFFIX}": scale for layer, scale in weight_scales.items()}
        self._scales = {f"{key}_scale": scale for key, scale in self._weight_scales.items()}
        self._scales |= {f"{layer}.input_scale": scale for layer, scale in input_scales.items()}

    @property
    def scales(self) -> Mapping[str, torch.Tensor]:
        """Every scale by the name of its tensor."""
        return self._scales

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of tensor `key`."""
        return tuple(self._scales[key].shape) if key in self._scales else super().shape(key)

    def blocks(self, key: str, dtype: torch.dtype, transpose: bool = False) -> Iterator[torch.Tensor]:
        """Yield tensor `key` block by block; `dtype` must be the dtype that this source has for it."""
        assert not transpose
        if key in self._scales:
            assert dtype == self._scales[key].dtype
            yield self._scales[key]
            return
        if key not in self._weight_scales:
            yield from super().blocks(key, dtype)
            return
        scale = self._weight_scales[key]
        for block in super().blocks(key, self.index[key].dtype):
            yield encode(block, scale)


def _read(file: BinaryIO, buffer: bytearray, num_bytes: int, block_bytes: int) -> Iterator[memoryview]:
    """Read `num_bytes` in blocks of `block_bytes` (the last may be shorter); each is valid until the next is read."""
    while num_bytes:
        block = memoryview(buffer)[: min(block_bytes, num_bytes)]
        read = file.readinto(block)  # type: ignore[attr-defined]
        if not read:
            raise QuantizeError("the weights file ended early; if it was changed just now, run the command again")
        num_bytes -= read
        yield block[:read]
