"""The closed-form ArcFlow step: latents [B, N, C*P] and the student's heads -> latents at lower noise.

With s the sigma at which the student was evaluated, w = softmax_k(logweights), loggamma_0 = 0 and
phi(z) = expm1(z) / z (ArcFlow, arXiv 2602.09014):

    velocity(sigma) = sum_k w_k mean_k exp(loggamma_k (s - sigma))
    x_b = x_a - (a - b) sum_k w_k mean_k exp(loggamma_k (s - a)) phi(loggamma_k (a - b)),   s >= a >= b

Coefficients are per mode and sub-pixel, a sixteenth of the means, and are computed in float64: exp turns an
error of half a place in its argument z into |z| half places of the result. State, means and sum are float32.
"""

from __future__ import annotations

import numpy as np

# Tokens per block of the sum over modes: its temporary stays in the processor's cache.
_BLOCK = 512


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
        sigma_start: where the interval starts, at most `sigma_src`.
        sigma_end: where it ends, at most `sigma_start`.

    Returns:
        [B, N, C*P] float32, a new array.
    """
    step = sigma_start - sigma_end
    weights, gammas = _modes(logweights, loggammas)
    coefficients = weights * _phi(gammas * step)
    if sigma_start != sigma_src:  # a whole step starts where the student was evaluated, and the factor is 1
        coefficients *= np.exp(gammas * (sigma_src - sigma_start))
    return latents - _mix(means, coefficients * step)


def velocity(
    means: np.ndarray, logweights: np.ndarray, loggammas: np.ndarray, sigma_src: float, sigma: float
) -> np.ndarray:
    """The student's velocity at `sigma` <= `sigma_src`, [B, N, C*P] float32; arguments as for `update`."""
    weights, gammas = _modes(logweights, loggammas)
    return _mix(means, weights * np.exp(gammas * (sigma_src - sigma)))


def _modes(logweights: np.ndarray, loggammas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """softmax over modes, and loggammas with mode 0: both [K, B, N, P] float64.

    Modes come first because numpy reduces the first axis several times faster than a middle one.
    """
    weights = np.moveaxis(logweights, -2, 0).astype(np.float64, order="C")
    weights -= weights.max(axis=0)
    np.exp(weights, out=weights)
    weights /= weights.sum(axis=0)
    gammas = np.zeros(weights.shape)
    gammas[1:] = np.moveaxis(loggammas, -2, 0)
    return weights, gammas


def _phi(z: np.ndarray) -> np.ndarray:
    """expm1(z) / z, with its limit 1 at 0. expm1 is accurate near 0, so only 0 itself needs a branch."""
    zero = z == 0
    return np.where(zero, 1.0, np.expm1(z) / np.where(zero, 1.0, z))


def _mix(means: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """sum_k coefficient[k, p] * mean[k, c*P + p]: [B, N, K, C*P], [K, B, N, P] -> [B, N, C*P] float32."""
    b, n, k, d = means.shape
    p = coefficients.shape[-1]
    means = means.reshape(b * n, k, d)
    coefficients = np.moveaxis(coefficients, 0, -2).astype(np.float32, order="C").reshape(b * n, k, p)
    out = np.empty((b * n, d), np.float32)
    for i in range(0, b * n, _BLOCK):
        block = slice(i, i + _BLOCK)
        tiled = np.tile(coefficients[block], (1, 1, d // p))
        np.einsum("nkd,nkd->nd", tiled, means[block], out=out[block])
    return out.reshape(b, n, d)
