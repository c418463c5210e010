"""Measure `arcflow quantize` on a FLUX backbone of real size with random weights: time, peak memory and sizes.

The bundle is that of the tiny golden student with its backbone replaced: the real graph of FLUX.1-dev, traced here,
with weights from a seeded generator. `--blocks` makes it smaller. With `--build sm89`, TensorRT-RTX also builds the
result. Criterion: peak resident memory at most 6 GiB. The files are deleted at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from export_fullsize import MeasureError, drop_cache, run_arcflow
from fullsize import random_chunks
from fullsize_models import LOGWEIGHTS_CHANNELS, NUM_GAUSSIANS, components
from machine import describe as describe_machine

from arcflow_export.checkpoint.sources import Location
from arcflow_export.export.export import export_bundle, plan_export
from arcflow_export.export.write import attach, initializer_name, write_weights
from arcflow_export.formats.policy import load_policy, select
from arcflow_export.formats.scales import ActivationRange, PromptSet, Scales
from arcflow_export.graph.linears import find_linears
from arcflow_export.graph.trace import trace
from arcflow_export.models.flux import build
from arcflow_export.models.layers import parameters
from arcflow_export.options import ExportOptions
from arcflow_export.student.load import load_student
from arcflow_runtime.disk import manifest as b
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.files import sha256_file

MAX_RESIDENT_BYTES = 6 << 30
BLOCKS = (19, 38)
_GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "flux-tiny"
_SEED = 0


class RandomWeights:
    """Random finite bfloat16 tensors with values of at most 2^-7; a tensor depends only on its name.

    The bytes are made in the order in which the file stores them.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self._shapes = shapes

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of tensor `key`."""
        return self._shapes[key]

    def blocks(self, key: str, dtype: torch.dtype, transpose: bool = False) -> Iterator[torch.Tensor]:
        """Yield tensor `key` in flat pieces; the writer only joins them."""
        for chunk in random_chunks(_SEED, key, torch.Size(self._shapes[key]).numel() * dtype.itemsize):
            yield torch.from_numpy(chunk).view(dtype)

    def uncache(self) -> None:
        """Do nothing: no file was read."""


def make_bundle(root: Path, blocks: tuple[int, int]) -> Bundle:
    """Write the bundle; see the module's docstring."""
    student = load_student(Location(str(_GOLDEN / "base")), Location(str(_GOLDEN / "adapter")), [])
    m = Bundle.open(export_bundle(plan_export(student, ExportOptions("bfloat16")), root, "benchmark")).manifest
    (config,) = (c.config for c in components("flux") if c.folder == "transformer")
    config = {**config, "num_layers": blocks[0], "num_single_layers": blocks[1]}
    built = build(config, NUM_GAUSSIANS, LOGWEIGHTS_CHANNELS, "bfloat16", "bfloat16")
    part = next(p for p in built if p.name == "backbone")
    params = [dataclasses.replace(p, transform="none") for p in parameters(part)]
    model = trace(part, ExportOptions().opset)
    live = [p for p in params if initializer_name(p) in model.graph.initializers]
    weights, graph = root / "backbone.safetensors", root / "backbone.onnx"
    source = RandomWeights({p.key: p.shape for p in live if p.key is not None})
    entry, placed = write_weights(weights, live, source, lambda _: None)
    attach(model, weights, placed)
    ir.save(model, graph)
    count = sum(math.prod(p.shape) for p in live if p.key is not None)
    spec = dataclasses.replace(m.parts["backbone"], parameters=count, inputs=part.inputs, outputs=part.outputs)
    files = {weights.name: entry, graph.name: b.FileEntry(graph.stat().st_size, sha256_file(graph))}
    m = dataclasses.replace(m, parts={**m.parts, "backbone": spec}, files={**m.files, **files})
    (root / b.MANIFEST).write_text(m.to_json(), encoding="utf-8")
    return Bundle.open(root)


def make_scales(bundle: Bundle) -> Scales:
    """Scales with ranges between 1 and 64 for every linear that the preset selects."""
    linears = find_linears(ir.load(bundle.path("backbone.onnx")))
    layers = select(load_policy("flux").parts["backbone"], "backbone", list(linears))
    ranges = {name: ActivationRange((2.0 ** (i % 7),) * 2, 1) for i, name in enumerate(layers)}
    p, prompts = bundle.manifest.provenance, PromptSet("none", "0" * 64, 1)
    size = ((1024, 1024),)
    return Scales(
        p.base, p.adapter, p.loras, "flux", "max", None, prompts, 2, size, 3.5, _SEED, {}, {"backbone": ranges}
    )


