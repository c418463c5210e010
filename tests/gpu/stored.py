"""The kernels' dtypes, and how numpy stores their values."""

from __future__ import annotations

import numpy as np

DTYPES = ("float32", "float16", "bfloat16")
#: Dtype -> the numpy type that stores it.
STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def widen(x):
    """Convert float32, float16, or bfloat16 stored as uint16 to float32."""
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x.astype(np.float32)


def narrow(x, dtype):
    """Round `x` to `dtype`, ties to even; bfloat16 is returned as uint16."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return x.astype(dtype)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)
