"""The noise schedule: number of steps -> sigmas [S+1], and the timestep [S] and guidance inputs of the student.

A straight student's schedules are those of diffusers' FlowMatchEulerDiscreteScheduler, in float64.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from arcflow_runtime.disk.families import Family, facts
from arcflow_runtime.disk.manifest import DType, Sampler, Schedule
from arcflow_runtime.errors import RequestError
from arcflow_runtime.maths.dtypes import round_to

#: The students' sinusoidal embedding takes sigma times this number.
TIMESTEP_SCALE = 1000


@lru_cache(maxsize=16)
def sigmas(num_inference_steps: int, schedule: Schedule, image_tokens: int | None = None) -> np.ndarray:
    """The noise level sigma at the start of each step, and 0 at the end.

    t_i = 1 - i / (S - 1 + r) and sigma(t) = shift * t / (1 + (shift - 1) * t), with r the timestep ratio
    (ArcFlow, arXiv 2602.09014). Two steps at shift 3.2 and r 1 give 1, 0.7619, 0. A straight student's schedule may
    have its own t_i, a shift that depends on the number of image tokens, and a terminal sigma (B16).

    Args:
        num_inference_steps: S.
        schedule: the bundle's.
        image_tokens: N, tokens of one image; needed if the schedule has a dynamic shift.

    Returns:
        [S+1] float64, falling from 1 to 0 (from the first of the schedule's own sigmas, if it has any), read-only.

    Raises:
        RequestError: `num_inference_steps` is below 1.
    """
    if num_inference_steps < 1:
        raise RequestError(
            f"num_inference_steps must be at least 1, got {num_inference_steps}; the default is "
            f"{schedule.num_inference_steps}"
        )
    if schedule.sigmas is None:
        t = 1 - np.arange(num_inference_steps, dtype=np.float64) / (num_inference_steps - 1 + schedule.timestep_ratio)
    else:
        assert num_inference_steps == len(schedule.sigmas), "check_request checks this"
        t = np.array(schedule.sigmas)
    shift = _shift(schedule, image_tokens)
    levels = shift * t / (1 + (shift - 1) * t)
    # With one step the only sigma is 1, which stretching would not change; diffusers divides 0 by 0 there.
    if schedule.terminal is not None and levels[-1] < 1:
        levels = 1 - (1 - levels) * ((1 - schedule.terminal) / (1 - levels[-1]))
    levels = np.append(levels, 0.0)
    levels.setflags(write=False)
    return levels


def _shift(schedule: Schedule, image_tokens: int | None) -> float:
    """The schedule's S for images of this size."""
    dynamic = schedule.dynamic_shift
    if dynamic is None:
        return schedule.shift
    assert image_tokens is not None, "a dynamic shift depends on the image's size"
    mu = dynamic.mu(image_tokens)
    return math.exp(mu) if dynamic.kind == "exponential" else mu


def conditioning_timesteps(
    sigmas: np.ndarray, family: Family, reference_dtype: DType, sampler: Sampler = "momentum"
) -> np.ndarray:
    """The input of the sinusoidal timestep embedding at each step.

    The students were trained in `reference_dtype`, so its rounding is reproduced. FLUX rounds sigma and the product
    sigma * 1000: at sigma 0.7619, bfloat16 gives 760.0. Qwen-Image rounds sigma only: 761.71875. diffusers' pipelines,
    which a straight student reproduces, first round sigma * 1000, and the quotient of that and 1000 is the sigma here.

    Args:
        sigmas: [S+1] float64 from `sigmas`.
        family: the student's family.
        reference_dtype: the dtype of the reference implementation.
        sampler: the student's sampler.

    Returns:
        [S] float32.
    """
    sigma = round_to(sigmas[:-1], "float32")
    if sampler == "linear":
        sigma = round_to(sigma * np.float32(TIMESTEP_SCALE), reference_dtype) / np.float32(TIMESTEP_SCALE)
    sigma = round_to(sigma, reference_dtype)
    timesteps = sigma * np.float32(TIMESTEP_SCALE)
    return round_to(timesteps, reference_dtype) if facts(family).rounds_timesteps else timesteps


@lru_cache(maxsize=16)
def timesteps_of(
    num_inference_steps: int,
    schedule: Schedule,
    family: Family,
    reference_dtype: DType,
    sampler: Sampler = "momentum",
    image_tokens: int | None = None,
) -> np.ndarray:
    """The `conditioning_timesteps` of a schedule with this number of steps, [S] float32, read-only."""
    levels = sigmas(num_inference_steps, schedule, image_tokens)
    timesteps = conditioning_timesteps(levels, family, reference_dtype, sampler)
    timesteps.setflags(write=False)
    return timesteps


@lru_cache(maxsize=16)
def conditioning_guidance(guidance_scale: float, reference_dtype: DType) -> np.float32:
    """The input of FLUX's sinusoidal guidance embedding: guidance 3.5 becomes 3504 in bfloat16."""
    scaled = round_to(guidance_scale, reference_dtype) * np.float32(TIMESTEP_SCALE)
    return np.float32(round_to(scaled, reference_dtype))
