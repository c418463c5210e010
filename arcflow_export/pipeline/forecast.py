"""Estimate every stage of a compile job, from the student's configs, the stages' options and the machine's speeds.

`arcflow plan` prints the result.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass

from arcflow_export.checkpoint.layout import adapter_files, base_files, lora_files
from arcflow_export.checkpoint.sources import Location, measure
from arcflow_export.costs.costs import (
    Cost,
    GateWork,
    build_cost,
    calibrate_cost,
    export_cost,
    gate_cost,
    network_bytes,
    quantize_cost,
)
from arcflow_export.costs.machine import Machine
from arcflow_export.costs.work import PartWork, call_sizes, part_work
from arcflow_export.options import STEPS, ExportOptions
from arcflow_export.pipeline.stages import (
    BUILD,
    CALIBRATE,
    DOWNLOAD,
    EXPORT,
    QUANTIZE,
    VERIFY,
    CompileJob,
    Stage,
    plan_stages,
)
from arcflow_export.pipeline.students import Checkpoint
from arcflow_export.student.load import Outline, read_outline
from arcflow_export.student.schedule import choose_schedule, read_schedule
from arcflow_runtime.cli import COMMANDS
from arcflow_runtime.disk.signatures import bakes_modulation


@dataclass(frozen=True)
class SourceBytes:
    """Bytes of the weights of base and adapter (with LoRAs), and how many must still be downloaded."""

    base_bytes: int
    adapter_bytes: int
    missing_bytes: int


def forecast(job: CompileJob, machine: Machine) -> list[Cost]:
    """The cost of every stage, as if no stage was done.

    Downloads the configs of checkpoints on the hub, but no weights.

    Raises:
        SourceError: a checkpoint is missing or wrong.
    """
    adapter = job.student.adapter
    outline = read_outline(
        _location(job.student.base, job.offline), None if adapter is None else _location(adapter, job.offline)
    )
    sources = _measure(job)
    return [_cost(stage, job, outline, sources, machine) for stage in plan_stages(job, {})]


@dataclass(frozen=True)
class Walk:
    """The network calls of an image: steps, calls in each step, and whether a table can replace the conditioner."""

    steps: int
    calls: int
    baked: bool


def _walk(outline: Outline, args: argparse.Namespace, steps: int | None) -> Walk:
    """The calls of a student with the schedule that options name.

    Args:
        outline: of the student.
        args: options of `arcflow export` or `arcflow calibrate`.
        steps: the number of steps that they name.
    """
    baked = bakes_modulation(outline.family)
    if outline.sampler == "momentum":
        return Walk(steps or STEPS[0], 1, baked)
    own = read_schedule(outline.folder, outline.family, outline.config)
    given = None if steps is None else (steps,)
    schedule, scale = choose_schedule(own, args.schedule, args.shift, args.sigmas, args.true_cfg_scale, given)
    guided = scale is not None and scale > 1
    return Walk(steps or schedule.num_inference_steps, 2 if guided else 1, baked and schedule.dynamic_shift is None)


def _cost(stage: Stage, job: CompileJob, outline: Outline, sources: SourceBytes, machine: Machine) -> Cost:
    if stage.name == DOWNLOAD:
        return Cost(DOWNLOAD, None, 0, sources.missing_bytes)
    export = _options(EXPORT, next(s for s in plan_stages(job, {}) if s.name == EXPORT))
    walk = _walk(outline, export, None if export.steps is None else export.steps[0])
    options = ExportOptions(dtype=export.dtype)
    text, px = export.max_sequence_length, min(1024, export.max_px)

    def works(height: int, width: int, tokens: int, steps: int) -> dict[str, PartWork]:
        sizes = call_sizes(height, width, tokens, steps)
        return {part.name: part_work(part, sizes) for part in outline.parts(options.part_dtype)}

    if stage.name == EXPORT:
        parts = _shipped(works(px, px, text, walk.steps), walk)
        return export_cost(parts, sources.base_bytes, sources.adapter_bytes, outline.width, machine)
    if stage.name == CALIBRATE:
        args = _options(CALIBRATE, stage)
        return _calibrate(args, _walk(outline, args, args.num_inference_steps), works, sources, machine)
    parts = _shipped(works(px, px, text, walk.steps), walk)
    quantized = {"backbone": parts["backbone"].parameters}
    if stage.name == QUANTIZE:
        unchanged = sum(p.weight_bytes for name, p in parts.items() if name not in quantized)
        return quantize_cost(parts, quantized, unchanged, machine)
    if stage.name == VERIFY:
        return _gate(_options(VERIFY, stage), walk, works, px, text, machine)
    assert stage.name == BUILD
    if job.quantized is not None:
        backbone = parts["backbone"]
        parts["backbone"] = PartWork(**(vars(backbone) | {"weight_bytes": backbone.parameters}))
    if (chosen := _options(BUILD, stage).parts) is not None:
        parts = {name: parts[name] for name in chosen.split(",") if name in parts}
    return build_cost(parts, len((job.target or "here").split(",")), machine)


def _calibrate(
    args: argparse.Namespace,
    walk: Walk,
    works: Callable[[int, int, int, int], dict[str, PartWork]],
    sources: SourceBytes,
    machine: Machine,
) -> Cost:
    from arcflow_export.formats.prompts import read_prompts

    prompts = len(read_prompts(args.prompts, args.limit).texts)
    height, width = max(args.sizes, key=lambda size: size[0] * size[1])
    parts = works(height, width, args.max_sequence_length, walk.steps)
    batches = -(-prompts // args.batch)
    steps = walk.steps * walk.calls
    memory, read = network_bytes(
        parts, sources.base_bytes, sources.adapter_bytes, args.dtype, args.batch, steps, machine.free_memory_bytes
    )
    return calibrate_cost(parts, prompts, steps, args.dtype, read * batches, memory, machine)


def _gate(
    args: argparse.Namespace,
    walk: Walk,
    works: Callable[[int, int, int, int], dict[str, PartWork]],
    px: int,
    text: int,
    machine: Machine,
) -> Cost:
    from arcflow_export.drift.cases import LIMIT, LIMIT_WITH_JUDGE

    cases = args.limit or (LIMIT_WITH_JUDGE if args.judge else LIMIT)
    steps = args.steps or walk.steps
    calls = 1 if args.true_cfg_scale is not None and args.true_cfg_scale <= 1 else walk.calls
    parts = works(args.height or px, args.width or px, text, steps)
    heads = 4 * (args.height or px) * (args.width or px) // 256 * 1200 * (steps + 2)
    gate = GateWork(cases, steps * calls, False, False, 1.0, kept_bytes=min(cases * heads, 1 << 30))
    return gate_cost(parts, gate, machine)


def _shipped(parts: dict[str, PartWork], walk: Walk) -> dict[str, PartWork]:
    """The parts whose weights are written; a conditioner that is baked into a table is not."""
    return {n: p for n, p in parts.items() if n != "conditioner" or not walk.baked}


def _measure(job: CompileJob) -> SourceBytes:
    base = _bytes(job.student.base, "base checkpoint", base_files, job.offline)
    arc = job.student.adapter
    adapter = (0, 0) if arc is None else _bytes(arc, "adapter", adapter_files, job.offline)
    loras = [_bytes(lora, "LoRA", lora_files, job.offline) for lora in job.student.loras]
    missing = base[1] + adapter[1] + sum(m for _, m in loras)
    return SourceBytes(base[0], adapter[0] + sum(n for n, _ in loras), missing)


def _bytes(checkpoint: Checkpoint, what: str, choose: Callable[..., list[str]], offline: bool) -> tuple[int, int]:
    """Bytes of a checkpoint's weights, and how many of them must be downloaded."""
    if checkpoint.path is not None:
        folder = checkpoint.path / (checkpoint.subfolder or "")
        files = [folder] if folder.is_file() else sorted(folder.rglob("*.safetensors"))
        return sum(f.stat().st_size for f in files), 0
    found = measure(_location(checkpoint, offline), what, choose)
    return found.bytes, found.bytes - found.cached_bytes


def _location(checkpoint: Checkpoint, offline: bool) -> Location:
    name = checkpoint.name if checkpoint.path is None else str(checkpoint.path)
    return Location(name, checkpoint.subfolder, checkpoint.revision, offline)


def _options(name: str, stage: Stage) -> argparse.Namespace:
    """Parse a stage's options with the stage's own parser, so that its defaults apply."""
    module = importlib.import_module(COMMANDS[name])
    parser = argparse.ArgumentParser(allow_abbrev=False)
    module.add_arguments(parser)
    return parser.parse_intermixed_args(stage.command[1:])
