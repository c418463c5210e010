"""The options of `arcflow export` for a straight student, a base without --adapter: its schedule and guidance."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import TYPE_CHECKING

from arcflow_export.options import ExportOptions

if TYPE_CHECKING:
    from arcflow_export.student.load import Student
    from arcflow_runtime.disk.manifest import Schedule

#: Values of --schedule.
SCHEDULES = ("base", "lightning")


def add_straight_arguments(parser: argparse.ArgumentParser, bundle: bool = True) -> None:
    """Declare --schedule and, for a command that writes a bundle, --sigmas and --true-cfg-scale."""
    group = parser.add_argument_group("a base without --adapter")
    group.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help="that of the base's own scheduler, or of the Qwen-Image-Lightning LoRAs: shift 3, 8 steps, no guidance; "
        "--shift gives either a fixed shift; default: base",
    )
    if not bundle:
        return
    group.add_argument(
        "--sigmas",
        metavar="S,S,...",
        help="noise level before the shift at the start of each step, such as 1,0.6,0.3, in place of equal steps",
    )
    group.add_argument(
        "--true-cfg-scale",
        type=float,
        metavar="G",
        help="default scale of Qwen-Image's guidance with a negative prompt; default: 4, or 1 for lightning",
    )


def check_straight(args: argparse.Namespace) -> None:
    """Check that the options of a straight student and those of one with an adapter are not mixed.

    Raises:
        RequestError: they are, or a value is out of range.
    """
    from arcflow_runtime.disk.rules import MAX_TRUE_CFG_SCALE
    from arcflow_runtime.errors import RequestError

    if args.adapter is not None:
        for name in ("schedule", "sigmas", "true_cfg_scale"):
            if getattr(args, name, None) is not None:
                option = f"--{name.replace('_', '-')}"
                raise RequestError(f"{option} is for a base without --adapter; leave {option} or --adapter out")
        return
    if args.timestep_ratio is not None:
        raise RequestError("--timestep-ratio is for a student with --adapter; leave it out")
    if args.shift is not None and not (math.isfinite(args.shift) and args.shift > 0):
        raise RequestError(f"--shift must be above 0 and finite, got {args.shift:g}")
    scale = getattr(args, "true_cfg_scale", None)
    if scale is not None and not 1 <= scale <= MAX_TRUE_CFG_SCALE:
        raise RequestError(f"--true-cfg-scale must be between 1 and {MAX_TRUE_CFG_SCALE:g}, got {scale:g}")


def straight_options(options: ExportOptions, args: argparse.Namespace, student: Student) -> ExportOptions:
    """The options with the schedule and the guidance that the arguments name.

    Raises:
        RequestError: they do not fit the family, or contradict each other.
        SourceError: the base's scheduler cannot be read or is not supported.
    """
    from arcflow_runtime.errors import RequestError

    schedule, scale = straight_schedule(args, student)
    if args.true_cfg_scale is not None:
        if scale is None:
            raise RequestError(f"--true-cfg-scale: {student.family} is not guided by a negative prompt; leave it out")
        scale = args.true_cfg_scale
    if args.sigmas is not None:
        schedule = _with_sigmas(schedule, args.sigmas, options.steps)
    return dataclasses.replace(options, schedule=schedule, true_cfg_scale=scale)


def straight_schedule(args: argparse.Namespace, student: Student) -> tuple[Schedule, float | None]:
    """The schedule that --schedule and --shift name, and the scale of its guidance; see `straight_options`."""
    from arcflow_export.student.schedule import LIGHTNING, base_schedule
    from arcflow_runtime.errors import RequestError

    schedule, scale = base_schedule(student)
    if args.schedule == "lightning":
        if scale is None:
            raise RequestError("--schedule lightning is for Qwen-Image; leave it out for the base's own schedule")
        schedule, scale = LIGHTNING, 1.0
    if args.shift is not None:
        schedule = dataclasses.replace(schedule, shift=args.shift, dynamic_shift=None)
    return schedule, scale


def _with_sigmas(schedule: Schedule, text: str, steps: tuple[int, ...] | None) -> Schedule:
    from arcflow_runtime.errors import RequestError

    try:
        sigmas = tuple(float(s) for s in text.split(","))
    except ValueError:
        raise RequestError(f"--sigmas must be numbers separated by commas, got {text!r}") from None
    if not all(a > b for a, b in zip(sigmas, (*sigmas[1:], 0.0), strict=True)) or sigmas[0] > 1:
        raise RequestError(f"--sigmas must fall from at most 1 and stay above 0, got {text!r}")
    if steps not in (None, (len(sigmas),)):
        raise RequestError(
            f"--steps must be {len(sigmas)}, the number of --sigmas, got {', '.join(map(str, steps))}; leave it out"
        )
    return dataclasses.replace(schedule, sigmas=sigmas, num_inference_steps=len(sigmas))
