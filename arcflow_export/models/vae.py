"""VAE decoders, which `models.families` exports as the part `vae_decoder`.

Packed float32 latents [B, H/16, W/16, 64] -> uint8 RGB [B, H, W, 3].
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderTiny
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageAttentionBlock,
    QwenImageCausalConv3d,
    QwenImageRMS_norm,
    QwenImageUpsample,
)
from torch import nn

from arcflow_export.errors import SourceError
from arcflow_export.families import PACKED_CHANNELS
from arcflow_export.models.layers import Constant, FrameConv, ModelPart, make_part, replace_linears, wide_attention
from arcflow_runtime.disk.manifest import DType


def _unpack(latents: torch.Tensor) -> torch.Tensor:
    """Packed latents [B, h, w, C*4] channel-major -> [B, C, 2h, 2w]."""
    x = latents.unflatten(-1, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)  # [B, C, h, 2, w, 2]
    return x.flatten(4, 5).flatten(2, 3)


def _to_rgb(image: torch.Tensor) -> torch.Tensor:
    """Image [B, 3, H, W] in [-1, 1] -> [B, H, W, 3] uint8, rounded as diffusers does."""
    x = (image.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    return torch.round(x * 255).to(torch.uint8)


class _FluxAttention:
    """Attention processor of AutoencoderKL's middle block, without a fused operator."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        x = attn.group_norm(hidden_states).flatten(2).transpose(1, 2)  # [B, HW, C]
        x = attn.to_out[0](wide_attention(attn.to_q(x), attn.to_k(x), attn.to_v(x)))
        x = x.transpose(1, 2).unflatten(2, hidden_states.shape[2:])
        return (x + hidden_states) / attn.rescale_output_factor


class _QwenAttention(nn.Module):
    """Attention of Qwen's middle block on one frame, without a fused operator."""

    def __init__(self, block: QwenImageAttentionBlock):
        super().__init__()
        self.norm, self.to_qkv, self.proj = block.norm, block.to_qkv, block.proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, 1, H, W] -> [B, C, 1, H, W]."""
        frame = x.squeeze(2)
        qkv = self.to_qkv(self.norm(frame)).flatten(2).transpose(1, 2)  # [B, HW, 3C]
        out = wide_attention(*qkv.chunk(3, dim=-1)).transpose(1, 2).unflatten(2, frame.shape[2:])
        return self.proj(out).unsqueeze(2) + x


class FluxDecoder(nn.Module):
    """AutoencoderKL's decoder with FLUX's scaling: z / scaling_factor + shift_factor."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv
        for attention in self.decoder.mid_block.attentions:
            if attention is not None:
                attention.set_processor(_FluxAttention())
        self.scale, self.shift = float(vae.config.scaling_factor), float(vae.config.shift_factor or 0.0)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, h, w, 64] float32 -> [B, 16h, 16w, 3] uint8."""
        z = _unpack(latents) / self.scale + self.shift
        z = z.to(self.decoder.conv_in.weight.dtype)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return _to_rgb(self.decoder(z))


class TinyDecoder(nn.Module):
    """AutoencoderTiny's decoder (TAEF1), on the latents that diffusers' pipeline gives it: z / scaling_factor + shift.

    Its config's factors are 1 and 0, because it was trained on the latents as the transformer sees them. Its
    `latent_magnitude` and `latent_shift` belong to images of latents, which a pipeline does not make.
    """

    def __init__(self, vae: AutoencoderTiny):
        super().__init__()
        self.decoder = vae.decoder
        self.scale, self.shift = float(vae.config.scaling_factor), float(vae.config.shift_factor)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, h, w, 64] float32 -> [B, 16h, 16w, 3] uint8."""
        z = _unpack(latents) / self.scale + self.shift
        return _to_rgb(self.decoder(z.to(next(self.decoder.parameters()).dtype)))


