"""Rotary position tables: token grid and text length -> cos and sin, [2, N, D/2] and [2, T, D/2] float32.

Angles are computed in float64, and each cos and sin is rounded once. Positions follow diffusers' `FluxPosEmbed` and
`QwenEmbedRope` with `scale_rope`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from arcflow_runtime.disk.families import Family, facts
from arcflow_runtime.disk.manifest import DType, Rotary
from arcflow_runtime.maths.dtypes import round_to

# The table of a 1024 px image takes 2 MiB, and a service uses only a few sizes at a time.
_CACHED_TABLES = 16


@lru_cache(maxsize=_CACHED_TABLES)
def image_rotary(rotary: Rotary, family: Family, reference_dtype: DType, height: int, width: int) -> np.ndarray:
    """The rotary table of the image tokens, in row-major order.

    FLUX uses positions (0, y, x). Qwen-Image centres them: y runs from -(h - h//2) to h//2 - 1, and x likewise.

    Args:
        rotary: theta and per-axis sizes of the head dimension D.
        family: the student's family.
        reference_dtype: for FLUX, cos and sin are rounded to it, because the reference casts them to its hidden dtype.
        height: tokens per column.
        width: tokens per row.

    Returns:
        [2, height*width, D/2] float32 (cos, sin), read-only.
    """
    y = np.repeat(np.arange(height), width)
    x = np.tile(np.arange(width), height)
    if facts(family).centred_positions:
        y, x = y - (height - height // 2), x - (width - width // 2)
    return _table(rotary, family, reference_dtype, np.stack([np.zeros_like(y), y, x], axis=1))


@lru_cache(maxsize=_CACHED_TABLES)
def text_rotary(
    rotary: Rotary, family: Family, reference_dtype: DType, height: int, width: int, text_tokens: int
) -> np.ndarray:
    """The rotary table of `text_tokens` T text tokens; see `image_rotary` for the other arguments.

    FLUX gives every text token position 0. Qwen-Image gives token j the position max(h//2, w//2) + j on all axes.

    Returns:
        [2, T, D/2] float32 (cos, sin), read-only.
    """
    positions = np.zeros(text_tokens, np.int64)
    if facts(family).centred_positions:
        positions = max(height // 2, width // 2) + np.arange(text_tokens)
    return _table(rotary, family, reference_dtype, np.stack([positions] * 3, axis=1))


def _table(rotary: Rotary, family: Family, reference_dtype: DType, positions: np.ndarray) -> np.ndarray:
    """positions [N, 3] -> cos and sin [2, N, D/2] of the angles position / theta^(2i/d), for each axis of size d."""
    angles = np.concatenate(
        [
            positions[:, axis, None] * (1.0 / rotary.theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim))
            for axis, dim in enumerate(rotary.axes_dims)
        ],
        axis=1,
    )
    table = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    if facts(family).rounds_rotary:
        table = round_to(table, reference_dtype)
    table.setflags(write=False)
    return table
