"""A straight student in torch: its schedule by diffusers' scheduler, the rounding of its timesteps, and its step."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from arcflow_runtime.disk.manifest import Schedule


class Whole(nn.Module):
    """Stands for a student's heads where the transformer keeps its own final projection."""

    def forward(self, velocity: torch.Tensor) -> tuple[torch.Tensor]:
        """Velocity [B, N, C] -> the same, as a tuple like that of three heads."""
        return (velocity,)


def straight_sigmas(schedule: Schedule, num_inference_steps: int, image_tokens: int) -> torch.Tensor:
    """Sigmas [S + 1] float32, falling to 0, as diffusers' FlowMatchEulerDiscreteScheduler computes them.

    Args:
        schedule: of a straight student.
        num_inference_steps: S; the number of the schedule's own sigmas, if it has them.
        image_tokens: N, tokens of one image.
    """
    dynamic = schedule.dynamic_shift
    # With one step, diffusers divides 0 by 0 to stretch the sigmas.
    terminal = schedule.terminal if num_inference_steps > 1 else None
    settings = {} if dynamic is None else {"use_dynamic_shifting": True, "time_shift_type": dynamic.kind}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=schedule.shift, shift_terminal=terminal, **settings)
    s = num_inference_steps
    levels = [1 - i / (s - 1 + schedule.timestep_ratio) for i in range(s)]
    mu = None if dynamic is None else dynamic.mu(image_tokens)
    scheduler.set_timesteps(sigmas=list(schedule.sigmas or levels), mu=mu)
    return scheduler.sigmas


def seen_sigma(sigma: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sigma that the network is given: diffusers' pipelines round sigma * 1000 to `dtype`, then divide by 1000."""
    return (sigma * 1000).to(dtype) / 1000


def guided(velocity: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
    """Guide a velocity away from a negative prompt's, in float32, as diffusers' QwenImagePipeline does.

    Args:
        velocity: of the prompt, [B, N, C].
        negative: of the negative prompt, likewise.
        scale: of the guidance.
    """
    v, n = velocity.float(), negative.float()
    combined = n + scale * (v - n)
    return combined * (v.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))


def line(x: torch.Tensor, velocity: torch.Tensor, start: float, end: float) -> torch.Tensor:
    """One Euler step from sigma `start` to `end`, in float32."""
    return x - (start - end) * velocity.float()
