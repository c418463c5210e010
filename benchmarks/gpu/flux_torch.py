"""A FLUX student as two plain torch modules with the inputs and outputs of a bundle's parts; it needs no diffusers.

It computes what the parts that `arcflow export` traces compute; a test compares them. The conditioner's modulation
linears, one per norm there, are one linear here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.gpu.flux_bundle import FluxSizes

_EPS = 1e-6
_SINUSOID = 256
_MLP_RATIO = 4


def _norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, then shift and scale [B, D]."""
    return F.layer_norm(x, x.shape[-1:], eps=_EPS) * (1 + scale[:, None]) + shift[:, None]


def _rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate adjacent pairs of [B, S, H, D] in float32; `rotary` is [2, S, D/2]."""
    cos, sin = rotary[0, :, None], rotary[1, :, None]
    real, imag = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([real * cos - imag * sin, imag * cos + real * sin], dim=-1).flatten(-2).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, rotary: Tensor) -> Tensor:
    """Full attention over [B, S, H, D] -> [B, S, H*D]."""
    q, k, v = _rotate(q, rotary).transpose(1, 2), _rotate(k, rotary).transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """Two linears with a tanh-approximated GELU between them."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, _MLP_RATIO * width), nn.Linear(_MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Attention(nn.Module):
    """Queries, keys and values of one stream."""

    def __init__(self, sizes: FluxSizes):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(sizes.width, sizes.width) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(sizes.head_dim, eps=_EPS) for _ in range(2))
        self.head_dim = sizes.head_dim

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, D] -> queries, keys and values, each [B, S, H, D/H]."""
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.q, self.k, self.v))
        return self.norm_q(q), self.norm_k(k), v


class DoubleBlock(nn.Module):
    """A block with weights of its own for image and text."""

    def __init__(self, sizes: FluxSizes):
        super().__init__()
        self.image, self.text = Attention(sizes), Attention(sizes)
        self.image_out, self.text_out = (nn.Linear(sizes.width, sizes.width) for _ in range(2))
        self.image_mlp, self.text_mlp = Mlp(sizes.width), Mlp(sizes.width)

    def forward(self, x: Tensor, text: Tensor, modulation: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, N, D], text [B, T, D], modulation [B, 12 D]."""
        of_image, of_text = modulation.chunk(2, dim=-1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = of_image.chunk(6, dim=-1)
        t_shift, t_scale, t_gate, t_mlp_shift, t_mlp_scale, t_mlp_gate = of_text.chunk(6, dim=-1)
        both = zip(self.text(_norm(text, t_shift, t_scale)), self.image(_norm(x, shift, scale)), strict=True)
        q, k, v = (torch.cat(pair, dim=1) for pair in both)
        mixed = _attend(q, k, v, rotary)
        tokens = text.shape[1]
        x = x + gate[:, None] * self.image_out(mixed[:, tokens:])
        x = x + mlp_gate[:, None] * self.image_mlp(_norm(x, mlp_shift, mlp_scale))
        text = text + t_gate[:, None] * self.text_out(mixed[:, :tokens])
        text = text + t_mlp_gate[:, None] * self.text_mlp(_norm(text, t_mlp_shift, t_mlp_scale))
        return x, text


class SingleBlock(nn.Module):
    """A block over image and text together, with attention and MLP side by side."""

    def __init__(self, sizes: FluxSizes):
        super().__init__()
        self.attention = Attention(sizes)
        self.up = nn.Linear(sizes.width, _MLP_RATIO * sizes.width)
        self.down = nn.Linear((1 + _MLP_RATIO) * sizes.width, sizes.width)

    def forward(self, x: Tensor, modulation: Tensor, rotary: Tensor) -> Tensor:
        """x [B, T + N, D], modulation [B, 3 D]."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        normed = _norm(x, shift, scale)
        q, k, v = self.attention(normed)
        mixed = _attend(q, k, v, rotary)
        mlp = F.gelu(self.up(normed), approximate="tanh")
        return x + gate[:, None] * self.down(torch.cat([mixed, mlp], dim=2))


class Backbone(nn.Module):
    """The part `backbone`."""

    def __init__(self, sizes: FluxSizes):
        super().__init__()
        self.sizes = sizes
        self.x_embedder = nn.Linear(sizes.channels, sizes.width)
        self.context_embedder = nn.Linear(sizes.text_width, sizes.width)
        self.double_blocks = nn.ModuleList(DoubleBlock(sizes) for _ in range(sizes.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(sizes) for _ in range(sizes.single_blocks))
        self.means = nn.Linear(sizes.width, sizes.modes * sizes.channels)
        self.logweights = nn.Linear(sizes.width, sizes.modes * sizes.sub_pixels)
        self.loggammas = nn.Linear(sizes.width, (sizes.modes - 1) * sizes.sub_pixels)

    def forward(
        self,
        latents: Tensor,
        encoder_hidden_states: Tensor,
        modulation: Tensor,
        image_rotary: Tensor,
        text_rotary: Tensor,
    ) -> dict[str, Tensor]:
        """See the signature of the part in docs/bundle.md."""
        s = self.sizes
        lengths = [12 * s.width] * s.double_blocks + [3 * s.width] * s.single_blocks + [2 * s.width]
        pieces = iter(modulation.split(lengths, dim=-1))
        rotary = torch.cat([text_rotary, image_rotary], dim=1)
        x, text = self.x_embedder(latents), self.context_embedder(encoder_hidden_states)
        for double in self.double_blocks:
            x, text = double(x, text, next(pieces), rotary)
        tokens = text.shape[1]
        x = torch.cat([text, x], dim=1)
        for single in self.single_blocks:
            x = single(x, next(pieces), rotary)
        scale, shift = next(pieces).chunk(2, dim=-1)
        x = _norm(x[:, tokens:], shift, scale)
        return {
            "means": self.means(x).unflatten(-1, (s.modes, s.channels)),
            "logweights": self.logweights(x).unflatten(-1, (s.modes, s.sub_pixels)),
            "loggammas": self.loggammas(x).unflatten(-1, (s.modes - 1, s.sub_pixels)),
        }


class Embedder(nn.Module):
    """Two linears with a SiLU between them."""

    def __init__(self, given: int, width: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(given, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., given] -> [..., width]."""
        return self.linear_2(F.silu(self.linear_1(x)))


class Conditioner(nn.Module):
    """The part `conditioner`."""

    def __init__(self, sizes: FluxSizes):
        super().__init__()
        self.timestep_embedder, self.guidance_embedder = (Embedder(_SINUSOID, sizes.width) for _ in range(2))
        self.text_embedder = Embedder(sizes.pooled_width, sizes.width)
        self.modulations = nn.Linear(sizes.width, sizes.modulation)

    def forward(self, timesteps: Tensor, guidance: Tensor, pooled_projections: Tensor) -> dict[str, Tensor]:
        """See the signature of the part in docs/bundle.md."""
        dtype = pooled_projections.dtype
        temb = self.timestep_embedder(_sinusoid(timesteps).to(dtype))[:, None]
        temb = temb + self.guidance_embedder(_sinusoid(guidance).to(dtype))[None]
        return {"modulation": self.modulations(F.silu(temb + self.text_embedder(pooled_projections)[None]))}


def _sinusoid(values: Tensor) -> Tensor:
    """Sinusoidal embedding [S] -> [S, 256] in float32, cosines first."""
    half = _SINUSOID // 2
    exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=values.device) / half
    angle = values[:, None] * exponent.exp()[None]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def random_student(sizes: FluxSizes, dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    """Both parts by name, with random weights made on the device: variance 1/in, so activations keep their size."""
    torch.manual_seed(0)
    with torch.device("meta"):
        modules: dict[str, nn.Module] = {"conditioner": Conditioner(sizes), "backbone": Backbone(sizes)}
    for module in modules.values():
        module.to(dtype).to_empty(device=device).requires_grad_(False).eval()
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(std=layer.in_features**-0.5)
                layer.bias.zero_()
            elif isinstance(layer, nn.RMSNorm):
                layer.weight.fill_(1)
    return modules


def update(latents: Tensor, heads: dict[str, Tensor], sigma: float, following: float) -> Tensor:
    """The closed-form update in float32, as `arcflow_runtime.maths.update` documents it: [B, N, C] -> [B, N, C]."""
    means, logweights, loggammas = (heads[n].float() for n in ("means", "logweights", "loggammas"))
    step = sigma - following
    gammas = F.pad(loggammas, (0, 0, 1, 0))
    z = gammas * step
    phi = torch.where(z.abs() < _EPS, 1 + z / 2, torch.expm1(z) / torch.where(z == 0, 1, z))
    coefficients = logweights.softmax(dim=2) * phi * step  # [B, N, K, P]
    by_pixel = means.unflatten(-1, (-1, logweights.shape[-1]))  # [B, N, K, C/P, P]
    return latents - (by_pixel * coefficients[..., None, :]).sum(dim=2).flatten(2)
