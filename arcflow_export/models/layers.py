"""Modules that replace diffusers' and transformers' layers to give a simpler graph; `ModelPart`, the tracer's input.

All model files of this folder use them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from arcflow_runtime.disk.manifest import DType, Sampler, TensorSpec
from arcflow_runtime.disk.signatures import signature, tensor_specs

Transform = Literal["none", "transpose", "last_frame"]


@dataclass(frozen=True)
class ModelPart:
    """One part of a bundle before export: a module on the meta device, with its inputs and outputs.

    `rename` maps a parameter's name in the module to its key in the checkpoint. A dimension in a spec is an int, or
    the name of a dynamic dimension.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    rename: Callable[[str], str]
    precision: torch.dtype


def make_part(
    family: str,
    name: str,
    module: nn.Module,
    dtype: DType,
    sizes: Mapping[str, int],
    rename: Callable[[str], str],
    without: tuple[str, ...] = (),
    sampler: Sampler = "momentum",
) -> ModelPart:
    """Make a part with the inputs and outputs of rule B9.

    Args:
        family: the family of the bundle.
        name: the part's name.
        module: the part's module, on the meta device.
        dtype: the part's precision.
        sizes: the value of each symbol of the part's signature that is a size of the model.
        rename: maps a parameter's name to its key in the checkpoint.
        without: names of optional inputs that this part does not have.
        sampler: the student's.
    """
    tensors = signature(family, name, sampler)
    inputs = tensor_specs(tensors.inputs, dtype, sizes, without)
    return ModelPart(name, module, inputs, tensor_specs(tensors.outputs, dtype, sizes), rename, getattr(torch, dtype))


@dataclass(frozen=True)
class Parameter:
    """One initializer of a part: its name in the module, and the source of its values.

    Exactly one of `key` (a tensor of the checkpoint) and `constant` is set. `shape` is the shape in the graph, after
    `transform`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    transform: Transform = "none"
    key: str | None = None
    constant: torch.Tensor | None = None


class MatMul(nn.Module):
    """x W + b with W stored as [in, out], so that the graph has a plain MatMul and no Transpose.

    It computes in its weight's dtype, and casts the result to `output` if that is set.
    """

    transforms: ClassVar[dict[str, Transform]] = {"weight": "transpose"}

    def __init__(self, linear: nn.Linear):
        super().__init__()
        kw: dict[str, Any] = {"dtype": linear.weight.dtype, "device": "meta"}
        self.weight = nn.Parameter(torch.empty(linear.in_features, linear.out_features, **kw), requires_grad=False)
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(torch.empty(linear.out_features, **kw), requires_grad=False)
        self.output: torch.dtype | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        y = torch.matmul(x.to(self.weight.dtype), self.weight)
        y = y if self.bias is None else y + self.bias
        return y if self.output is None else y.to(self.output)


class Slice(nn.Module):
    """Replaces a modulation linear: returns columns [start, stop) of the modulation [B, M]."""

    def __init__(self, start: int, stop: int):
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, modulation: torch.Tensor) -> torch.Tensor:
        """[B, M] -> [B, stop - start]."""
        return modulation[:, self.start : self.stop]


class FrameConv(nn.Module):
    """A causal Conv3d on one frame. The earlier frames are zeros, so only the kernel's last frame is used."""

    transforms: ClassVar[dict[str, Transform]] = {"weight": "last_frame"}

    def __init__(self, conv: nn.Conv3d, padding: tuple[int, int]):
        super().__init__()
        kw: dict[str, Any] = {"dtype": conv.weight.dtype, "device": "meta"}
        self.weight = nn.Parameter(
            torch.empty(conv.out_channels, conv.in_channels, *conv.kernel_size[1:], **kw), requires_grad=False
        )
        self.bias = nn.Parameter(torch.empty(conv.out_channels, **kw), requires_grad=False)
        self.padding = padding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, 1, H, W] -> [B, C', 1, H, W]."""
        return F.conv2d(x.squeeze(2), self.weight, self.bias, padding=self.padding).unsqueeze(2)


class RMSNorm(nn.Module):
    """RMS norm computed in float32; one RMSNormalization node in opset 23."""

    def __init__(self, weight: torch.Tensor, eps: float):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D] in the weight's dtype."""
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(self.weight.dtype)


