"""Sizes of the dtypes that bundles and buffers have."""

from __future__ import annotations

#: Dtype -> bytes per element.
ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "uint8": 1}
