"""Generate images to evaluate: captions and seeds -> latents and images.

This file has the `Sampler` interface and the teacher's sampler; those of students are in `students.py`. All start from
the same noise: that of torch's CPU generator with each image's own seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from arcflow_distill.evaluate.options import FAMILY
from arcflow_export.checkpoint.sources import read_json
from arcflow_export.errors import SourceError
from arcflow_export.families import facts
from arcflow_export.images.scenes import MAX_SEQUENCE_LENGTH, RESOLUTION
from arcflow_export.options import SHIFT
from arcflow_runtime.disk.families import DEFAULT_GUIDANCE_SCALE
from arcflow_runtime.maths.noise import draw_latents

#: Largest number of images generated at a time.
BATCH = 64
_CHANNELS, _SCALE, _PATCH = 16, 8, 2


@dataclass(frozen=True)
class Generated:
    """Final packed latents [B, 16, 64] float32 and images [B, 64, 64, 3] uint8."""

    latents: np.ndarray
    images: np.ndarray


class Sampler(Protocol):
    """Generates images, up to `batch` at a time, with `network_calls` network calls per image."""

    network_calls: int
    batch: int

    def generate(self, captions: Sequence[str], seeds: Sequence[int]) -> Generated:
        """Generate one image per caption."""
        ...


def generate_all(
    sampler: Sampler,
    captions: Sequence[str],
    seeds: Sequence[int],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Generated:
    """Generate an image for every caption, in batches; `progress` gets the number of images done and their total."""
    parts = []
    for i in range(0, len(captions), sampler.batch):
        parts.append(sampler.generate(captions[i : i + sampler.batch], seeds[i : i + sampler.batch]))
        progress(min(i + sampler.batch, len(captions)), len(captions))
    return Generated(np.concatenate([p.latents for p in parts]), np.concatenate([p.images for p in parts]))


class TeacherPipeline:
    """The teacher: diffusers' own FluxPipeline in float32."""

    def __init__(self, base: Path) -> None:
        """Load the pipeline; the students' fixed shift replaces the shift of the directory's scheduler.

        Raises:
            SourceError: the directory is missing or damaged, is not a FLUX pipeline, or has another kind of VAE.
        """
        _check_base(base)
        try:
            self.pipe = FluxPipeline.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
        except (OSError, ValueError, KeyError) as e:
            raise SourceError(f"base: {base} cannot be loaded ({str(e).strip().splitlines()[0]})") from None
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            self.pipe.scheduler.config, shift=SHIFT, use_dynamic_shifting=False
        )

    def walk(self, captions: Sequence[str], seeds: Sequence[int], steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Run Euler steps: latents [S+1, B, N, C], the noise first, and images [B, 64, 64, 3] uint8."""
        path = [noise(seeds)]

        def keep(_pipe: object, _step: int, _timestep: object, values: dict[str, Any]) -> dict[str, Any]:
            path.append(values["latents"])
            return values

        images = self.pipe(
            list(captions),
            height=RESOLUTION,
            width=RESOLUTION,
            num_inference_steps=steps,
            guidance_scale=DEFAULT_GUIDANCE_SCALE,
            latents=path[0],
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            output_type="np",
            callback_on_step_end=keep,
        ).images
        return torch.stack(path).numpy(), to_uint8(images)


class EulerSampler:
    """Samples the teacher with a fixed number of Euler steps."""

    def __init__(self, teacher: TeacherPipeline, steps: int) -> None:
        self.teacher, self.network_calls, self.batch = teacher, steps, BATCH

    def generate(self, captions: Sequence[str], seeds: Sequence[int]) -> Generated:
        """Generate one image per caption."""
        path, images = self.teacher.walk(captions, seeds, self.network_calls)
        return Generated(path[-1], images)


def _check_base(base: Path) -> None:
    """Check, from its configs, that `base` is a FLUX pipeline with an 8x VAE of 16 channels."""
    if not base.is_dir():
        raise SourceError(f"base: {base} is not a directory; give the teacher's directory in diffusers format")
    name, wanted = read_json(base / "model_index.json", "base").get("_class_name"), facts(FAMILY).pipeline
    if name != wanted:
        raise SourceError(f"base: {base / 'model_index.json'}: _class_name must be {wanted!r}, got {name!r}")
    vae = read_json(base / "vae" / "config.json", "base")
    scale = 2 ** (len(vae.get("block_out_channels", ())) - 1)
    channels = vae.get("latent_channels")
    if (scale, channels) != (_SCALE, _CHANNELS):
        raise SourceError(
            f"base: {base / 'vae'} must reduce images {_SCALE}x to {_CHANNELS} channels, so that "
            f"{RESOLUTION}x{RESOLUTION} pixels are 16 tokens; got {scale:g}x and {json.dumps(channels)}"
        )


def noise(seeds: Sequence[int]) -> torch.Tensor:
    """The packed noise for images with these seeds: [B, 16, 64] float32."""
    side = RESOLUTION // _SCALE
    return torch.from_numpy(draw_latents(list(seeds), len(seeds), _CHANNELS, side, side, _PATCH))


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images [B, H, W, 3] in [0, 1] -> uint8, rounded to nearest as in saved images."""
    return np.rint(images * 255).astype(np.uint8)
