"""Collect the activation ranges of a student over a set of prompts; FP8 scales are made from them.

The torch student generates every prompt, and nvidia-modelopt's quantizers record the input range of each linear at each
step. The result, scales.json, is small, belongs to this base, adapter and LoRAs, and can be used on any machine. If the
command is stopped, run it again to continue.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from arcflow_calibration.options import DTYPES, METHODS, PERCENTILE, CalibrationSettings
from arcflow_export.commands.announce import announce
from arcflow_export.commands.sources import (
    add_schedule_arguments,
    add_source_arguments,
    check_schedule,
    open_student,
    quiet_libraries,
    warn_of_shift,
)
from arcflow_export.commands.straight import (
    add_straight_arguments,
    check_straight,
    negative_prompts,
    straight_schedule,
)
from arcflow_export.formats.prompts import PRESETS, Prompts, read_prompts
from arcflow_runtime.disk.families import DEFAULT_GUIDANCE_SCALE
from arcflow_runtime.errors import RequestError

if TYPE_CHECKING:
    from arcflow_export.costs.costs import Cost
    from arcflow_export.costs.machine import Machine
    from arcflow_export.formats.scales import Scales
    from arcflow_export.student.load import Student


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    default = CalibrationSettings()
    add_source_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write, such as scales.json")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE, and a stopped run with other settings")
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--prompts",
        default=PRESETS[0],
        metavar="PRESET|FILE",
        help=f"{' or '.join(PRESETS)}, or a file with one prompt per line; default: %(default)s",
    )
    group.add_argument("--limit", type=int, metavar="N", help="use the first N prompts")
    group.add_argument("--method", choices=METHODS, default=default.method, help="default: %(default)s")
    group.add_argument(
        "--percentile", type=float, metavar="P", help=f"for --method percentile, up to 100; default: {PERCENTILE}"
    )
    group.add_argument(
        "--parts",
        type=lambda text: tuple(dict.fromkeys(text.split(","))),
        default=default.parts,
        metavar="NAME,...",
        help="backbone, text_encoder_2 (FLUX), text_encoder (Qwen-Image); default: backbone",
    )
    group.add_argument(
        "--sizes",
        type=_sizes,
        default=default.sizes,
        metavar="HEIGHTxWIDTH,...",
        help="image sizes in pixels, used in turn; default: 1024x1024",
    )
    group.add_argument(
        "--num-inference-steps",
        type=int,
        metavar="N",
        help=f"default: {default.num_inference_steps}, or the base's own without --adapter",
    )
    group.add_argument(
        "--guidance-scale",
        type=float,
        metavar="G",
        help=f"default: {DEFAULT_GUIDANCE_SCALE} if the student takes one",
    )
    group.add_argument(
        "--max-sequence-length",
        type=int,
        default=default.max_sequence_length,
        metavar="TOKENS",
        help="number of text tokens, the same as the bundle's; default: %(default)s",
    )
    add_schedule_arguments(group)
    add_straight_arguments(parser, bundle=False)
    group.add_argument("--seed", type=int, default=default.seed, metavar="N", help="seed of the first prompt's noise")
    group.add_argument(
        "--batch", type=int, default=default.batch, metavar="N", help="prompts per network call; default: %(default)s"
    )
    group.add_argument("--dtype", choices=DTYPES, default=default.dtype, help="default: %(default)s")
    group.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if torch has one")
    group.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    """Calibrate."""
    prompts = _prompts(args)
    _check(args)
    quiet_libraries()
    from arcflow_calibration.calibrate import calibrate, default_device
    from arcflow_calibration.state import check_out

    default = CalibrationSettings()
    settings = CalibrationSettings(
        args.method,
        (args.percentile or PERCENTILE) if args.method == "percentile" else None,
        args.parts,
        args.num_inference_steps or default.num_inference_steps,
        args.sizes,
        args.guidance_scale,
        args.seed,
        args.batch,
        args.max_sequence_length,
        args.dtype,
        args.device or default_device(),
        default.shift if args.shift is None else args.shift,
        default.timestep_ratio if args.timestep_ratio is None else args.timestep_ratio,
    )
    check_out(args.out, args.overwrite)
    student = open_student(args)
    if student.adapter is not None:
        warn_of_shift(student, settings.shift)
    else:
        given = args.num_inference_steps
        schedule, scale = straight_schedule(args, student, None if given is None else (given,))
        negatives = negative_prompts(args, scale)
        settings = dataclasses.replace(
            settings,
            straight=schedule,
            num_inference_steps=given or schedule.num_inference_steps,
            negative_prompts=negatives,
            true_cfg_scale=scale if negatives else None,
        )
    # `plan_memory` refuses a student that cannot fit; it is more exact, because it knows the files.
    announce(partial(_cost, student, settings, len(prompts.texts)), args.out.absolute().parent, anyway=True)
    try:
        scales = calibrate(
            student, prompts, settings, args.out, args.overwrite, lambda message: print(message, file=sys.stderr)
        )
    except KeyboardInterrupt:
        _say_where_it_is(args.out)
        raise
    _report(args, scales)
    return 0


def _cost(student: Student, settings: CalibrationSettings, prompts: int, machine: Machine) -> Cost:
    from arcflow_export.costs.costs import calibrate_cost, network_bytes
    from arcflow_export.costs.work import call_sizes, part_work

    height, width = max(settings.sizes, key=lambda size: size[0] * size[1])
    steps, batch, dtype = settings.num_inference_steps, settings.batch, settings.dtype
    sizes = call_sizes(height, width, settings.max_sequence_length, steps)
    parts = {part.name: part_work(part, sizes) for part in student.parts(dtype)}
    free = machine.free_memory_bytes
    calls = steps * (2 if settings.negative_prompts else 1)
    memory, read = network_bytes(parts, student.base_bytes, student.adapter_bytes, dtype, batch, calls, free)
    return calibrate_cost(parts, prompts, calls, dtype, -(-prompts // batch) * read, memory, machine)


def _report(args: argparse.Namespace, scales: Scales) -> None:
    from arcflow_calibration.summary import as_dict, summarise, table  # it imports numpy

    summary = summarise(scales)
    if args.json:
        print(json.dumps(as_dict(summary) | {"out": str(args.out), "digest": scales.digest}, indent=2))
    else:
        print(table(summary))
        print(f"wrote {args.out}; quantise with: arcflow quantize BUNDLE --scales {args.out} --out BUNDLE8")


def _say_where_it_is(out: Path) -> None:
    from arcflow_calibration.state import state_path

    if state_path(out).exists():
        print(f"kept {state_path(out)}; run the same command again to continue", file=sys.stderr)


def _prompts(args: argparse.Namespace) -> Prompts:
    if args.limit is not None and args.limit < 1:
        raise RequestError(f"--limit must be at least 1, got {args.limit}")
    return read_prompts(args.prompts, args.limit)


def _check(args: argparse.Namespace) -> None:
    from arcflow_runtime.generate.request import MAX_INFERENCE_STEPS

    if args.num_inference_steps is not None and not 1 <= args.num_inference_steps <= MAX_INFERENCE_STEPS:
        raise RequestError(
            f"--num-inference-steps must be between 1 and {MAX_INFERENCE_STEPS}, got {args.num_inference_steps}"
        )
    for name in ("batch", "max_sequence_length"):
        if getattr(args, name) < 1:
            raise RequestError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    check_straight(args)
    if args.adapter is not None:
        check_schedule(args)
    if args.seed < 0:
        raise RequestError(f"--seed must be 0 or more, got {args.seed}")
    if args.guidance_scale is not None and not abs(args.guidance_scale) < 1e4:
        raise RequestError(f"--guidance-scale must be a finite number, got {args.guidance_scale}")
    if args.percentile is not None:
        if args.method != "percentile":
            raise RequestError("--percentile needs --method percentile")
        if not 0 < args.percentile <= 100:
            raise RequestError(f"--percentile must be above 0 and at most 100, got {args.percentile}")


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    sizes = []
    for item in text.split(","):
        try:
            height, width = (int(n) for n in item.split("x"))
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH such as 1024x1024, got {item!r}") from None
        if height < 16 or width < 16 or height % 16 or width % 16:
            raise argparse.ArgumentTypeError(f"sides must be positive multiples of 16, got {item!r}")
        sizes.append((height, width))
    return tuple(dict.fromkeys(sizes))
