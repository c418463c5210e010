"""Round float32 values to a narrower float type: [...] float32 -> [...] float32 that the type can hold."""

from __future__ import annotations

import numpy as np


def round_to(values: np.ndarray | float, dtype: str) -> np.ndarray:
    """Round to the nearest value of `dtype`, ties to even, and return it as float32.

    Args:
        values: finite numbers, any shape; rounded to float32 first.
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
        # bfloat16 is the upper half of float32: add just under half of its last place, plus one on odd to
        # break ties towards even, and drop the lower half.
        bits = np.atleast_1d(x).view(np.uint32)
        bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
        return bits.view(np.float32).reshape(x.shape)
    raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
