"""The options of `arcflow export` for a straight student, a base without --adapter: its schedule and guidance."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import TYPE_CHECKING

from arcflow_export.options import ExportOptions

if TYPE_CHECKING:
    from arcflow_export.student.load import Student
    from arcflow_runtime.disk.manifest import Manifest, Schedule

#: What Qwen-Image's authors give where there is nothing to avoid.
NEGATIVE_PROMPT = " "
#: Values of --schedule.
SCHEDULES = ("base", "lightning")


def add_straight_arguments(parser: argparse.ArgumentParser, bundle: bool = True) -> None:
    """Declare --schedule, --sigmas and --true-cfg-scale and, for a command that writes no bundle, --negative-prompt."""
    group = parser.add_argument_group("a base without --adapter")
    group.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help="that of the base's own scheduler, or of the Qwen-Image-Lightning LoRAs: shift 3, 8 steps, no guidance; "
        "--shift gives either a fixed shift; default: base",
    )
    group.add_argument(
        "--sigmas",
        metavar="S,S,...",
        help="noise level before the shift at the start of each step, such as 1,0.6,0.3, in place of equal steps",
    )
    group.add_argument(
        "--true-cfg-scale",
        type=float,
        metavar="G",
        help=f"{'default ' if bundle else ''}scale of Qwen-Image's guidance with a negative prompt; default: 4, or 1, "
        "which does not guide, for lightning",
    )
    if not bundle:
        group.add_argument(
            "--negative-prompt",
            action="append",
            metavar="TEXT",
            help="what Qwen-Image is guided away from; prompts take several in turn; default: a space",
        )


def check_straight(args: argparse.Namespace) -> None:
    """Check that the options of a straight student and those of one with an adapter are not mixed.

    Raises:
        RequestError: they are, or a value is out of range.
    """
    from arcflow_runtime.disk.rules import MAX_TRUE_CFG_SCALE
    from arcflow_runtime.errors import RequestError

    if args.adapter is not None:
        for name in ("schedule", "sigmas", "true_cfg_scale", "negative_prompt"):
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
    schedule, scale = straight_schedule(args, student, options.steps)
    return dataclasses.replace(options, schedule=schedule, true_cfg_scale=scale)


def straight_schedule(
    args: argparse.Namespace, student: Student, steps: tuple[int, ...] | None
) -> tuple[Schedule, float | None]:
    """The schedule and the scale of the guidance that the arguments name; `steps` are the step counts that were given.

    Raises:
        RequestError: they do not fit the family, or contradict each other.
        SourceError: the base's scheduler cannot be read or is not supported.
    """
    from arcflow_export.student.schedule import base_schedule, choose_schedule

    own = base_schedule(student)
    return choose_schedule(own, args.schedule, args.shift, args.sigmas, args.true_cfg_scale, steps)


def negative_prompt(args: argparse.Namespace, manifest: Manifest) -> str | None:
    """What `arcflow verify` guides a bundle away from: --negative-prompt, or a space if the bundle is guided."""
    own, given = manifest.true_cfg_scale, args.true_cfg_scale
    if args.negative_prompt is not None or own is None or (own if given is None else given) <= 1:
        return args.negative_prompt
    return NEGATIVE_PROMPT


def negative_prompts(args: argparse.Namespace, scale: float | None) -> tuple[str, ...]:
    """The negative prompts to guide away from with `scale`, of `straight_schedule`; empty without guidance.

    Raises:
        RequestError: there are negative prompts, and no guidance by one.
    """
    from arcflow_runtime.errors import RequestError

    if scale is None or scale <= 1:
        if args.negative_prompt is not None:
            why = "this model is not guided by one" if scale is None else f"--true-cfg-scale {scale:g} does not guide"
            raise RequestError(f"--negative-prompt: {why}; leave it out")
        return ()
    return tuple(args.negative_prompt or (NEGATIVE_PROMPT,))
