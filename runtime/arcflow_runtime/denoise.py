"""Denoise: noise [B, N, 64] -> latents [B, N, 64], one backbone run and one closed-form update per step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .errors import EngineError
from .parts import Run
from .stopwatch import Stopwatch
from .update import update

#: Called with the step's index and the latents after it, [B, N, 64] float32, read-only.
StepCallback = Callable[[int, np.ndarray], object]


@dataclass(frozen=True)
class Group:
    """The images of a batch whose text has one length, run together.

    `images` [b] are their places in the batch, `prompts` [b] their prompts' places in the modulation's axis
    U, `states` [b, T, Dt] their text states, `text_rotary` [2, T, D/2].
    """

    images: list[int]
    prompts: list[int]
    states: np.ndarray
    text_rotary: np.ndarray


def denoise(
    run: Run,
    groups: list[Group],
    noise: np.ndarray,
    modulation: np.ndarray,
    image_rotary: np.ndarray,
    sigmas: np.ndarray,
    watch: Stopwatch,
    callback: StepCallback | None = None,
) -> np.ndarray:
    """Run every step of the schedule.

    Args:
        run: runs the backbone.
        groups: the batch, by text length.
        noise: [B, N, 64] float32.
        modulation: [S, U, M], or [S, 1, M] where it does not depend on the prompt.
        image_rotary: [2, N, D/2] float32.
        sigmas: [S+1] float64.
        watch: gets the time of "backbone" and "update".
        callback: called after every step.

    Returns:
        [B, N, 64] float32; the backbone's inputs and outputs are cast from and to float32 around each run.

    Raises:
        EngineError: the backbone failed.
    """
    latents = noise
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        following = np.empty_like(latents)
        for group in groups:
            x = latents[group.images]
            inputs = {
                "latents": x,
                "encoder_hidden_states": group.states,
                "modulation": modulation[i][group.prompts if modulation.shape[1] > 1 else [0] * len(x)],
                "image_rotary": image_rotary,
                "text_rotary": group.text_rotary,
            }
            with watch("backbone"):
                heads = run(inputs)
            # check_finite reports infinities with what to do; numpy's warnings would only precede it.
            with watch("update"), np.errstate(over="ignore", invalid="ignore"):
                means, logweights, loggammas = (
                    heads[name].astype(np.float32, copy=False) for name in ("means", "logweights", "loggammas")
                )
                following[group.images] = update(x, means, logweights, loggammas, sigma, sigma, sigma_next)
        latents = following
        if callback is not None:
            view = latents.view()
            view.setflags(write=False)
            callback(i, view)
    return latents


def check_finite(latents: np.ndarray, precision: str) -> None:
    """Refuse latents [B, N, 64] with NaN or Inf, which would decode to a black picture.

    Raises:
        EngineError: names the images, and what to do for a backbone of this `precision`.
    """
    bad = [i for i, x in enumerate(latents) if not np.isfinite(x).all()]
    if bad:
        advice = "check the checkpoint and adapter with `arcflow verify`"
        if precision == "float16":
            advice = (
                "float16 overflows in these models: export with --dtype bfloat16 or float32, "
                "or with the linears in float32 that `arcflow verify` names"
            )
        raise EngineError(f"backbone: latents of images {bad} must be finite, got NaN or Inf; {advice}")
