"""Export a checked student as a bundle: trace the parts, stream their weights, bake modulation, write the manifest.

`plan_export` checks everything from headers alone; `export_bundle` writes the bundle atomically.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import onnx_ir as ir
import torch

from arcflow_export.checkpoint.tokenizer import export_tokenizer
from arcflow_export.export.bake import bake_modulation, modulation_columns
from arcflow_export.export.staging import staged
from arcflow_export.export.write import attach, check_source, initializer_name, num_bytes, write_weights
from arcflow_export.families import facts
from arcflow_export.graph.lora import AddLoraSlots
from arcflow_export.graph.trace import MAX_BATCH, trace
from arcflow_export.models.layers import ModelPart, Parameter, parameters
from arcflow_export.options import STEPS, ExportOptions
from arcflow_export.progress import ByteProgress, Silent
from arcflow_export.student.keep import float32_layers, keep_float32, matching
from arcflow_export.student.load import Student, tokenizer_folders
from arcflow_export.student.schedule import base_schedule
from arcflow_export.student.slots import slot_layers
from arcflow_runtime.disk import manifest as b
from arcflow_runtime.disk.bundle import timestamp
from arcflow_runtime.disk.files import sha256_file
from arcflow_runtime.disk.signatures import bakes_modulation
from arcflow_runtime.errors import RequestError
from arcflow_runtime.maths.schedule import conditioning_timesteps, sigmas


@dataclass(frozen=True)
class PartExportPlan:
    """The plan for one part: its module, its parameters, and the linears that get LoRA slots.

    `unread` are the linears of the checkpoint that the part leaves out.
    """

    part: ModelPart
    params: list[Parameter] = field(repr=False)
    slots: Mapping[str, b.SlotLayer] = field(default_factory=dict, repr=False)
    unread: tuple[str, ...] = field(default=(), repr=False)

    @property
    def parameters(self) -> int:
        """Number of parameters, without constants."""
        return sum(int(torch.Size(p.shape).numel()) for p in self.params if p.key is not None)

    @property
    def bytes(self) -> int:
        """Bytes of weights."""
        return sum(map(num_bytes, self.params))

    @property
    def float32_layers(self) -> tuple[str, ...]:
        """Names of the linears that stay in float32 although the part has another precision."""
        return float32_layers(self.part)


@dataclass(frozen=True)
class ExportPlan:
    """The plan for a whole bundle; it can be used once. Its options are complete: they have steps and a schedule.

    `baked` is Qwen-Image's conditioner, or None. `table_slots` are the slots of its table, with each layer's first
    column.
    """

    student: Student
    options: ExportOptions
    parts: tuple[PartExportPlan, ...]
    baked: ModelPart | None
    table_slots: Mapping[str, tuple[b.SlotLayer, int]] = field(default_factory=dict, repr=False)

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        return sum(p.bytes for p in self.parts)


def plan_export(student: Student, options: ExportOptions) -> ExportPlan:
    """Plan every part and check every tensor's name and shape; reads only headers.

    Raises:
        SourceError: a tensor is missing, or its shape differs from the config.
        RequestError: the options name a part that this student does not have, or a pattern that matches nothing.
    """
    options = _with_schedule(student, options)
    described = student.parts(options.part_dtype)
    names = [part.name for part in described]
    for name, _ in options.precision:
        if name not in names:
            raise RequestError(f"--precision: a {student.family} bundle has the parts {', '.join(names)}, got {name!r}")
    for part, layers in matching(described, options.keep_float32):
        keep_float32(part, layers)
    slots = slot_layers(student.family, described, options.lora_slots)
    parts, baked, table, used = [], None, {}, set()
    for part in described:
        params = parameters(part)
        check_source(params, student.source(part.name), part.name)
        used |= {p.key for p in params}
        if part.name == "conditioner" and _bakes(student, options):
            baked = part
            if not options.keep_conditioner:
                table = _table_slots(part, slots.get(part.name, {}))
                continue
        parts.append(PartExportPlan(part, params, slots.get(part.name, {})))
    transformer = student.indexes["transformer"]
    unread = {
        k.removesuffix(".weight") for k in transformer if k.endswith(".weight") and len(transformer[k].shape) == 2
    }
    left_out = tuple(sorted(name for name in unread if f"{name}.weight" not in used))
    parts = [dataclasses.replace(p, unread=left_out) if p.part.name == "backbone" else p for p in parts]
    if options.lora_slots and not table and not any(p.slots for p in parts):
        raise RequestError(
            "--lora-slots: the patterns match only the timestep's embedding, which is baked into the modulation; "
            "export with --keep-conditioner"
        )
    return ExportPlan(student, options, tuple(parts), baked, table)


def _with_schedule(student: Student, options: ExportOptions) -> ExportOptions:
    """The options with steps and a schedule: that of the released students, or the base's own for a straight student.

    Raises:
        RequestError: the options do not fit the student.
        SourceError: the base's scheduler cannot be read or is not supported.
    """
    if student.sampler == "momentum":
        if options.schedule is not None or options.true_cfg_scale is not None:
            raise RequestError("schedule and true_cfg_scale are for a base without an adapter; leave them out")
        steps = options.steps or STEPS
        return dataclasses.replace(
            options, steps=steps, schedule=b.Schedule(options.shift, options.timestep_ratio, steps[0])
        )
    own, scale = base_schedule(student)
    schedule = options.schedule or own
    if options.true_cfg_scale is not None:
        if scale is None:
            raise RequestError(f"true_cfg_scale must be left out: {student.family} is not guided by a negative prompt")
        scale = options.true_cfg_scale
    steps = options.steps or (schedule.num_inference_steps,)
    if schedule.sigmas is not None and steps != (len(schedule.sigmas),):
        raise RequestError(
            f"steps must be {len(schedule.sigmas)}, the number of sigmas, got {', '.join(map(str, steps))}"
        )
    schedule = dataclasses.replace(schedule, num_inference_steps=steps[0])
    return dataclasses.replace(options, schedule=schedule, true_cfg_scale=scale, steps=steps)


def _bakes(student: Student, options: ExportOptions) -> bool:
    """True if a table can replace the conditioner: the steps' sigmas are the same for every prompt and image size."""
    return bakes_modulation(student.family) and _schedule(options)[1].dynamic_shift is None


