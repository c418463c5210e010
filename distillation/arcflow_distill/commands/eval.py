"""Score a student of the small shapes model against its teacher, and plot the results.

TARGET is a bundle, which the runtime runs, or an adapter, which torch runs. Images of captions of shapes are generated
by the teacher in many and in few Euler steps and by the student in two steps, all from the same noise, and compared
with real images. The judge, a small classifier of such images, decides which are right. The results go to --out:
eval.json, table.md, contact_sheet.png and paths.png. An earlier evaluation there is replaced when the new one is
complete.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from arcflow_distill.evaluate.options import EvaluationOptions
from arcflow_export.progress import stage_bars
from arcflow_runtime.errors import RequestError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    default = EvaluationOptions()
    parser.add_argument("target", metavar="TARGET", type=Path, help="directory of a bundle or an adapter")
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="the teacher, in diffusers format")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--student",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="an adapter to compare with, under a name of letters, digits, - and _; repeatable",
    )
    parser.add_argument(
        "--judge", type=Path, metavar="DIR", help="default: `judge` beside the base; if there is none, one is trained"
    )
    parser.add_argument("--count", type=int, default=default.count, help="number of prompts; default: %(default)s")
    parser.add_argument("--seed", type=int, default=default.seed, help="default: %(default)s")
    parser.add_argument(
        "--teacher-steps",
        type=int,
        nargs="+",
        default=list(default.teacher_steps),
        metavar="N",
        help=f"Euler steps; the largest is the reference; default: {' '.join(map(str, default.teacher_steps))}",
    )
    parser.add_argument("--json", action="store_true", help="print eval.json instead of the table")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the table."""
    options = EvaluationOptions(args.count, args.seed, tuple(args.teacher_steps))
    students = _students(args.student)
    from arcflow_export.commands.sources import quiet_libraries

    quiet_libraries()
    from arcflow_distill.evaluate.run import evaluate

    report = evaluate(args.target, args.base, args.out, students, args.judge, options, stage_bars())
    print(json.dumps(report.as_json(), indent=2) if args.json else report.table(), end="\n" if args.json else "")
    return 0


def _students(pairs: list[str]) -> dict[str, Path]:
    students: dict[str, Path] = {}
    for pair in pairs:
        name, _, path = pair.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not path:
            raise RequestError(f"--student must be NAME=DIR with a NAME of letters, digits, - and _, got {pair!r}")
        if name in students:
            raise RequestError(f"--student must give each name once, got {name!r} twice")
        students[name] = Path(path)
    return students
