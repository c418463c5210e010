"""Train the small shapes model from nothing: judge, VAE, teacher and two-step students, and score them.

It takes about two hours on two CPU cores, or minutes on a GPU. A stage whose directory exists in --out is skipped, so
the same command continues a stopped run. The folders `teacher`, `adapter` and `judge` in --out are the model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from arcflow_runtime.errors import RequestError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to work in")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        metavar="X",
        help="factor for every amount of training, for trial runs (default: 1)",
    )


def run(args: argparse.Namespace) -> int:
    """Train."""
    if not 0 < args.scale <= 100:
        raise RequestError(f"--scale must be above 0 and at most 100, got {args.scale}")
    if not 0 <= args.seed < 2**31:
        raise RequestError(f"--seed must be between 0 and 2**31 - 1, got {args.seed}")
    if not args.out.absolute().parent.is_dir():
        raise RequestError(f"--out: {args.out.absolute().parent} is not a directory; create it first")
    from arcflow_export.commands.sources import quiet_libraries

    quiet_libraries()
    from arcflow_distill.shapes.recipe import Recipe

    Recipe(args.out, args.seed, args.scale).run()
    print(f"compile with: arcflow export --base {args.out}/teacher --adapter {args.out}/adapter --out BUNDLE")
    return 0
