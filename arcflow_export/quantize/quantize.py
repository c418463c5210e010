"""Quantise a bundle: bundle, policy and, if its format needs them, scales -> a new bundle with linears quantised.

`plan_quantization` checks everything without reading weights; `quantize_bundle` writes the bundle atomically.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import onnx_ir as ir

from arcflow_export.checkpoint.tensors import TensorIndex
from arcflow_export.errors import QuantizeError
from arcflow_export.export.staging import staged
from arcflow_export.export.write import attach, num_bytes, write_weights
from arcflow_export.formats.policy import QuantizationPolicy, Storage, select_formats, select_stored
from arcflow_export.formats.scales import Scales
from arcflow_export.graph.linears import LinearNode, find_linears, shared_inputs
from arcflow_export.progress import ByteProgress, Silent
from arcflow_export.quantize.formats import WEIGHT_FORMATS
from arcflow_export.quantize.graph import QuantizeLinears, is_quantized
from arcflow_export.quantize.stored import PlainWeight, find_weights, narrowed, row_layers
from arcflow_export.quantize.stored import tensors as stored_tensors
from arcflow_export.quantize.weights import QuantizedWeights, scan_weights
from arcflow_runtime.disk import manifest as b
from arcflow_runtime.disk.bundle import Bundle, timestamp
from arcflow_runtime.disk.external_data import checked_graph
from arcflow_runtime.disk.files import sha256_file
from arcflow_runtime.disk.quant_formats import FORMATS
from arcflow_runtime.errors import BundleError

_SHOWN = 5


@dataclass(frozen=True)
class PartQuantizationPlan:
    """The plan for one part: its graph, all of its linears and weights, the formats of the linears that are quantised,
    and how other weights are stored, by name.
    """

    name: str
    model: ir.Model = field(repr=False)
    linears: Mapping[str, LinearNode] = field(repr=False)
    weights: Mapping[str, PlainWeight] = field(repr=False)
    formats: Mapping[str, b.QuantFormat] = field(default_factory=dict)
    stored: Mapping[str, Storage] = field(default_factory=dict)

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of the linears to quantise."""
        return tuple(self.formats)

    @property
    def changed(self) -> bool:
        """True if the part's files are rewritten."""
        return bool(self.formats or self.stored)

    @property
    def saved_bytes(self) -> int:
        """About how many bytes of weights the plan saves."""
        sizes = [
            (self.linears[n].parameters, self.linears[n].dtype, FORMATS[f].weight_bits) for n, f in self.formats.items()
        ]
        bits = {"int8": 8, "float16": 16}
        for name, storage in self.stored.items():
            dtype = self.weights[name].value.dtype
            assert dtype is not None
            sizes.append((self.weights[name].elements, dtype, bits[storage]))
        return sum(elements * (int(8 * dtype.itemsize) - stored) // 8 for elements, dtype, stored in sizes)


@dataclass(frozen=True)
class QuantizationPlan:
    """The plan for a whole bundle; `quantize_bundle` changes its graphs, so a plan can be used once."""

    bundle: Bundle
    scales: Scales | None
    policy: QuantizationPolicy
    parts: tuple[PartQuantizationPlan, ...]

    @property
    def weight_bytes(self) -> int:
        """About how many bytes of weights will be written."""
        files, parts = self.bundle.manifest.files, self.bundle.manifest.parts
        return sum(files[parts[p.name].weights].bytes - p.saved_bytes for p in self.parts if p.changed)


def plan_quantization(bundle: Bundle, scales: Scales | None, policy: QuantizationPolicy) -> QuantizationPlan:
    """Decide which linears are quantised and check that their scales exist; reads graphs, but no weights.

    Args:
        bundle: an unquantised bundle.
        scales: from calibration; None for a format without it.
        policy: selects the linears and their format.

    Raises:
        QuantizeError: the bundle is quantised already, the policy names a part or linear that the bundle does not have,
            it selects linears that were not calibrated or that the format cannot hold, or scales are missing or not
            needed.
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
    _check_scales(scales, policy)
    if scales is not None:
        scales.check_belongs(m)
    parts = []
    for name, part in m.parts.items():
        model = ir.load(checked_graph(bundle, name))
        if is_quantized(model):
            raise QuantizeError(
                f"{bundle.path(part.graph)} is quantised, but the manifest does not say that {name} is; "
                "export the bundle again"
            )
        linears, weights = find_linears(model), find_weights(model)
        formats: dict[str, b.QuantFormat] = {}
        stored: dict[str, Storage] = {}
        if name in policy.parts:
            if policy.parts[name].include:
                formats = select_formats(policy.parts[name], name, list(linears), policy.format)
            stored = _select_stored(policy, name, {n: w for n, w in weights.items() if n not in formats})
            for layer, used in formats.items():
                if (why := WEIGHT_FORMATS[used].refuse(linears[layer])) is not None:
                    raise QuantizeError(f"{name}: {layer} {why}")
                if m.opset < (opset := FORMATS[used].opset):
                    raise QuantizeError(
                        f"{FORMATS[used].title} needs opset {opset}, the bundle has {m.opset}; "
                        f"export with --opset {opset}"
                    )
            if scales is not None:
                _check_calibrated(scales, name, tuple(formats))
        parts.append(PartQuantizationPlan(name, model, linears, weights, formats, stored))
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
            if planned.changed:
                parts[planned.name] = _quantize_part(plan, planned, folder, files, progress)
        _take_over(plan, folder, files, progress)
        provenance = dataclasses.replace(
            m.provenance,
            command=f"{m.provenance.command} && {command}",
            created=timestamp(),
            tools=dict(m.provenance.tools) | {n: metadata.version(n) for n in ("arcflow", "torch", "onnx-ir")},
        )
        manifest = dataclasses.replace(m, parts=parts, files=files, provenance=provenance)
        manifest = dataclasses.replace(manifest, version=manifest.needed_version)
        with (folder / b.MANIFEST).open("w", encoding="utf-8") as f:
            f.write(manifest.to_json())
            f.flush()
            os.fsync(f.fileno())
    return out


def _select_stored(policy: QuantizationPolicy, part: str, weights: Mapping[str, PlainWeight]) -> dict[str, Storage]:
    embeddings = [name for name, weight in weights.items() if weight.embedding]
    return narrowed(select_stored(policy.parts[part], part, list(weights), embeddings), weights)


def _check_scales(scales: Scales | None, policy: QuantizationPolicy) -> None:
    used = [FORMATS[name] for name in policy.formats]
    calibrated = " and ".join(facts.title for facts in used if facts.calibrated)
    if calibrated and scales is None:
        raise QuantizeError(f"{calibrated} needs scales; make them with `arcflow calibrate` and give --scales")
    if not calibrated and scales is not None:
        raise QuantizeError(
            f"{used[0].title} measures its inputs while it runs and takes no scales; leave --scales out"
        )


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
    digest, amax = scan_weights(source, planned.chosen, progress.advance, row_layers(planned.stored))
    if digest != files[spec.weights].sha256:
        raise BundleError(
            f"{source} does not match its SHA-256 in {b.MANIFEST}; it was edited or damaged, export again"
        )
    groups = shared_inputs(planned.linears[name] for name in planned.chosen)
    ranges = {} if plan.scales is None else _input_ranges(plan.scales, planned.name, groups)
    tensors = {
        name: WEIGHT_FORMATS[used].tensors(planned.linears[name], amax[name], ranges.get(name))
        for name, used in planned.formats.items()
    }
    for name, storage in planned.stored.items():
        tensors[name] = stored_tensors(planned.weights[name], storage, amax.get(name))
    weights = QuantizedWeights(index, tensors, [linear.name for group in groups for linear in group])
    params = weights.parameters()
    result = QuantizeLinears(planned.formats, planned.stored)(planned.model)
    target, graph = folder / spec.weights, folder / spec.graph
    target.parent.mkdir(parents=True, exist_ok=True)
    graph.parent.mkdir(parents=True, exist_ok=True)
    titles = " and ".join(
        dict.fromkeys([FORMATS[f].title for f in planned.formats.values()] + [*planned.stored.values()])
    )
    progress.stage(f"{planned.name}: weights in {titles}", sum(num_bytes(p) for p in params))
    files[spec.weights], placed = write_weights(target, params, weights, progress.advance)
    attach(result.model, target, placed)
    ir.save(result.model, graph)
    files[spec.graph] = b.FileEntry(graph.stat().st_size, sha256_file(graph))
    if not planned.formats:
        return spec
    scales = None if plan.scales is None else plan.scales.digest
    others = {name: used for name, used in planned.formats.items() if used != plan.policy.format} or None
    quantization = b.Quantization(plan.policy.format, planned.chosen, plan.policy.digest(), scales, others)
    return dataclasses.replace(spec, quantization=quantization)


def _input_ranges(scales: Scales, part: str, groups: Iterable[tuple[LinearNode, ...]]) -> dict[str, float]:
    """The range of each layer's input. Layers that read the same tensor all get the largest of their ranges."""
    found: dict[str, float] = {}
    for group in groups:
        amax = max(scales.amax(part, linear.name) for linear in group)
        found |= {linear.name: amax for linear in group}
    return found


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
    unchanged = {name for p in plan.parts if not p.changed for name in (m.parts[p.name].graph, m.parts[p.name].weights)}
    return plan.weight_bytes + sum(m.files[name].bytes for name in unchanged)
