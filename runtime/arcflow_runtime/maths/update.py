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

from arcflow_runtime.maths.speedups import compiled

# Tokens per block of the sum over modes: its temporary stays in the processor's cache.
_BLOCK = 512
_NEAR_ZERO = 1e-300  # far below float32's smallest, 1.4e-45


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
    if compiled is not None and sigma_start == sigma_src:
        heads = (np.ascontiguousarray(x, np.float32) for x in (means, logweights, loggammas, latents))
        out = np.empty(latents.shape, np.float32)
        compiled.update(*heads, out, means.shape[2], means.shape[3], logweights.shape[3], step)
        return out
    # Whoever calls looks for infinities in the result; numpy's warnings of them would only precede it.
    with np.errstate(over="ignore", invalid="ignore"):
        coefficients, gammas = _modes(logweights, loggammas)
        coefficients[1:] *= _phi(gammas * step)
        coefficients *= step
        if sigma_start != sigma_src:  # a whole step starts where the student was evaluated, and the factor is 1
            coefficients[1:] *= np.exp(gammas * (sigma_src - sigma_start))
        mixed = _mix(means, coefficients)
        return np.subtract(latents, mixed, out=mixed)


def velocity(
    means: np.ndarray, logweights: np.ndarray, loggammas: np.ndarray, sigma_src: float, sigma: float
) -> np.ndarray:
    """The student's velocity at `sigma` <= `sigma_src`, [B, N, C*P] float32; arguments as for `update`."""
    coefficients, gammas = _modes(logweights, loggammas)
    coefficients[1:] *= np.exp(gammas * (sigma_src - sigma))
    return _mix(means, coefficients)


def _modes(logweights: np.ndarray, loggammas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """softmax over modes [K, B, N, P] and the loggammas of modes 1 and on [K-1, B, N, P], both new and float64.

    Modes come first because numpy reduces the first axis several times faster than a middle one.
    """
    weights = logweights.transpose(2, 0, 1, 3).astype(np.float64, order="C")
    weights -= np.maximum.reduce(weights)
    np.exp(weights, out=weights)
    weights /= np.add.reduce(weights)
    return weights, loggammas.transpose(2, 0, 1, 3).astype(np.float64, order="C")


def _phi(z: np.ndarray) -> np.ndarray:
    """expm1(z) / z, with its limit 1 at 0, from `z`, which it changes.

    expm1 is accurate near 0, so only 0 itself needs care: of the number added there, expm1 is the number itself, and to
    a product of float32 numbers that is not 0 it adds nothing.
    """
    z += _NEAR_ZERO
    phi: np.ndarray = np.expm1(z)
    phi /= z
    return phi


def _mix(means: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """sum_k coefficient[k, p] * mean[k, c*P + p]: [B, N, K, C*P], [K, B, N, P] -> [B, N, C*P] float32."""
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