class LayerNorm(nn.Module):
    """Layer norm with weight and bias. It accepts float32 input; the result has the weight's dtype."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D] in the weight's dtype."""
        if x.dtype == self.weight.dtype:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        y = F.layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps)
        return y.to(self.weight.dtype)


class Constant(nn.Module):
    """A module whose buffers keep real values, while everything else is traced without values."""

    def __init__(self, **values: torch.Tensor):
        super().__init__()
        self.constants = values
        for name, value in values.items():
            self.register_buffer(name, value.to("meta"))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Constant:
        return self  # `module.to(dtype)` must not round the constants


class Sinusoid(Constant):
    """Sinusoidal embedding, cosines first (diffusers' `Timesteps` with flip_sin_to_cos, no shift)."""

    def __init__(self, channels: int = 256):
        half = channels // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device="cpu") / half
        super().__init__(freqs=torch.exp(exponent))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Embed values [S] float32 -> [S, channels] float32."""
        angle = values[:, None] * self.get_buffer("freqs")[None]
        return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


def rotate(x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Rotate adjacent pairs of the head dimension, in float32.

    The results are in another order: the first numbers of all pairs, then the second ones. Attention multiplies
    queries by keys in the same order, so its scores are equal, and engines need not interleave single numbers.

    Args:
        x: queries or keys [B, S, H, D].
        rotary: cosines and sines [2, S, D/2] float32.

    Returns:
        [B, S, H, D] in x's dtype.
    """
    cos, sin = rotary[0, :, None], rotary[1, :, None]  # [S, 1, D/2]
    real, imag = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [B, S, H, D/2]
    return torch.cat([real * cos - imag * sin, imag * cos + real * sin], dim=-1).to(x.dtype)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Full attention over [B, S, H, D] -> [B, S, H*D]; one Attention node in opset 23."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


def wide_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Single-head attention over [B, S, D] -> [B, S, D] in plain products, softmax in float32.

    A VAE's one head is as wide as its channels (384 or 512), for which no engine has a fused kernel.
    """
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(1, 2))
    return torch.matmul(scores.float().softmax(dim=-1).to(v.dtype), v)


def replace_linears(module: nn.Module) -> None:
    """Replace every nn.Linear below `module` by `MatMul`, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, MatMul(child))
        else:
            replace_linears(child)


def linear_names(part: ModelPart) -> dict[str, str]:
    """The linears of a part: layer name (the key of the weight without `.weight`) -> name in the part's module."""
    return {
        part.rename(f"{name}.weight").removesuffix(".weight"): name
        for name, module in part.module.named_modules()
        if isinstance(module, MatMul) and module.weight.numel()  # with one mode the gamma head is empty
    }


def parameters(part: ModelPart) -> list[Parameter]:
    """Every parameter and constant of a part, in the module's order; tied parameters are listed once."""
    found: dict[int, Parameter] = {}
    for name, tensor, owner, leaf in _tensors(part.module):
        constants = getattr(owner, "constants", {})
        if leaf in constants:
            value = constants[leaf]
            item = Parameter(name, tuple(value.shape), value.dtype, constant=value)
        else:
            transform = getattr(owner, "transforms", {}).get(leaf, "none")
            item = Parameter(name, tuple(tensor.shape), tensor.dtype, transform, key=part.rename(name))
        found.setdefault(id(tensor), item)
    return list(found.values())


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, nn.Module, str]]:
    for prefix, owner in module.named_modules():
        for leaf, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None and leaf not in owner._non_persistent_buffers_set:
                yield (f"{prefix}.{leaf}" if prefix else leaf), tensor, owner, leaf
