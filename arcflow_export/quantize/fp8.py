"""Numbers in FP8 E4M3 (3 bits of mantissa, largest 448, no infinity): ranges -> scales, weights -> codes."""

from __future__ import annotations

import torch

from arcflow_runtime.maths.dtypes import E4M3_MAX

E4M3 = torch.float8_e4m3fn
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def make_scale(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """amax / 448 in `dtype`, rounded up, so that nothing within the range exceeds 448; 1 where amax is 0.

    Args:
        amax: largest absolute values, none negative, any shape.
        dtype: float32, bfloat16 or float16.

    Returns:
        Positive scales of the same shape.
    """
    exact = amax.double() / E4M3_MAX
    scale = exact.to(dtype)
    # The bits of a positive float, plus one, are those of the next.
    above = (scale.view(_BITS[dtype]) + 1).view(dtype)
    scale = torch.where(scale.double() < exact, above, scale)
    return torch.where(exact == 0, torch.ones_like(scale), scale)


def encode(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """values / scale in E4M3: clamped to 448, since a bare cast may give NaN, and rounded to nearest even from float32.

    `scale` broadcasts against `values`; neither holds a NaN.
    """
    return (values.float() / scale.float()).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
