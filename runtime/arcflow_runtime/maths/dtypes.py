"""Arrays in the dtypes of parts, and casts between them; bfloat16, which numpy lacks, is its 16 bits as uint16."""

from __future__ import annotations

import numpy as np

#: What holds each dtype on the host. No part takes or gives uint16 itself, so that such an array is always bfloat16.
NUMPY: dict[str, type[np.generic]] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int64": np.int64,
    "uint8": np.uint8,
}

#: Largest finite float16.
FLOAT16_MAX = 65504.0
#: Largest value of FP8 E4M3 without infinity.
E4M3_MAX = 448.0


def item_bytes(dtype: str) -> int:
    """Bytes of one element."""
    return np.dtype(NUMPY[dtype]).itemsize


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """The array in what holds `dtype`, contiguous, each value the nearest (B9); itself where it is that already."""
    if dtype == "bfloat16":
        return np.ascontiguousarray(array if array.dtype == np.uint16 else _to_bits(array))
    return np.ascontiguousarray(to_float32(array) if array.dtype == np.uint16 else array, dtype=NUMPY[dtype])


def to_float32(array: np.ndarray) -> np.ndarray:
    """The array in float32; itself where it is that already."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float32, copy=False)


def _to_bits(array: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16, ties to even: any array -> its bits, uint16, in the same shape.

    bfloat16 is the upper half of float32. Half of its last place is added, less one unit unless the last place is odd,
    so that ties go to even, and the lower half is dropped.
    """
    x = np.ascontiguousarray(array, dtype=np.float32)
    bits = x.reshape(-1).view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += bits
    rounded += np.uint32(0x7FFF)
    rounded >>= np.uint32(16)
    nan = np.isnan(x).reshape(-1)
    if nan.any():
        rounded[nan] = 0x7FC0  # rounding could carry a NaN's bits over to infinity
    return rounded.astype(np.uint16).reshape(array.shape)


def round_to(values: np.ndarray | float, dtype: str) -> np.ndarray:
    """Round to the nearest value of `dtype`, ties to even, and return it as float32.

    Args:
        values: any shape; rounded to float32 first.
        dtype: "float32", "float16" or "bfloat16".

    Raises:
        ValueError: another `dtype`.
    """
    x = np.asarray(values, np.float32)
    if dtype == "float32":
        return x
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        return to_float32(_to_bits(x))
    raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
