"""Rotary position tables: token grid and text length -> cos and sin, [2, N, D/2] and [2, T, D/2] float32.

Angles are float64 and each cos and sin is rounded once. Positions follow diffusers' `FluxPosEmbed` and
`QwenEmbedRope` with `scale_rope`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from arcflow_runtime.disk.families import Family, facts
from arcflow_runtime.disk.manifest import DType, Rotary
from arcflow_runtime.maths.dtypes import round_to

# A table of a 1024 px image takes 2 MiB; a service uses few sizes at once.
_CACHED_TABLES = 16


@lru_cache(maxsize=_CACHED_TABLES)
def image_rotary(rotary: Rotary, family: Family, reference_dtype: DType, height: int, width: int) -> np.ndarray:
    """The table of the image tokens, row by row.

    FLUX's positions are (0, y, x). Qwen-Image centres them: y runs over -(h - h//2) ... h//2 - 1, x likewise.

    Args:
        rotary: theta and per-axis sizes of the head dimension D.
        family: the student's family.
        reference_dtype: FLUX's reference casts cos and sin to its hidden dtype, so they are rounded to it.
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
    """The table of the text tokens; arguments as for `image_rotary`.

    FLUX's text has no positions. Qwen-Image's token j stands at max(h//2, w//2) + j on all axes.

    Returns:
        [2, T, D/2] float32 (cos, sin), read-only.
    """
    positions = np.zeros(text_tokens, np.int64)
    if facts(family).centred_positions:
        positions = max(height // 2, width // 2) + np.arange(text_tokens)
    return _table(rotary, family, reference_dtype, np.stack([positions] * 3, axis=1))


def _table(rotary: Rotary, family: Family, reference_dtype: DType, positions: np.ndarray) -> np.ndarray:
    """positions [N, 3] -> [2, N, D/2]; axis a of size d turns by position / theta^(2i/d)."""
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
