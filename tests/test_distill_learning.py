"""Training works: on a curved field with known paths, two steps of a trained student beat two Euler steps."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from arcflow_distill.train.networks import make_heads
from arcflow_distill.train.policy import Policy, warp
from arcflow_distill.train.trajectory import Mixing, walk_segment

#: Spread of the data in each of a token's channels; noise has spread 1.
SPREAD = torch.tensor([0.05, 0.3, 0.6, 2.0])
BATCH, WIDTH = 32, 32


def variance(sigma):
    return (SPREAD * (1 - sigma)) ** 2 + sigma**2


def teacher(x, sigma):
    """The exact velocity where data is Gaussian: paths follow the spread of x, x(sigma) = x(1) sqrt(variance)."""
    sigma = sigma[:, None, None]
    return x * (sigma - SPREAD**2 * (1 - sigma)) / variance(sigma)


class Student(nn.Module):
    def __init__(self, modes):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, WIDTH), nn.SiLU())
        self.heads = make_heads(nn.Linear(WIDTH, 4), modes)

    def forward(self, x, sigma):
        hidden = self.body(torch.cat([x, sigma.expand(*x.shape[:2], 1)], 2))
        return Policy.from_heads(*self.heads(hidden), float(sigma))


def train(modes, iterations=160):
    torch.manual_seed(0)
    student, generator = Student(modes), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2, betas=(0.9, 0.95), weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for i in range(iterations):
        ratio = max(0.0, 1 - i / (0.6 * iterations))
        x = torch.randn(BATCH, 4, 4, generator=generator)
        for time in (1.0, 0.5):
            policy = student(x, warp(torch.tensor(time)))
            error, x = walk_segment(policy, x, time, 0.5, ratio, teacher, Mixing(), generator)
            (7.5 * error).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return student


@torch.no_grad()
def errors(student):
    """RMS distance of two student steps, and of two Euler steps, from the ends of the true paths."""
    noise = torch.randn(500, 4, 4, generator=torch.Generator().manual_seed(9))
    ours, euler, sigmas = noise, noise, warp(torch.tensor([1.0, 0.5, 0.0]))
    for start, end in itertools.pairwise(sigmas):
        ours = student(ours, start).move(ours, start.expand(500), end.expand(500))
        euler = euler + (end - start) * teacher(euler, start.expand(500))
    return [float((x - noise * SPREAD).square().mean().sqrt()) for x in (ours, euler)]


@pytest.mark.slow
def test_two_steps_beat_euler_and_a_straight_student():
    ours, euler = errors(train(modes=4))
    straight, _ = errors(train(modes=1))
    assert ours < 0.3 * euler, (ours, euler)
    assert ours < 0.5 * straight, (ours, straight)
