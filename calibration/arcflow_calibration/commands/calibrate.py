"""Collect the ranges of a student's activations over prompts, which FP8 scales are made from.

The torch student draws every prompt at its own timesteps and states, and nvidia-modelopt's quantizers watch the input
of each linear, step by step. The result, scales.json, is small, belongs to this base, adapter and LoRAs, and is used on
any machine. A run that was stopped goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from arcflow_export.commands.sources import add_source_arguments, open_student, quiet_libraries
from arcflow_runtime.errors import RequestError

from ..options import DTYPES, METHODS, PERCENTILE, Settings
from ..prompts import PRESETS, Prompts, read_prompts
from ..summary import as_dict, summarise, table

if TYPE_CHECKING:
    from ..scales import Scales


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    default = Settings()
    add_source_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write, such as scales.json")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE, and a stopped run of other settings")
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
        "--percentile", type=float, metavar="P", help=f"of --method percentile, up to 100; default: {PERCENTILE}"
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
        help="in pixels; prompts take them in turn; default: 1024x1024",
    )
    group.add_argument(
        "--num-inference-steps", type=int, default=default.num_inference_steps, metavar="N", help="default: %(default)s"
    )
    group.add_argument("--guidance-scale", type=float, metavar="G", help="default: 3.5 where the student takes one")
    group.add_argument(
        "--max-sequence-length",
        type=int,
        default=default.max_sequence_length,
        metavar="TOKENS",
        help="text tokens, as the bundle's; default: %(default)s",
    )
    group.add_argument("--seed", type=int, default=default.seed, metavar="N", help="of the first prompt's noise")
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
    from ..calibrate import calibrate, default_device
    from ..state import check_out

    settings = Settings(
        args.method,
        (args.percentile or PERCENTILE) if args.method == "percentile" else None,
        args.parts,
        args.num_inference_steps,
        args.sizes,
        args.guidance_scale,
        args.seed,
        args.batch,
        args.max_sequence_length,
        args.dtype,
        args.device or default_device(),
    )
    check_out(args.out, args.overwrite)
    student = open_student(args)
    try:
        scales = calibrate(
            student, prompts, settings, args.out, args.overwrite, lambda message: print(message, file=sys.stderr)
        )
    except KeyboardInterrupt:
        _say_where_it_is(args.out)
        raise
    _report(args, scales)
    return 0


def _report(args: argparse.Namespace, scales: Scales) -> None:
    summary = summarise(scales)
    if args.json:
        print(json.dumps(as_dict(summary) | {"out": str(args.out), "digest": scales.digest}, indent=2))
    else:
        print(table(summary))
        print(f"wrote {args.out}; quantise with: arcflow quantize BUNDLE --scales {args.out} --out BUNDLE8")


def _say_where_it_is(out: Path) -> None:
    from ..state import state_path

    if state_path(out).exists():
        print(f"kept {state_path(out)}; give the same command again to go on", file=sys.stderr)


def _prompts(args: argparse.Namespace) -> Prompts:
    if args.limit is not None and args.limit < 1:
        raise RequestError(f"--limit must be at least 1, got {args.limit}")
    return read_prompts(args.prompts, args.limit)


def _check(args: argparse.Namespace) -> None:
    from arcflow_runtime.request import MAX_INFERENCE_STEPS

    if not 1 <= args.num_inference_steps <= MAX_INFERENCE_STEPS:
        raise RequestError(
            f"--num-inference-steps must be between 1 and {MAX_INFERENCE_STEPS}, got {args.num_inference_steps}"
        )
    for name in ("batch", "max_sequence_length"):
        if getattr(args, name) < 1:
            raise RequestError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.seed < 0:
        raise RequestError(f"--seed must be 0 or more, got {args.seed}")
    if args.guidance_scale is not None and not abs(args.guidance_scale) < 1e4:
        raise RequestError(f"--guidance-scale must be a finite number, got {args.guidance_scale}")
    if args.percentile is not None:
        if args.method != "percentile":
            raise RequestError("--percentile is for --method percentile")
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
