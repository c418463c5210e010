"""Denoise with a straight student: noise [B, N, 64] -> latents [B, N, 64], with one or two backbone runs per step.

`denoise_straight` runs the loop on the host, as `denoise.denoise` does for a momentum student. `guided_groups` prepares
a batch for a backend's `Denoiser`. Called by `Pipeline`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from arcflow_runtime.engines.denoiser import NegativeTexts
from arcflow_runtime.engines.parts import Run
from arcflow_runtime.engines.stopwatch import Stopwatch
from arcflow_runtime.generate.denoise import Group, StepCallback, backbone_inputs, call_back, in_order
from arcflow_runtime.maths.dtypes import to_float32
from arcflow_runtime.maths.euler import euler, guide


@dataclass(frozen=True)
class Negative:
    """The negative prompts of a batch, as groups of its images by their length, and the scale of the guidance."""

    groups: list[Group]
    scale: float


def guided_groups(groups: list[Group], negative: Negative | None) -> list[tuple[Group, NegativeTexts | None]]:
    """Split a batch so that the negative prompts of a group's images have one length too, and give each its texts."""
    if negative is None:
        return [(group, None) for group in groups]
    found: list[tuple[Group, NegativeTexts | None]] = []
    for group in groups:
        for other in negative.groups:
            if images := [image for image in group.images if image in other.images]:
                texts = other.only(images).texts
                found.append((group.only(images), NegativeTexts(texts, other.text_rotary, negative.scale)))
    return found


def denoise_straight(
    run: Run,
    groups: list[Group],
    negative: Negative | None,
    noise: np.ndarray,
    modulation: np.ndarray,
    image_rotary: np.ndarray,
    sigmas: np.ndarray,
    watch: Stopwatch,
    callback: StepCallback | None = None,
    preview: StepCallback | None = None,
) -> np.ndarray:
    """Run every step of the schedule; see `denoise.denoise` for the other arguments and what is raised.

    Args:
        negative: runs the backbone a second time in each step; None does not guide.
        preview: called after every step but the last with the latents at sigma 0 that this step's velocity leads to.
    """
    latents = noise

    def velocity(groups: list[Group], step: int) -> np.ndarray:
        found = []
        for group in groups:
            x = latents if len(groups) == 1 else latents[group.images]
            with watch("backbone"):
                found.append(run(backbone_inputs(group, x, modulation[step], image_rotary))["velocity"])
        with watch("update"):
            return in_order([group.images for group in groups], [to_float32(v) for v in found])

    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        v = velocity(groups, i)
        away = None if negative is None else velocity(negative.groups, i)
        with watch("update"):
            if negative is not None and away is not None:
                v = guide(v, away, negative.scale)
            before, latents = latents, euler(latents, v, sigma - sigma_next)
        if callback is not None:
            call_back(callback, i, latents)
        if preview is not None and sigma_next > 0:
            call_back(preview, i, euler(before, v, sigma))
    return latents
