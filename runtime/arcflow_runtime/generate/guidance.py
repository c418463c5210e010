"""Check the arguments of guidance with a negative prompt: arguments -> negative prompts and scale, or none."""

from __future__ import annotations

import math
from collections.abc import Sequence

from arcflow_runtime.disk.manifest import Manifest
from arcflow_runtime.disk.rules import MAX_TRUE_CFG_SCALE
from arcflow_runtime.errors import RequestError

_ONE_PASS = {
    "momentum": "the student is distilled to run once per step, without a negative prompt",
    "linear": "this model is guided by guidance_scale or not at all",
}


def check_guidance(
    manifest: Manifest, prompts: int, negative_prompt: object, true_cfg_scale: object
) -> tuple[tuple[str, ...] | None, float, tuple[str, ...]]:
    """Check `negative_prompt` and `true_cfg_scale`.

    As in diffusers, guidance needs a negative prompt and a scale above 1.

    Returns:
        The negative prompt of each prompt, or None without guidance; the scale; and warnings.

    Raises:
        RequestError: the bundle has no such guidance, or an argument has the wrong type or is out of range.
    """
    default = manifest.true_cfg_scale
    if default is None:
        for name, value in (("negative_prompt", negative_prompt), ("true_cfg_scale", true_cfg_scale)):
            if value is not None:
                raise RequestError(f"{name} is not supported: {_ONE_PASS[manifest.sampler]}; leave it out")
        return None, 1.0, ()
    scale = default if true_cfg_scale is None else _scale(true_cfg_scale)
    if negative_prompt is None:
        warning = "without a negative_prompt the images are not guided; give negative_prompt=' ' to guide them"
        return None, scale, (warning,) if scale > 1 else ()
    negatives = _negatives(negative_prompt, prompts)
    if scale <= 1:
        return None, scale, (f"true_cfg_scale {scale:g} does not guide, so negative_prompt was ignored",)
    return negatives, scale, ()


def _scale(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(f"true_cfg_scale must be a number, got {value!r}")
    if not (math.isfinite(value) and 0 <= value <= MAX_TRUE_CFG_SCALE):
        raise RequestError(f"true_cfg_scale must be between 0 and {MAX_TRUE_CFG_SCALE:g}, got {value!r}")
    return float(value)


def _negatives(value: object, prompts: int) -> tuple[str, ...]:
    given: Sequence[object] | None = [value] * prompts if isinstance(value, str) else None
    if isinstance(value, (list, tuple)):
        given = value
    if given is None or not all(isinstance(p, str) for p in given):
        raise RequestError(f"negative_prompt must be a string or a list of strings, got {value!r}")
    if len(given) != prompts:
        raise RequestError(f"negative_prompt must be a string or a list of {prompts}, one per prompt, got {len(given)}")
    return tuple(str(p) for p in given)
