"""The networks of a distillation: teacher and student share the parameters of one frozen base in memory.

The teacher is a copy of the base's modules with shared parameters. The student is the base itself, with LoRA factors,
its own `norm_out`, and three heads instead of `proj_out`. Two networks are needed because switching off the LoRA
factors would not give the teacher back: the student's `norm_out` is trained too.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arcflow_distill.errors import DistillError
from arcflow_distill.train.prompts import TextBatch
from arcflow_export.checkpoint.adapter import HEADS, SUB_PIXELS
from arcflow_export.checkpoint.sources import read_json
from arcflow_export.families import PACKED_CHANNELS, UNSUPPORTED_SETTINGS, facts, family_of_pipeline, pipelines
from arcflow_export.models.student import Heads
from arcflow_export.student.families import Conditions, RoundedRotary, torch_family

#: Range of the modes' initial gammas, log-spaced; mode 0 keeps gamma 1, a straight path.
GAMMAS = (0.2, 4.0)
#: Spread of the modes' initial biases, so that the modes start different.
BIAS_NOISE = 0.05


@dataclass(frozen=True)
class Canvas:
    """An image's size in packed tokens (16 x 16 pixels each), and the guidance scale for the networks."""

    height: int
    width: int
    guidance_scale: float

    @property
    def tokens(self) -> int:
        """Number of packed tokens of the image."""
        return self.height * self.width


def base_family(base: Path) -> str:
    """The family of a base checkpoint in diffusers' format.

    Raises:
        SourceError: model_index.json is missing or not readable.
        DistillError: the pipeline is not supported, or its transformer is a variant that cannot be distilled.
    """
    name = read_json(base / "model_index.json", "base checkpoint").get("_class_name")
    family = family_of_pipeline(name)
    if family is None:
        raise DistillError(f"base checkpoint: {base} is a {name}; supported are {', '.join(pipelines())}")
    config = read_json(base / "transformer" / "config.json", "base checkpoint")
    if config.get("in_channels", PACKED_CHANNELS) != PACKED_CHANNELS:
        raise DistillError(
            f"base checkpoint: {base}: in_channels must be {PACKED_CHANNELS}, got {config['in_channels']}; "
            "inpainting and control models are not supported"
        )
    for key in UNSUPPORTED_SETTINGS:
        if config.get(key):
            raise DistillError(f"base checkpoint: {base}: {key} is not supported; the base must be Qwen/Qwen-Image's")
    return family


def load_transformer(base: Path, family: str, dtype: torch.dtype) -> Any:
    """Load the base checkpoint's transformer, frozen and in evaluation mode."""
    import diffusers

    transformer = getattr(diffusers, facts(family).transformer).from_pretrained(
        base / "transformer", torch_dtype=dtype, use_safetensors=True
    )
    return transformer.requires_grad_(False).eval()


def lora_targets(transformer: nn.Module, family: str) -> list[str]:
    """Names of the linears that get LoRA factors, the same as in the released adapters."""
    found = facts(family)
    names = [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(found.lora_targets)
    ]
    if found.unused_last is not None:
        last = len(transformer.transformer_blocks) - 1  # type: ignore[arg-type]
        names = [n for n in names if not n.startswith(f"transformer_blocks.{last}.{found.unused_last}")]
    return names


