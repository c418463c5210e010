"""A FLUX student's manifest made in memory, without weights, and requests for it: sizes -> `Bundle`, `DenoiseJob`.

It has the conditioner and the backbone only: a request gives the text states, and its result are latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.manifest import (
    DType,
    DynamicShift,
    Latents,
    Manifest,
    Part,
    PromptFormat,
    Provenance,
    Ranges,
    Rotary,
    Sampler,
    Schedule,
    SizeRange,
    Source,
)
from arcflow_runtime.disk.signatures import signature, tensor_specs
from arcflow_runtime.engines.denoiser import DenoiseJob, Embeddings
from arcflow_runtime.maths.noise import streams
from arcflow_runtime.maths.rotary import image_rotary, text_rotary
from arcflow_runtime.maths.schedule import conditioning_guidance, sigmas, timesteps_of

_FAMILY: Literal["flux"] = "flux"
_MAX_PX, _MAX_TOKENS = 2048, 512


@dataclass(frozen=True)
class FluxSizes:
    """The sizes of a FLUX student; the defaults are those of a student of FLUX.1-dev."""

    heads: int = 24
    head_dim: int = 128
    double_blocks: int = 19
    single_blocks: int = 38
    text_width: int = 4096
    pooled_width: int = 768
    axes_dims: tuple[int, int, int] = (16, 56, 56)
    modes: int = 16
    sub_pixels: int = 4
    channels: int = 64

    @property
    def width(self) -> int:
        """Width of a token in the transformer."""
        return self.heads * self.head_dim

    @property
    def modulation(self) -> int:
        """M: shift, scale and gate twice for both streams of a double block, once for a single one, and the last norm's
        scale and shift."""
        return (12 * self.double_blocks + 3 * self.single_blocks + 2) * self.width


#: Those of tests/golden/flux-tiny.
TINY = FluxSizes(2, 32, 2, 3, 64, 32, (8, 12, 12))


#: FLUX.1-dev's own schedule, which depends on the image's size.
_DYNAMIC = Schedule(1.0, 1.0, 3, DynamicShift("exponential", 0.5, 1.15, 256, 4096))


def flux_bundle(sizes: FluxSizes, dtype: DType, sampler: Sampler = "momentum") -> Bundle:
    """The bundle in memory, with both parts in `dtype`; with the sampler "linear", that of a straight student."""
    values = {
        "channels": sizes.channels,
        "text_width": sizes.text_width,
        "pooled_width": sizes.pooled_width,
        "modulation": sizes.modulation,
        "half_head": sizes.head_dim // 2,
        "modes": sizes.modes,
        "gammas": sizes.modes - 1,
        "sub_pixels": sizes.sub_pixels,
    }
    parts = {}
    for name in ("conditioner", "backbone"):
        tensors = signature(_FAMILY, name, sampler)
        specs = [tensor_specs(t, dtype, values) for t in (tensors.inputs, tensors.outputs)]
        parts[name] = Part(f"{name}.onnx", f"{name}.weights", dtype, 0, specs[0], specs[1])
    source = Source("made in memory", None, "")
    side = SizeRange(16, _MAX_PX)
    manifest = Manifest(
        family=_FAMILY,
        dtype=dtype,
        reference_dtype="bfloat16",
        opset=23,
        guidance=True,
        schedule=Schedule(3.2, 1.0, 2) if sampler == "momentum" else _DYNAMIC,
        sampler=sampler,
        latents=Latents(sizes.channels // 4, 2, 8, sizes.modes, sizes.sub_pixels),
        rotary=Rotary(10_000.0, sizes.axes_dims),
        text=PromptFormat(_MAX_TOKENS),
        ranges=Ranges(SizeRange(1, 4), side, side),
        parts=parts,
        tokenizers={},
        files={},
        provenance=Provenance("", "", {}, source, source),
    )
    return Bundle(Path("made-in-memory"), manifest)


def make_job(bundle: Bundle, size_px: int, text_tokens: int, seeds: Sequence[int], steps: int = 2) -> DenoiseJob:
    """A request for square images, one per seed; their text states are normal numbers made from the seed."""
    m = bundle.manifest
    grid = (size_px // 16, size_px // 16)
    shapes = {s.name: s.shape for part in m.parts.values() for s in part.inputs}
    texts = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        widths = (int(shapes["encoder_hidden_states"][-1]), int(shapes["pooled_projections"][-1]))
        states = rng.standard_normal((1, text_tokens, widths[0]), np.float32)
        texts.append(Embeddings(states, rng.standard_normal((1, widths[1]), np.float32)))
    numbers = grid[0] * grid[1] * m.latents.channels * m.latents.patch_size**2
    return DenoiseJob(
        streams=streams(list(seeds), len(seeds), numbers),
        texts=texts,
        image_rotary=image_rotary(m.rotary, m.family, m.reference_dtype, *grid),
        text_rotary=text_rotary(m.rotary, m.family, m.reference_dtype, *grid, text_tokens),
        grid=grid,
        sigmas=sigmas(steps, m.schedule, grid[0] * grid[1]),
        timesteps=timesteps_of(steps, m.schedule, m.family, m.reference_dtype, m.sampler, grid[0] * grid[1]),
        guidance=conditioning_guidance(3.5, m.reference_dtype),
        table=None,
        pixels=False,
    )
