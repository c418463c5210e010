"""One step of the student against the teacher: scheduled trajectory mixing without data (arXiv 2602.09014).

The walk through a step's segment alternates between the student's own path and short Euler hops along the teacher's
velocity. At the points in between the teacher says what the velocity should be, and the student's average velocity up
to a short window beyond the hop is pulled towards it. `ratio` is the teacher's share of the walk: 1 at the beginning,
when the student's path means little, and 0 in the end, when only its own path counts.

The window makes the average lag: it is compared to the velocity at its beginning, so that what is learnt runs about
half a window (1.5/128 of the time) behind the teacher. `center_window` shifts the interval by half a window instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from arcflow_distill.train.policy import Policy, warp

#: (x [B, N, C], sigma [B]) -> velocity [B, N, C] float32.
Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Mixing:
    """How a segment is walked; the defaults are the released students'."""

    states: int = 4
    substeps: int = 128
    window_substeps: int = 3
    mode_dropout: float = 0.1
    center_window: bool = False


def intervals(
    batch: int, states: int, length: float, ratio: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random lengths of the student's and the teacher's parts of a walk: two tensors [batch, states], in time.

    The student's parts add up to at most (1 - ratio) of `length`, the teacher's to exactly `ratio` of it.
    """
    zero, one = torch.zeros(batch, 1), torch.ones(batch, 1)
    student = torch.rand(batch, states, generator=generator).sort(1).values
    teacher = torch.rand(batch, states - 1, generator=generator).sort(1).values
    return (
        torch.diff(student, dim=1, prepend=zero) * ((1 - ratio) * length),
        torch.diff(teacher, dim=1, prepend=zero, append=one) * (ratio * length),
    )


def walk_segment(
    policy: Policy,
    x: torch.Tensor,
    time: float,
    length: float,
    ratio: float,
    teacher: Velocity,
    mixing: Mixing,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare a policy with the teacher along one segment.

    Args:
        policy: the student's prediction at `x`, with gradients.
        x: latents [B, N, C] float32 at `time`.
        time: where the segment begins, in (0, 1].
        length: the segment's length in time.
        ratio: the teacher's share of the walk, in [0, 1].
        teacher: its velocity; called `mixing.states` times without gradients.
        mixing: how to walk.
        generator: a CPU generator, for the intervals and the modes that are dropped.

    Returns:
        The mean squared error of the student's velocity, and the latents at the segment's end without gradients.
    """
    batch, device = len(x), x.device
    window = min(mixing.window_substeps * length / max(round(length * mixing.substeps), 1), length)
    mover = policy.detached(mixing.mode_dropout, generator)
    parts = torch.stack(intervals(batch, mixing.states, length - window, ratio, generator), dim=2)
    times = (time - parts.flatten(1).cumsum(1)).clamp(min=0)
    at, after = times[:, 0::2], times[:, 1::2]  # [B, states]: where the teacher is asked, and where its hop ends
    shift = window / 2 if mixing.center_window else 0.0
    begin, end = (at + shift).clamp(max=time), (after - window + shift).clamp(min=0)
    sigma_at, sigma_after, sigma_begin, sigma_end = (warp(t).to(device) for t in (at, after, begin, end))
    targets = []
    with torch.no_grad():
        sigma = torch.full([batch], policy.sigma, device=device)
        for i in range(mixing.states):
            x = mover.move(x, sigma, sigma_at[:, i])
            velocity = teacher(x, sigma_at[:, i])
            targets.append(velocity)
            sigma = sigma_after[:, i]
            x = x + velocity * (sigma - sigma_at[:, i])[:, None, None]
        target = torch.full([batch], time - length).clamp(min=0)
        x = mover.move(x, sigma, warp(target).to(device))
    predicted = policy.average(sigma_begin, sigma_end)
    return (predicted - torch.stack(targets, dim=1)).square().mean(), x
