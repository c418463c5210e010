"""Compare a bundle with the torch student it was made from, or --against another bundle, per part and end to end.

With --base and --adapter: compare with torch. Give the base and adapter that the bundle was made from; a base without
an adapter needs --base alone. The torch side shares nothing with the bundle: it is diffusers' transformer with unmerged
LoRA and its own update. Every quantity is compared with torch in float32. A float32 part must agree to 1e-4. For a
bfloat16 or float16 part the bound is about twice torch's own error in that precision, over several runs with random
rounding. float16 parts are checked for overflow. With --vae, the distance to the images of the base's own decoder is
shown too, without a bound. Weights that do not fit in memory are read from disk as they are used. Exit code 1 if
anything disagrees.

With --against BUNDLE: the drift gate. Both bundles run on this CPU with the same prompts and noise, and FP8 is rounded
as on a GPU. Errors are reported for each part on the reference's inputs, end to end, and for every quantised layer.
Exit code 1 if a threshold of the policy does not hold; the output says which, by how much, and which layers to leave
out.

In both, a bundle that is guided by a negative prompt runs with one, a space unless --negative-prompt says otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from arcflow_export.commands.announce import announce
from arcflow_export.commands.drift import add_drift_arguments, run_drift
from arcflow_export.commands.sources import add_source_arguments, add_vae_arguments, open_student, quiet_libraries
from arcflow_export.commands.straight import negative_prompt
from arcflow_export.errors import SourceError
from arcflow_runtime.errors import RequestError

if TYPE_CHECKING:
    from arcflow_export.costs.costs import Cost
    from arcflow_export.costs.machine import Machine
    from arcflow_export.student.load import Student
    from arcflow_export.verify.verify import VerifyRow
    from arcflow_runtime.disk.bundle import Bundle
    from arcflow_runtime.disk.manifest import SizeRange
    from arcflow_runtime.generate.request import Request

HEIGHT_PX, WIDTH_PX = 64, 96
PROMPTS = ("a large red circle on a blue background", "portrait of an old sailor, oil painting, detailed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", type=Path, help="directory of the bundle")
    add_source_arguments(parser, required=False)
    add_vae_arguments(parser)
    add_drift_arguments(parser)
    parser.add_argument(
        "--prompt", action="append", default=[], help="repeatable; default: two built-in ones; --against has --prompts"
    )
    parser.add_argument(
        "--negative-prompt", metavar="TEXT", help="for a bundle that is guided by one; default: a space"
    )
    parser.add_argument(
        "--true-cfg-scale", type=float, metavar="G", help="of that guidance; 1 does not guide; default: the bundle's"
    )
    against = "or the nearest allowed size; with --against the bundle's default"
    parser.add_argument("--height", type=int, help=f"in pixels; default: {HEIGHT_PX} {against}")
    parser.add_argument("--width", type=int, help=f"in pixels; default: {WIDTH_PX} {against}")
    parser.add_argument("--steps", type=int, help="default: the bundle's")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="print JSON instead of tables; FILE only with --against"
    )


def run(args: argparse.Namespace) -> int:
    """Compare and print one row per quantity."""
    _check_mode(args)
    return _run_torch(args) if args.against is None else run_drift(args)


def _check_mode(args: argparse.Namespace) -> None:
    """Refuse the torch comparison's options with --against, and the drift gate's without it: they would be ignored."""
    if args.against is None:
        if args.base is None:
            raise _missing(args, "base", "adapter")
        if args.json not in (None, "-"):
            raise RequestError(f"--json takes a file only with --against, got {args.json!r}; redirect stdout instead")
    kinds = {
        True: ("base", "adapter", "lora", "vae", "prompt"),
        False: ("report", "prompts", "limit", "judge", "policy"),
    }
    if wrong := [f"--{name}" for name in kinds[args.against is not None] if getattr(args, name)]:
        how = "with" if args.against is not None else "without"
        cure = "leave one or the other out" if args.against is not None else "add --against BUNDLE or leave it out"
        raise RequestError(f"{', '.join(wrong)} cannot be used {how} --against; {cure}")


def _missing(args: argparse.Namespace, *names: str) -> RequestError:
    missing = " and ".join(f"--{name}" for name in names if getattr(args, name) is None)
    return RequestError(f"give {missing}, or --against BUNDLE to compare with another bundle")


def _run_torch(args: argparse.Namespace) -> int:
    """Compare with the torch student."""
    from arcflow_runtime.disk.bundle import Bundle
    from arcflow_runtime.generate.request import check_request

    bundle = Bundle.open(args.bundle)
    if args.adapter is None and bundle.manifest.provenance.adapter is not None:
        raise _missing(args, "adapter")
    if quantised := [name for name, part in bundle.manifest.parts.items() if part.quantization is not None]:
        raise RequestError(
            f"{args.bundle} is quantised ({', '.join(quantised)}) and cannot be compared with torch; compare it with "
            f"the bundle it was made from: arcflow verify {args.bundle} --against BUNDLE"
        )
    prompts = tuple(args.prompt) or PROMPTS
    ranges = bundle.manifest.ranges
    height = args.height if args.height is not None else _nearest(HEIGHT_PX, ranges.height_px)
    width = args.width if args.width is not None else _nearest(WIDTH_PX, ranges.width_px)
    negative = negative_prompt(args, bundle.manifest)
    request = check_request(
        bundle.manifest,
        prompts,
        height,
        width,
        args.steps,
        None,
        42,
        1,
        None,
        "latents",
        negative_prompt=negative,
        true_cfg_scale=args.true_cfg_scale,
    )
    quiet_libraries()
    from tqdm import tqdm

    from arcflow_export.drift.comparable import check_student
    from arcflow_export.verify.verify import VerifyCase, as_dict, verify_bundle

    student = open_student(args)
    if student.family != bundle.manifest.family:
        raise SourceError(
            f"{args.bundle} is a {bundle.manifest.family} bundle, the student given is {student.family}; "
            "give the base and adapter it was made from"
        )
    check_student(bundle, student.sources, student.vae_source)
    announce(partial(_cost, bundle, student, request, len(prompts)), Path.cwd(), args.anyway)
    case = VerifyCase("", request.height_px, request.width_px, request.num_inference_steps)
    if request.negative_prompts is not None:
        case = replace(case, negative_prompt=negative, true_cfg_scale=request.true_cfg_scale)
    cases = [replace(case, prompt=prompt) for prompt in prompts]
    with tqdm(total=len(cases) + 1, disable=None) as bar:

        def progress(stage: str) -> None:
            bar.set_description(stage)
            bar.update()

        rows = verify_bundle(bundle, student, cases, progress, args.backend)
    failed = [r for r in rows if not r.passed]
    layers = tuple(dict.fromkeys(layer for r in failed for layer in r.layers))
    if args.json:
        remedy = {"keep_float32": layers} if layers else {}
        print(json.dumps({"passed": not failed, "rows": [as_dict(r) for r in rows]} | remedy, indent=2))
    else:
        print(f"{'case':>4}  {'quantity':36}{'error':>10}{'bound':>10}")
        for r in rows:
            end = "" if r.passed else "FAILED" + (f" at {r.node}" if r.node else "")
            bound = f"{r.bound:>10.2e}" if math.isfinite(r.bound) else f"{'none':>10}"
            print(f"{r.case:>4}  {r.what:36}{r.error:>10.2e}{bound}  {end}".rstrip())
        print(f"{len(rows) - len(failed)} of {len(rows)} within bounds" + (f", {len(failed)} FAILED" if failed else ""))
        if overflowing := [r for r in failed if r.node]:
            print(_advice(overflowing, layers))
    return 1 if failed else 0


def _cost(bundle: Bundle, student: Student, request: Request, cases: int, machine: Machine) -> Cost:
    from arcflow_export.costs.costs import verify_cost
    from arcflow_export.costs.work import call_sizes, part_work
    from arcflow_export.verify.verify import RUNS

    steps = request.num_inference_steps * (1 if request.negative_prompts is None else 2)
    sizes = call_sizes(request.height_px, request.width_px, bundle.manifest.text.max_sequence_length, steps)
    parts = {part.name: part_work(part, sizes) for part in student.parts(bundle.manifest.dtype)}
    reduced = any(part.precision != "float32" for part in bundle.manifest.parts.values())
    return verify_cost(parts, cases, steps, RUNS if reduced else 0, student.base_bytes, student.adapter_bytes, machine)


def _nearest(size_px: int, allowed: SizeRange) -> int:
    return min(max(size_px, allowed.min), allowed.max)


def _advice(overflowing: list[VerifyRow], layers: tuple[str, ...]) -> str:
    parts = list(dict.fromkeys(r.what.partition(":")[0] for r in overflowing))
    first = overflowing[0]
    advice = f"float16 overflows in {', '.join(parts)}, first at {first.node}. "
    whole = ",".join(f"{part}=bfloat16" for part in parts)
    if not layers:
        return f"{advice}Export again with --precision {whole}"
    return f"{advice}Export again with --precision {whole}, or with\n  --keep-float32 {','.join(layers)}"
