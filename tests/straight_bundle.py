"""Make a straight student's bundle of an ArcFlow student's, without an export: its velocity is the mean of mode 0."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import shutil
from pathlib import Path

import onnx
from onnx import helper

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.manifest import MANIFEST, DynamicShift, FileEntry, Schedule, TensorSpec

#: FLUX.1-dev's schedule, Qwen-Image's, and that of its Lightning LoRAs.
_FLUX = Schedule(1.0, 1.0, 2, DynamicShift("exponential", 0.5, 1.15, 256, 4096))
_QWEN = Schedule(1.0, 1.0, 2, DynamicShift("exponential", 0.5, 0.9, 256, 8192), 0.02)
#: The straight students of the cases on the host driver: name, the bundle that they are made of, schedule, scale of the
#: guidance by a negative prompt.
_STUDENTS = [
    ("flux", "flux", _FLUX, None),
    ("float16", "float16", _FLUX, None),
    ("qwen", "conditioner", _QWEN, 4.0),
    ("table", "qwen", Schedule(3.0, 1.0, 4), 1.5),
    ("slots", "qwen slots", Schedule(3.0, 1.0, 2), 4.0),
]


def with_straight(roots: dict[str, Path], once) -> dict[str, Path]:
    """The bundles `roots`, by name, and "straight ..." for each student that can be made of one of them."""
    made = dict(roots)
    for name, source, schedule, scale in _STUDENTS:
        if source in roots:
            make = functools.partial(_straighten_into, roots[source], schedule=schedule, true_cfg_scale=scale)
            made[f"straight {name}"] = once(f"straight {name} on the driver", make) / "bundle"
    return made


def _straighten_into(source, folder, **options):
    straighten(source, folder / "bundle", **options)


def straighten(source: Path, out: Path, schedule: Schedule, true_cfg_scale: float | None = None) -> Path:
    """Copy the bundle `source` to `out` as a straight student's with this schedule; Qwen-Image's needs the scale."""
    shutil.copytree(source, out)
    m = Bundle.open(out).manifest
    part = m.parts["backbone"]
    path = out / part.graph
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    graph.initializer.append(helper.make_tensor("first_mode", onnx.TensorProto.INT64, [], [0]))
    graph.node.append(helper.make_node("Gather", ["means", "first_mode"], ["velocity"], axis=2))
    kind = next(o for o in graph.output if o.name == "means").type.tensor_type.elem_type
    batch, tokens, _, channels = next(spec.shape for spec in part.outputs if spec.name == "means")
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("velocity", kind, [batch, tokens, channels]))
    onnx.save(model, path)
    changed = FileEntry(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    velocity = TensorSpec("velocity", part.precision, (batch, tokens, channels))
    files, table = {**m.files, part.graph: changed}, m.modulation
    if table is not None and schedule.dynamic_shift is not None:
        (out / table.file).unlink()
        del files[table.file]
        table = None
    straight = dataclasses.replace(
        m,
        version=4,
        sampler="linear",
        schedule=schedule,
        latents=dataclasses.replace(m.latents, num_gaussians=1),
        parts={**m.parts, "backbone": dataclasses.replace(part, outputs=(velocity,))},
        provenance=dataclasses.replace(m.provenance, adapter=None),
        true_cfg_scale=true_cfg_scale,
        modulation=table,
        files=files,
    )
    (out / MANIFEST).write_text(straight.to_json())
    return out
