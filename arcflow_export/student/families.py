"""The functions that differ by family when a student or its teacher runs in torch with diffusers' modules.

They repeat on purpose what the runtime knows about rounding and latents: the torch student is the independent check of
a bundle, so it shares nothing with the bundle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from arcflow_export.families import facts

#: (text states [1, T, D], pooled vector [1, Dp] or None) of one prompt.
Encoded = tuple[torch.Tensor, torch.Tensor | None]
#: Rounds float32 numbers to a network's input dtype.
Rounding = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Conditions:
    """A network's inputs besides latents and text states, for B images of `height` x `width` tokens.

    `pooled` [B, Dp] is the pooled text, and `mask` [B, T] bool marks the valid text tokens; None if the family has
    none.
    """

    batch: int
    height: int
    width: int
    text_tokens: int
    guidance_scale: float
    pooled: torch.Tensor | None = None
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class TorchFamily:
    """The functions of one family.

    Args:
        encode: (diffusers' pipeline, prompts, device, max_sequence_length) -> encoded text of each prompt.
        arguments: (transformer, conditions, device) -> the transformer's arguments that only this family has.
        embed: (time_text_embed, sigma [B] in `reference_dtype`, guidance scale, other arguments of the embedding, dtype
            of the conditioner) -> the conditioning vector [B, D].
        decode: (VAE, latents [B, C, H/8, W/8] float32, rounding) -> images [B, 3, H, W] in [-1, 1].
        rounds_rotary: True if the reference rounds rotary tables to its dtype.
    """

    encode: Callable[[Any, list[str], str, int], list[Encoded]]
    arguments: Callable[[Any, Conditions, torch.device | str], dict[str, Any]]
    embed: Callable[[nn.Module, torch.Tensor, float, tuple[torch.Tensor, ...], torch.dtype], torch.Tensor]
    decode: Callable[[Any, torch.Tensor, Rounding], torch.Tensor]
    rounds_rotary: bool


def _encode_flux(pipe: Any, prompts: list[str], device: str, max_sequence_length: int) -> list[Encoded]:
    states, pooled, _ = pipe.encode_prompt(
        prompts, prompt_2=None, device=device, max_sequence_length=max_sequence_length
    )
    return list(zip(states.split(1), pooled.split(1), strict=True))


def _encode_qwen(pipe: Any, prompts: list[str], device: str, max_sequence_length: int) -> list[Encoded]:
    # One by one, because each prompt has its own length and a batch would be padded.
    return [
        (pipe.encode_prompt(prompt, device=device, max_sequence_length=max_sequence_length)[0], None)
        for prompt in prompts
    ]


def _flux_arguments(transformer: Any, told: Conditions, device: torch.device | str) -> dict[str, Any]:
    assert told.pooled is not None
    ids = torch.zeros(told.height, told.width, 3, device=device)
    ids[..., 1] = torch.arange(told.height, device=device)[:, None]
    ids[..., 2] = torch.arange(told.width, device=device)
    guidance = None
    if transformer.config.guidance_embeds:
        guidance = torch.full([told.batch], told.guidance_scale, device=device, dtype=torch.float32)
    return {
        "pooled_projections": told.pooled,
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(told.text_tokens, 3, device=device),
        "guidance": guidance,
    }


def _qwen_arguments(transformer: Any, told: Conditions, device: torch.device | str) -> dict[str, Any]:
    shapes = [[(1, told.height, told.width)]] * told.batch
    return {"img_shapes": shapes, "encoder_hidden_states_mask": told.mask}


def _embed_flux(
    embed: nn.Module,
    sigma: torch.Tensor,
    guidance_scale: float,
    rest: tuple[torch.Tensor, ...],
    conditioner: torch.dtype,
) -> torch.Tensor:
    # The reference rounds sigma and its product with 1000; guidance in the same way, if the student takes it.
    values = [(sigma * 1000).float()]
    if len(rest) == 2:
        values.append((torch.full_like(sigma, guidance_scale) * 1000).float())
    return embed(*values, rest[-1].to(conditioner))


def _embed_qwen(
    embed: nn.Module,
    sigma: torch.Tensor,
    guidance_scale: float,
    rest: tuple[torch.Tensor, ...],
    conditioner: torch.dtype,
) -> torch.Tensor:
    # The reference rounds only sigma. The embedding uses only the dtype of its second argument.
    return embed(sigma.float(), rest[0].to(conditioner), *rest[1:])


def _decode_flux(vae: Any, latents: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    z = latents / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(rounding(z), return_dict=False)[0]


def _decode_qwen(vae: Any, latents: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    mean = torch.tensor(vae.config.latents_mean, device=latents.device).view(1, -1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=latents.device).view(1, -1, 1, 1)
    z = rounding(latents * std + mean)
    return vae.decode(z[:, :, None], return_dict=False)[0][:, :, 0]


TORCH_FAMILIES: dict[str, TorchFamily] = {
    "flux": TorchFamily(_encode_flux, _flux_arguments, _embed_flux, _decode_flux, rounds_rotary=True),
    "qwen-image": TorchFamily(_encode_qwen, _qwen_arguments, _embed_qwen, _decode_qwen, rounds_rotary=False),
}


def torch_family(family: str) -> TorchFamily:
    """The torch functions of a family.

    Raises:
        SourceError: the family is not in the table of families.
    """
    facts(family)
    return TORCH_FAMILIES[family]


class RoundedRotary(nn.Module):
    """Wraps a rotary embedding and rounds its tables to the model's dtype, as FLUX's reference does."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Position ids [N, 3] -> cosines and sines, float32."""
        return tuple(t.to(self.dtype).float() for t in self.inner(ids))
