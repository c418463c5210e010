"""What the drift gate enforces: the [thresholds] of a policy, which `arcflow_export.formats.policy` reads."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """Limits of the drift from the reference; None is not enforced. Those of single layers have defaults.

    Args:
        heads: relative RMS error of the means on the reference's own inputs, mean over prompts, worst step; at most.
        latents: relative RMS error of the final latents, mean over prompts; at most.
        psnr: of the pictures, in dB, mean over prompts; at least.
        judge: drop of the judge's shares of pictures, named right and right and clean, the larger; at most.
        layers: relative RMS error of any quantised linear's output on the reference's own input, worst step; at most.
            Two E4M3 operands of 3 mantissa bits give about 0.04, so several times that is a wrong scale.
        headroom: how many times the largest input seen an activation scale may reach; at most. E4M3 has exponents, so
            a scale far too large costs little here and much where inputs are small: it is found by this alone.
    """

    heads: float | None = None
    latents: float | None = None
    psnr: float | None = None
    judge: float | None = None
    layers: float | None = 0.2
    headroom: float | None = 8.0


def times(value: float, limit: float | None) -> float:
    """How many times `limit` a value is; Inf for anything above a limit of 0, 0 where there is none."""
    if limit is None:
        return 0.0
    if limit > 0:
        return value / limit
    return math.inf if value > 0 else 0.0
