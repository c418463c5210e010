"""Launches of the update kernel and their result in float64, for its tests on a CPU and on a GPU.

The bound of `exact` is derived there. It holds on a CPU, whose expf and expm1f are within 1 unit in the last place, and
on a GPU, where they are within 2 and 1 (CUDA C++ Programming Guide, "Mathematical Functions").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from arcflow_runtime.gpu.kernels import UpdateShape
from tests.gpu.stored import DTYPES, narrow, widen

EPS = 2.0**-24  # half a unit in the last place of float32
TINY = 2.0**-149  # the smallest float32
SIGMAS = np.array([1, 3.2 * 0.5 / 2.1, 0])


def exact(latents, means, logweights, loggammas, sigma, following):
    """The step in float64, and how far from it float32 may be; heads of shape [T, K, *].

    Per mode's share of the sum: exp of the weight is 4 EPS (2 places) and its correction 1; expm1 is 2 EPS and its
    correction 1, the division by loggamma 1, the product with the weight 1: 10. One exponential in their place, or
    none where the exponent vanishes, has fewer. K fused multiply-adds add K EPS. The sum of the weights is 5 EPS of
    each plus K - 1 additions, its reciprocal 1. The last operation rounds the result once. One more covers products of
    errors. Weights and shares below float32's normal numbers are rounded to a multiple of TINY.
    """
    means, logweights, loggammas = (x.astype(np.float64) for x in (means, logweights, loggammas))
    modes = means.shape[1]
    w = np.exp(logweights - logweights.max(1, keepdims=True))
    w /= w.sum(1, keepdims=True)
    g = np.concatenate([np.zeros_like(w[:, :1]), loggammas], axis=1)
    d = float(sigma) - float(following)
    z = g * d
    with np.errstate(over="ignore"):
        integral = np.where(np.abs(z) < 1e-9, d * (1 + z / 2), np.expm1(z) / np.where(g == 0, 1, g))
        repeat = (1, 1, means.shape[2] // w.shape[2])
        shares = means * np.tile(w * integral, repeat)
    result = latents.astype(np.float64) - shares.sum(1)
    lost = TINY * (np.abs(means) * np.tile(1 + np.abs(np.where(z > 64, 0, integral)), repeat)).sum(1)
    return result, (2 * modes + 16) * EPS * np.abs(shares).sum(1) + EPS * np.abs(result) + lost


def heads(rng, tokens=64, modes=16, channels=64, sub_pixels=4):
    """Heads that reach every branch: ties, logits of 1e4, loggammas of 30, tiny ones and exact zeros."""
    logweights = rng.standard_normal((tokens, modes, sub_pixels)).astype(np.float32) * 4
    logweights[0] = 1.25  # all equal
    if tokens > 4:
        logweights[1] = rng.uniform(-1e4, 1e4, logweights.shape[1:])
        logweights[2] += 1e4
        logweights[3] = np.float32(-1e4)
    loggammas = rng.uniform(-30, 30, (tokens, modes - 1, sub_pixels)).astype(np.float32)
    loggammas[rng.random(loggammas.shape) < 0.1] = 0
    tiny = rng.random(loggammas.shape) < 0.2
    loggammas[tiny] = rng.choice([1e-45, 1e-38, 1e-20, -1e-20, 1e-8, -3e-8, 1e-4], tiny.sum())
    means = rng.standard_normal((tokens, modes, channels)).astype(np.float32)
    return rng.standard_normal((tokens, channels)).astype(np.float32), means, logweights, loggammas


@dataclass(frozen=True)
class Case:
    """Sizes and dtypes of one launch."""

    heads: str
    engine_input: str
    tokens: int = 21
    modes: int = 16
    channels: int = 64
    sub_pixels: int = 4
    shift: int = 0  # elements by which the means are off a 16-byte boundary
    in_place: bool = False
    second: bool = True

    def shape(self) -> UpdateShape:
        return UpdateShape(self.tokens, self.modes, self.channels, self.sub_pixels, self.heads, self.engine_input)


# Every pair of dtypes; the last block partly filled; K below, above and off the number of lanes; more channels than the
# lanes hold, and fewer; what goes the scalar way: odd sizes, other sub-pixels, misaligned heads.
CASES = [
    *(Case(h, i) for h in DTYPES for i in DTYPES),
    *(Case(h, "float16", modes=k, tokens=9) for h in DTYPES for k in (1, 3, 17, 32)),
    *(Case(h, "bfloat16", channels=c, tokens=5) for h in DTYPES for c in (4, 20, 32, 200)),
    *(Case(h, "float32", sub_pixels=p, channels=16 * p, modes=5) for h in DTYPES for p in (1, 9)),
    *(Case(h, "float16", tokens=5, shift=1) for h in DTYPES),
    *(Case(h, h, tokens=t, in_place=True) for h in DTYPES for t in (1, 64)),
    Case("bfloat16", "float16", second=False),
    Case("float16", "float16", tokens=3, modes=90, sub_pixels=4),  # 64 threads per block
]


def inputs_of(case, seed=0):
    """latents float32, and the heads in the case's dtype."""
    latents, *rest = heads(np.random.default_rng(seed), case.tokens, case.modes, case.channels, case.sub_pixels)
    if case.shift:
        rest[0] = np.concatenate([np.zeros(case.shift, np.float32), rest[0].ravel()])
    return latents, *(narrow(x, case.heads) for x in rest)


def means_of(case, means):
    return means[case.shift :].reshape(case.tokens, case.modes, case.channels) if case.shift else means


def check(case, arrays, out, second, step):
    """Assert that one launch's results are within the bound; returns the largest error as a fraction of its bound."""
    latents, means, logweights, loggammas = arrays
    wide = [widen(x) for x in (means_of(case, means), logweights, loggammas)]
    result, bound = exact(latents, *wide, SIGMAS[step], SIGMAS[step + 1])
    error = np.abs(out - result)
    assert (error <= bound).all()
    if second is not None:
        np.testing.assert_array_equal(second, narrow(out, case.engine_input))
    return float((error / bound).max())