def _table_slots(conditioner: ModelPart, layers: Mapping[str, b.SlotLayer]) -> dict[str, tuple[b.SlotLayer, int]]:
    """The slots of a baked table: its own linears among `layers`, in float32, with the first column of each."""
    columns = modulation_columns(conditioner)
    return {
        name: (dataclasses.replace(layer, dtype="float32"), columns[name])
        for name, layer in layers.items()
        if name in columns
    }


def export_bundle(
    plan: ExportPlan, out: Path, command: str, overwrite: bool = False, progress: ByteProgress | None = None
) -> Path:
    """Write the bundle of `plan` to `out` atomically; `plan` cannot be used again.

    Args:
        plan: from `plan_export`.
        out: the bundle's directory.
        command: the command line, recorded as provenance.
        overwrite: replace an existing bundle when the new one is complete.
        progress: receives the stages and the bytes written.

    Returns:
        `out`.

    Raises:
        SourceError: a weight is NaN or Inf or overflows the dtype.
        ExportError: tracing failed, the disk is full, or `out` cannot be written.
    """
    progress = progress or Silent()
    with staged(out, overwrite, plan.bytes) as folder:
        files: dict[str, b.FileEntry] = {}
        modulation = _bake(plan, folder, files, progress)
        parts = {p.part.name: _export_part(p, plan, folder, files, progress) for p in plan.parts}
        tokenizers, pads = _export_tokenizers(plan.student, folder, files, progress)
        manifest = _manifest(plan, parts, tokenizers, pads, modulation, files, command)
        path = folder / b.MANIFEST
        with path.open("w", encoding="utf-8") as f:
            f.write(manifest.to_json())
            f.flush()
            os.fsync(f.fileno())
    return out


def _bake(
    plan: ExportPlan, folder: Path, files: dict[str, b.FileEntry], progress: ByteProgress
) -> b.ModulationTable | None:
    if plan.baked is None:
        return None
    from safetensors.torch import save

    progress.stage("modulation: baking", 0)
    (steps, schedule), family = _schedule(plan.options), _family(plan.student)
    tables: dict[str, torch.Tensor] = {}
    for n in steps:
        reference = plan.options.reference_dtype
        timesteps = conditioning_timesteps(sigmas(n, schedule), family, reference, plan.student.sampler)
        source = plan.student.source("conditioner")
        precision = getattr(torch, plan.options.part_dtype("backbone"))
        table, inputs = bake_modulation(plan.baked, source, torch.from_numpy(timesteps), precision)
        tables[f"num_inference_steps_{n}"] = table
        if plan.table_slots:
            tables[f"conditioning_{n}"] = inputs
    path = folder / "modulation.safetensors"
    path.write_bytes(save(tables))
    files[path.name] = _entry(path)
    layers = {name: layer for name, (layer, _) in plan.table_slots.items()}
    columns = {name: column for name, (_, column) in plan.table_slots.items()}
    return b.ModulationTable(path.name, steps, _slots(plan, layers, ()), columns or None)


