"""The walk through a segment, its intervals and its error, against float64 written down from the definitions."""

from __future__ import annotations

import pytest
import torch

from arcflow_distill.train.policy import SHIFT, Policy, phi, warp
from arcflow_distill.train.trajectory import Mixing, intervals, walk_segment

BATCH, TOKENS, MODES, CHANNELS = 3, 2, 4, 8


def sigma_of(t: torch.Tensor) -> torch.Tensor:
    """The released students' fixed shift of 3.2."""
    return 3.2 * t / (1 + 2.2 * t)


def heads(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((MODES, CHANNELS), (MODES, 4), (MODES - 1, 4))
    return tuple(torch.randn(BATCH, TOKENS, *s, generator=g) for s in shapes)


def average(given, lost: torch.Tensor, sigma: float, begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Mean velocity [B, N, C] over [begin, end] by the closed form, in float64, without the lost modes [B, K]."""
    means, logweights, loggammas = (t.double() for t in given)
    weights = torch.exp(logweights) * (~lost)[:, None, :, None]
    weights = weights / weights.sum(2, keepdim=True)
    rates = torch.cat([torch.zeros_like(loggammas[:, :, :1]), loggammas], 2)
    begin, end = (s.double()[:, None, None, None] for s in (begin, end))
    z = rates * (begin - end)
    factor = torch.where(z.abs() < 1e-9, torch.ones_like(z), torch.expm1(z) / torch.where(z == 0, 1, z))
    factor = weights * torch.exp(rates * (sigma - begin)) * factor
    return (means * factor.repeat(1, 1, 1, CHANNELS // 4)).sum(2)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("time", "length"), [(1.0, 0.5), (0.25, 0.25)])
@pytest.mark.parametrize("mixing", [Mixing(), Mixing(3, 32, 2, 0.4, True)])
def test_the_walk_is_the_definition(ratio, time, length, mixing):
    """Student's path, teacher's hop, and so on; the error is of means over a window that begins at the teacher's point.

    Random numbers come in this order: which modes are lost, the student's parts, the teacher's parts.
    """
    given, x0 = heads(), torch.randn(BATCH, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(9))
    sigma = float(sigma_of(torch.tensor(time, dtype=torch.float64)))
    calls = []

    def teacher(x, at):
        calls.append((x, at))
        return 0.5 * x + at[:, None, None] * torch.arange(CHANNELS)

    policy = Policy.from_heads(*given, sigma)
    error, end = walk_segment(policy, x0, time, length, ratio, teacher, mixing, torch.Generator().manual_seed(3))

    g = torch.Generator().manual_seed(3)
    lost = torch.rand(BATCH, MODES, generator=g) < mixing.mode_dropout
    lost[lost.all(1)] = False  # an image never loses all of its modes
    window = mixing.window_substeps / mixing.substeps
    parts = intervals(BATCH, mixing.states, length - window, ratio, g)
    kept = torch.zeros_like(lost)
    x, now, at_sigma, errors = x0.double(), torch.full([BATCH], time).double(), torch.full([BATCH], sigma).double(), []
    for i in range(mixing.states):
        at = now - parts[0][:, i].double()
        x = x - (at_sigma - sigma_of(at))[:, None, None] * average(given, lost, sigma, at_sigma, sigma_of(at))
        seen, seen_sigma = calls[i]
        # float32 sums of a few numbers of order 1 to 10.
        torch.testing.assert_close(seen.double(), x, rtol=0, atol=2e-5)
        torch.testing.assert_close(seen_sigma.double(), sigma_of(at), rtol=0, atol=1e-6)
        velocity = 0.5 * x + sigma_of(at)[:, None, None] * torch.arange(CHANNELS)
        now = at - parts[1][:, i].double()
        x = x + velocity * (sigma_of(now) - sigma_of(at))[:, None, None]
        at_sigma = sigma_of(now)
        shift = window / 2 if mixing.center_window else 0.0
        begin, finish = (at + shift).clamp(max=time), (now - window + shift).clamp(min=0)
        predicted = average(given, kept, sigma, sigma_of(begin), sigma_of(finish))
        errors.append((predicted - velocity).square().mean())
    last = sigma_of(torch.full([BATCH], time - length).double())
    x = x - (at_sigma - last)[:, None, None] * average(given, lost, sigma, at_sigma, last)
    torch.testing.assert_close(end.double(), x, rtol=0, atol=2e-5)
    assert len(calls) == mixing.states
    assert float(error) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)


def test_intervals_are_the_gaps_between_sorted_numbers():
    """The first gap begins at 0; the student's last number is not followed up to 1, the teacher's is."""
    student, teacher = intervals(2, 3, 2.0, 0.25, torch.Generator().manual_seed(5))
    g = torch.Generator().manual_seed(5)
    first, second = torch.rand(2, 3, generator=g).sort(1).values, torch.rand(2, 2, generator=g).sort(1).values
    torch.testing.assert_close(student.cumsum(1), first * 1.5)
    torch.testing.assert_close(teacher.cumsum(1), torch.cat([second, torch.ones(2, 1)], 1) * 0.5)


@pytest.mark.parametrize(
    ("length", "substeps", "window"),
    [
        (0.5, 128, 3 / 128),  # 64 substeps, of which three
        (0.01, 128, 0.01),  # one substep, and no window is longer than the segment
        (1.0, 10, 0.3),
    ],
)
def test_the_window_is_three_substeps_and_at_most_the_segment(length, substeps, window):
    """A teacher that alone moves, without end: the last of its points is a window before the segment's end."""
    points = []

    def teacher(x, sigma):
        points.append(sigma)
        return torch.zeros_like(x)

    policy = Policy.from_heads(*heads(), 1.0)
    x = torch.zeros(BATCH, TOKENS, CHANNELS)
    many = Mixing(states=200, substeps=substeps, mode_dropout=0.0)
    walk_segment(policy, x, 1.0, length, 0.0, teacher, many, torch.Generator().manual_seed(0))
    lowest = torch.stack(points).min()
    # Of 600 points in [0, 1] the largest is above 0.98, but for one in 10^5.
    assert sigma_of(torch.tensor(1 - (length - window))) - 1e-6 <= lowest
    assert lowest <= sigma_of(torch.tensor(1 - 0.98 * (length - window))) + 1e-6


def test_a_lost_mode_is_lost_with_its_probability_and_per_image():
    """Shares of 4,000 images: four standard deviations of sqrt(p (1 - p) / n)."""
    given = tuple(t[:1].expand(4000, *t.shape[1:]) for t in heads())
    policy = Policy.from_heads(*given, 1.0)
    for p in (0.1, 0.5):
        weights = policy.detached(p, torch.Generator().manual_seed(0)).weights
        lost = weights[:, 0, 0] == 0  # [B, K]
        assert (weights == 0).eq(lost[:, None, None]).all(), "for every token and sub-pixel"
        share = p - p**MODES  # all at once are put back
        assert abs(float(lost[:, 1].float().mean()) - share) < 4 * (share * (1 - share) / 4000) ** 0.5
        assert len(lost.unique(dim=0)) > 2


def test_phi_and_warp_by_hand():
    assert SHIFT == 3.2
    assert phi(torch.tensor([1.0, -1.0, 0.0])).tolist() == pytest.approx([1.7182818, 0.6321206, 1.0])
    assert warp(torch.tensor([0.25, 0.75])).tolist() == pytest.approx([0.8 / 1.55, 2.4 / 2.65])
