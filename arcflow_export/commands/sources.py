"""The command-line options that name a student (base, adapter, LoRAs), for every command that reads one."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING

from arcflow_export.options import SHIFT, TIMESTEP_RATIO

if TYPE_CHECKING:
    from arcflow_export.checkpoint.sources import Location
    from arcflow_export.student.load import Student


def add_source_arguments(parser: argparse.ArgumentParser, required: bool = True, straight: bool = True) -> None:
    """Declare --base, --adapter, --lora and their further options.

    Args:
        parser: of the command.
        required: --base must be given.
        straight: --adapter may be left out.
    """
    group = parser.add_argument_group("student")
    group.add_argument("--base", required=required, metavar="DIR|ID", help="base checkpoint in diffusers format")
    group.add_argument("--base-subfolder", metavar="NAME")
    group.add_argument("--base-revision", metavar="REV", help="branch, tag or commit on the hub")
    group.add_argument(
        "--adapter",
        required=required and not straight,
        metavar="DIR|ID",
        help="ArcFlow adapter" + ("; without one, the base itself is the model" if straight else ""),
    )
    group.add_argument("--adapter-subfolder", metavar="NAME", help="for example arcflow-flux-2steps")
    group.add_argument("--adapter-revision", metavar="REV")
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[:SCALE]",
        help="LoRA to merge on top; `arcflow lora inspect` shows what a file holds; repeatable",
    )
    group.add_argument("--offline", action="store_true", help="use the hub's cache only")


def add_vae_arguments(group: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Declare --vae and its revision, for commands that use the decoder."""
    group.add_argument("--vae", metavar="DIR|ID", help="VAE whose decoder replaces the base's, such as TAEF1 for FLUX")
    group.add_argument("--vae-revision", metavar="REV")


def vae_location(args: argparse.Namespace) -> Location | None:
    """The VAE that --vae names; None without that option, and for commands that do not have it."""
    from arcflow_export.checkpoint.sources import Location

    name = getattr(args, "vae", None)
    return None if name is None else Location(name, None, args.vae_revision, args.offline)


def add_schedule_arguments(group: argparse._ArgumentGroup) -> None:
    """Declare --shift and --timestep-ratio."""
    group.add_argument(
        "--shift",
        type=float,
        metavar="S",
        help=f"timestep shift that the student was trained with; default: {SHIFT}, as for the released students",
    )
    group.add_argument(
        "--timestep-ratio",
        type=float,
        metavar="R",
        help=f"length of the last step relative to the others, above 0 and at most 1; default: {TIMESTEP_RATIO}",
    )


def check_schedule(args: argparse.Namespace) -> None:
    """Check --shift and --timestep-ratio, and set them to their defaults if they were not given.

    Raises:
        RequestError: a value is out of range.
    """
    from arcflow_runtime.errors import RequestError

    args.shift = SHIFT if args.shift is None else args.shift
    args.timestep_ratio = TIMESTEP_RATIO if args.timestep_ratio is None else args.timestep_ratio
    if not (math.isfinite(args.shift) and args.shift > 0):
        raise RequestError(f"--shift must be above 0 and finite, got {args.shift:g}")
    if not 0 < args.timestep_ratio <= 1:
        raise RequestError(f"--timestep-ratio must be above 0 and at most 1, got {args.timestep_ratio:g}")


def warn_of_shift(student: Student, shift: float) -> None:
    """Print a warning if the base's scheduler has another fixed shift."""
    from arcflow_export.student.schedule import shift_warning

    if warning := shift_warning(student.base.path, shift):
        print(f"warning: {warning}", file=sys.stderr)


def quiet_libraries() -> None:
    """Silence log output of transformers, diffusers and the hub's client; their errors are exceptions.

    The hub's progress bars stay, because a download can take an hour. transformers would switch them off with its own.
    """
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging
    from huggingface_hub import constants
    from huggingface_hub.utils import enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    for module in (diffusers_logging, transformers_logging):
        module.set_verbosity_error()
        module.disable_progress_bar()
    hub_logging.set_verbosity_error()
    if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()


def open_student(args: argparse.Namespace) -> Student:
    """Open the student that the options name.

    Raises:
        RequestError: --lora is malformed.
        SourceError: a file is missing or damaged, or does not fit the others.
    """
    from arcflow_export.checkpoint.sources import Location
    from arcflow_export.student.load import load_student
    from arcflow_runtime.errors import RequestError
    from arcflow_runtime.lora.argument import parse_lora

    try:
        loras = [parse_lora(text) for text in args.lora]
    except ValueError as e:
        raise RequestError(str(e)) from None
    adapter = None
    if args.adapter is not None:
        adapter = Location(args.adapter, args.adapter_subfolder, args.adapter_revision, args.offline)
    elif args.adapter_subfolder is not None or args.adapter_revision is not None:
        raise RequestError("--adapter-subfolder and --adapter-revision need --adapter; give it, or leave them out")
    return load_student(
        Location(args.base, args.base_subfolder, args.base_revision, args.offline),
        adapter,
        [(Location(path, offline=args.offline), scale) for path, scale in loras],
        vae_location(args),
    )
