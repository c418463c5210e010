"""Open a safetensors file without torch, and decode its tensors to float32.

numpy has no bfloat16 and no float8, so tensors are decoded from their bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from arcflow_runtime.errors import LoraError
from arcflow_runtime.maths.dtypes import to_float32

#: Largest header that is read; safetensors has the same limit.
_MAX_HEADER_BYTES = 100_000_000
#: A LoRA of all linears of Qwen-Image has 2,538 tensors with its alphas.
_MAX_TENSORS = 100_000
_PICKLES = (b"PK", *(bytes([0x80, protocol]) for protocol in range(2, 6)))


def _e4m3(codes: np.ndarray) -> np.ndarray:
    """FP8 E4M3 without infinity: bits seeeemmm, bias 7, subnormals, NaN is 0x7f and 0xff."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    value = np.where(bits & 127 == 127, np.nan, value) * np.where(bits >> 7, -1, 1)
    return value.astype(np.float32)[codes]


def _e5m2(codes: np.ndarray) -> np.ndarray:
    """FP8 E5M2 is the upper byte of float16."""
    return (codes.astype(np.uint16) << 8).view(np.float16).astype(np.float32)


def _float64(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # the caller checks for infinities
        return values.astype(np.float32)


#: Dtype in the file -> the numpy dtype of its bytes, and the function to float32.
_FLOATS: dict[str, tuple[str, Any]] = {
    "F64": ("<f8", _float64),
    "F32": ("<f4", to_float32),
    "F16": ("<f2", to_float32),
    "BF16": ("<u2", to_float32),  # `to_float32` reads uint16 as bfloat16
    "F8_E4M3": ("u1", _e4m3),
    "F8_E5M2": ("u1", _e5m2),
}
_INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}


@dataclass(frozen=True)
class Entry:
    """One tensor of the header: dtype as in the file, shape, and the range of its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class LoraTensors:
    """The tensors and the metadata of one safetensors file; a tensor is read when asked for."""

    def __init__(self, path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]):
        self.path, self.entries, self.metadata = path, entries, metadata

    @staticmethod
    def open(path: Path) -> LoraTensors:
        """Read the header of `path`; the safetensors library checks it first.

        Raises:
            LoraError: there is no such file, or it is not a valid safetensors file.
        """
        _check_start(path)
        try:
            with safe_open(path, framework="numpy"):
                pass
        except SafetensorError as e:
            raise LoraError(f"LoRA: {path} is not a valid safetensors file ({e}); download it again") from None
        with path.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            text = f.read(min(size, _MAX_HEADER_BYTES))
            total = f.seek(0, 2)
        try:
            header = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, path))
        except ValueError as e:
            raise LoraError(f"LoRA: {path}: the header is not valid JSON ({e}); download it again") from None
        metadata = header.pop("__metadata__", None) or {}
        if len(header) > _MAX_TENSORS:
            raise LoraError(f"LoRA: {path} must have at most {_MAX_TENSORS} tensors, got {len(header)}")
        entries = {}
        for key, value in header.items():
            start, stop = (8 + size + offset for offset in value["data_offsets"])
            if not 8 + size <= start <= stop <= total:
                raise LoraError(f"LoRA: {path}: tensor {key!r} is outside the file; download it again")
            entries[key] = Entry(value["dtype"], tuple(value["shape"]), start, stop)
        return LoraTensors(path, entries, metadata)

    def floats(self, key: str) -> np.ndarray:
        """Tensor `key` in float32, read-only.

        Raises:
            LoraError: it is not stored as floating point, or holds NaN, infinity or a value beyond float32.
        """
        entry = self.entries[key]
        if entry.dtype not in _FLOATS:
            raise LoraError(
                f"LoRA: {self.path}: {key!r} has dtype {entry.dtype}, factors must have one of "
                f"{', '.join(_FLOATS)}; use the file before it was quantised"
            )
        stored, convert = _FLOATS[entry.dtype]
        values: np.ndarray = convert(self._bytes(key, stored))
        if bad := int(np.count_nonzero(~np.isfinite(values))):
            raise LoraError(
                f"LoRA: {self.path}: {key!r} holds {bad} NaN or infinite values; the file is damaged or the training "
                "diverged"
            )
        values.flags.writeable = False
        return values

    def number(self, key: str) -> float:
        """Tensor `key`, which must hold one finite number, in any floating point or integer dtype.

        Raises:
            LoraError: it does not.
        """
        entry = self.entries[key]
        count = math.prod(entry.shape)
        if count != 1:
            raise LoraError(
                f"LoRA: {self.path}: {key!r} must be one number, got {count} in shape {list(entry.shape)}; "
                "save the LoRA again"
            )
        if entry.dtype in _INTEGERS:
            return float(self._bytes(key, _INTEGERS[entry.dtype]).item())
        if entry.dtype not in _FLOATS:
            raise LoraError(
                f"LoRA: {self.path}: {key!r} must be a number, got dtype {entry.dtype}; save the LoRA again"
            )
        stored, convert = _FLOATS[entry.dtype]
        raw = self._bytes(key, stored)
        value = float(raw.item() if entry.dtype == "F64" else convert(raw).item())
        if not math.isfinite(value):
            raise LoraError(f"LoRA: {self.path}: {key!r} must be a finite number, got {value}; save the LoRA again")
        return value

    def is_zero(self, key: str) -> bool:
        """True if every byte of tensor `key` is 0, or is the sign of a zero."""
        entry = self.entries[key]
        if entry.dtype in _FLOATS:
            stored, convert = _FLOATS[entry.dtype]
            return not convert(self._bytes(key, stored)).any()
        return not self._bytes(key, "u1", flat=True).any()

    def _bytes(self, key: str, dtype: str, flat: bool = False) -> np.ndarray:
        entry = self.entries[key]
        wanted = (entry.stop - entry.start) // np.dtype(dtype).itemsize
        values = np.fromfile(self.path, dtype, wanted, offset=entry.start)
        if values.size != wanted:
            raise LoraError(f"LoRA: {self.path} became shorter while it was read; read it again")
        return values if flat else values.reshape(entry.shape)


def _check_start(path: Path) -> None:
    """Report the usual faults of a file in clearer words than the safetensors parser does."""
    if not path.is_file():
        raise LoraError(f"LoRA: {path} is not a file; check the path")
    with path.open("rb") as f:
        head = f.read(9)
    if len(head) < 8:
        raise LoraError(f"LoRA: {path} has only {len(head)} bytes; it is truncated, download it again")
    # The length of a safetensors header can begin with the same bytes; then a "{" follows.
    if head.startswith(_PICKLES) and not head.endswith(b"{"):
        raise LoraError(f"LoRA: {path} is a pickle, which can run code when read; convert it to safetensors")
    if head.startswith(b"version "):
        raise LoraError(f"LoRA: {path} is a Git LFS pointer, not the weights; run `git lfs pull`")


def _unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise LoraError(f"LoRA: {path}: the header has {twice!r} twice; save the LoRA again")
    return found