def make_heads(proj_out: nn.Linear, modes: int) -> Heads:
    """Make the initial heads. Apart from noise on the biases, they predict the same as the base's output layer.

    Every mode's mean is a copy of the output layer with noise on the bias, equal for the sub-pixels of a latent
    channel. All mode weights are equal. Gammas do not depend on the token yet.
    """
    channels, dim = proj_out.weight.shape
    heads = Heads(dim, channels, modes, SUB_PIXELS)
    noise = BIAS_NOISE * torch.randn(modes * channels // SUB_PIXELS)
    with torch.no_grad():
        heads.proj_out_means.weight.copy_(proj_out.weight.repeat(modes, 1))
        heads.proj_out_means.bias.copy_(proj_out.bias.float().repeat(modes) + noise.repeat_interleave(SUB_PIXELS))
        for head in (heads.proj_out_logweights, heads.proj_out_loggamma):
            head.weight.zero_()
            head.bias.zero_()
        low, high = (math.log(g) for g in GAMMAS)
        heads.proj_out_loggamma.bias.copy_(torch.linspace(low, high, modes - 1).repeat_interleave(SUB_PIXELS))
    return heads


class _Output(nn.Module):
    """The student's last layers (`norm_out` and heads) in float32; replaces the base's `norm_out`."""

    def __init__(self, norm_out: nn.Module, heads: Heads):
        super().__init__()
        self.norm_out = copy.deepcopy(norm_out).float().requires_grad_(True)
        self.heads = heads

    def forward(self, hidden: torch.Tensor, temb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.heads(self.norm_out(hidden.float(), temb.float()))


class StudentNetwork(nn.Module):
    """The trained network; a call returns the float32 output of the three heads."""

    def __init__(self, transformer: Any, family: str, modes: int, rank: int, dropout: float):
        """Turn a frozen base transformer into a student, in place; random numbers are from torch's global generator."""
        from peft import LoraConfig

        super().__init__()
        self.family = family
        device = transformer.proj_out.weight.device
        heads = make_heads(transformer.proj_out, modes).to(device)
        targets = lora_targets(transformer, family)
        transformer.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=rank,
                lora_dropout=dropout,
                init_lora_weights="gaussian",
                target_modules=targets,
            )
        )
        for name, parameter in transformer.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        transformer.norm_out = _Output(transformer.norm_out, heads)
        transformer.proj_out = nn.Identity()
        if torch_family(family).rounds_rotary:
            transformer.pos_embed = RoundedRotary(transformer.pos_embed, transformer.dtype)
        self.transformer = transformer

    def forward(
        self, latents: torch.Tensor, sigma: torch.Tensor, text: TextBatch, canvas: Canvas
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents [B, N, C], sigma [B] -> means [B, N, K, C], logweights [B, N, K, P], loggammas [B, N, K-1, P]."""
        dtype = self.transformer.dtype
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return self.transformer(**arguments(self.transformer, self.family, latents, sigma, text, canvas))[0]

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by their names in the released adapter format."""
        names = {}
        for name, parameter in self.transformer.named_parameters():
            if parameter.requires_grad:
                names[_released_name(name)] = parameter
        return names


def _released_name(name: str) -> str:
    for part, released in (
        ("norm_out.heads.", ""),
        ("norm_out.norm_out.", "norm_out."),
        (".default.weight", ".weight"),
    ):
        name = name.replace(part, released)
    return name


class TeacherNetwork:
    """The base's velocity, with optional classifier-free guidance; it is never trained."""

    def __init__(self, transformer: Any, family: str, true_cfg_scale: float = 1.0):
        """Copy a base's modules before it becomes a student; the parameters are shared, not copied."""
        shared = {id(t): t for t in (*transformer.parameters(), *transformer.buffers())}
        self.transformer: Any = copy.deepcopy(transformer, shared)
        self.family, self.true_cfg_scale = family, true_cfg_scale

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor, text: TextBatch, canvas: Canvas) -> torch.Tensor:
        """Velocity [B, N, C] float32 at latents [B, N, C] and sigma [B].

        With guidance, `text` holds the negative prompts and then the prompts, [2 B].
        """
        if self.true_cfg_scale == 1:
            return self._velocity(latents, sigma, text, canvas)
        both = self._velocity(latents.repeat(2, 1, 1), sigma.repeat(2), text, canvas)
        negative, positive = both.chunk(2)
        return positive + (positive - negative) * (self.true_cfg_scale - 1)

    def _velocity(self, latents: torch.Tensor, sigma: torch.Tensor, text: TextBatch, canvas: Canvas) -> torch.Tensor:
        return self.transformer(**arguments(self.transformer, self.family, latents, sigma, text, canvas))[0].float()


def arguments(
    transformer: Any, family: str, latents: torch.Tensor, sigma: torch.Tensor, text: TextBatch, canvas: Canvas
) -> dict[str, Any]:
    """A transformer's keyword arguments. The transformer itself rounds timestep and guidance to its dtype."""
    dtype, device, batch = transformer.dtype, latents.device, len(latents)
    common = {
        "hidden_states": latents.to(dtype),
        "timestep": sigma,
        "encoder_hidden_states": text.states.to(dtype),
        "return_dict": False,
    }
    pooled = None if text.pooled is None else text.pooled.to(dtype)
    told = Conditions(
        batch, canvas.height, canvas.width, text.states.shape[1], canvas.guidance_scale, pooled, text.mask
    )
    return common | torch_family(family).arguments(transformer, told, device)


def count_by_kind(trained: dict[str, nn.Parameter]) -> dict[str, int]:
    """The number of trained parameters by kind: heads, norm_out, lora."""
    counts = {"heads": 0, "norm_out": 0, "lora": 0}
    for name, parameter in trained.items():
        kind = "lora" if "lora" in name else "heads" if name.startswith(HEADS) else "norm_out"
        counts[kind] += parameter.numel()
    return counts
