"""The limits that the drift gate enforces: the `[thresholds]` table of a policy file (read by `formats.policy`)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """Limits for the drift from the reference; a limit of None is not enforced.

    Args:
        heads: largest relative RMS error of the means, given the reference's inputs; mean over prompts, worst step.
        latents: largest relative RMS error of the final latents; mean over prompts.
        psnr: smallest PSNR of the images in dB; mean over prompts.
        judge: largest drop of the judge's two shares of images (attributes right; attributes right and clean).
        layers: largest relative RMS error of any quantised linear's output, given the reference's input; worst step.
            Two E4M3 operands with 3 mantissa bits give about 0.04, so several times that means a wrong scale.
        headroom: largest ratio of an activation scale's range to the largest input seen. E4M3 has exponents, so a scale
            that is far too large barely raises `layers`, but it hurts small inputs; only this limit finds it.
    """

    heads: float | None = None
    latents: float | None = None
    psnr: float | None = None
    judge: float | None = None
    layers: float | None = 0.2
    headroom: float | None = 8.0


def times(value: float, limit: float | None) -> float:
    """value / limit. Returns 0 if `limit` is None; for a limit of 0, Inf if the value is above 0, else 0."""
    if limit is None:
        return 0.0
    if limit > 0:
        return value / limit
    return math.inf if value > 0 else 0.0