def _slots(plan: ExportPlan, layers: Mapping[str, b.SlotLayer], unread: tuple[str, ...]) -> b.LoraSlots | None:
    return b.LoraSlots(layers, b.RANK_MULTIPLE, plan.options.lora_max_rank, unread) if layers else None


def _export_part(
    planned: PartExportPlan, plan: ExportPlan, folder: Path, files: dict[str, b.FileEntry], progress: ByteProgress
) -> b.Part:
    part = planned.part
    progress.stage(f"{part.name}: tracing", 0)
    model = trace(part, plan.options.opset)
    AddLoraSlots(tuple(planned.slots))(model)
    live = [p for p in planned.params if initializer_name(p) in model.graph.initializers]
    graph, weights = folder / f"{part.name}.onnx", folder / f"{part.name}.safetensors"
    progress.stage(f"{part.name}: weights", sum(map(num_bytes, live)))
    files[weights.name], placed = write_weights(weights, live, plan.student.source(part.name), progress.advance)
    attach(model, weights, placed)
    ir.save(model, graph)
    files[graph.name] = _entry(graph)
    count = sum(int(torch.Size(p.shape).numel()) for p in live if p.key is not None)
    precision: b.DType = str(part.precision).removeprefix("torch.")  # type: ignore[assignment]
    lora = _slots(plan, planned.slots, planned.unread)
    return b.Part(graph.name, weights.name, precision, count, part.inputs, part.outputs, lora=lora)


def _export_tokenizers(
    student: Student, folder: Path, files: dict[str, b.FileEntry], progress: ByteProgress
) -> tuple[dict[str, str], dict[str, int | None]]:
    progress.stage("tokenizers", 0)
    names, pads = {}, {}
    for name, source in tokenizer_folders(student).items():
        path = folder / f"{name}.json"
        pads[name] = export_tokenizer(source, path, name)
        files[path.name] = _entry(path)
        names[name] = path.name
    return names, pads


def _entry(path: Path) -> b.FileEntry:
    return b.FileEntry(path.stat().st_size, sha256_file(path))


def _family(student: Student) -> b.Family:
    return student.family  # type: ignore[return-value]


def _schedule(options: ExportOptions) -> tuple[tuple[int, ...], b.Schedule]:
    """Step counts and schedule of a plan's options."""
    assert options.steps is not None and options.schedule is not None, "plan_export sets both"
    return options.steps, options.schedule


def _manifest(
    plan: ExportPlan,
    parts: Mapping[str, b.Part],
    tokenizers: Mapping[str, str],
    pads: Mapping[str, int | None],
    modulation: b.ModulationTable | None,
    files: Mapping[str, b.FileEntry],
    command: str,
) -> b.Manifest:
    student, options = plan.student, plan.options
    found = facts(student.family)
    text = b.PromptFormat(
        options.max_sequence_length,
        template=found.template,
        drop_tokens=found.drop_tokens,
        clip_tokens=found.clip_tokens,
        **{key: pads[tokenizer] for key, tokenizer in found.pad_tokenizers.items()},
    )
    px = b.SizeRange(16, options.max_px)
    slots = any(part.lora for part in parts.values()) or (modulation is not None and modulation.lora is not None)
    config, outline = student.config, student.outline
    version = b.LORA_VERSION if slots else b.PLAIN_VERSION
    return b.Manifest(
        family=_family(student),
        dtype=options.dtype,
        reference_dtype=options.reference_dtype,
        opset=options.opset,
        guidance=outline.guidance,
        schedule=_schedule(options)[1],
        latents=b.Latents(config["in_channels"] // 4, 2, 8, outline.num_gaussians, outline.logweights_channels),
        rotary=b.Rotary(10000.0, tuple(config["axes_dims_rope"])),
        text=text,
        ranges=b.Ranges(b.SizeRange(1, MAX_BATCH), px, px),
        parts=parts,
        tokenizers=tokenizers,
        files=files,
        provenance=_provenance(student, command),
        modulation=modulation,
        sampler=outline.sampler,
        true_cfg_scale=options.true_cfg_scale,
        version=b.STRAIGHT_VERSION if outline.sampler == "linear" else version,
    )


def _provenance(student: Student, command: str) -> b.Provenance:
    tools = {n: metadata.version(n) for n in ("arcflow", "torch", "diffusers", "transformers", "onnx-ir", "onnxscript")}
    tools["python"] = platform.python_version()
    base, adapter, loras = student.sources
    return b.Provenance(
        command=command,
        created=timestamp(),
        tools=tools,
        base=base,
        adapter=adapter,
        loras=loras,
        vae=student.vae_source,
    )
