"""The policy's closed forms against float64, and the walk through a segment."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from arcflow_distill.train.policy import Policy, phi, warp
from arcflow_distill.train.trajectory import Mixing, intervals, walk_segment
from arcflow_export.student.reference import integrate


def random_heads(batch=2, tokens=3, modes=4, channels=8, seed=0, requires_grad=False):
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(batch, tokens, modes, channels, generator=g)
    logweights = torch.randn(batch, tokens, modes, 4, generator=g)
    loggammas = torch.randn(batch, tokens, modes - 1, 4, generator=g)
    return tuple(t.requires_grad_(requires_grad) for t in (means, logweights, loggammas))


def velocity64(heads, sigma, at):
    """The definition, in float64: velocity [B, N, C] at noise level `at`, predicted at `sigma`."""
    means, logweights, loggammas = (t.detach().double() for t in heads)
    loggammas = torch.cat([torch.zeros_like(logweights[:, :, :1]), loggammas], dim=2)
    factors = logweights.softmax(2) * torch.exp(loggammas * (sigma - at))
    repeats = means.shape[-1] // 4
    return sum(means[:, :, k] * factors[:, :, k].repeat(1, 1, repeats) for k in range(means.shape[2]))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_warp_gives_the_released_schedule():
    assert warp(torch.tensor([1.0, 0.5, 0.0])).tolist() == pytest.approx([1, 0.7619048, 0])


@pytest.mark.parametrize("modes", [1, 4])
def test_average_is_the_integral_of_the_velocity(modes):
    heads = random_heads(modes=modes)
    policy = Policy.from_heads(*heads, 0.9)
    start, end = torch.tensor([[0.9, 0.7], [0.8, 0.5]]), torch.tensor([[0.4, 0.7 - 1e-3], [0.1, 0.0]])
    got = policy.average(start, end)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    for b in range(2):
        for s in range(2):
            a, e = float(start[b, s]), float(end[b, s])
            points = (a + e) / 2 + (a - e) / 2 * nodes
            expected = sum(w / 2 * velocity64(heads, 0.9, x)[b] for w, x in zip(weights, points, strict=True))
            assert torch.allclose(got[b, s].double(), expected, rtol=1e-5, atol=1e-6)


def test_average_over_nothing_is_the_velocity():
    heads = random_heads()
    at = torch.tensor([[0.6], [0.2]])
    got = Policy.from_heads(*heads, 0.9).average(at, at)
    for b in range(2):
        assert torch.allclose(got[b, 0].double(), velocity64(heads, 0.9, float(at[b]))[b], rtol=1e-5, atol=1e-6)


def test_a_whole_step_is_the_exporters():
    heads, x = random_heads(), torch.randn(2, 3, 8, generator=generator())
    start, end = torch.full([2], 1.0), torch.full([2], 0.3)
    moved = Policy.from_heads(*heads, 1.0).move(x, start, end)
    assert torch.allclose(moved, integrate(x, *heads, 1.0, 0.3), atol=1e-5)


def test_moves_add_up():
    heads, x = random_heads(), torch.zeros(2, 3, 8)
    policy = Policy.from_heads(*heads, 1.0)
    a, b, c = (torch.full([2], s) for s in (1.0, 0.7, 0.3))
    assert torch.allclose(policy.move(policy.move(x, a, b), b, c), policy.move(x, a, c), atol=1e-5)


def test_phi_and_its_gradient_are_exact_through_zero():
    z = torch.cat([torch.linspace(-4, 4, 401), torch.tensor([0.0, 1e-8, -1e-6, 1e-4, 0.5, -0.5])]).requires_grad_()
    value = phi(z)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    terms = range(60)
    exact = [sum(x**n / math.factorial(n + 1) for n in terms) for x in z.tolist()]
    exact_gradient = [sum((n + 1) * x**n / math.factorial(n + 2) for n in terms) for x in z.tolist()]
    assert torch.allclose(value.double(), torch.tensor(exact, dtype=torch.float64), rtol=5e-7)
    assert torch.allclose(gradient.double(), torch.tensor(exact_gradient, dtype=torch.float64), rtol=5e-6)


def test_gamma_learns_at_zero():
    """At gamma 1 the loss has a gradient; clamping phi's argument away from 0 would take it."""
    means, logweights, loggammas = random_heads()
    loggammas = torch.zeros_like(loggammas, requires_grad=True)
    Policy.from_heads(means, logweights, loggammas, 1.0).average(
        torch.ones(2, 1), torch.full([2, 1], 0.9)
    ).sum().backward()
    weights = logweights.softmax(2)
    expected = 0.05 * weights[:, :, 1:] * means.unflatten(-1, (-1, 4)).sum(3)[:, :, 1:]  # phi'(0) = 1/2
    assert torch.allclose(loggammas.grad, expected, rtol=1e-4, atol=1e-7)


