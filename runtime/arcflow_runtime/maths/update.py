"""The closed-form ArcFlow step: latents [B, N, C*P] and the student's heads -> latents at lower noise.

Let s be the sigma at which the student was evaluated, w = softmax_k(logweights), loggamma_0 = 0 and
phi(z) = expm1(z) / z. Then (ArcFlow, arXiv 2602.09014):

    velocity(sigma) = sum_k w_k mean_k exp(loggamma_k (s - sigma))
    x_b = x_a - (a - b) sum_k w_k mean_k exp(loggamma_k (s - a)) phi(loggamma_k (a - b)),   s >= a >= b

Coefficients are computed in float64, because exp turns an error of half an ulp in its argument z into |z| half ulps of
the result. That is cheap: they are per mode and sub-pixel, a sixteenth of the size of the means. Latents, means and
their sum are float32.
"""

from __future__ import annotations

import numpy as np

from arcflow_runtime.maths.speedups import compiled

# Tokens per block of the sum over modes, few enough that the temporary stays in the processor's cache.
_BLOCK = 512
_NEAR_ZERO = 1e-300  # far below 1.4e-45, the smallest float32 number


def update(
    latents: np.ndarray,
    means: np.ndarray,
    logweights: np.ndarray,
    loggammas: np.ndarray,
    sigma_src: float,
    sigma_start: float,
    sigma_end: float,
) -> np.ndarray:
    """Integrate the student's velocity exactly from `sigma_start` to `sigma_end`.

    Args:
        latents: [B, N, C*P] float32 at `sigma_start`; channel c*P + p belongs to sub-pixel p.
        means: [B, N, K, C*P] float32.
        logweights: [B, N, K, P] float32, unnormalised.
        loggammas: [B, N, K-1, P] float32; mode 0 has loggamma 0.
        sigma_src: the sigma at which the student was evaluated.
        sigma_start: sigma at the start of the interval, at most `sigma_src`.
        sigma_end: sigma at its end, at most `sigma_start`.

    Returns:
        [B, N, C*P] float32, a new array.
    """
    step = sigma_start - sigma_end
    if compiled is not None and sigma_start == sigma_src:
        heads = (np.ascontiguousarray(x, np.float32) for x in (means, logweights, loggammas, latents))
        out = np.empty(latents.shape, np.float32)
        compiled.update(*heads, out, means.shape[2], means.shape[3], logweights.shape[3], step)
        return out
    # The caller checks the result for infinities, so numpy's overflow warnings are silenced here.
    with np.errstate(over="ignore", invalid="ignore"):
        coefficients, gammas = _modes(logweights, loggammas)
        coefficients[1:] *= _phi(gammas * step)
        coefficients *= step
        if sigma_start != sigma_src:  # if they are equal, as for a whole step, the factor is 1
            coefficients[1:] *= np.exp(gammas * (sigma_src - sigma_start))
        mixed = _mix(means, coefficients)
        return np.subtract(latents, mixed, out=mixed)


def velocity(
    means: np.ndarray, logweights: np.ndarray, loggammas: np.ndarray, sigma_src: float, sigma: float
) -> np.ndarray:
    """The student's velocity at `sigma` <= `sigma_src`, [B, N, C*P] float32; see `update` for the arguments."""
    coefficients, gammas = _modes(logweights, loggammas)
    coefficients[1:] *= np.exp(gammas * (sigma_src - sigma))
    return _mix(means, coefficients)


def _modes(logweights: np.ndarray, loggammas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The softmax over modes [K, B, N, P] and the loggammas of modes 1 to K-1 [K-1, B, N, P], as new float64 arrays.

    The axis of modes is first because numpy reduces the first axis several times faster than a middle one.
    """
    weights = logweights.transpose(2, 0, 1, 3).astype(np.float64, order="C")
    weights -= np.maximum.reduce(weights)
    np.exp(weights, out=weights)
    weights /= np.add.reduce(weights)
    return weights, loggammas.transpose(2, 0, 1, 3).astype(np.float64, order="C")


def _phi(z: np.ndarray) -> np.ndarray:
    """expm1(z) / z, and its limit 1 at z = 0. Overwrites `z`.

    expm1 is accurate near 0, so only z = 0 needs care. Adding `_NEAR_ZERO` makes such a z nonzero, with expm1(z) = z.
    It is too small to change any other z, which is a product of float32 numbers.
    """
    z += _NEAR_ZERO
    phi: np.ndarray = np.expm1(z)
    phi /= z
    return phi


def _mix(means: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """sum_k coefficients[k, p] * means[k, c*P + p]: [B, N, K, C*P], [K, B, N, P] -> [B, N, C*P] float32."""
    b, n, k, d = means.shape
    p = coefficients.shape[-1]
    means = means.reshape(b * n, k, d)
    coefficients = coefficients.transpose(1, 2, 0, 3).astype(np.float32, order="C").reshape(b * n, k, p)
    out = np.empty((b * n, d), np.float32)
    for i in range(0, b * n, _BLOCK):
        block = slice(i, i + _BLOCK)
        tiled = coefficients[block].reshape(-1, p).repeat(d // p, axis=0).reshape(-1, k, d)
        np.einsum("nkd,nkd->nd", tiled, means[block], out=out[block])
    return out.reshape(b, n, d)
