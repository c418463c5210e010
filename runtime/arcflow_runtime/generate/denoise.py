"""Denoise: noise [B, N, 64] -> latents [B, N, 64], with one backbone run and one closed-form update per step.

`denoise` runs the loop on the host, one engine call at a time. `denoise_on_device` passes it to a backend's `Denoiser`,
which runs all of it on a GPU. Called by `Pipeline`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from arcflow_runtime.engines.denoiser import DenoiseJob, Denoiser, Embeddings
from arcflow_runtime.engines.parts import Run
from arcflow_runtime.engines.stopwatch import Stopwatch
from arcflow_runtime.errors import EngineError
from arcflow_runtime.maths.dtypes import to_float32
from arcflow_runtime.maths.update import update

#: Called with the index of a step and the latents after it, [B, N, 64] float32, read-only.
StepCallback = Callable[[int, np.ndarray], object]


@dataclass(frozen=True)
class Group:
    """The images of a batch whose texts have the same length T; they run together.

    `images` [b] are their indices in the batch, `prompts` [b] the indices of their prompts in the modulation's axis U,
    `texts` their embeddings, and `text_rotary` is [2, T, D/2].
    """

    images: list[int]
    prompts: list[int]
    texts: list[Embeddings]
    text_rotary: np.ndarray

    @cached_property
    def states(self) -> np.ndarray:
        """The text states of all images, [b, T, Dt]."""
        return join([text.states for text in self.texts])

    def only(self, images: list[int]) -> Group:
        """The group of some of these images."""
        places = [self.images.index(image) for image in images]
        return Group(images, [self.prompts[i] for i in places], [self.texts[i] for i in places], self.text_rotary)


def backbone_inputs(
    group: Group, latents: np.ndarray, modulation: np.ndarray, image_rotary: np.ndarray
) -> dict[str, np.ndarray]:
    """The backbone's inputs for a group.

    Args:
        group: b images.
        latents: of these images, [b, N, 64] float32.
        modulation: of this step, [U, M], or [1, M] if it does not depend on the prompt.
        image_rotary: [2, N, D/2] float32.
    """
    rows = group.prompts if len(modulation) > 1 else [0] * len(group.images)
    return {
        "latents": latents,
        "encoder_hidden_states": group.states,
        "modulation": modulation if rows == list(range(len(modulation))) else modulation[rows],
        "image_rotary": image_rotary,
        "text_rotary": group.text_rotary,
    }


def denoise(
    run: Run,
    groups: list[Group],
    noise: np.ndarray,
    modulation: np.ndarray,
    image_rotary: np.ndarray,
    sigmas: np.ndarray,
    watch: Stopwatch,
    callback: StepCallback | None = None,
    preview: StepCallback | None = None,
) -> np.ndarray:
    """Run every step of the schedule.

    Args:
        run: runs the backbone.
        groups: the batch, by text length.
        noise: [B, N, 64] float32.
        modulation: [S, U, M], or [S, 1, M] if it does not depend on the prompt.
        image_rotary: [2, N, D/2] float32.
        sigmas: [S+1] float64.
        watch: receives the time of "backbone" and "update".
        callback: called after every step.
        preview: called after every step but the last with the latents at sigma 0 that follow from this step's heads:
            the velocity that the heads describe, integrated exactly to the end.

    Returns:
        [B, N, 64] float32; the backbone's inputs and outputs are cast from and to float32 around each run.

    Raises:
        EngineError: the backbone failed.
    """
    latents = noise
    places = [group.images for group in groups]
    # A list, because arithmetic on Python floats is faster than on numpy scalars.
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        following, ends = [], []
        for group in groups:
            x = latents if len(groups) == 1 else latents[group.images]
            inputs = backbone_inputs(group, x, modulation[i], image_rotary)
            with watch("backbone"):
                heads = run(inputs)
            with watch("update"):
                means, logweights, loggammas = [to_float32(heads[n]) for n in ("means", "logweights", "loggammas")]
                following.append(update(x, means, logweights, loggammas, sigma, sigma, sigma_next))
                if preview is not None and sigma_next > 0:
                    ends.append(update(x, means, logweights, loggammas, sigma, sigma, 0.0))
        latents = in_order(places, following)
        if callback is not None:
            call_back(callback, i, latents)
        if preview is not None and ends:
            call_back(preview, i, in_order(places, ends))
    return latents


def denoise_on_device(
    denoiser: Denoiser,
    jobs: list[tuple[list[int], DenoiseJob]],
    watch: Stopwatch,
    callback: StepCallback | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Run a batch with a backend's denoiser, one job per text length.

    Args:
        denoiser: the backend's denoiser.
        jobs: (indices in the batch of the job's images, job).
        watch: receives the time of the denoiser's stages.
        callback: called after every step of the last job; the other jobs have finished by then.

    Returns:
        Latents [B, N, 64] float32, and pixels [B, H, W, 3] uint8 if the jobs request them.

    Raises:
        EngineError: the denoiser failed.
    """
    steps: dict[int, list[np.ndarray]] = {}
    results = []
    places = [images for images, _ in jobs]
    for images, job in jobs:

        def after(step: int, latents: np.ndarray, last: bool = images is jobs[-1][0]) -> None:
            steps.setdefault(step, []).append(latents)
            if last and callback is not None:
                call_back(callback, step, in_order(places, steps[step]))

        results.append(denoiser.denoise(job, watch, None if callback is None else after))
    latents = in_order(places, [r.latents for r in results])
    pixels = [r.pixels for r in results if r.pixels is not None]
    return latents, in_order(places, pixels) if pixels else None


def join(arrays: list[np.ndarray]) -> np.ndarray:
    """Concatenate arrays [1, ...] of one shape to [len(arrays), ...]; a single array is not copied."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def in_order(places: list[list[int]], parts: list[np.ndarray]) -> np.ndarray:
    """Put the groups' arrays [b, ...] together as the batch [B, ...]; `places` are their images' indices in it."""
    if len(parts) == 1:
        return parts[0]
    batch = np.empty((sum(len(p) for p in parts), *parts[0].shape[1:]), parts[0].dtype)
    for images, part in zip(places, parts, strict=True):
        batch[images] = part
    return batch


def call_back(callback: StepCallback, step: int, latents: np.ndarray) -> None:
    """Call a callback with latents that it cannot change."""
    view = latents.view()
    view.setflags(write=False)
    callback(step, view)


def check_finite(latents: np.ndarray, precision: str) -> None:
    """Check latents [B, N, 64] for NaN and Inf, which would decode to a black image.

    Raises:
        EngineError: names the images, and says what to do for a backbone of this `precision`.
    """
    finite = np.isfinite(latents)
    if not finite.all():
        bad = [i for i, x in enumerate(finite) if not x.all()]
        advice = "check the checkpoint and adapter with `arcflow verify`"
        if precision == "float16":
            advice = (
                "float16 overflows in these models: export with --dtype bfloat16 or float32, "
                "or with the linears in float32 that `arcflow verify` names"
            )
        raise EngineError(f"backbone: latents of images {bad} must be finite, got NaN or Inf; {advice}")
