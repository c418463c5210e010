"""Moving average of the trained weights, with the power-law profile of Karras et al. (arXiv 2312.02696)."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def decay(iteration: int, start: int, gamma: float) -> float:
    """The share of the old average that is kept after `iteration` (from 0): (1 - 1/t)^(gamma + 1), 0 up to `start`."""
    t = max(iteration + 1 - start, 1)
    return (1 - 1 / t) ** (gamma + 1)


class Ema:
    """The moving average of parameters, in their own dtype."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], gamma: float, start: int):
        self.gamma, self.start = gamma, start
        self.tensors = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, torch.Tensor], iteration: int) -> None:
        """Update the average with the parameters after `iteration`, counted from 0."""
        new = 1 - decay(iteration, self.start, self.gamma)
        for name, average in self.tensors.items():
            average.lerp_(parameters[name], new)
