"""E4M3 numbers: scales that hold their range, and codes as near as codes can be."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from arcflow_export.quantize import fp8
from arcflow_export.quantize.fp8 import E4M3, encode, make_scale

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_holds_its_range_and_is_the_smallest_that_does(dtype):
    amax = torch.exp(torch.linspace(np.log(1e-6), np.log(6e4), 5000, dtype=torch.float64))
    scale = make_scale(amax, dtype)
    assert scale.dtype == dtype and (scale.double() * 448 >= amax).all()
    below = (scale.view(torch.int32 if dtype == torch.float32 else torch.int16) - 1).view(dtype)
    assert (below.double() * 448 < amax).all()
    assert make_scale(torch.tensor([0.0, 448.0]), dtype).tolist() == [1, 1]


def test_every_value_is_within_half_a_unit_of_its_code():
    """Neighbours of E4M3 are 2^-3 of their binade apart, 2^-9 below 2^-6."""
    values = torch.linspace(-448, 448, 200_001, dtype=torch.float64).float()
    codes = encode(values, torch.tensor(1.0)).double()
    half = torch.exp2(torch.floor(torch.log2(values.double().abs().clamp(min=2**-6))) - 4)
    assert ((codes - values).abs() <= half).all()
    assert torch.equal(
        codes.float(), torch.from_numpy(values.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    )


def test_ties_go_to_even():
    values = torch.tensor(
        [17.0, 19.0, 2**-10, 3 * 2**-10]
    )  # halfway in 16..18..20 and in the subnormals 0, 1, 2 x 2^-9
    assert encode(values, torch.tensor(1.0)).float().tolist() == [16.0, 20.0, 0.0, 2**-8]


def test_what_is_too_large_becomes_448_and_never_nan(monkeypatch):
    """torch 2.13's cast saturates by itself; that of ml_dtypes gives NaN above 464, and so shows what was clamped."""
    values = torch.tensor([448.0, 449.0, 464.0, 465.0, 1e30, -1e30])
    assert np.isnan(values.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)[3:]).all()
    got = encode(values, torch.tensor(1.0))
    assert got.dtype == E4M3 and got.float().tolist() == [448.0] * 5 + [-448.0]
    monkeypatch.setattr(fp8, "E4M3", torch.float32)  # so that encode returns what it would cast
    given = encode(torch.cat([values, torch.tensor([torch.inf])]), torch.tensor(1.0)).numpy()
    assert given.astype(ml_dtypes.float8_e4m3fn).astype(np.float32).tolist() == [448.0] * 5 + [-448.0, 448.0]


def test_values_are_divided_by_their_column_s_scale():
    """Columns of scale 2 and 0.5 by hand: 6 / 2 = 3, 7 / 0.5 = 14, and 1 / 0.5 = 2."""
    codes = encode(torch.tensor([[6.0, 7.0], [-2.0, 1.0]]), torch.tensor([2.0, 0.5]))
    assert codes.float().tolist() == [[3.0, 14.0], [-1.0, 2.0]]
