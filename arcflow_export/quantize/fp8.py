"""FP8 E4M3 arithmetic (3 mantissa bits, largest value 448, no infinity): ranges -> scales, weights -> FP8 values."""

from __future__ import annotations

import torch

from arcflow_runtime.maths.dtypes import E4M3_MAX

E4M3 = torch.float8_e4m3fn
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def make_scale(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """amax / 448 in `dtype`, or 1 where amax is 0; rounded up, so that a scaled value within the range is at most 448.

    Args:
        amax: largest absolute values, at least 0, of any shape.
        dtype: dtype of the scales: float32, bfloat16 or float16.

    Returns:
        Positive scales of the same shape.
    """
    exact = amax.double() / E4M3_MAX
    scale = exact.to(dtype)
    # Adding 1 to the bits of a positive float gives the next larger float.
    above = (scale.view(_BITS[dtype]) + 1).view(dtype)
    scale = torch.where(scale.double() < exact, above, scale)
    return torch.where(exact == 0, torch.ones_like(scale), scale)


def encode(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """values / scale in E4M3, rounded from float32 to nearest even.

    The quotient is clamped to +-448, because a cast of a larger value may give NaN. `scale` broadcasts against
    `values`; neither may hold NaN.
    """
    return (values.float() / scale.float()).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
