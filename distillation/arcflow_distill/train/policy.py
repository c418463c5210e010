"""The policy: a student's prediction in one network call, a velocity along the whole step, integrated in closed form.

"Policy" is the paper's word (arXiv 2602.09014). Sigma falls from `s`, where the network was evaluated; mode 0 has
loggamma 0:

    velocity(sigma) = sum_k w_k mean_k exp(loggamma_k (s - sigma)),  w = softmax_k(logweights)
    average over [a, b], s >= a >= b:  sum_k w_k mean_k exp(loggamma_k (s - a)) phi(loggamma_k (a - b))

with phi(z) = (exp(z) - 1) / z. Everything is float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from arcflow_export.options import SHIFT

#: Below this |z|, phi is computed as a polynomial, because the gradient of the quotient loses digits by cancellation.
_SERIES_LIMIT = 0.5
#: Taylor coefficients 1/(n+1)! of phi, highest order first; the first omitted term is below 3e-9 of the sum.
_SERIES = (1 / 362880, 1 / 40320, 1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0)


def warp(t: torch.Tensor) -> torch.Tensor:
    """Time t in [0, 1] -> noise level sigma in [0, 1]; both fall during generation."""
    return SHIFT * t / (1 + (SHIFT - 1) * t)


def phi(z: torch.Tensor) -> torch.Tensor:
    """(exp(z) - 1) / z, with phi(0) = 1; exact to float32 rounding, gradient included, for every z."""
    small = z.abs() < _SERIES_LIMIT
    series = torch.full_like(z, _SERIES[0])
    near = torch.where(small, z, 0)  # keeps the unused branch finite, so that its zero gradient stays zero
    for coefficient in _SERIES[1:]:
        series = series * near + coefficient
    far = torch.where(small, 1, z)
    return torch.where(small, series, torch.expm1(far) / far)


@dataclass(frozen=True)
class Policy:
    """A student's prediction: K modes per token, predicted at noise level `sigma` for the whole batch.

    A packed token's C channels are C/P latent channels of P sub-pixels each, channel-major. Each sub-pixel has its own
    weights and gammas. Shapes: means [B, N, P, K, C/P], logweights [B, N, P, K], loggammas [B, N, P, K] (0 for mode 0).
    """

    means: torch.Tensor
    logweights: torch.Tensor
    loggammas: torch.Tensor
    sigma: float

    @staticmethod
    def from_heads(means: torch.Tensor, logweights: torch.Tensor, loggammas: torch.Tensor, sigma: float) -> Policy:
        """Make a policy from the heads: means [B, N, K, C], logweights [B, N, K, P], loggammas [B, N, K-1, P]."""
        sub_pixels = logweights.shape[-1]
        return Policy(
            means.float().unflatten(-1, (-1, sub_pixels)).permute(0, 1, 4, 2, 3).contiguous(),
            logweights.float().transpose(2, 3),
            nn.functional.pad(loggammas.float(), (0, 0, 1, 0)).transpose(2, 3),
            sigma,
        )

    def detached(self, dropout: float, generator: torch.Generator) -> Policy:
        """A copy without gradients. Each sample loses each mode with probability `dropout`, but never all of them.

        Args:
            dropout: probability in [0, 1).
            generator: a CPU generator.
        """
        lost = torch.rand(len(self.means), self.means.shape[3], generator=generator) < dropout
        lost &= ~lost.all(1, keepdim=True)
        logweights = self.logweights.detach().masked_fill(lost.to(self.means.device)[:, None, None], float("-inf"))
        return replace(self, means=self.means.detach(), logweights=logweights, loggammas=self.loggammas.detach())

    @cached_property
    def weights(self) -> torch.Tensor:
        """The mode weights [B, N, P, K]; they add up to 1 over the modes."""
        return self.logweights.softmax(3)

    def average(self, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """The mean velocity between the noise levels `start` and `end`; the velocity itself if both are equal.

        Args:
            start: [B, S], at most `sigma`.
            end: [B, S], at most `start`.

        Returns:
            [B, S, N, C].
        """
        start, end = (s[:, None, None, :, None] for s in (start, end))
        loggammas, weights = self.loggammas.unsqueeze(3), self.weights.unsqueeze(3)
        factors = weights * torch.exp(loggammas * (self.sigma - start)) * phi(loggammas * (start - end))
        velocity = factors @ self.means  # [B, N, P, S, K] @ [B, N, P, K, C/P]
        return velocity.permute(0, 3, 1, 4, 2).flatten(3)

    def move(self, x: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """Carry x [B, N, C] from noise level `start` [B] to `end` [B]."""
        return x - (start - end)[:, None, None] * self.average(start[:, None], end[:, None])[:, 0]
