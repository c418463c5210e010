"""The student in torch, from its base checkpoint and adapter: the independent reference for bundles.

`arcflow verify` compares bundles with it; calibration and evaluation generate with it. It is diffusers' own transformer
with unmerged LoRA (peft), the three heads on its last hidden state, and the closed-form update in torch. It shares no
weights, graph or runtime code with a bundle. Weights that do not fit in memory stay in the checkpoint's files and are
read as they are used; the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from arcflow_export.checkpoint.adapter import HEADS
from arcflow_export.checkpoint.sources import read_json
from arcflow_export.options import PARTS, SHIFT, TIMESTEP_RATIO
from arcflow_export.student.assemble import assemble, load_vae
from arcflow_export.student.cast import cast_conditioner, cast_linears, keep_float32
from arcflow_export.student.families import Conditions, RoundedRotary, TorchFamily, torch_family
from arcflow_export.student.load import Student
from arcflow_export.student.memory import free_bytes, stays_on_disk, weight_bytes
from arcflow_export.student.straight import guided, line, seen_sigma, straight_sigmas
from arcflow_runtime.disk.families import DEFAULT_GUIDANCE_SCALE
from arcflow_runtime.disk.manifest import Schedule


@dataclass(frozen=True)
class TorchRun:
    """The result of a torch run: packed latents [B, N, C] float32 before the first step (`noise`) and after every step,
    and images [B, H, W, 3] in [0, 1].
    """

    noise: torch.Tensor
    steps: list[torch.Tensor]
    images: torch.Tensor


class TorchStudent:
    """The student in torch; `on_disk` is True if the base's weights are read from disk as they are used."""

    def __init__(
        self,
        student: Student,
        dtype: torch.dtype | Mapping[str, torch.dtype] = torch.float32,
        reference_dtype: torch.dtype | None = None,
        device: str = "cpu",
        float32_layers: Mapping[str, Iterable[str]] | None = None,
        offload: bool | None = None,
        shift: float = SHIFT,
        timestep_ratio: float = TIMESTEP_RATIO,
        straight: Schedule | None = None,
    ):
        """Load base, adapter and LoRAs.

        Args:
            student: from `load_student`.
            dtype: dtype of all weights and activations, or a dtype for each part by its name in a bundle. The update is
                always float32.
            reference_dtype: the dtype that the timestep, the guidance and FLUX's rotary tables are rounded to, as if
                the reference ran in it; None means the backbone's dtype.
            device: torch device to run on.
            float32_layers: linears to keep in float32, by part; layer names as in the graphs.
            offload: read the weights of transformer and text encoders from disk whenever they are used, so that one
                layer's are in memory at a time; None is where all of them together do not fit in the free memory.
            shift: S of the student's schedule.
            timestep_ratio: the ratio r of the student's schedule.
            straight: the schedule of a straight student, in place of both.
        """
        assert (student.adapter is None) == (straight is not None), "a straight student has a schedule of its own"
        dtypes = dict.fromkeys(PARTS, dtype) if isinstance(dtype, torch.dtype) else dict(dtype)
        dtype, conditioner = dtypes["backbone"], dtypes["conditioner"]
        kept = {part: list(layers) for part, layers in (float32_layers or {}).items()}
        self.family, self.shift, self.timestep_ratio = torch_family(student.family), shift, timestep_ratio
        self.straight = straight
        self.dtype, self.vae_dtype, self.device = dtype, dtypes["vae_decoder"], device
        self.on_disk = stays_on_disk(weight_bytes(student, dtypes), free_bytes(device)) if offload is None else offload
        self.pipe, self.heads = assemble(student, dtypes, device, self.on_disk)
        self.transformer = self.pipe.transformer
        #: The base's own VAE in float32 if another one was given in its place, else None.
        self.full_vae = None
        if student.vae is not None:
            folder = student.base.path / "vae"
            self.full_vae = load_vae(folder, read_json(folder / "config.json", "base checkpoint"), torch.float32)
            self.full_vae.to(device)
        if kept.get("backbone") or kept.get("conditioner") or conditioner != dtype:
            cast_linears(self.transformer)
            cast_linears(self.heads)
        if conditioner != dtype:
            cast_conditioner(self.transformer, conditioner, dtype)
        for part, layers in kept.items():
            self._keep_float32(part, layers, dtypes[part])
        reference = self.reference_dtype = reference_dtype or dtype
        self.conditioning = _Conditioning(self.transformer.time_text_embed, self.family, reference, conditioner)
        self.transformer.time_text_embed = self.conditioning
        if self.family.rounds_rotary and straight is None:
            self.transformer.pos_embed = RoundedRotary(self.transformer.pos_embed, reference)

    def _keep_float32(self, part: str, layers: list[str], dtype: torch.dtype) -> None:
        if part in ("backbone", "conditioner"):
            heads = [name for name in layers if name in HEADS and self.straight is None]
            keep_float32(self.heads, heads, dtype)
            keep_float32(self.transformer, [name for name in layers if name not in HEADS], dtype)
        elif layers:
            component = getattr(self.pipe, part)
            cast_linears(component)
            keep_float32(component, layers, dtype)

    def schedule(self, num_inference_steps: int, height: int, width: int) -> torch.Tensor:
        """The student's sigmas [S + 1] float32 for images of this size in pixels."""
        if self.straight is not None:
            return straight_sigmas(self.straight, num_inference_steps, height * width // 256)
        return schedule(num_inference_steps, self.shift, self.timestep_ratio)

    @torch.inference_mode()
    def encode(self, prompt: str, max_sequence_length: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode a prompt: text states [1, T, D], and CLIP's pooled projection [1, Dp] for FLUX (None for Qwen)."""
        return self.encode_batch([prompt], max_sequence_length)[0]

    @torch.inference_mode()
    def encode_batch(
        self, prompts: list[str], max_sequence_length: int
    ) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """`encode` several prompts; FLUX encodes them as one batch.

        Qwen-Image encodes them one by one, because its text length is the prompt's own and a batch would pad it.
        """
        return self.family.encode(self.pipe, prompts, self.device, max_sequence_length)

    @torch.inference_mode()
    def predict(
        self,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        states: torch.Tensor,
        pooled: torch.Tensor | None,
        height: int,
        width: int,
        guidance_scale: float,
        rounding: torch.Generator | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Call the network once: packed latents [B, N, C] at `sigma` -> means, logweights (logits), loggammas.

        A straight student gives its velocity [B, N, C] alone. With a generator `rounding`, the latents are rounded to
        the network's dtype at random; see `round_randomly`.
        """
        batch = latents.shape[0]
        if self.straight is not None:
            sigma = seen_sigma(sigma, self.reference_dtype)
        self.conditioning.sigma, self.conditioning.guidance = sigma, guidance_scale
        common: dict[str, Any] = {
            "hidden_states": round_randomly(latents, self.dtype, rounding),
            "timestep": sigma.to(self.device).expand(batch),
            "encoder_hidden_states": states.to(self.dtype).expand(batch, -1, -1),
            "return_dict": False,
        }
        vector = None if pooled is None else pooled.expand(batch, -1)
        told = Conditions(batch, height // 16, width // 16, states.shape[1], guidance_scale, vector)
        found = self.transformer(**common, **self.family.arguments(self.transformer, told, self.device))[0]
        heads: tuple[torch.Tensor, ...] = self.heads(found)
        return heads

    def step(self, latents: torch.Tensor, heads: tuple[torch.Tensor, ...], start: float, end: float) -> torch.Tensor:
        """Latents [B, N, C] at sigma `end`, from those at `start` and what the network gave there."""
        if self.straight is not None:
            return line(latents, heads[0], start, end)
        means, logweights, loggammas = heads
        return integrate(latents, means, logweights, loggammas, start, end)

    @torch.inference_mode()
    def generate(
        self,
        prompt: str,
        height: int,
        width: int,
        num_inference_steps: int = 2,
        seed: int = 0,
        guidance_scale: float = DEFAULT_GUIDANCE_SCALE,
        max_sequence_length: int = 512,
        on_step: Callable[[int], None] | None = None,
        noise: torch.Tensor | None = None,
        rounding: torch.Generator | None = None,
        negative_prompt: str | None = None,
        true_cfg_scale: float = 1.0,
    ) -> TorchRun:
        """Generate one image; arguments as in the runtime's pipeline. `noise` [1, C, H/8, W/8] replaces the seed."""
        states, pooled = self.encode(prompt, max_sequence_length)
        negative = None if negative_prompt is None else self.encode(negative_prompt, max_sequence_length)[0]
        generator = torch.Generator("cpu").manual_seed(seed)
        channels = self.transformer.config.in_channels // 4
        if noise is None:
            noise = torch.randn(1, channels, height // 8, width // 8, generator=generator)
        x = pack(noise.to(self.device))
        first, steps = x, []
        sigmas = self.schedule(num_inference_steps, height, width)
        for i in range(num_inference_steps):
            heads = self.predict(x, sigmas[i], states, pooled, height, width, guidance_scale, rounding)
            if negative is not None:
                away = self.predict(x, sigmas[i], negative, None, height, width, guidance_scale, rounding)
                heads = (guided(heads[0], away[0], true_cfg_scale),)
            x = self.step(x, heads, float(sigmas[i]), float(sigmas[i + 1]))
            steps.append(x)
            if on_step:
                on_step(i)
        return TorchRun(first, steps, self.decode(x, height, width, rounding))

    @torch.inference_mode()
    def decode(
        self,
        latents: torch.Tensor,
        height: int,
        width: int,
        rounding: torch.Generator | None = None,
        full: bool = False,
    ) -> torch.Tensor:
        """Decode packed latents [B, N, C] to images [B, H, W, 3] float32 in [0, 1]; `full` uses `full_vae`."""
        z = latents.unflatten(1, (height // 16, width // 16)).unflatten(-1, (-1, 2, 2))
        z = z.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        vae, dtype = (self.full_vae, torch.float32) if full else (self.pipe.vae, self.vae_dtype)
        image = self.family.decode(vae, z, lambda x: round_randomly(x, dtype, rounding))
        return (image.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def round_randomly(x: torch.Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> torch.Tensor:
    """Round float32 numbers to `dtype` stochastically; a `generator` of None rounds to nearest.

    A number is rounded up or down at random, with the probabilities that keep its mean. Everything computed from the
    result then has other rounding errors, so several runs show how far rounding alone moves a result (Monte Carlo
    arithmetic: Parker, UCLA CSD-970002, 1997).
    """
    if generator is None or dtype == torch.float32:
        return x.to(dtype)
    dropped = {torch.bfloat16: 16, torch.float16: 13}[dtype]  # bits of float32's significand
    bits = x.float().contiguous().view(torch.int32)
    bits = bits + torch.randint(0, 1 << dropped, bits.shape, generator=generator, dtype=torch.int32).to(bits.device)
    return (bits >> dropped << dropped).view(torch.float32).to(dtype)


def schedule(num_inference_steps: int, shift: float = SHIFT, timestep_ratio: float = TIMESTEP_RATIO) -> torch.Tensor:
    """Sigmas [S + 1] float32, falling from 1 to 0: t_i = 1 - i/(S - 1 + r), sigma = shift t / (1 + (shift - 1) t)."""
    t = 1 - torch.arange(num_inference_steps, dtype=torch.float64) / (num_inference_steps - 1 + timestep_ratio)
    return torch.cat([shift * t / (1 + (shift - 1) * t), torch.zeros(1, dtype=torch.float64)]).float()


def integrate(
    x: torch.Tensor,
    means: torch.Tensor,
    logweights: torch.Tensor,
    loggammas: torch.Tensor,
    start: float,
    end: float,
) -> torch.Tensor:
    """One step of the closed-form update (arXiv 2602.09014), in float32.

    Args:
        x: packed latents [B, N, C] at sigma `start`, where the network was evaluated.
        means: [B, N, K, C]; logweights: [B, N, K, P]; loggammas: [B, N, K-1, P].
        start: sigma before the step.
        end: sigma after it.
    """
    d = start - end
    weights = logweights.float().softmax(dim=2)
    z = nn.functional.pad(loggammas.float(), (0, 0, 1, 0)) * d
    phi = torch.where(z.abs() < 1e-3, 1 + z / 2 + z * z / 6, torch.expm1(z) / torch.where(z == 0, 1, z))
    modes = means.float().unflatten(-1, (-1, weights.shape[-1]))  # [B, N, K, C/P, P]
    return x - d * (modes * (weights * phi).unsqueeze(3)).sum(2).flatten(-2)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[B, C, 2h, 2w] -> [B, h*w, C*4], channel-major."""
    x = latents.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))  # [B, C, h, 2, w, 2]
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class _Conditioning(nn.Module):
    """Wraps the conditioning embeddings: passes them timestep and guidance as the reference computes them."""

    def __init__(self, inner: nn.Module, family: TorchFamily, dtype: torch.dtype, conditioner: torch.dtype):
        super().__init__()
        self.inner, self.family, self.dtype, self.conditioner = inner, family, dtype, conditioner
        self.sigma, self.guidance = torch.tensor(1.0), DEFAULT_GUIDANCE_SCALE

    def forward(self, timestep: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        sigma = self.sigma.to(timestep.device).to(self.dtype).expand(timestep.shape[0])
        return self.family.embed(self.inner, sigma, self.guidance, rest, self.conditioner)
