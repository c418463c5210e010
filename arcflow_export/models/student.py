"""What both families share when a student's transformer is split into conditioner and backbone; the split is exact."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from arcflow_export.models.layers import ModelPart, Slice, make_part
from arcflow_runtime.disk.manifest import DType, Sampler


class Velocity(nn.Module):
    """The base's own final projection, which gives a straight student's velocity."""

    def __init__(self, dim: int, channels: int):
        super().__init__()
        self.proj_out = nn.Linear(dim, channels)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        """[B, N, D] -> velocity [B, N, C]."""
        return (self.proj_out(x),)


class Heads(nn.Module):
    """The three heads of a student: K modes per token, in place of the base's final projection."""

    def __init__(self, dim: int, channels: int, num_gaussians: int, logweights_channels: int):
        super().__init__()
        self.k, self.c, self.p = num_gaussians, channels, logweights_channels
        self.proj_out_means = nn.Linear(dim, self.k * self.c)
        self.proj_out_logweights = nn.Linear(dim, self.k * self.p)
        with warnings.catch_warnings():  # with one mode there are no gammas, and torch warns about an empty layer
            warnings.simplefilter("ignore")
            self.proj_out_loggamma = nn.Linear(dim, (self.k - 1) * self.p)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, N, D] -> means [B, N, K, C], logweights [B, N, K, P] (logits), loggammas [B, N, K-1, P]."""
        return (
            self.proj_out_means(x).unflatten(-1, (self.k, self.c)),
            self.proj_out_logweights(x).unflatten(-1, (self.k, self.p)),
            self.proj_out_loggamma(x).unflatten(-1, (self.k - 1, self.p)),
        )


def make_heads(dim: int, channels: int, num_gaussians: int, logweights_channels: int, sampler: Sampler) -> nn.Module:
    """The last layer of a student of this sampler; see `Heads` and `Velocity`."""
    return Velocity(dim, channels) if sampler == "linear" else Heads(dim, channels, num_gaussians, logweights_channels)


class Modulations(nn.Module):
    """The modulation linears of all blocks, run once on the conditioning vector."""

    def __init__(self, linears: list[nn.Linear]):
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, temb: torch.Tensor) -> torch.Tensor:
        """temb [..., D] -> modulation [..., M]."""
        x = nn.functional.silu(temb)
        return torch.cat([linear(x) for linear in self.linears], dim=-1)


def lift_modulations(slots: list[tuple[str, nn.Module, str]]) -> tuple[list[nn.Linear], list[str], int]:
    """Take the modulation linears out of a transformer and put slices of the modulation vector in their place.

    Args:
        slots: (checkpoint name, owner module, attribute) of each linear, in the order of the modulation vector.

    Returns:
        The linears, their checkpoint names, and M, the length of the modulation vector.
    """
    linears, names, start = [], [], 0
    for name, owner, attribute in slots:
        linear = getattr(owner, attribute)
        assert isinstance(linear, nn.Linear), name
        setattr(owner, attribute, Slice(start, start + linear.out_features))
        linears.append(linear)
        names.append(name)
        start += linear.out_features
    return linears, names, start


def backbone_part(
    family: str,
    module: nn.Module,
    config: dict[str, Any],
    num_gaussians: int,
    logweights_channels: int,
    modulation: int,
    dtype: DType,
    sampler: Sampler,
) -> ModelPart:
    """Make the backbone part, with its sizes from the transformer's config.

    Args:
        family: the family of the bundle.
        module: the backbone on the meta device.
        config: the base transformer's `config.json`.
        num_gaussians: K, the number of modes.
        logweights_channels: P, the number of sub-pixels of a token, each with its own mode weights.
        modulation: M, the length of the modulation vector.
        dtype: dtype of the backbone's weights and arithmetic.
        sampler: which outputs the backbone has.
    """
    sizes = {
        "channels": config["in_channels"],
        "text_width": config["joint_attention_dim"],
        "modulation": modulation,
        "half_head": config["attention_head_dim"] // 2,
        "modes": num_gaussians,
        "gammas": num_gaussians - 1,
        "sub_pixels": logweights_channels,
    }

    def rename(name: str) -> str:
        return name.removeprefix("transformer.").removeprefix("heads.")

    return make_part(family, "backbone", module, dtype, sizes, rename, sampler=sampler)


def rename_linears(names: list[str]) -> Callable[[str], str]:
    """A function that maps a conditioner's parameter names to checkpoint keys; `names` are the linears' keys."""

    def rename(name: str) -> str:
        if name.startswith("modulations.linears."):
            index, leaf = name.removeprefix("modulations.linears.").split(".")
            return f"{names[int(index)]}.{leaf}"
        return f"time_text_embed.{name}"

    return rename
