"""A straight student's step: latents and velocity [B, N, C*P] -> latents at lower noise. And guidance of a velocity.

This is the closed-form step of `update.py` with one mode and loggamma 0: weight 1, phi(0) = 1.
"""

from __future__ import annotations

import numpy as np


def euler(latents: np.ndarray, velocity: np.ndarray, step: float) -> np.ndarray:
    """x - step * velocity, as in diffusers' FlowMatchEulerDiscreteScheduler.

    Args:
        latents: [B, N, C*P] float32.
        velocity: [B, N, C*P] float32.
        step: sigma before the step minus sigma after it.

    Returns:
        [B, N, C*P] float32, a new array.
    """
    # The caller checks the result for infinities, so numpy's overflow warnings are silenced here.
    with np.errstate(over="ignore", invalid="ignore"):
        moved = velocity * np.float32(step)
        return np.subtract(latents, moved, out=moved)


def guide(velocity: np.ndarray, negative: np.ndarray, scale: float) -> np.ndarray:
    """Guide a velocity away from that of a negative prompt, and keep its norm at each token.

    negative + scale * (velocity - negative), scaled to the norm of `velocity` (diffusers' QwenImagePipeline). A token
    whose guided velocity is 0 stays 0, where diffusers divides 0 by 0.

    Args:
        velocity: of the prompt, [B, N, C*P] float32.
        negative: of the negative prompt, likewise.
        scale: the guidance scale, above 1.

    Returns:
        [B, N, C*P] float32, a new array.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        guided = negative + np.float32(scale) * (velocity - negative)
        norm, guided_norm = (np.sqrt(np.square(v).sum(-1, keepdims=True)) for v in (velocity, guided))
        guided *= np.divide(norm, guided_norm, out=np.zeros_like(norm), where=guided_norm != 0)
        return guided
