"""Casts between parts; the reference for bfloat16 is ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from arcflow_runtime.disk.dtypes import ITEM_BYTES
from arcflow_runtime.maths.dtypes import cast, round_to, to_float32

# every bfloat16, halfway points between them, their neighbours, and what float32 has beyond
_UPPER = (np.arange(1 << 16, dtype=np.uint32) << 16)[:, None]
VALUES = (_UPPER + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)).view(np.float32).reshape(-1)


def test_bfloat16_rounds_to_nearest_even():
    with np.errstate(over="ignore", invalid="ignore"):
        expected = VALUES.astype(ml_dtypes.bfloat16)
    found = cast(VALUES, "bfloat16")
    nan = np.isnan(VALUES)
    np.testing.assert_array_equal(found[~nan], expected.view(np.uint16)[~nan])
    assert np.isnan(to_float32(found[nan])).all()


def test_rounding_and_casting_to_bfloat16_agree():
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(round_to(VALUES, "bfloat16"), to_float32(cast(VALUES, "bfloat16")))
    scalar = round_to(3500.0, "bfloat16")  # between 3488 and 3504, 16 apart
    assert scalar == 3504 and scalar.shape == () and scalar.dtype == np.float32


def test_every_bfloat16_comes_back():
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = to_float32(bits)
    assert wide.dtype == np.float32
    whole = ~np.isnan(wide)
    np.testing.assert_array_equal(cast(wide, "bfloat16")[whole], bits[whole])
    np.testing.assert_array_equal(cast(bits, "float32")[whole], wide[whole])


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "uint8", "float64"])
def test_the_same_dtype_is_not_copied(dtype):
    x = np.ones((2, 3), dtype)
    assert cast(x, dtype) is x
    assert cast(x.T, dtype).flags.c_contiguous
    assert ITEM_BYTES[dtype] == x.itemsize


def test_from_bfloat16_to_float16():
    x = cast(np.float32([1, 2.5, -3]), "bfloat16")
    assert cast(x, "float16").dtype == np.float16
    np.testing.assert_array_equal(cast(x, "float16"), [1, 2.5, -3])
    assert cast(x, "bfloat16") is x
