"""Read the schedule of a base's own scheduler, for a straight student; and warn of a shift that differs from it.

The base's scheduler is diffusers' FlowMatchEulerDiscreteScheduler, whose settings are in `scheduler_config.json`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arcflow_export.checkpoint.sources import read_json
from arcflow_export.errors import SourceError
from arcflow_export.families import facts
from arcflow_export.student.load import Student
from arcflow_runtime.disk.manifest import DynamicShift, Schedule
from arcflow_runtime.errors import RequestError

_CONFIG = Path("scheduler") / "scheduler_config.json"
_CLASS = "FlowMatchEulerDiscreteScheduler"
#: The default shift of diffusers' FlowMatchEulerDiscreteScheduler, for config files without one.
_DEFAULT_SHIFT = 1.0
#: Settings of that scheduler that change its sigmas in ways that a bundle cannot state.
_UNSUPPORTED = (
    "invert_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
    "use_flow_sigmas",
)
#: Schedule of the Qwen-Image-Lightning LoRAs: their scheduler's base_shift and max_shift are log(3), and exp(log(3)) is
#: a fixed shift of 3. They are distilled without guidance.
LIGHTNING = Schedule(3.0, 1.0, 8)


def base_schedule(student: Student) -> tuple[Schedule, float | None]:
    """`read_schedule` of a student's base."""
    return read_schedule(student.base.path, student.family, student.config)


def read_schedule(base: Path, family: str, transformer: Mapping[str, Any]) -> tuple[Schedule, float | None]:
    """The schedule of a base's own scheduler, with its usual number of steps; and the scale of its guidance.

    Args:
        base: the base's directory.
        family: of the base.
        transformer: config of its transformer.

    Raises:
        SourceError: the scheduler's config is missing or damaged, or has a setting that is not supported.
    """
    path = base / _CONFIG
    config = read_json(path, "base checkpoint")
    where = f"base checkpoint: {path}"
    if config.get("_class_name") != _CLASS:
        raise SourceError(f"{where}: _class_name must be {_CLASS!r}, got {config.get('_class_name')!r}")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise SourceError(f"{where}: {key} must be false, got {config[key]!r}: it is not supported")
    known = facts(family)
    dynamic = _dynamic(config, where) if config.get("use_dynamic_shifting") else None
    shift = 1.0 if config.get("use_dynamic_shifting") else _number(config, "shift", _DEFAULT_SHIFT, where)
    if dynamic is not None and dynamic.base_shift == dynamic.max_shift:
        mu = dynamic.base_shift
        shift, dynamic = math.exp(mu) if dynamic.kind == "exponential" else mu, None
    terminal = _number(config, "shift_terminal", 0.0, where) or None
    # FLUX.1-schnell is the FLUX without guidance and with a fixed shift. It was distilled to four steps.
    distilled = dynamic is None and "guidance_embeds" in transformer and not transformer["guidance_embeds"]
    steps = known.distilled_steps if distilled and known.distilled_steps else known.steps
    return Schedule(shift, 1.0, steps, dynamic, terminal), known.true_cfg_scale


def choose_schedule(
    own: tuple[Schedule, float | None],
    name: str | None,
    shift: float | None,
    sigmas: str | None,
    true_cfg_scale: float | None,
    steps: tuple[int, ...] | None,
) -> tuple[Schedule, float | None]:
    """Apply the options of a straight student to the base's own schedule and scale of guidance.

    Args:
        own: of `read_schedule`.
        name: value of --schedule.
        shift: value of --shift.
        sigmas: value of --sigmas.
        true_cfg_scale: value of --true-cfg-scale.
        steps: the step counts that were given.

    Raises:
        RequestError: an option does not fit the family, or contradicts another.
    """
    schedule, scale = own
    if name == "lightning":
        if scale is None:
            raise RequestError("--schedule lightning is for Qwen-Image; leave it out for the base's own schedule")
        schedule, scale = LIGHTNING, 1.0
    if shift is not None:
        schedule = dataclasses.replace(schedule, shift=shift, dynamic_shift=None)
    if true_cfg_scale is not None:
        if scale is None:
            raise RequestError("--true-cfg-scale: this model is not guided by a negative prompt; leave it out")
        scale = true_cfg_scale
    return schedule if sigmas is None else _with_sigmas(schedule, sigmas, steps), scale


def _with_sigmas(schedule: Schedule, text: str, steps: tuple[int, ...] | None) -> Schedule:
    try:
        sigmas = tuple(float(s) for s in text.split(","))
    except ValueError:
        raise RequestError(f"--sigmas must be numbers separated by commas, got {text!r}") from None
    if not all(a > b for a, b in zip(sigmas, (*sigmas[1:], 0.0), strict=True)) or sigmas[0] > 1:
        raise RequestError(f"--sigmas must fall from at most 1 and stay above 0, got {text!r}")
    if steps not in (None, (len(sigmas),)):
        raise RequestError(
            f"the number of steps must be {len(sigmas)}, that of --sigmas, got {', '.join(map(str, steps))}; "
            "leave it out"
        )
    return dataclasses.replace(schedule, sigmas=sigmas, num_inference_steps=len(sigmas))


def _dynamic(config: dict[str, Any], where: str) -> DynamicShift:
    kind = config.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise SourceError(f"{where}: time_shift_type must be 'exponential' or 'linear', got {kind!r}")
    tokens = [int(_number(config, key, default, where)) for key, default in _TOKENS.items()]
    low, high = (_number(config, key, default, where) for key, default in _SHIFTS.items())
    if tokens[0] >= tokens[1]:
        raise SourceError(f"{where}: base_image_seq_len must be below max_image_seq_len, got {tokens[0]}, {tokens[1]}")
    return DynamicShift(kind, low, high, *tokens)


#: diffusers' defaults of the settings of a dynamic shift.
_TOKENS = {"base_image_seq_len": 256, "max_image_seq_len": 4096}
_SHIFTS = {"base_shift": 0.5, "max_shift": 1.15}


def _number(config: dict[str, Any], key: str, default: float, where: str) -> float:
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise SourceError(f"{where}: {key} must be a number, 0 or more, got {value!r}")
    return float(value)


def shift_warning(base: Path, shift: float) -> str | None:
    """A warning if the base's scheduler has a fixed shift other than `shift`, else None.

    A base whose shift depends on the image size gives no warning, because it says nothing about its students: those of
    FLUX.1-dev and Qwen-Image have a fixed shift nevertheless.

    Args:
        base: the base's directory; without a scheduler in it there is no warning.
        shift: the shift of the bundle or the calibration.

    Raises:
        SourceError: the scheduler's config is damaged.
    """
    path = base / _CONFIG
    if not path.is_file():
        return None
    config = read_json(path, "base checkpoint")
    own = config.get("shift", _DEFAULT_SHIFT)
    if config.get("use_dynamic_shifting") or not isinstance(own, (int, float)) or own == shift:
        return None
    return (
        f"the base's scheduler has shift {own:g} ({path}), the student is run with shift {shift:g}; "
        f"give --shift {own:g} if it was trained with that"
    )
