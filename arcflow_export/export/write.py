"""Stream a part's parameters into one safetensors file, block by block, and point the ONNX graph's weights into it."""

from __future__ import annotations

import hashlib
import itertools
import json
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from arcflow_export.checkpoint.merge import WeightSource
from arcflow_export.checkpoint.tensors import uncache
from arcflow_export.errors import SourceError
from arcflow_export.models.layers import Parameter
from arcflow_runtime.disk.manifest import FileEntry

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.float4_e2m1fn_x2: "F4",
}
#: Tensor data starts at a multiple of this, so that a mapped file is aligned for any dtype.
_ALIGNMENT = 4096
#: Pages are dropped from the page cache each time that this many bytes have been written; see `tensors.uncache`.
_UNCACHE_BYTES = 512 << 20
#: Blocks queued between the producing and the writing thread. Tensors with LoRAs take longer, so there are a few.
_AHEAD = 4


@dataclass(frozen=True)
class Placed:
    """The position of one tensor in its file, in bytes."""

    name: str
    offset: int
    length: int


def initializer_name(p: Parameter) -> str:
    """The name of a parameter in the graph and in the weights file."""
    return p.key if p.key is not None else f"constant.{p.name}"


def num_bytes(p: Parameter) -> int:
    """Bytes of a parameter as written."""
    elements = int(torch.Size(p.shape).numel())
    return elements // 2 if p.dtype == torch.float4_e2m1fn_x2 else elements * p.dtype.itemsize


def check_source(params: list[Parameter], source: WeightSource, part: str) -> None:
    """Check that every parameter has a tensor of the right shape, before anything is traced or written.

    Raises:
        SourceError: a tensor is missing or has the wrong shape; the message names it.
    """
    for p in params:
        if p.key is None:
            continue
        shape = source.shape(p.key)
        wanted: tuple[int, ...] = p.shape
        if p.transform == "transpose":
            wanted = (p.shape[1], p.shape[0])
        elif p.transform == "last_frame":
            wanted = (*p.shape[:2], shape[2] if len(shape) == 5 else 0, *p.shape[2:])
        if shape != wanted:
            raise SourceError(
                f"{part}: tensor {p.key!r} must have shape {list(wanted)} by the config, got {list(shape)}; "
                "config.json and weights disagree"
            )


def write_weights(
    path: Path, params: list[Parameter], source: WeightSource, progress: Callable[[int], None]
) -> tuple[FileEntry, dict[str, Placed]]:
    """Stream parameters into the safetensors file `path`.

    Other threads read, merge and cast while this one writes and hashes. At most `_AHEAD` + 2 tensors are in memory.

    Returns:
        The file's size and SHA-256, and the position of each tensor.

    Raises:
        SourceError: a weight is NaN or Inf, or overflows the dtype.
        OSError: the disk is full or not writable.
    """
    # Wider dtypes first keeps every tensor aligned to its element size.
    ordered = sorted(params, key=lambda p: -p.dtype.itemsize)
    header, placed = _layout(ordered)
    digest = hashlib.sha256(header)
    total = dropped = len(header)
    # The source uses its own threads. torch's threads would only compete with them.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    blocks = _Prefetch(_blocks(ordered, source))
    try:
        with path.open("wb") as f:
            f.write(header)
            for block in blocks:
                f.write(block)
                digest.update(block)
                total += len(block)
                progress(len(block))
                if total - dropped > _UNCACHE_BYTES:
                    uncache(path)
                    source.uncache()
                    dropped = total
    finally:
        blocks.close()
        torch.set_num_threads(threads)
    return FileEntry(total, digest.hexdigest()), placed


def attach(model: ir.Model, file: Path, placed: dict[str, Placed]) -> None:
    """Point the graph's initializers into the weights file beside it."""
    for name, value in model.graph.initializers.items():
        if name not in placed:
            continue
        assert value.shape is not None and value.dtype is not None
        value.const_value = ir.ExternalTensor(
            file.name,
            placed[name].offset,
            placed[name].length,
            value.dtype,
            shape=value.shape,
            name=name,
            base_dir=file.parent,
        )


def _layout(params: list[Parameter]) -> tuple[bytes, dict[str, Placed]]:
    entries: dict[str, object] = {"__metadata__": {"format": "onnx"}}
    offset = 0
    for p in params:
        size = num_bytes(p)
        entries[initializer_name(p)] = {
            "dtype": _NAMES[p.dtype],
            "shape": list(p.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    placed, start = {}, len(header)
    for p in params:
        placed[initializer_name(p)] = Placed(initializer_name(p), start, num_bytes(p))
        start += num_bytes(p)
    return header, placed


def _blocks(params: list[Parameter], source: WeightSource) -> Iterator[memoryview]:
    # Transposed tensors reuse `_AHEAD` + 2 buffers in turn. A buffer is reused only when `_AHEAD` later blocks are
    # queued and one more is being written, so nobody reads it any more.
    largest = max((num_bytes(p) for p in params if p.transform == "transpose"), default=0)
    turns = itertools.cycle([torch.empty(largest, dtype=torch.uint8) for _ in range(_AHEAD + 2)])
    for p in params:
        if p.constant is not None:
            yield _bytes(p.constant.to(p.dtype))
            continue
        assert p.key is not None
        blocks = source.blocks(p.key, p.dtype, transpose=p.transform == "transpose")
        if p.transform == "none":
            yield from map(_bytes, blocks)
        elif p.transform == "transpose":
            whole, start = next(turns)[: num_bytes(p)].view(p.dtype).view(p.shape), 0
            for block in blocks:  # [in, rows]
                whole[:, start : start + block.shape[1]] = block
                start += block.shape[1]
            yield _bytes(whole)
        else:
            yield _bytes(torch.cat(list(blocks))[:, :, -1])


def _bytes(tensor: torch.Tensor) -> memoryview:
    # A tensor of one element counts as contiguous with any stride, and cannot be viewed as bytes with some.
    flat = tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    return flat.numpy().data


class _Prefetch:
    """Run an iterator in a second thread, up to `_AHEAD` items ahead of the reader."""

    def __init__(self, items: Iterator[memoryview]):
        self._queue: queue.Queue[memoryview | BaseException | None] = queue.Queue(maxsize=_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), daemon=True)
        self._thread.start()

    def _run(self, items: Iterator[memoryview]) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
            self._put(None)
        except BaseException as e:
            self._put(e)

    def _put(self, item: memoryview | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[memoryview]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stop.set()
        self._thread.join()
