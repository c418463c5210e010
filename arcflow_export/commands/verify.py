"""Compare a bundle with the torch student it was made from, per part and end to end.

The torch side shares nothing with the bundle: diffusers' transformer, LoRA unmerged, its own update. A float32
bundle must agree to 1e-4; one in bfloat16 or float16 to twice torch's own distance between that dtype and float32.
Both models are loaded whole, so this is for students that fit in memory. Exit code 1 if anything disagrees.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..errors import SourceError
from .sources import add_source_arguments, open_student, quiet_libraries

PROMPTS = ("a large red circle on a blue background", "portrait of an old sailor, oil painting, detailed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", type=Path, help="directory of the bundle")
    add_source_arguments(parser)
    parser.add_argument("--prompt", action="append", default=[], help="repeatable; two are built in")
    parser.add_argument("--height", type=int, default=64, help="in pixels; default: %(default)s")
    parser.add_argument("--width", type=int, default=96, help="in pixels; default: %(default)s")
    parser.add_argument("--steps", type=int, help="default: the bundle's")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")


def run(args: argparse.Namespace) -> int:
    """Compare and print one row per quantity."""
    from arcflow_runtime.bundle import Bundle
    from arcflow_runtime.request import check_request

    bundle = Bundle.open(args.bundle)
    prompts = tuple(args.prompt) or PROMPTS
    request = check_request(bundle.manifest, prompts, args.height, args.width, args.steps, None, 42, 1, None, "latents")
    quiet_libraries()
    from tqdm import tqdm

    from ..verify import Case, as_dict, verify_bundle

    student = open_student(args)
    if student.family != bundle.manifest.family:
        raise SourceError(
            f"{args.bundle} is a {bundle.manifest.family} bundle, the student given is {student.family}; "
            "give the base and adapter it was made from"
        )
    cases = [Case(p, request.height_px, request.width_px, request.num_inference_steps) for p in prompts]
    with tqdm(total=len(cases) + 1, disable=None) as bar:

        def progress(stage: str) -> None:
            bar.set_description(stage)
            bar.update()

        rows = verify_bundle(bundle, student, cases, progress)
    failed = [r for r in rows if not r.passed]
    if args.json:
        print(json.dumps({"passed": not failed, "rows": [as_dict(r) for r in rows]}, indent=2))
    else:
        print(f"{'case':>4}  {'quantity':36}{'error':>10}{'bound':>10}")
        for r in rows:
            print(f"{r.case:>4}  {r.what:36}{r.error:>10.2e}{r.bound:>10.2e}  {'' if r.passed else 'FAILED'}".rstrip())
        print(f"{len(rows) - len(failed)} of {len(rows)} within bounds" + (f", {len(failed)} FAILED" if failed else ""))
    return 1 if failed else 0
