"""The interface of a backend that runs everything after the text encoders on its device.

Noise and text states in -> latents and images out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.engines.parts import Parts
from arcflow_runtime.engines.stopwatch import Stopwatch

#: Called with a step's index and the latents after it, [b, N, C] float32.
OnStep = Callable[[int, np.ndarray], None]


@dataclass(frozen=True)
class Embeddings:
    """One prompt's text states [1, T, Dt] and, for FLUX, CLIP's pooled vector [1, Dp]; both read-only.

    `warnings` are those of its tokens, so that a prompt whose embeddings are kept need not be tokenised again.
    """

    states: np.ndarray
    pooled: np.ndarray | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class DenoiseJob:
    """What is drawn at once: b images whose texts have one length T.

    `streams` [b, 2] int64 of the noise, as `noise.streams` gives them; `texts`, one per image; `image_rotary`
    [2, N, D/2] and `text_rotary` [2, T, D/2] float32; `grid`, height and width in tokens; `sigmas` [S+1] float64;
    `timesteps` [S] float32 and `guidance`, what the conditioner sees; `table`, the baked modulation [S, M] float32
    where the bundle has it; `pixels`, whether pictures are asked for and not only latents.
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


@dataclass(frozen=True)
class Denoised:
    """`latents` [b, N, C] float32, and `pixels` [b, H, W, 3] uint8 if they were asked for."""

    latents: np.ndarray
    pixels: np.ndarray | None


class Denoiser(Protocol):
    """Draws on a device what the text encoders prepared; safe to call from several threads."""

    def denoise(self, job: DenoiseJob, watch: Stopwatch, on_step: OnStep | None = None) -> Denoised:
        """Condition, run every step, decode.

        Args:
            job: what to draw.
            watch: gets the time of each stage on the device.
            on_step: called after every step, before the next one starts; the latents are its own.

        Raises:
            EngineError: an engine failed, does not take these shapes, or memory ran out.
        """
        ...

    def warm_up(self, job: DenoiseJob) -> None:
        """Make ready whatever `draw` would make on the first pictures of this shape; nothing is given back."""
        ...

    def close(self) -> None:
        """Wait for pictures being drawn and free the memory; job afterwards raises `EngineError`."""
        ...


@runtime_checkable
class DenoisingBackend(Protocol):
    """A backend that can keep the whole loop on its device."""

    def open_denoiser(self, bundle: Bundle, parts: Parts) -> Denoiser | None:
        """The denoiser of `bundle`, whose engines it takes from `parts`; None where this installation has none."""
        ...