def test_dropout_never_takes_every_mode():
    heads = random_heads(batch=200, modes=2)
    policy = Policy.from_heads(*heads, 1.0).detached(0.9, generator())
    assert torch.allclose(policy.weights.sum(3), torch.ones(200, 3, 4))
    lost = policy.weights == 0
    assert (lost.all(1).all(1) == lost.any(1).any(1)).all(), "a mode is lost for the whole sample"
    assert lost.any(3).float().mean() == pytest.approx(2 * 0.9 * 0.1, abs=0.07)


def test_without_dropout_nothing_changes():
    heads = random_heads(requires_grad=True)
    policy = Policy.from_heads(*heads, 1.0)
    detached = policy.detached(0.0, generator())
    assert torch.equal(detached.weights, policy.weights)
    assert not detached.means.requires_grad and policy.means.requires_grad


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_intervals_share_the_length(ratio):
    student, teacher = intervals(500, 4, 0.4, ratio, generator())
    assert student.shape == teacher.shape == (500, 4)
    assert (student >= 0).all() and (teacher >= 0).all()
    assert torch.allclose(teacher.sum(1), torch.full([500], 0.4 * ratio), atol=1e-6)
    assert (student.sum(1) <= 0.4 * (1 - ratio) + 1e-6).all()
    assert student.sum(1).mean() == pytest.approx(0.4 * (1 - ratio) * 4 / 5, rel=0.05, abs=1e-9)


def straight(velocity):
    """Heads of one mode that predict a constant velocity [B, N, C]."""
    batch, tokens, _ = velocity.shape
    return velocity[:, :, None], torch.zeros(batch, tokens, 1, 4), torch.zeros(batch, tokens, 0, 4)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("center", [False, True])
def test_a_perfect_student_of_a_straight_teacher_has_no_error(ratio, center):
    velocity = torch.randn(3, 2, 4, generator=generator())
    x, calls = torch.randn(3, 2, 4, generator=generator(1)), []

    def teacher(x, sigma):
        calls.append(sigma)
        return velocity

    sigma = warp(torch.tensor(0.5))
    error, end = walk_segment(
        Policy.from_heads(*straight(velocity), float(sigma)),
        x,
        0.5,
        0.5,
        ratio,
        teacher,
        Mixing(center_window=center),
        generator(),
    )
    assert error < 1e-10
    assert torch.allclose(end, x - sigma * velocity, atol=1e-5)
    assert len(calls) == 4
    assert all((a >= b).all() for a, b in itertools.pairwise(calls)), "the walk goes down"
    assert (calls[-1] >= warp(torch.tensor(3 / 128)) - 1e-6).all(), "the last window ends inside the segment"


def test_at_ratio_one_the_teacher_alone_moves():
    """The states are those of Euler hops along the teacher, whatever the student predicts."""
    velocity, x = torch.randn(3, 2, 4, generator=generator()), torch.zeros(3, 2, 4)
    seen = []

    def teacher(x, sigma):
        seen.append((x, sigma))
        return velocity

    policy = Policy.from_heads(*straight(100 * velocity), 1.0)
    walk_segment(policy, x, 1.0, 0.5, 1.0, teacher, Mixing(), generator())
    for state, sigma in seen:
        assert torch.allclose(state, (sigma - 1)[:, None, None] * velocity, atol=1e-4)


def test_the_gradient_reaches_every_head():
    heads = random_heads(channels=4, requires_grad=True)
    x = torch.zeros(2, 3, 4)
    error, end = walk_segment(
        Policy.from_heads(*heads, 1.0), x, 1.0, 0.5, 0.5, lambda x, s: torch.ones_like(x), Mixing(), generator()
    )
    error.backward()
    assert all(t.grad.abs().sum() > 0 for t in heads)
    assert not end.requires_grad
