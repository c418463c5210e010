"""Launches of the kernel for a straight student's step, and their result: bits of the Python runtime, or float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from arcflow_runtime.gpu.kernels import EulerShape
from arcflow_runtime.maths.euler import euler, guide
from tests.gpu.stored import DTYPES, narrow, widen
from tests.gpu.update_cases import EPS, SIGMAS

SCALE = 4.0


def exact(latents, velocity, negative, step):
    """The guided step in float64, and how far from it float32 may be; arrays of shape [T, C].

    c = n + g (v - n): the difference is rounded once and its product twice, the sum once, and one EPS of each covers
    products of errors. That is `off` for a channel. A norm's squares and their sum are C + 1 EPS, of which the root
    halves, and the root 1; c's is off by that of `off` too. Quotient, product, the step's rounding and product are 4,
    and 1 more covers products of errors. The subtraction rounds the result once. A token with c = 0 is exact.
    """
    v, n = velocity.astype(np.float64), negative.astype(np.float64)
    away = SCALE * (v - n)
    c = n + away
    off = EPS * (3 * np.abs(away) + 2 * np.abs(c))
    norm, c_norm, off_norm = (np.sqrt(np.square(x).sum(1, keepdims=True)) for x in (v, c, off))
    some = c_norm != 0
    longer = np.divide(norm, c_norm, out=np.zeros_like(norm), where=some)
    relative = np.divide(off_norm, c_norm, out=np.zeros_like(norm), where=some) + (c.shape[1] + 8) * EPS
    result = latents - step * longer * c
    return result, step * longer * (off + np.abs(c) * relative) + EPS * np.abs(result)


@dataclass(frozen=True)
class EulerCase:
    """Sizes and dtypes of one launch."""

    velocity: str
    engine_input: str
    tokens: int = 21
    channels: int = 64
    guided: bool = False
    in_place: bool = False
    second: bool = True

    def shape(self) -> EulerShape:
        return EulerShape(self.tokens, self.channels, self.velocity, self.engine_input)


# Every pair of dtypes; the last block partly filled; fewer channels than the lanes hold, and more.
EULER_CASES = [
    *(EulerCase(v, i, guided=g) for v in DTYPES for i in DTYPES for g in (False, True)),
    *(EulerCase(v, "float16", 9, c, g) for v in DTYPES for c in (8, 24, 200) for g in (False, True)),
    *(EulerCase(v, v, 1, guided=g, in_place=True) for v in DTYPES for g in (False, True)),
    EulerCase("bfloat16", "float16", second=False),
]


def euler_inputs(case, seed=0):
    """latents float32, and velocity and negative in the case's dtype; the first token's guided velocity is 0."""
    rng = np.random.default_rng(seed)
    latents, velocity, negative = (rng.standard_normal((case.tokens, case.channels)).astype(np.float32) for _ in "123")
    velocity[0], negative[0] = 3, 4  # 4 + 4 * (3 - 4) = 0
    return latents, narrow(velocity, case.velocity), narrow(negative, case.velocity)


def check_euler(case, arrays, out, second, step):
    """Assert that one launch's results are the bits of euler.py, or with guidance within the bound of float64."""
    latents, velocity, negative = (widen(x) for x in arrays)
    length = SIGMAS[step] - SIGMAS[step + 1]
    if case.guided:
        result, bound = exact(latents, velocity, negative, length)
        assert (np.abs(out - result) <= bound).all()
        # The Python runtime keeps the bound too.
        ours = euler(latents[None], guide(velocity[None], negative[None], SCALE), length)[0]
        assert (np.abs(ours - result) <= bound).all()
    else:
        np.testing.assert_array_equal(out, euler(latents, velocity, length))
    if second is not None:
        np.testing.assert_array_equal(second, narrow(out, case.engine_input))
