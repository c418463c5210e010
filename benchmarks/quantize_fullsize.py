"""Measure `arcflow quantize` on a FLUX backbone of real size with random weights: time, peak memory and sizes.

The bundle is that of the tiny golden student with its backbone replaced: the real graph of FLUX.1-dev, traced here,
with weights from a seeded generator. `--blocks` makes it smaller. With `--build sm89`, TensorRT-RTX also builds the
result. Criterion: peak resident memory at most 6 GiB. The files are deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir
from export_fullsize import MeasureError, drop_cache, run_arcflow
from fullsize_bundle import flux_parts, make_tiny, put_part
from machine import describe as describe_machine

from arcflow_export.formats.policy import load_policy, select
from arcflow_export.formats.scales import ActivationRange, PromptSet, Scales
from arcflow_export.graph.linears import find_linears
from arcflow_runtime.disk.bundle import Bundle

MAX_RESIDENT_BYTES = 6 << 30
BLOCKS = (19, 38)
_SEED = 0


def make_bundle(root: Path, blocks: tuple[int, int]) -> Bundle:
    """Write the bundle; see the module's docstring."""
    with tempfile.TemporaryDirectory() as configs:
        backbone = flux_parts(Path(configs), "bfloat16", blocks)["backbone"]
    return put_part(make_tiny(root), backbone)


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
