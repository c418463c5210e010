"""Text encoders: transformers' CLIP, T5 and Qwen2.5-VL language model -> parts that can be traced.

The layers are transformers' own. The loop over them is ours, because transformers builds a mask from the input and
none of the three needs one here: CLIP and Qwen attend causally, and padding comes last; FLUX gives T5 no mask.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, CLIPTextModel, T5EncoderModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
from transformers.models.t5.modeling_t5 import T5LayerNorm

from arcflow_export.checkpoint.sources import read_json
from arcflow_export.errors import SourceError
from arcflow_export.families import CLIP_TOKENS
from arcflow_export.models.layers import Constant, ModelPart, RMSNorm, make_part, replace_linears
from arcflow_runtime.disk.manifest import DType


def _grouped_causal_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention that repeats the key and value heads, because opset 20 decomposes grouped heads wrongly.

    query [B, H, T, D], key and value [B, H/g, T, D] -> [B, T, H, D].
    """
    assert attention_mask is None
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2), None


AttentionInterface.register("arcflow", _grouped_causal_attention)


class ClipText(nn.Module):
    """CLIP's text model, pooled at the end-of-text token."""

    def __init__(self, model: CLIPTextModel):
        super().__init__()
        self.embeddings = model.embeddings
        self.embeddings.position_ids = None  # `forward` slices the table instead
        self.encoder, self.final_layer_norm = model.encoder, model.final_layer_norm
        self.eos_token_id = model.config.eos_token_id

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [B, 77] int64 -> pooled_projections [B, Dp]."""
        positions = self.embeddings.position_embedding.weight[: input_ids.shape[1]]
        x = self.embeddings.token_embedding(input_ids) + positions
        x = self.encoder(inputs_embeds=x, attention_mask=None, is_causal=True).last_hidden_state
        x = self.final_layer_norm(x)
        # Configs from before transformers 4.31 say eos_token_id 2, which is wrong; there the highest id ends the text.
        ids = input_ids if self.eos_token_id == 2 else (input_ids == self.eos_token_id).long()
        end = ids.argmax(dim=-1)[:, None, None].expand(-1, 1, x.shape[-1])
        return x.gather(1, end).squeeze(1)


class T5Encoder(nn.Module):
    """T5's encoder without a mask."""

    def __init__(self, model: T5EncoderModel):
        super().__init__()
        self.shared = model.shared
        self.block, self.final_layer_norm = model.encoder.block, model.encoder.final_layer_norm

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [B, T] int64 -> encoder_hidden_states [B, T, Dt]."""
        x = self.shared(input_ids)
        bias = None
        for block in self.block:
            x, bias, *_ = block(x, attention_mask=None, position_bias=bias)
        return self.final_layer_norm(x)


class QwenText(nn.Module):
    """Qwen2.5-VL's language model on text alone, where its three rotary axes have equal positions."""

    def __init__(self, model: Qwen2_5_VLTextModel, theta: float):
        super().__init__()
        self.embed_tokens, self.layers, self.norm = model.embed_tokens, model.layers, model.norm
        dim = self.layers[0].self_attn.head_dim
        self.rotary = Constant(freqs=1.0 / theta ** (torch.arange(0, dim, 2, device="cpu").float() / dim))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [B, T] int64 -> encoder_hidden_states [B, T, Dt], after the final norm."""
        x = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], dtype=torch.float32, device=input_ids.device)
        angle = positions[:, None] * self.rotary.get_buffer("freqs")[None]
        angle = torch.cat([angle, angle], dim=-1)[None]  # [1, T, D]
        rotary = (angle.cos().to(x.dtype), angle.sin().to(x.dtype))
        for layer in self.layers:
            x = layer(x, attention_mask=None, position_embeddings=rotary, use_cache=False)
            x = x[0] if isinstance(x, tuple) else x
        return self.norm(x)


def _config(folder: Path, what: str, architectures: tuple[str, ...]) -> Any:
    data = read_json(folder / "config.json", what)
    got = (data.get("architectures") or [None])[0]
    if got not in architectures:
        raise SourceError(f"{what}: {folder / 'config.json'}: architecture must be one of {architectures}, got {got!r}")
    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "sdpa"
    return config


def _replace_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, T5LayerNorm) or type(child).__name__.endswith("RMSNorm"):
            norm: Any = child
            setattr(module, name, RMSNorm(norm.weight, norm.variance_epsilon))
        else:
            _replace_norms(child)


def clip(folder: Path, dtype: DType, keys: Collection[str]) -> ModelPart:
    """FLUX's first text encoder, from its component folder.

    Args:
        folder: the component's folder, with its config.
        dtype: dtype of the part.
        keys: names of the checkpoint's tensors; empty if only sizes are needed.

    Raises:
        SourceError: the folder does not hold a CLIP text model.
    """
    config = _config(folder, "text_encoder", ("CLIPTextModel",))
    with torch.device("meta"):
        model = ClipText(CLIPTextModel(config))
    replace_linears(model)
    model.to(getattr(torch, dtype)).requires_grad_(False).eval()
    prefix = "text_model." if any(k.startswith("text_model.") for k in keys) else ""
    return make_part(
        "flux",
        "text_encoder",
        model,
        dtype,
        {"clip_tokens": CLIP_TOKENS, "pooled_width": config.hidden_size},
        lambda name: prefix + name,
    )


def t5(folder: Path, dtype: DType, keys: Collection[str]) -> ModelPart:
    """FLUX's second text encoder, from its component folder.

    In float16 the feed-forward output projections stay in float32, as in transformers, because they overflow.

    Raises:
        SourceError: the folder does not hold a T5 encoder.
    """
    config = _config(folder, "text_encoder_2", ("T5EncoderModel",))
    with torch.device("meta"):
        model = T5Encoder(T5EncoderModel(config))
    _replace_norms(model)
    replace_linears(model)
    model.to(getattr(torch, dtype)).requires_grad_(False).eval()
    if dtype == "float16":
        for name, module in model.named_modules():
            if name.endswith(".wo"):
                module.float()

    def rename(name: str) -> str:
        if name == "shared.weight":
            return name if name in keys else "encoder.embed_tokens.weight"
        return f"encoder.{name}"

    return make_part("flux", "text_encoder_2", model, dtype, {"text_width": config.d_model}, rename)


def qwen(folder: Path, dtype: DType, keys: Collection[str]) -> ModelPart:
    """Qwen-Image's text encoder (the language model of Qwen2.5-VL), from its component folder.

    Raises:
        SourceError: the folder does not hold a Qwen2.5-VL model.
    """
    config = _config(folder, "text_encoder", ("Qwen2_5_VLForConditionalGeneration",)).get_text_config()
    config._attn_implementation = "arcflow"
    with torch.device("meta"):
        model = QwenText(Qwen2_5_VLTextModel(config), config.rope_parameters["rope_theta"])
    _replace_norms(model)
    replace_linears(model)
    model.to(getattr(torch, dtype)).requires_grad_(False).eval()
    # Three versions of transformers wrote three different prefixes.
    prefixes = [p for p in ("model.language_model.", "language_model.model.", "model.") if f"{p}norm.weight" in keys]
    if keys and not prefixes:
        raise SourceError(
            f"text_encoder: {folder} has no Qwen2.5-VL language model weights; is the checkpoint complete?"
        )
    return make_part(
        "qwen-image",
        "text_encoder",
        model,
        dtype,
        {"text_width": config.hidden_size},
        lambda name: (prefixes or [""])[0] + name,
    )
