"""Make FP8 bundles for tests, with ranges measured on the bundle itself, and bundles with one wrong weight."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from arcflow_export.drift.cases import DriftCase, ImageSettings
from arcflow_export.drift.layers import LayerDrift, drift_of_layers, measure_layers
from arcflow_export.drift.stages import BundleStages, backbone_inputs
from arcflow_export.formats.policy import load_policy
from arcflow_export.formats.scales import ActivationRange, PromptSet, Scales
from arcflow_export.graph.linears import find_linears
from arcflow_export.quantize.quantize import plan_quantization, quantize_bundle
from arcflow_runtime.disk.bundle import Bundle
from tests.fake_bundle import list_files, write_manifest

#: Range of every linear in a first quantisation, which only serves to measure the inputs.
_WIDE = 100.0


def scene(bundle: Bundle, height_px: int = 64, width_px: int = 64) -> ImageSettings:
    m = bundle.manifest
    steps, guidance = m.schedule.num_inference_steps, 3.5 if m.guidance else None
    return ImageSettings(height_px, width_px, steps, guidance, min(m.text.max_sequence_length, 16))


def local_drift(reference: Bundle, candidate: Bundle, cases: Sequence[DriftCase]) -> list[LayerDrift]:
    """The drift of each layer of the backbone, measured on the reference's inputs."""
    stages = BundleStages(reference, cases, scene(reference), candidate.manifest.reference_dtype)
    text = stages.encode()
    batches = stages.batches(text, stages.modulation(text.pooled))
    trajectory = stages.generate(batches)
    inputs = [list(backbone_inputs(batches, trajectory, step)) for step in range(len(trajectory.heads))]
    return drift_of_layers(candidate, "backbone", measure_layers(reference, candidate, "backbone", inputs))


def make_fp8(source: Path, out: Path, cases: Sequence[DriftCase], policy: str = "flux") -> Path:
    """Quantise a bundle's backbone to FP8, with the ranges of its linears' inputs measured on `cases`."""
    wide = _quantize(source, out.with_name(f"{out.name}.wide"), {}, policy)
    drift = local_drift(Bundle.open(source), Bundle.open(wide), cases)
    amax = {d.layer: max(d.reach) * _WIDE for d in drift if d.reach is not None}
    shutil.rmtree(wide)
    return _quantize(source, out, amax, policy)


def edit_backbone(bundle: Path, out: Path, tensor: str, factor: float) -> Path:
    """Copy a bundle and multiply one constant of its backbone by `factor`."""
    shutil.copytree(bundle, out)
    opened = Bundle.open(bundle)
    part = opened.manifest.parts["backbone"]
    model = ir.load(bundle / part.graph)
    value = model.graph.initializers[tensor]
    assert value.const_value is not None
    array = value.const_value.numpy()
    value.const_value = ir.tensor((array.astype(np.float32) * factor).astype(array.dtype), name=tensor)
    (out / part.weights).unlink()
    (out / part.graph).unlink()
    ir.save(model, out / part.graph, external_data=part.weights)
    write_manifest(out, dataclasses.replace(opened.manifest, files=list_files(out)))
    return out


def _quantize(source: Path, out: Path, amax: dict[str, float], policy: str) -> Path:
    bundle = Bundle.open(source)
    p = bundle.manifest.provenance
    layers = find_linears(ir.load(bundle.path(bundle.manifest.parts["backbone"].graph)))
    ranges = {name: ActivationRange((amax.get(name, _WIDE),), 1, None) for name in layers}
    scales = Scales(
        base=p.base,
        adapter=p.adapter,
        loras=p.loras,
        family=bundle.manifest.family,
        method="max",
        percentile=None,
        prompts=PromptSet("test", "0" * 64, 1),
        num_inference_steps=1,
        sizes=((64, 64),),
        guidance_scale=None,
        seed=0,
        tools={},
        parts={"backbone": ranges},
    )
    return quantize_bundle(plan_quantization(bundle, scales, load_policy(policy)), out, "test")
