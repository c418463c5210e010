"""Split a FLUX student (diffusers' FluxTransformer2DModel) into its conditioner and backbone parts."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import nn

from arcflow_export.models.layers import ModelPart, Sinusoid, attention, make_part, replace_linears, rotate
from arcflow_export.models.student import Modulations, backbone_part, lift_modulations, make_heads, rename_linears
from arcflow_runtime.disk.manifest import DType, Sampler
from arcflow_runtime.maths.dtypes import FLOAT16_MAX

_FAMILY = "flux"


class _Attention:
    """Attention processor over [text, image] tokens; takes rotary tables of cosines and sines as inputs."""

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        assert image_rotary_emb is not None and attention_mask is None

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (-1, attn.head_dim))  # [B, S, H, D]

        q = attn.norm_q(heads(attn.to_q(hidden_states)))
        k = attn.norm_k(heads(attn.to_k(hidden_states)))
        v = heads(attn.to_v(hidden_states))
        if encoder_hidden_states is not None:
            q = torch.cat([attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states))), q], dim=1)
            k = torch.cat([attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states))), k], dim=1)
            v = torch.cat([heads(attn.add_v_proj(encoder_hidden_states)), v], dim=1)
        x = attention(rotate(q, image_rotary_emb), rotate(k, image_rotary_emb), v)
        if encoder_hidden_states is None:
            return x
        text_tokens = encoder_hidden_states.shape[1]
        return attn.to_out[0](x[:, text_tokens:]), attn.to_add_out(x[:, :text_tokens])


class FluxBackbone(nn.Module):
    """The image-dependent part of a FLUX student."""

    def __init__(self, transformer: FluxTransformer2DModel, heads: nn.Module):
        super().__init__()
        transformer.time_text_embed = transformer.proj_out = None
        for module in transformer.modules():
            if isinstance(module, FluxAttention):
                module.set_processor(_Attention())
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
        rotary = torch.cat([text_rotary, image_rotary], dim=1)  # [2, T + N, D/2]
        x = t.x_embedder(latents)
        text = t.context_embedder(encoder_hidden_states)
        for block in t.transformer_blocks:
            text, x = block(hidden_states=x, encoder_hidden_states=text, temb=modulation, image_rotary_emb=rotary)
        text_tokens = text.shape[1]
        # diffusers joins and splits the two streams in every single block; joining them once gives the same numbers.
        x = torch.cat([text, x], dim=1)
        for block in t.single_transformer_blocks:
            normed, gate = block.norm(x, emb=modulation)
            mixed = block.attn(hidden_states=normed, image_rotary_emb=rotary)
            mlp = block.act_mlp(block.proj_mlp(normed))
            x = x + gate.unsqueeze(1) * block.proj_out(torch.cat([mixed, mlp], dim=2))
            if x.dtype == torch.float16:
                x = x.clip(-int(FLOAT16_MAX), int(FLOAT16_MAX))  # as diffusers does
        x = t.norm_out(x[:, text_tokens:], modulation)
        return tuple(head.to(latents.dtype) for head in self.heads(x))


class FluxConditioner(nn.Module):
    """The image-independent part of a FLUX student: every step's modulation in one batch."""

    def __init__(self, embed: Any, linears: list[nn.Linear], guidance: bool):
        super().__init__()
        self.sinusoid = Sinusoid()
        self.timestep_embedder: nn.Module = embed.timestep_embedder
        self.guidance_embedder = embed.guidance_embedder if guidance else None
        self.text_embedder = embed.text_embedder
        self.modulations = Modulations(linears)

    def forward(self, timesteps: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        """timesteps [S], guidance [B] (if embedded), pooled_projections [B, Dp] -> modulation [S, B, M]."""
        pooled = rest[-1]
        temb = self.timestep_embedder(self.sinusoid(timesteps).to(pooled.dtype))[:, None]  # [S, 1, D]
        if self.guidance_embedder is not None:
            temb = temb + self.guidance_embedder(self.sinusoid(rest[0]).to(pooled.dtype))[None]
        return self.modulations(temb + self.text_embedder(pooled)[None]).to(pooled.dtype)


def build(
    config: dict[str, Any],
    num_gaussians: int,
    logweights_channels: int,
    conditioner_dtype: DType,
    dtype: DType,
    sampler: Sampler = "momentum",
) -> list[ModelPart]:
    """The conditioner and backbone of a FLUX student, on the meta device.

    Args:
        config: the base transformer's `config.json`.
        num_gaussians: K, the number of modes.
        logweights_channels: P, the number of sub-pixels of a token, each with its own mode weights.
        conditioner_dtype: dtype of the conditioner's weights and arithmetic.
        dtype: dtype of the backbone's weights and arithmetic.
        sampler: "linear" keeps the base's own final projection in place of the three heads.
    """
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(config)
        heads = make_heads(transformer.inner_dim, config["in_channels"], num_gaussians, logweights_channels, sampler)
    slots: list[tuple[str, nn.Module, str]] = []
    for i, block in enumerate(transformer.transformer_blocks):
        for name in ("norm1", "norm1_context"):
            slots.append((f"transformer_blocks.{i}.{name}.linear", getattr(block, name), "linear"))
    for i, block in enumerate(transformer.single_transformer_blocks):
        slots.append((f"single_transformer_blocks.{i}.norm.linear", block.norm, "linear"))
    slots.append(("norm_out.linear", transformer.norm_out, "linear"))
    for _, owner, _ in slots:
        owner.silu = nn.Identity()
    linears, names, size = lift_modulations(slots)
    guidance = bool(config.get("guidance_embeds"))
    conditioner = FluxConditioner(transformer.time_text_embed, linears, guidance)
    backbone = FluxBackbone(transformer, heads)
    dtypes: list[torch.dtype] = [getattr(torch, conditioner_dtype), getattr(torch, dtype)]
    for module, torch_dtype in zip((conditioner, backbone), dtypes, strict=True):
        replace_linears(module)
        module.to(torch_dtype).requires_grad_(False).eval()
    sizes = {"pooled_width": config["pooled_projection_dim"], "modulation": size}
    without = () if guidance else ("guidance",)
    return [
        make_part(_FAMILY, "conditioner", conditioner, conditioner_dtype, sizes, rename_linears(names), without),
        backbone_part(_FAMILY, backbone, config, num_gaussians, logweights_channels, size, dtype, sampler),
    ]
