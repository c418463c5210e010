"""Run Qwen-Image's conditioner at export for the steps of a schedule, so that its weights need not be shipped."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from arcflow_export.checkpoint.merge import WeightSource
from arcflow_export.models.layers import MatMul, ModelPart, Sinusoid


def bake_modulation(
    part: ModelPart, source: WeightSource, timesteps: torch.Tensor, precision: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the modulation table of a schedule, with one linear's weights in memory at a time.

    Args:
        part: the conditioner of `models.qwen.build`, still on the meta device.
        source: the student's merged weights.
        timesteps: the timesteps as the sinusoidal embedding gets them, [S] float32.
        precision: the backbone's dtype.

    Returns:
        Modulation [S, M] float32, whose values are rounded to the conditioner's precision, then to the backbone's; and
        the input of the modulation linears, silu(temb) [S, D] float32.
    """
    names = {id(m): n for n, m in part.module.named_modules()}

    def linear(x: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
        assert isinstance(module, MatMul)
        name = names[id(module)]
        key = part.rename(f"{name}.weight")
        dtype = module.weight.dtype
        bias = torch.cat(list(source.blocks(part.rename(f"{name}.bias"), dtype)))
        rows, start = [], 0
        for block in source.blocks(key, dtype):
            rows.append(F.linear(x.to(dtype), block, bias[start : start + len(block)]))
            start += len(block)
        return torch.cat(rows, dim=-1)

    conditioner = part.module
    sinusoid, embedder = conditioner.get_submodule("sinusoid"), conditioner.get_submodule("timestep_embedder")
    assert isinstance(sinusoid, Sinusoid)
    angle = timesteps[:, None] * sinusoid.constants["freqs"][None]
    x = torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1).to(part.precision)
    x = linear(F.silu(linear(x, embedder.get_submodule("linear_1"))), embedder.get_submodule("linear_2"))
    x = F.silu(x)
    linears = conditioner.get_submodule("modulations.linears")
    table = torch.cat([linear(x, module).to(part.precision) for module in linears.children()], dim=-1)
    return table.to(precision).float(), x.float()


def modulation_columns(part: ModelPart) -> dict[str, int]:
    """The layers that make a modulation table -> the first column of each.

    Args:
        part: the conditioner of `models.qwen.build`.
    """
    linears = part.module.get_submodule("modulations.linears")
    columns, start = {}, 0
    for i, module in enumerate(linears.children()):
        assert isinstance(module, MatMul)
        columns[part.rename(f"modulations.linears.{i}.weight").removesuffix(".weight")] = start
        start += module.weight.shape[1]
    return columns
