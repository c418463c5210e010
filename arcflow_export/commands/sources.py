"""The command-line options that name a student (base, adapter, LoRAs), for every command that reads one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arcflow_export.student.load import Student


def add_source_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Declare --base, --adapter, --lora and their further options; `required` applies to the first two."""
    group = parser.add_argument_group("student")
    group.add_argument("--base", required=required, metavar="DIR|ID", help="base checkpoint in diffusers format")
    group.add_argument("--base-subfolder", metavar="NAME")
    group.add_argument("--base-revision", metavar="REV", help="branch, tag or commit on the hub")
    group.add_argument("--adapter", required=required, metavar="DIR|ID", help="ArcFlow adapter")
    group.add_argument("--adapter-subfolder", metavar="NAME", help="for example arcflow-flux-2steps")
    group.add_argument("--adapter-revision", metavar="REV")
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[:SCALE]",
        help="style LoRA to merge on top, in diffusers' or Kohya's naming; repeatable",
    )
    group.add_argument("--offline", action="store_true", help="use the hub's cache only")


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
    from arcflow_export.checkpoint.styles import parse_lora
    from arcflow_export.student.load import load_student
    from arcflow_runtime.errors import RequestError

    try:
        loras = [parse_lora(text) for text in args.lora]
    except ValueError as e:
        raise RequestError(str(e)) from None
    return load_student(
        Location(args.base, args.base_subfolder, args.base_revision, args.offline),
        Location(args.adapter, args.adapter_subfolder, args.adapter_revision, args.offline),
        [(Location(path, offline=args.offline), scale) for path, scale in loras],
    )
