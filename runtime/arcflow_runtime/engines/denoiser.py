"""The interface of a denoiser, which runs everything after the text encoders on a GPU: text states -> latents, images.

Implemented by `gpu/denoiser.py`; called by the pipeline in place of its own loop over the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.engines.parts import Parts
from arcflow_runtime.engines.stopwatch import Stopwatch
from arcflow_runtime.lora.prepare import NO_LORAS, PreparedLoras

#: Called with the index of a step and the latents after it, [b, N, C] float32.
OnStep = Callable[[int, np.ndarray], None]


@dataclass(frozen=True)
class Embeddings:
    """One prompt's text states [1, T, Dt] and, for FLUX, CLIP's pooled vector [1, Dp]; both read-only.

    `warnings` are the tokenizer's, kept here so that a cached prompt need not be tokenised again to repeat them.
    """

    states: np.ndarray
    pooled: np.ndarray | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class NegativeTexts:
    """The negative prompts of a job: one text per image, all of T' tokens, `text_rotary` [2, T', D/2], and the scale
    of the guidance, above 1."""

    texts: Sequence[Embeddings]
    text_rotary: np.ndarray
    scale: float


@dataclass(frozen=True)
class DenoiseJob:
    """The inputs of one call of a denoiser: b images whose texts all have T tokens.

    Attributes:
        streams: [b, 2] int64, the noise of each image, from `noise.streams`.
        texts: one per image.
        image_rotary: [2, N, D/2] float32.
        text_rotary: [2, T, D/2] float32.
        grid: height and width in tokens.
        sigmas: [S+1] float64.
        timesteps: [S] float32, input of the conditioner.
        guidance: input of the conditioner, or None for a student without guidance.
        table: the baked modulation [S, M] float32, or None if the conditioner must run.
        pixels: True to decode images, False to stop at the latents.
        loras: the LoRAs of the request; `table` includes their change.
        negative: what a straight student is guided away from, in a second backbone run per step; None does not guide.
    """

    streams: np.ndarray
    texts: Sequence[Embeddings]
    image_rotary: np.ndarray
    text_rotary: np.ndarray
    grid: tuple[int, int]
    sigmas: np.ndarray
    timesteps: np.ndarray
    guidance: np.float32 | None
    table: np.ndarray | None
    pixels: bool
    loras: PreparedLoras = NO_LORAS
    negative: NegativeTexts | None = None


@dataclass(frozen=True)
class Denoised:
    """The result of a `DenoiseJob`: `latents` [b, N, C] float32, and `pixels` [b, H, W, 3] uint8 if requested."""

    latents: np.ndarray
    pixels: np.ndarray | None


class Denoiser(Protocol):
    """Turns text states into latents and images on a device; safe to call from several threads."""

    def denoise(self, job: DenoiseJob, watch: Stopwatch, on_step: OnStep | None = None) -> Denoised:
        """Compute the modulation, run every step, and decode if the job asks for pixels.

        Args:
            job: the inputs.
            watch: receives the time of each stage on the device.
            on_step: called after every step, before the next one starts; it may keep the latents.

        Raises:
            EngineError: an engine failed or does not accept these shapes, or memory ran out.
        """
        ...

    def warm_up(self, job: DenoiseJob) -> None:
        """Do the one-time work for this job's shape ahead of `denoise`, such as the capture of a CUDA graph."""
        ...

    def clear_cache(self) -> None:
        """Drop results that are kept to avoid running the conditioner again."""
        ...

    def close(self) -> None:
        """Wait for running jobs and free the memory; `denoise` raises `EngineError` afterwards."""
        ...


@runtime_checkable
class DenoisingBackend(Protocol):
    """A backend that can run the whole loop over the steps on its device."""

    def open_denoiser(self, bundle: Bundle, parts: Parts) -> Denoiser | None:
        """A denoiser that runs the engines of `parts`; None if this installation cannot run one."""
        ...
