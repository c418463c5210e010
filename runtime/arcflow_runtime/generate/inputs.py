"""What denoising takes: a checked request and its embeddings -> noise, schedule, groups of images, jobs for a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from arcflow_runtime.disk.manifest import Manifest
from arcflow_runtime.engines.denoiser import DenoiseJob, Embeddings
from arcflow_runtime.engines.stopwatch import Stopwatch
from arcflow_runtime.generate.condition import Conditioner
from arcflow_runtime.generate.denoise import Group
from arcflow_runtime.generate.request import Request
from arcflow_runtime.generate.straight import Negative, guided_groups
from arcflow_runtime.lora.prepare import PreparedLoras
from arcflow_runtime.maths.noise import draw_latents, streams
from arcflow_runtime.maths.rotary import image_rotary, text_rotary
from arcflow_runtime.maths.schedule import conditioning_guidance, sigmas, timesteps_of


def grid_of(manifest: Manifest, request: Request) -> tuple[int, int]:
    """Height and width of an image in tokens."""
    token_px = manifest.latents.vae_scale_factor * manifest.latents.patch_size
    return request.height_px // token_px, request.width_px // token_px


def schedule_of(manifest: Manifest, request: Request) -> np.ndarray:
    """The noise levels sigma before each step and after the last, [S + 1]."""
    height, width = grid_of(manifest, request)
    return sigmas(request.num_inference_steps, manifest.schedule, height * width)


def conditioning_of(manifest: Manifest, request: Request) -> tuple[np.ndarray, np.float32 | None]:
    """The conditioner's inputs: timesteps [S] float32 and guidance."""
    m, scale = manifest, request.guidance_scale
    height, width = grid_of(m, request)
    timesteps = timesteps_of(
        request.num_inference_steps, m.schedule, m.family, m.reference_dtype, m.sampler, height * width
    )
    return timesteps, None if scale is None else conditioning_guidance(scale, m.reference_dtype)


def packed_noise(manifest: Manifest, request: Request, watch: Stopwatch) -> np.ndarray:
    """The packed noise, [B, N, 64] float32."""
    if request.seed is None:
        assert request.latents is not None, "check_request sets seed or latents"
        return request.latents
    latents, grid = manifest.latents, grid_of(manifest, request)
    p = latents.patch_size
    with watch("noise"):
        return draw_latents(request.seed, request.batch, latents.channels, grid[0] * p, grid[1] * p, p)


def groups_of(
    manifest: Manifest, request: Request, prompts: Sequence[str], embeddings: Mapping[str, Embeddings]
) -> list[Group]:
    """Group the images of the batch by text length, so that no text is padded to the length of another.

    Args:
        manifest: of the bundle.
        request: says how many images each prompt has.
        prompts: the request's prompts, or its negative prompts.
        embeddings: by prompt.
    """
    m, grid = manifest, grid_of(manifest, request)
    place = {p: i for i, p in enumerate(embeddings)}
    batch = [p for p in prompts for _ in range(request.num_images_per_prompt)]
    by_length: dict[int, list[int]] = {}
    for image, p in enumerate(batch):
        by_length.setdefault(embeddings[p].states.shape[1], []).append(image)
    return [
        Group(
            images,
            [place[batch[i]] for i in images],
            [embeddings[batch[i]] for i in images],
            text_rotary(m.rotary, m.family, m.rotary_dtype, *grid, length),
        )
        for length, images in by_length.items()
    ]


def jobs_of(
    manifest: Manifest,
    request: Request,
    loras: PreparedLoras,
    groups: list[Group],
    negative: Negative | None,
    conditioner: Conditioner,
) -> list[tuple[list[int], DenoiseJob]]:
    """Jobs for the backend's denoiser, each with the indices of its images in the batch."""
    m, grid = manifest, grid_of(manifest, request)
    schedule = schedule_of(m, request)
    timesteps, guidance = conditioning_of(m, request)
    numbers = m.latents.channels * m.latents.patch_size**2 * grid[0] * grid[1]
    assert request.seed is not None, "a denoiser runs only if the noise comes from a seed"
    sources = streams(request.seed, request.batch, numbers)
    return [
        (
            group.images,
            DenoiseJob(
                streams=sources[group.images],
                texts=group.texts,
                image_rotary=image_rotary(m.rotary, m.family, m.rotary_dtype, *grid),
                text_rotary=group.text_rotary,
                grid=grid,
                sigmas=schedule,
                timesteps=timesteps,
                guidance=guidance,
                table=conditioner.baked(len(timesteps), loras),
                pixels=request.output_type != "latents",
                loras=loras,
                negative=texts,
            ),
        )
        for group, texts in guided_groups(groups, negative)
    ]


def first_step(job: DenoiseJob) -> DenoiseJob:
    """A job whose only step is the first of `job`, taken to sigma 0."""
    table = None if job.table is None else job.table[:1]
    return replace(job, sigmas=np.array([job.sigmas[0], 0.0]), timesteps=job.timesteps[:1], table=table)
