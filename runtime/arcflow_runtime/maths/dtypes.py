"""Cast numpy arrays to and from the dtypes of a bundle's parts.

numpy has no bfloat16: such an array is stored as uint16, with the 16 bits of each bfloat16 number.
"""

from __future__ import annotations

import numpy as np

#: Dtype of a part -> the numpy type that stores it. No part has uint16 inputs or outputs: uint16 always means bfloat16.
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
#: Largest finite value of FP8 E4M3 (the variant without infinities).
E4M3_MAX = 448.0
#: Largest E2M1 number, and how many of them share a scale in NVFP4 (B16).
E2M1_MAX = 6.0
NVFP4_BLOCK = 16


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """Convert an array to `dtype`, rounding to nearest (B9). The result is contiguous; it is a copy only if needed.

    Args:
        array: any shape, of a dtype in `NUMPY`; uint16 is read as bfloat16.
        dtype: a key of `NUMPY`.
    """
    if dtype == "bfloat16":
        return np.ascontiguousarray(array if array.dtype == np.uint16 else _to_bits(array))
    return np.ascontiguousarray(to_float32(array) if array.dtype == np.uint16 else array, dtype=NUMPY[dtype])


def to_float32(array: np.ndarray) -> np.ndarray:
    """Convert an array of a part's dtype to float32, without a copy if it is float32 already."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float32, copy=False)


def _to_bits(array: np.ndarray) -> np.ndarray:
    """Round to the nearest bfloat16, ties to even: any array -> the bits as uint16 in the same shape; NaN stays NaN.

    bfloat16 is the upper half of float32. Add just under half a bfloat16 ulp, plus one if the last bit is odd, so that
    ties go to even, and drop the lower half.
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
        rounded[nan] = 0x7FC0  # rounding up could turn a NaN's bits into those of infinity
    return rounded.astype(np.uint16).reshape(array.shape)


def round_to(values: np.ndarray | float, dtype: str) -> np.ndarray:
    """Round to the nearest value of `dtype`, ties to even, and return it as float32.

    Args:
        values: any shape; rounded to float32 first.
        dtype: "float32", "float16" or "bfloat16".

    Raises:
        ValueError: `dtype` is another one.
    """
    x = np.asarray(values, np.float32)
    if dtype == "float32":
        return x
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        return to_float32(_to_bits(x))
    raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
