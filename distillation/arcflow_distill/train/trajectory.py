"""Compute the loss of one step of the student: scheduled trajectory mixing without data (arXiv 2602.09014).

The walk through a step's segment alternates between parts of the student's own path and short Euler hops along the
teacher's velocity. Before each hop, the teacher's velocity is the target. The student's velocity, averaged from that
point to a short window after the hop, is trained towards it. `ratio` is the teacher's share of the walk. It is 1 at the
start of training, when the student's path means little, and 0 at the end, when the student walks alone.

The average is compared with the velocity at the start of its interval, so what the student learns lags behind the
teacher by about half a window (1.5/128 of the time). `center_window` removes the lag: it shifts the interval by half a
window.
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
    """The settings of a walk; the defaults are those of the released students."""

    states: int = 4
    substeps: int = 128
    window_substeps: int = 3
    mode_dropout: float = 0.1
    center_window: bool = False


def intervals(
    batch: int, states: int, length: float, ratio: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random lengths, in time, of the student's and the teacher's parts of a walk: two tensors [batch, states].

    The student's parts add up to at most (1 - ratio) * length, the teacher's to exactly ratio * length.
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
    """Walk along one segment and compare the student's velocity with the teacher's.

    Args:
        policy: the student's prediction at `x`, with gradients.
        x: latents [B, N, C] float32 at `time`.
        time: start of the segment, in (0, 1].
        length: length of the segment in time.
        ratio: the teacher's share of the walk, in [0, 1].
        teacher: the teacher's velocity function; called `mixing.states` times without gradients.
        mixing: the settings of the walk.
        generator: a CPU generator, for the random intervals and the dropped modes.

    Returns:
        The mean squared error of the student's velocity, and the latents at the end of the segment without gradients.
    """
    batch, device = len(x), x.device
    window = min(mixing.window_substeps * length / max(round(length * mixing.substeps), 1), length)
    mover = policy.detached(mixing.mode_dropout, generator)
    parts = torch.stack(intervals(batch, mixing.states, length - window, ratio, generator), dim=2)
    times = (time - parts.flatten(1).cumsum(1)).clamp(min=0)
    at, after = times[:, 0::2], times[:, 1::2]  # [B, states]: start and end of each of the teacher's hops
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
