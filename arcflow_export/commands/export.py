"""Merge a base checkpoint, an ArcFlow adapter and LoRAs, and write them as a bundle of ONNX graphs.

Without an adapter, the bundle has the base itself, with its own schedule: a teacher, or a LoRA that needs few steps.

Weights are read, merged and written one tensor at a time, so that a 20-billion-parameter student exports within
4 GiB of memory. The bundle's directory appears only when it is complete.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcflow_export.commands.announce import add_anyway, announce
from arcflow_export.commands.sources import (
    add_schedule_arguments,
    add_source_arguments,
    add_vae_arguments,
    check_schedule,
    open_student,
    quiet_libraries,
    warn_of_shift,
)
from arcflow_export.commands.straight import add_straight_arguments, check_straight, straight_options
from arcflow_export.options import DTYPES, OPSETS, PARTS, SHORT_DTYPES, SLOT_PATTERNS, ExportOptions
from arcflow_export.progress import ByteBars
from arcflow_runtime.disk.manifest import MAX_RANK, RANK_MULTIPLE

if TYPE_CHECKING:
    from arcflow_export.costs.costs import Cost
    from arcflow_export.costs.machine import Machine
    from arcflow_export.export.export import ExportPlan
    from arcflow_export.student.load import Student
    from arcflow_runtime.disk.manifest import DType


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    default = ExportOptions()
    add_source_arguments(parser)
    add_vae_arguments(parser)
    group = parser.add_argument_group("bundle")
    group.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="directory to write")
    group.add_argument("--overwrite", action="store_true", help="replace an existing bundle once the new one is done")
    group.add_argument(
        "--dtype",
        type=lambda text: SHORT_DTYPES.get(text, text),
        choices=DTYPES,
        default=default.dtype,
        help="or short: fp32, bf16, fp16; default: %(default)s",
    )
    group.add_argument(
        "--precision",
        action="append",
        default=[],
        metavar="PART=DTYPE[,...]",
        help="another dtype for one part, such as text_encoder_2=bf16,vae=fp16; repeatable",
    )
    group.add_argument(
        "--keep-float32",
        action="append",
        default=[],
        metavar="PATTERN[,...]",
        help="names of linears to keep in float32 in parts of reduced precision; repeatable",
    )
    group.add_argument(
        "--scales",
        type=Path,
        metavar="FILE",
        help="from `arcflow calibrate`: keep linears in float32 whose output exceeds half of float16's range there",
    )
    group.add_argument(
        "--opset",
        type=int,
        choices=OPSETS,
        default=default.opset,
        help="23 has attention as one operator, 20 decomposes it; default: %(default)s",
    )
    group.add_argument(
        "--steps",
        type=_steps,
        metavar="N[,N...]",
        help="step counts whose modulation is baked for Qwen-Image; the first is the bundle's default; default: 2, or "
        "the base's own without --adapter",
    )
    group.add_argument(
        "--keep-conditioner",
        action="store_true",
        help="also write Qwen-Image's conditioner, for step counts that are not baked",
    )
    group.add_argument(
        "--max-px", type=int, default=default.max_px, metavar="PX", help="largest height or width; default: %(default)s"
    )
    group.add_argument(
        "--max-sequence-length",
        type=int,
        default=default.max_sequence_length,
        metavar="TOKENS",
        help="largest number of text tokens, and the bundle's default; default: %(default)s",
    )
    group.add_argument(
        "--lora-slots",
        action="append",
        default=[],
        metavar="attn|all|PATTERN[,...]",
        help="linears of backbone, conditioner and CLIP that can take a LoRA at each request, by name; repeatable",
    )
    group.add_argument(
        "--lora-max-rank",
        type=int,
        default=default.lora_max_rank,
        metavar="RANK",
        help="largest rank of the LoRAs of one request, all together; a multiple of 8; default: %(default)s",
    )
    add_schedule_arguments(group)
    add_straight_arguments(parser)
    add_anyway(parser)
    group.add_argument("--dry-run", action="store_true", help="check everything and print what would be written")
    group.add_argument("--json", action="store_true", help="print the plan or result as JSON")


def run(args: argparse.Namespace) -> int:
    """Export the bundle."""
    from arcflow_export.export.staging import check_out

    options = _options(args)
    if not args.dry_run:
        check_out(args.out, args.overwrite)
    quiet_libraries()
    from arcflow_export.export.export import export_bundle, plan_export

    student = open_student(args)
    if student.adapter is not None:
        warn_of_shift(student, options.shift)
    else:
        options = straight_options(options, args, student)
    if args.scales is not None:
        options = _with_measured(options, args.scales, student)
    plan = plan_export(student, options)
    if not args.json:
        print(_describe(plan))
    if args.dry_run:
        if args.json:
            print(json.dumps(_as_dict(plan), indent=2))
        else:
            print(f"dry run: {plan.bytes:,} bytes of weights would be written to {args.out}")
        return 0
    announce(partial(_cost, plan), args.out.absolute().parent, args.anyway)
    with ByteBars() as bars:
        out = export_bundle(plan, args.out, shlex.join(["arcflow", *sys.argv[1:]]), args.overwrite, bars)
    from arcflow_export.export.runs_on import runs_on
    from arcflow_runtime.disk.bundle import Bundle

    found = runs_on(Bundle.open(out))
    if args.json:
        result = {"out": str(out), "runs_on": dataclasses.asdict(found), "stages": bars.stages}
        print(json.dumps(_as_dict(plan) | result, indent=2))
        return 0
    following = (
        f'generate with: arcflow generate {out} "a prompt" --out image.png'
        if found.onnxruntime
        else f"build engines with: arcflow build {out} --backend tensorrt-rtx --target sm89"
    )
    print(f"wrote {out}; {following}\n{found.sentence()}")
    return 0


def _cost(plan: ExportPlan, machine: Machine) -> Cost:
    from arcflow_export.costs.costs import export_cost
    from arcflow_export.costs.work import PartWork

    student = plan.student
    parts = {
        p.part.name: PartWork(p.parameters, p.bytes, len(p.params), 0, 0, 0, str(p.part.precision)) for p in plan.parts
    }
    cost = export_cost(parts, student.base_bytes, student.adapter_bytes, student.outline.width, machine)
    return dataclasses.replace(cost, memory_bytes=cost.memory_bytes + student.lora_bytes)


def _steps(text: str) -> tuple[int, ...]:
    from arcflow_runtime.generate.request import MAX_INFERENCE_STEPS

    try:
        steps = tuple(dict.fromkeys(int(n) for n in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers such as 2 or 2,4, got {text!r}") from None
    if not all(1 <= n <= MAX_INFERENCE_STEPS for n in steps):
        raise argparse.ArgumentTypeError(f"step counts must be between 1 and {MAX_INFERENCE_STEPS}, got {text!r}")
    return steps


def _options(args: argparse.Namespace) -> ExportOptions:
    from arcflow_runtime.errors import RequestError

    if args.max_px < 16 or args.max_px % 16:
        raise RequestError(f"--max-px must be a positive multiple of 16, got {args.max_px}")
    if args.max_sequence_length < 1:
        raise RequestError(f"--max-sequence-length must be at least 1, got {args.max_sequence_length}")
    if not 0 < args.lora_max_rank <= MAX_RANK or args.lora_max_rank % RANK_MULTIPLE:
        raise RequestError(
            f"--lora-max-rank must be a multiple of {RANK_MULTIPLE} up to {MAX_RANK}, got {args.lora_max_rank}"
        )
    check_straight(args)
    if args.adapter is not None:
        check_schedule(args)
    default = ExportOptions()
    slots = [pattern for text in args.lora_slots for pattern in _items(text, "--lora-slots")]
    return ExportOptions(
        args.dtype,
        args.opset,
        args.steps,
        args.keep_conditioner,
        args.max_px,
        args.max_sequence_length,
        _precision(args.precision),
        tuple(pattern for text in args.keep_float32 for pattern in _items(text, "--keep-float32")),
        default.shift if args.shift is None else args.shift,
        default.timestep_ratio if args.timestep_ratio is None else args.timestep_ratio,
        tuple(SLOT_PATTERNS.get(pattern, pattern) for pattern in slots),
        args.lora_max_rank,
    )


def _items(text: str, option: str) -> list[str]:
    from arcflow_runtime.errors import RequestError

    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise RequestError(f"{option} must be names separated by commas, got {text!r}")
    return items


def _precision(texts: list[str]) -> tuple[tuple[str, DType], ...]:
    """Parse the values of --precision -> (part, dtype) pairs, each part once."""
    import difflib

    from arcflow_runtime.errors import RequestError

    def close(word: str, known: Collection[str]) -> str:
        found = difflib.get_close_matches(word, known, 1)
        return f"; did you mean {found[0]}?" if found else ""

    chosen: dict[str, DType] = {}
    for item in [item for text in texts for item in _items(text, "--precision")]:
        name, equals, dtype = item.partition("=")
        if not equals:
            raise RequestError(f"--precision must be PART=DTYPE such as text_encoder_2=bf16, got {item!r}")
        part = "vae_decoder" if name == "vae" else name
        if part not in PARTS:
            raise RequestError(f"--precision: PART must be one of {', '.join(PARTS)}, got {name!r}{close(name, PARTS)}")
        if dtype in ("fp8", "float8", "fp8_e4m3"):
            raise RequestError(f"--precision: {item}: an export cannot write FP8; use `arcflow quantize` afterwards")
        known: dict[str, DType] = {**SHORT_DTYPES, **{d: d for d in DTYPES}}
        if dtype not in known:
            raise RequestError(
                f"--precision: {name} must be one of {', '.join(DTYPES)}, got {dtype!r}{close(dtype, known)}"
            )
        if chosen.setdefault(part, known[dtype]) != known[dtype]:
            raise RequestError(f"--precision: {part} is given as {chosen[part]} and as {known[dtype]}; choose one")
    return tuple(chosen.items())


def _with_measured(options: ExportOptions, scales: Path, student: Student) -> ExportOptions:
    """Add the layers to `keep_float32` whose outputs came near float16's limit in calibration."""
    from arcflow_export.student.keep import measured
    from arcflow_runtime.errors import RequestError

    if "float16" not in map(options.part_dtype, PARTS):
        raise RequestError("--scales: no part is in float16, so nothing can overflow; leave the option out")
    layers = measured(scales, student, options.part_dtype)
    return dataclasses.replace(options, keep_float32=(*options.keep_float32, *layers))


