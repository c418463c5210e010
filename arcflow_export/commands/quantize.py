"""Quantise the linears that a policy selects, and write a new bundle: FP8 or NVFP4 for GPUs, int8 for CPUs.

In FP8 (E4M3), weights get one scale per output channel, and activations one per tensor, from the calibrated ranges. In
NVFP4 (E2M1), every 16 inputs have a scale too; those of activations are computed while the model runs. In int8,
activations get a scale per token while the model runs, and there is no calibration. Weights are read one tensor at a
time, so that memory does not grow with the student. Unchanged parts are copied.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from arcflow_export.commands.announce import add_anyway, announce
from arcflow_export.errors import QuantizeError
from arcflow_export.progress import ByteBars
from arcflow_runtime.disk.quant_formats import BY_OPTION

if TYPE_CHECKING:
    from arcflow_export.costs.costs import Cost
    from arcflow_export.costs.machine import Machine
    from arcflow_export.quantize.coverage import Coverage
    from arcflow_export.quantize.quantize import QuantizationPlan
    from arcflow_runtime.disk.bundle import Bundle

_SHOWN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", type=Path, help="directory of the bundle")
    parser.add_argument(
        "--format", choices=sorted(BY_OPTION), help="number format (default: the policy's, and fp8 without --policy)"
    )
    parser.add_argument("--scales", type=Path, metavar="FILE", help="from arcflow calibrate; not for int8")
    parser.add_argument(
        "--policy", metavar="NAME|FILE", help="preset or .toml file (default: the family's preset for the format)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE8", help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle once the new one is done")
    parser.add_argument("--height", type=int, metavar="PX", help="image height for FLOPs (default: the bundle's)")
    parser.add_argument("--width", type=int, metavar="PX", help="image width for FLOPs (default: the bundle's)")
    add_anyway(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Quantise the bundle and print how much of it is quantised."""
    from arcflow_export.export.staging import check_out
    from arcflow_runtime.disk.bundle import Bundle
    from arcflow_runtime.generate.request import check_request

    bundle = Bundle.open(args.bundle)
    m = bundle.manifest
    request = check_request(m, "size", args.height, args.width, None, None, 0, 1, None, "latents")
    if args.out.exists() and args.out.samefile(args.bundle):
        raise QuantizeError(f"--out: {args.out} is the bundle itself; give another name")
    check_out(args.out, args.overwrite)

    from arcflow_export.formats.policy import default_policy, load_policy
    from arcflow_export.formats.scales import Scales
    from arcflow_export.quantize.coverage import cover_part
    from arcflow_export.quantize.quantize import plan_quantization, quantize_bundle

    policy = load_policy(args.policy or default_policy(m.family, args.format), args.format)
    scales = None if args.scales is None else Scales.load(args.scales)
    plan = plan_quantization(bundle, scales, policy)
    for warning in scales.warnings(m) if scales is not None else ():
        print(f"warning: {warning}", file=sys.stderr)
    announce(partial(_cost, plan), args.out.absolute().parent, args.anyway)
    size = (request.height_px, request.width_px)
    rows = [cover_part(m, p.name, p.linears, p.chosen, p.stored, *size) for p in plan.parts]
    with ByteBars() as bars:
        out = quantize_bundle(plan, args.out, shlex.join(["arcflow", *sys.argv[1:]]), args.overwrite, bars)
    quantized = Bundle.open(out)
    if args.json:
        parts = [dataclasses.asdict(r) | _bytes(bundle, quantized, r.part) for r in rows]
        result = {"out": str(out), "policy": policy.name, "height_px": size[0], "width_px": size[1], "parts": parts}
        print(json.dumps(result | {"stages": bars.stages}, indent=2))
    else:
        print(f"policy {policy.name}, {policy.format}; FLOPs of linears, one {size[1]}x{size[0]} image")
        print(_table(rows, bundle, quantized))
        print(f"wrote {out}")
    return 0


def _cost(plan: QuantizationPlan, machine: Machine) -> Cost:
    from arcflow_export.costs.costs import quantize_cost
    from arcflow_export.costs.work import PartWork

    files = plan.bundle.manifest.files
    parts, chosen = {}, {}
    for p in plan.parts:
        spec = plan.bundle.manifest.parts[p.name]
        size = files[spec.weights].bytes
        parts[p.name] = PartWork(spec.parameters, size, len(p.linears), 0, 0, 0, spec.precision)
        if p.chosen:
            chosen[p.name] = sum(p.linears[name].parameters for name in p.chosen)
    unchanged = sum(f.bytes for f in files.values()) - sum(parts[name].weight_bytes for name in chosen)
    return quantize_cost(parts, chosen, unchanged, machine)


def _bytes(before: Bundle, after: Bundle, part: str) -> dict[str, int]:
    def size(bundle: Bundle) -> int:
        spec = bundle.manifest.parts[part]
        return sum(bundle.manifest.files[name].bytes for name in (spec.graph, spec.weights))

    return {"bytes_before": size(before), "bytes_after": size(after)}


def _table(rows: list[Coverage], before: Bundle, after: Bundle) -> str:
    cells = [("part", "linears", "parameters", "FLOPs", "bytes before", "bytes after")]
    for r in rows:
        sizes = _bytes(before, after, r.part)
        cells.append(
            (
                r.part,
                f"{r.quantized_linears} of {r.linears}",
                f"{r.quantized_parameters / max(1, r.parameters):.1%}",
                f"{r.quantized_flops / max(1, r.flops):.1%}",
                f"{sizes['bytes_before']:,}",
                f"{sizes['bytes_after']:,}",
            )
        )
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for first, *rest in cells:
        numbers = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([f"  {first:{widths[0]}}", *numbers]))
    for r in rows:
        if r.quantized_linears and r.left:
            more = f" and {len(r.left) - _SHOWN} more" if len(r.left) > _SHOWN else ""
            lines.append(f"  not quantised in {r.part}: {', '.join(r.left[:_SHOWN])}{more}")
    for r in rows:
        for storage in dict.fromkeys(r.stored.values()):
            names = [name for name, used in r.stored.items() if used == storage]
            what = ", ".join(names) if len(names) <= _SHOWN else f"{len(names)} weights"
            lines.append(f"  stored in {storage} in {r.part}: {what}")
    return "\n".join(lines)
