"""Distil a FLUX or Qwen-Image checkpoint into a two-step ArcFlow adapter.

PRESET is flux, qwen or shapes, or a TOML file of your own; options and --set replace its settings. The base is frozen.
LoRA factors, the last normalisation and three heads are trained against the base's velocity; only prompts are needed.
Ctrl-C saves the run, and --resume continues it exactly. For several GPUs: accelerate launch -m arcflow_runtime.cli
distill PRESET ...

Losses at different ratios cannot be compared: the loss jumps while the teacher's share falls to 0.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

#: Option -> setting of the configuration.
_OPTIONS = ("prompts", "iterations", "batch_size", "modes", "rank", "learning_rate", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", metavar="PRESET|FILE.toml")
    parser.add_argument("--base", required=True, metavar="DIR|ID", help="base checkpoint in diffusers format")
    parser.add_argument("--base-revision", metavar="REV", help="branch, tag or commit on the hub")
    parser.add_argument("--offline", action="store_true", help="use the hub's cache only")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="adapter to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing adapter or stopped run")
    parser.add_argument("--resume", action="store_true", help="continue the stopped run in DIR.training")
    parser.add_argument("--keep-training", action="store_true", help="keep DIR.training when done")
    group = parser.add_argument_group("settings")
    group.add_argument("--prompts", metavar="FILE", help="one prompt per line")
    group.add_argument("--iterations", type=int, metavar="N")
    group.add_argument("--batch-size", type=int, metavar="N", help="images per process and iteration")
    group.add_argument("--modes", type=int, metavar="K", help="modes per token; 1 gives a linear student")
    group.add_argument("--rank", type=int, metavar="R", help="rank of the LoRA factors")
    group.add_argument("--learning-rate", type=float, metavar="RATE")
    group.add_argument("--seed", type=int, metavar="N")
    group.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any other setting of the file; repeatable"
    )


def run(args: argparse.Namespace) -> int:
    """Distil."""
    from arcflow_distill.train.config import load_config, parse_setting
    from arcflow_distill.train.folders import check_out

    overrides: dict[str, Any] = dict(parse_setting(text) for text in args.set)
    overrides |= {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    config = load_config(args.config, overrides)
    check_out(args.out, args.overwrite)

    from arcflow_export.checkpoint.layout import base_files
    from arcflow_export.checkpoint.sources import Location, resolve
    from arcflow_export.commands.sources import quiet_libraries

    quiet_libraries()
    from arcflow_distill.train.trainer import distill

    base = resolve(Location(args.base, None, args.base_revision, args.offline), "base checkpoint", base_files)
    provenance = {"command": shlex.join(["arcflow", *sys.argv[1:]]), "base": base.name, "base_revision": base.revision}
    out = distill(
        config,
        base.path,
        args.out,
        resume=args.resume,
        overwrite=args.overwrite,
        keep_training=args.keep_training,
        provenance=provenance,
    )
    print(f"wrote {out}; compile with: arcflow export --base {args.base} --adapter {out} --out BUNDLE")
    return 0