def _describe(plan: ExportPlan) -> str:
    student = plan.student
    lines = [
        f"base     {student.base.name}: {student.family}, {student.base_parameters:,} parameters in the transformer",
    ]
    if (adapter := student.adapter) is not None:
        ranks = sorted({pair.a.shape[0] for pair in adapter.loras.values()})
        share = adapter.parameters / student.base_parameters
        lines.append(
            f"adapter  {adapter.source.name}: {len(adapter.loras)} LoRA linears of rank {', '.join(map(str, ranks))}, "
            f"{len(adapter.full)} full tensors, K {adapter.num_gaussians}, P {adapter.logweights_channels}; "
            f"{adapter.parameters:,} parameters, {share:.1%} of the transformer"
        )
    elif plan.options.schedule is not None:
        lines.append(f"schedule {plan.options.schedule.describe()}")
    for style in student.styles:
        counts = ", ".join(f"{len(pairs)} linears of {component}" for component, pairs in style.pairs.items())
        lines.append(f"lora     {style.source.name} x {style.scale:g}: {counts}")
        lines += [f"         left out {s.key}: it {s.reason}" for s in style.lora.skipped]
    if student.vae is not None:
        lines.append(f"vae      {student.vae.name}: {student.vae_config['_class_name']} in place of the base's decoder")
    lines.append("")
    lines.append(f"  {'part':16}{'parameters':>18}{'bytes':>18}  dtype")
    for p in plan.parts:
        precision = str(p.part.precision).removeprefix("torch.")
        if kept := len(p.float32_layers):
            precision += f", {kept} linear{'s' if kept > 1 else ''} in float32"
        lines.append(f"  {p.part.name:16}{p.parameters:>18,}{p.bytes:>18,}  {precision}")
    for name, layers in _slots(plan).items():
        lines.append(f"  {len(layers)} linears of {name} take LoRAs up to rank {plan.options.lora_max_rank}")
    if plan.baked is not None:
        shipped = "kept as well" if plan.options.keep_conditioner else "its conditioner is not shipped"
        lines.append(f"  modulation is baked for {', '.join(map(str, plan.options.steps or ()))} steps; {shipped}")
    return "\n".join(lines)