def measure(folder: Path, blocks: tuple[int, int], target: str | None) -> dict[str, Any]:
    """Make the bundle in `folder`, quantise it there, and build an engine if `target` is given.

    Raises:
        MeasureError: quantising failed; its message is on stderr. A failed build is recorded in the result instead.
    """
    source, scales, out = folder / "bundle", folder / "scales.json", folder / "bundle8"
    bundle = make_bundle(source, blocks)
    make_scales(bundle).save(scales)
    drop_cache([source / "backbone.safetensors"])
    load = os.getloadavg()
    printed, used = run_arcflow("quantize", str(source), "--scales", str(scales), "--out", str(out))
    row = next(p for p in printed["parts"] if p["part"] == "backbone")
    result: dict[str, Any] = {
        "command": f"python benchmarks/quantize_fullsize.py --blocks {blocks[0]},{blocks[1]}",
        "blocks": list(blocks),
        "machine": describe_machine() | {"load_average": load},
        "quantize": used | {"stages": printed["stages"]},
        "coverage": row,
        "criterion": {
            "max_resident_bytes": MAX_RESIDENT_BYTES,
            "resident_met": used["peak_resident_bytes"] <= MAX_RESIDENT_BYTES,
        },
    }
    if target is not None:
        options = ("--target", target, "--parts", "backbone", "--resolutions", "1024")
        result["command"] += f" --build {target}"
        try:
            built, used = run_arcflow("build", str(out), "--backend", "tensorrt-rtx", *options)
        except MeasureError as e:
            result["build"] = {"target": target, "error": str(e)}
        else:
            (engine,) = built["engines"]
            result["build"] = used | {key: engine[key] for key in ("target", "bytes", "build_seconds")}
    return result


def describe(result: dict[str, Any]) -> str:
    """A result of `measure` as text."""
    row, used = result["coverage"], result["quantize"]
    lines = [
        f"FLUX backbone, {result['blocks'][0]} + {result['blocks'][1]} blocks, "
        f"{row['parameters'] / 1e9:.2f} B parameters: "
        f"{row['quantized_linears']} of {row['linears']} linears, "
        f"{row['quantized_parameters'] / row['parameters']:.1%} of the parameters, "
        f"{row['quantized_flops'] / row['flops']:.1%} of the linears' FLOPs",
        f"  {row['bytes_before'] / 1e9:.2f} GB -> {row['bytes_after'] / 1e9:.2f} GB in {used['wall_s']:.0f} s "
        f"({used['user_s']:.0f} s of CPU), peak resident {used['peak_resident_bytes'] / 2**30:.2f} GiB",
    ]
    built = result.get("build")
    if built and "error" in built:
        lines.append(f"  no {built['target']} engine: {built['error']}")
    elif built:
        lines.append(
            f"  {built['target']} engine of {built['bytes'] / 1e9:.2f} GB in {built['build_seconds']:.0f} s, "
            f"peak resident {built['peak_resident_bytes'] / 2**30:.2f} GiB"
        )
    return "\n".join(lines)


def main() -> int:
    """Parse the command line and measure; returns 0 if the criterion is met, 1 if it is missed or an error occurred."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", default=",".join(map(str, BLOCKS)), metavar="DOUBLE,SINGLE")
    parser.add_argument("--build", metavar="SM", help="build this target with TensorRT-RTX too, such as sm89")
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="existing directory to work in")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/quantize_flux.json")
    args = parser.parse_args()
    double, single = map(int, args.blocks.split(","))
    target = args.json or Path(__file__).parent / "results" / "quantize_flux.json"
    try:
        with tempfile.TemporaryDirectory(prefix="quantize-", dir=args.folder) as folder:
            result = measure(Path(folder), (double, single), args.build)
    except (MeasureError, OSError) as e:
        print(f"quantize_fullsize: error: {e}", file=sys.stderr)
        return 1
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(describe(result))
    done = result["criterion"]["resident_met"] and "error" not in result.get("build", {})
    return 0 if done else 1


if __name__ == "__main__":
    raise SystemExit(main())
