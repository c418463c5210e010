"""Split a Qwen-Image student (diffusers' QwenImageTransformer2DModel) into its conditioner and backbone parts."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn

from arcflow_export.models.layers import ModelPart, RMSNorm, Sinusoid, attention, make_part, replace_linears, rotate
from arcflow_export.models.student import Modulations, backbone_part, lift_modulations, make_heads, rename_linears
from arcflow_runtime.disk.manifest import DType, Sampler

_FAMILY = "qwen-image"


class _Attention:
    """Attention processor over [text, image] tokens; takes rotary tables of cosines and sines as inputs."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert image_rotary_emb is not None and encoder_hidden_states_mask is None
        image_rotary, text_rotary = image_rotary_emb
        head_dim = attn.inner_dim // attn.heads

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (-1, head_dim))  # [B, S, H, D]

        rotary = torch.cat([text_rotary, image_rotary], dim=1)
        text_q = attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states)))
        text_k = attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states)))
        q = torch.cat([text_q, attn.norm_q(heads(attn.to_q(hidden_states)))], dim=1)
        k = torch.cat([text_k, attn.norm_k(heads(attn.to_k(hidden_states)))], dim=1)
        v = torch.cat([heads(attn.add_v_proj(encoder_hidden_states)), heads(attn.to_v(hidden_states))], dim=1)
        x = attention(rotate(q, rotary), rotate(k, rotary), v)
        text_tokens = encoder_hidden_states.shape[1]
        return attn.to_out[0](x[:, text_tokens:]), attn.to_add_out(x[:, :text_tokens])


class QwenBackbone(nn.Module):
    """The image-dependent part of a Qwen-Image student."""

    def __init__(self, transformer: QwenImageTransformer2DModel, heads: nn.Module):
        super().__init__()
        transformer.time_text_embed = transformer.proj_out = transformer.pos_embed = None
        # The last block's text output is never read, so its layers are removed and their weights are not shipped.
        transformer.transformer_blocks[-1].txt_mlp = nn.Identity()
        transformer.transformer_blocks[-1].attn.to_add_out = nn.Identity()
        for block in transformer.transformer_blocks:
            block.attn.set_processor(_Attention())
            for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                setattr(block.attn, name, RMSNorm(getattr(block.attn, name).weight, getattr(block.attn, name).eps))
        transformer.txt_norm = RMSNorm(transformer.txt_norm.weight, transformer.txt_norm.eps)
        self.transformer, self.heads = transformer, heads

    def forward(
        self,
        latents: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        modulation: torch.Tensor,
        image_rotary: torch.Tensor,
        text_rotary: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Shapes as in `backbone_part`."""
        t = self.transformer
        x = t.img_in(latents)
        text = t.txt_in(t.txt_norm(encoder_hidden_states))
        for block in t.transformer_blocks:
            text, x = block(
                hidden_states=x,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=None,
                temb=modulation,
                image_rotary_emb=(image_rotary, text_rotary),
            )
        return tuple(head.to(latents.dtype) for head in self.heads(t.norm_out(x, modulation)))


class QwenConditioner(nn.Module):
    """The image-independent part of a Qwen-Image student, a function of the timestep alone."""

    def __init__(self, embed: Any, linears: list[nn.Linear], dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.sinusoid = Sinusoid()
        self.timestep_embedder: nn.Module = embed.timestep_embedder
        self.modulations = Modulations(linears)

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """timesteps [S] float32 -> modulation [S, 1, M]."""
        x = self.sinusoid(timesteps).to(self.dtype)
        return self.modulations(self.timestep_embedder(x)).to(self.dtype)[:, None]


def build(
    config: dict[str, Any],
    num_gaussians: int,
    logweights_channels: int,
    conditioner_dtype: DType,
    dtype: DType,
    sampler: Sampler = "momentum",
) -> list[ModelPart]:
    """The conditioner and backbone of a Qwen-Image student, on the meta device; arguments as for `flux.build`."""
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel.from_config(config)
        heads = make_heads(transformer.inner_dim, config["in_channels"], num_gaussians, logweights_channels, sampler)
    slots: list[tuple[str, nn.Module, str]] = []
    for i, block in enumerate(transformer.transformer_blocks):
        for name in ("img_mod", "txt_mod"):
            slots.append((f"transformer_blocks.{i}.{name}.1", getattr(block, name), "1"))
            getattr(block, name)[0] = nn.Identity()
    slots.append(("norm_out.linear", transformer.norm_out, "linear"))
    transformer.norm_out.silu = nn.Identity()
    linears, names, size = lift_modulations(slots)
    dtypes: list[torch.dtype] = [getattr(torch, conditioner_dtype), getattr(torch, dtype)]
    conditioner = QwenConditioner(transformer.time_text_embed, linears, dtypes[0])
    backbone = QwenBackbone(transformer, heads)
    for module, torch_dtype in zip((conditioner, backbone), dtypes, strict=True):
        replace_linears(module)
        module.to(torch_dtype).requires_grad_(False).eval()
    sizes = {"modulation": size}
    return [
        make_part(_FAMILY, "conditioner", conditioner, conditioner_dtype, sizes, rename_linears(names)),
        backbone_part(_FAMILY, backbone, config, num_gaussians, logweights_channels, size, dtype, sampler),
    ]