class QwenDecoder(nn.Module):
    """AutoencoderKLQwenImage's decoder on one frame, with 2-D convolutions: z * std + mean per channel."""

    def __init__(self, vae: AutoencoderKLQwenImage):
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv
        self.statistics = Constant(
            mean=torch.tensor(vae.config.latents_mean, device="cpu").view(1, -1, 1, 1),
            std=torch.tensor(vae.config.latents_std, device="cpu").view(1, -1, 1, 1),
        )

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, h, w, 64] float32 -> [B, 16h, 16w, 3] uint8."""
        z = _unpack(latents) * self.statistics.get_buffer("std") + self.statistics.get_buffer("mean")
        z = z.to(self.decoder.conv_in.weight.dtype).unsqueeze(2)  # [B, C, 1, 2h, 2w]
        image = self.decoder(self.post_quant_conv(z))
        return _to_rgb(image.squeeze(2).clamp(-1, 1))


class _Norm(nn.Module):
    """Qwen's RMS norm over channels: x / max(|x|, 1e-12) * sqrt(C) * gamma, the norm in float32."""

    def __init__(self, norm: QwenImageRMS_norm):
        super().__init__()
        self.gamma, self.scale = norm.gamma, norm.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, ...] -> [B, C, ...]."""
        y = x.float()
        y = y / torch.linalg.vector_norm(y, dim=1, keepdim=True).clamp_min(1e-12)
        return y.to(x.dtype) * self.scale * self.gamma


class _Upsample(nn.Module):
    """Upsample to twice the size, nearest. At a factor of 2 it equals diffusers' "nearest-exact", which ONNX lacks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        return nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")


def _replace_qwen(module: nn.Module) -> None:
    """Turn Qwen's video decoder into an image decoder, in place."""
    for name, child in module.named_children():
        if isinstance(child, QwenImageCausalConv3d):
            setattr(module, name, FrameConv(child, (child._padding[3], child._padding[0])))
        elif isinstance(child, QwenImageRMS_norm):
            setattr(module, name, _Norm(child))
        elif isinstance(child, QwenImageUpsample):
            setattr(module, name, _Upsample())
        elif isinstance(child, QwenImageAttentionBlock):
            attention = _QwenAttention(child)
            _replace_qwen(attention)
            setattr(module, name, attention)
        else:
            _replace_qwen(child)
        if name == "time_conv":  # upsampling in time does nothing on the first frame
            setattr(module, name, None)


def flux_decoder(config: dict[str, Any], dtype: DType) -> ModelPart:
    """FLUX's VAE decoder, full or small, from the VAE's `config.json`.

    Raises:
        SourceError: the VAE is neither an `AutoencoderKL` nor an `AutoencoderTiny`, or it does not have 16 latent
            channels and 4 levels.
    """
    module: nn.Module
    if config.get("_class_name") == AutoencoderTiny.__name__:
        _check_sizes("flux", config.get("latent_channels", 4), len(config.get("decoder_block_out_channels", range(4))))
        if (factor := config.get("upsampling_scaling_factor", 2)) != 2:
            raise SourceError(f"vae: upsampling_scaling_factor must be 2, got {factor}; give TAEF1 or a VAE like it")
        with torch.device("meta"):
            module = TinyDecoder(AutoencoderTiny.from_config(config))
    else:
        _check("flux", config, AutoencoderKL, "latent_channels", "block_out_channels")
        with torch.device("meta"):
            module = FluxDecoder(AutoencoderKL.from_config(config))
    return _part("flux", module, dtype)


def qwen_decoder(config: dict[str, Any], dtype: DType) -> ModelPart:
    """Qwen-Image's VAE decoder, from the VAE's `config.json`.

    Raises:
        SourceError: the VAE is not an `AutoencoderKLQwenImage` with 16 latent channels and 4 levels.
    """
    _check("qwen-image", config, AutoencoderKLQwenImage, "z_dim", "dim_mult")
    with torch.device("meta"):
        module = QwenDecoder(AutoencoderKLQwenImage.from_config(config))
    _replace_qwen(module)
    return _part("qwen-image", module, dtype)


def _check(family: str, config: dict[str, Any], wanted: type, channels_key: str, levels_key: str) -> None:
    if config.get("_class_name") == AutoencoderTiny.__name__:
        raise SourceError(
            f"vae: AutoencoderTiny has no variant for the latents of {family}, which are those of {wanted.__name__}; "
            "leave --vae out"
        )
    if config.get("_class_name") != wanted.__name__:
        raise SourceError(
            f"vae: _class_name must be {wanted.__name__!r} for a {family} base, got {config.get('_class_name')!r}; "
            "give a base of this family"
        )
    _check_sizes(family, config.get(channels_key, 16), len(config.get(levels_key, range(4))))


def _check_sizes(family: str, channels: int, levels: int) -> None:
    if (channels, levels) != (16, 4):
        raise SourceError(
            f"vae: a {family} base must have 16 latent channels and 4 levels (8 pixels per latent), "
            f"got {channels} and {levels}"
        )


def _part(family: str, module: nn.Module, dtype: DType) -> ModelPart:
    replace_linears(module)
    module.to(getattr(torch, dtype)).requires_grad_(False).eval()
    return make_part(family, "vae_decoder", module, dtype, {"channels": PACKED_CHANNELS}, lambda name: name)