def _slots(plan: ExportPlan) -> dict[str, list[str]]:
    """Names of the linears that get LoRA slots, by part; those of a modulation table under "modulation"."""
    found = {p.part.name: list(p.slots) for p in plan.parts} | {"modulation": list(plan.table_slots)}
    return {name: layers for name, layers in found.items() if layers}


def _as_dict(plan: ExportPlan) -> dict[str, Any]:
    adapter = plan.student.adapter
    return {
        "family": plan.student.family,
        "base_parameters": plan.student.base_parameters,
        "sampler": plan.student.sampler,
        "adapter_parameters": 0 if adapter is None else adapter.parameters,
        "adapter_loras": 0 if adapter is None else len(adapter.loras),
        "loras": [
            {"name": s.source.name, "scale": s.scale, "skipped": [x.key for x in s.lora.skipped]}
            for s in plan.student.styles
        ],
        "parts": {
            p.part.name: {
                "parameters": p.parameters,
                "bytes": p.bytes,
                "precision": str(p.part.precision).removeprefix("torch."),
                "float32_layers": p.float32_layers,
            }
            for p in plan.parts
        },
        "bytes": plan.bytes,
        "vae": None if plan.student.vae is None else plan.student.vae.name,
        "lora_slots": _slots(plan),
    }
