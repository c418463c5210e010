"""Quantise a bundle: bundle, scales and policy -> a new bundle with the selected linears in FP8.

`plan_quantization` checks everything without reading weights; `quantize_bundle` writes the bundle atomically.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import onnx_ir as ir
import torch

from arcflow_export.checkpoint.tensors import TensorIndex
from arcflow_export.errors import QuantizeError
from arcflow_export.export.staging import staged
from arcflow_export.export.write import attach, write_weights
from arcflow_export.formats.policy import QuantizationPolicy, select
from arcflow_export.formats.scales import Scales
from arcflow_export.graph.linears import LinearNode, find_linears
from arcflow_export.models.layers import Parameter
from arcflow_export.progress import ByteProgress, Silent
from arcflow_export.quantize.fp8 import E4M3, make_scale
from arcflow_export.quantize.graph import QuantizeLinears, is_quantized, shared_inputs
from arcflow_export.quantize.weights import QuantizedWeights, scan_weights
from arcflow_runtime.disk import manifest as b
from arcflow_runtime.disk.bundle import Bundle, timestamp
from arcflow_runtime.disk.external_data import checked_graph
from arcflow_runtime.disk.files import sha256_file
from arcflow_runtime.errors import BundleError

_SHOWN = 5
_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT16: torch.float16,
}


@dataclass(frozen=True)
class PartQuantizationPlan:
    """The plan for one part: its graph, all of its linears, and the names of those that become FP8."""

    name: str
    model: ir.Model = field(repr=False)
    linears: Mapping[str, LinearNode] = field(repr=False)
    chosen: tuple[str, ...]


@dataclass(frozen=True)
class QuantizationPlan:
    """The plan for a whole bundle; `quantize_bundle` changes its graphs, so a plan can be used once."""

    bundle: Bundle
    scales: Scales
    policy: QuantizationPolicy
    parts: tuple[PartQuantizationPlan, ...]

    @property
    def weight_bytes(self) -> int:
        """About how many bytes of weights will be written."""
        files, parts = self.bundle.manifest.files, self.bundle.manifest.parts
        whole = sum(files[parts[p.name].weights].bytes for p in self.parts if p.chosen)
        return whole - sum(
            linear.parameters * (_DTYPES[linear.dtype].itemsize - 1)
            for p in self.parts
            for linear in (p.linears[name] for name in p.chosen)
        )


def plan_quantization(bundle: Bundle, scales: Scales, policy: QuantizationPolicy) -> QuantizationPlan:
    """Decide which linears become FP8 and check that their scales exist; reads graphs, but no weights.

    Raises:
        QuantizeError: the bundle is quantised already, the policy names a part or linear that the bundle does not have,
            or it selects linears that were not calibrated.
        CalibrationError: the scales belong to another student.
    """
    m = bundle.manifest
    if done := sorted(name for name, part in m.parts.items() if part.quantization is not None):
        raise QuantizeError(
            f"{bundle.root} is quantised already ({', '.join(done)}); give the bundle that `arcflow export` wrote"
        )
    if unknown := sorted(policy.parts.keys() - m.parts.keys()):
        raise QuantizeError(
            f"policy {policy.name}: the bundle has no part {', '.join(unknown)}; its parts are {', '.join(m.parts)}"
        )
    scales.check_belongs(m)
    parts = []
    for name, part in m.parts.items():
        model = ir.load(checked_graph(bundle, name))
        if is_quantized(model):
            raise QuantizeError(
                f"{bundle.path(part.graph)} has Q or DQ nodes, but the manifest does not say that {name} is quantised; "
                "export the bundle again"
            )
        linears = find_linears(model)
        chosen: tuple[str, ...] = ()
        if name in policy.parts:
            chosen = select(policy.parts[name], name, list(linears))
            _check_calibrated(scales, name, chosen)
        parts.append(PartQuantizationPlan(name, model, linears, chosen))
    return QuantizationPlan(bundle, scales, policy, tuple(parts))


def quantize_bundle(
    plan: QuantizationPlan, out: Path, command: str, overwrite: bool = False, progress: ByteProgress | None = None
) -> Path:
    """Write the quantised bundle to `out` atomically; `plan` cannot be used again.

    Files of unchanged parts are copied, because onnx refuses weights files with several hard links.

    Args:
        plan: from `plan_quantization`.
        out: the new bundle's directory.
        command: the command line, recorded as provenance after the bundle's own.
        overwrite: replace an existing bundle when the new one is complete.
        progress: receives the stages and the bytes read and written.

    Returns:
        `out`.

    Raises:
        QuantizeError: `out` is the bundle itself, or a weight is NaN or Inf.
        BundleError: a weights file does not match its SHA-256.
        ExportError: the disk is full, or `out` cannot be written.
    """
    progress = progress or Silent()
    root, m = plan.bundle.root, plan.bundle.manifest
    if out.exists() and root.exists() and out.samefile(root):
        raise QuantizeError(f"--out: {out} is the bundle itself; give another name")
    with staged(out, overwrite, _needed_bytes(plan)) as folder:
        files, parts = dict(m.files), dict(m.parts)
        for planned in plan.parts:
            if planned.chosen:
                parts[planned.name] = _quantize_part(plan, planned, folder, files, progress)
        _take_over(plan, folder, files, progress)
        provenance = dataclasses.replace(
            m.provenance,
            command=f"{m.provenance.command} && {command}",
            created=timestamp(),
            tools=dict(m.provenance.tools) | {n: metadata.version(n) for n in ("arcflow", "torch", "onnx-ir")},
        )
        manifest = dataclasses.replace(m, parts=parts, files=files, provenance=provenance)
        with (folder / b.MANIFEST).open("w", encoding="utf-8") as f:
            f.write(manifest.to_json())
            f.flush()
            os.fsync(f.fileno())
    return out


def _check_calibrated(scales: Scales, part: str, layers: tuple[str, ...]) -> None:
    known = scales.parts.get(part, {})
    if missing := [layer for layer in layers if layer not in known]:
        shown = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
        raise QuantizeError(
            f"scales: {len(missing)} of the {len(layers)} linears that the policy selects in {part} were not "
            f"calibrated: {shown}; calibrate them, or exclude them in the policy"
        )


def _quantize_part(
    plan: QuantizationPlan,
    planned: PartQuantizationPlan,
    folder: Path,
    files: dict[str, b.FileEntry],
    progress: ByteProgress,
) -> b.Part:
    spec = plan.bundle.manifest.parts[planned.name]
    source = plan.bundle.path(spec.weights)
    index = TensorIndex.open(source, planned.name)
    progress.stage(f"{planned.name}: ranges of weights", files[spec.weights].bytes)
    digest, amax = scan_weights(source, planned.chosen, progress.advance)
    if digest != files[spec.weights].sha256:
        raise BundleError(
            f"{source} does not match its SHA-256 in {b.MANIFEST}; it was edited or damaged, export again"
        )
    dtypes = {name: _DTYPES[planned.linears[name].dtype] for name in planned.chosen}
    weights = QuantizedWeights(
        index,
        {name: make_scale(amax[name], dtypes[name]) for name in planned.chosen},
        _input_scales(plan.scales, planned, dtypes),
    )
    params = _parameters(index, weights, planned.chosen)
    result = QuantizeLinears(planned.chosen)(planned.model)
    target, graph = folder / spec.weights, folder / spec.graph
    target.parent.mkdir(parents=True, exist_ok=True)
    graph.parent.mkdir(parents=True, exist_ok=True)
    progress.stage(f"{planned.name}: weights in FP8", sum(_num_bytes(p) for p in params))
    files[spec.weights], placed = write_weights(target, params, weights, progress.advance)
    attach(result.model, target, placed)
    ir.save(result.model, graph)
    files[spec.graph] = b.FileEntry(graph.stat().st_size, sha256_file(graph))
    quantization = b.Quantization(plan.policy.format, planned.chosen, plan.policy.digest(), plan.scales.digest)
    return dataclasses.replace(spec, quantization=quantization)


def _input_scales(
    scales: Scales, planned: PartQuantizationPlan, dtypes: Mapping[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """The input scale of each layer. Layers that read the same tensor get the same scale, from their largest range."""
    found = {}
    for group in shared_inputs(planned.linears[name] for name in planned.chosen):
        amax = max(scales.amax(planned.name, linear.name) for linear in group)
        for linear in group:
            found[linear.name] = make_scale(torch.tensor(amax, dtype=torch.float64), dtypes[linear.name])
    return found


def _parameters(index: TensorIndex, weights: QuantizedWeights, chosen: tuple[str, ...]) -> list[Parameter]:
    quantized = {f"{name}.weight" for name in chosen}
    params = [Parameter(key, ref.shape, E4M3 if key in quantized else ref.dtype, key=key) for key, ref in index.items()]
    return params + [Parameter(key, tuple(scale.shape), scale.dtype, key=key) for key, scale in weights.scales.items()]


def _take_over(plan: QuantizationPlan, folder: Path, files: Mapping[str, b.FileEntry], progress: ByteProgress) -> None:
    """Copy the bundle's files that were not rewritten."""
    left = [name for name in files if not (folder / name).exists()]
    progress.stage("unchanged files", sum(files[name].bytes for name in left))
    for name in left:
        source, target = plan.bundle.path(name).resolve(), folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        progress.advance(files[name].bytes)


def _needed_bytes(plan: QuantizationPlan) -> int:
    m = plan.bundle.manifest
    unchanged = {name for p in plan.parts if not p.chosen for name in (m.parts[p.name].graph, m.parts[p.name].weights)}
    return plan.weight_bytes + sum(m.files[name].bytes for name in unchanged)


def _num_bytes(p: Parameter) -> int:
    return int(torch.Size(p.shape).numel()) * p.dtype.itemsize
