"""Generate one image with FLUX.1-dev's real sizes in int8 on a CPU, from prompt to PNG: time and memory of each stage.

Every part is exported at its real size in float32, with random weights, and quantised at once, so that the disk holds
one part in float32 at a time. The parts are then put into one bundle, and `arcflow generate` makes the image, with one
part in memory at a time. Criteria: all parts take at most 17 GB, peak resident memory while generating is at most
20 GiB, and the image is finite. The files are deleted at the end.

    python benchmarks/full_image.py --folder /var/tmp
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnxruntime as ort
from export_fullsize import MeasureError, drop_cache, run_arcflow
from fullsize_bundle import flux_parts, make_tiny, put_part
from fullsize_models import components
from machine import describe as describe_machine
from PIL import Image

from arcflow_export.costs.work import call_sizes, part_work
from arcflow_export.formats.policy import load_policy
from arcflow_runtime.disk import manifest as b
from arcflow_runtime.disk.bundle import Bundle

POLICY = "flux-int8"
MAX_DISK_BYTES, MAX_RESIDENT_BYTES = 17e9, 20 << 30
PROMPT = "a large red circle on a blue background"
STEPS, TEXT_TOKENS = 2, 512
#: The backbone in float32 and in int8, with some room.
_NEEDED_BYTES = 46_000_000_000
#: Size of the product that measures the processor: tokens at 512 px, width, MLP width.
_PRODUCT = (1536, 3072, 12288)


def make_part(name: str, tiny: Bundle, folder: Path, blocks: tuple[int, int] | None) -> tuple[Bundle, dict[str, Any]]:
    """Export one part with random weights in a copy of the tiny bundle, and quantise it if the policy names it.

    Args:
        name: of the part.
        tiny: the tiny student's bundle in float32.
        folder: where to work; it is empty at first.
        blocks: as in `flux_parts`.

    Returns:
        The bundle with this part, and what both stages took.
    """
    with tempfile.TemporaryDirectory() as configs:
        part = flux_parts(Path(configs), "float32", blocks)[name]
    began = time.perf_counter()
    bundle = put_part(Bundle.open(shutil.copytree(tiny.root, folder / "float32")), part)
    found: dict[str, Any] = {"part": name, "export_s": round(time.perf_counter() - began, 2)}
    found["parameters"] = bundle.manifest.parts[name].parameters
    found["float32_bytes"] = _size(bundle, name)
    patterns = load_policy(POLICY).parts.get(name)
    if patterns is not None:
        policy = folder / "policy.toml"
        lines = [f'name = "{name}"', 'format = "int8"', f"[parts.{name}]", f"include = {list(patterns.include)!r}"]
        if patterns.stored is not None:
            lines.append(f"[parts.{name}.stored]")
            lines += [f"{key} = {list(value)!r}" for key, value in dataclasses.asdict(patterns.stored).items()]
        policy.write_text("\n".join(lines) + "\n")
        drop_cache([bundle.path(bundle.manifest.parts[name].weights)])
        out = folder / "int8"
        _, found["quantize"] = run_arcflow("quantize", str(bundle.root), "--policy", str(policy), "--out", str(out))
        shutil.rmtree(bundle.root)
        bundle = Bundle.open(out)
    found["bytes"] = _size(bundle, name)
    return bundle, found


def make_bundle(folder: Path, blocks: tuple[int, int] | None) -> tuple[Bundle, list[dict[str, Any]]]:
    """Make every part, and join them in `folder`/flux-int8."""
    tiny = make_tiny(folder / "tiny", "float32")
    out = Path(shutil.copytree(tiny.root, folder / "flux-int8"))
    manifest = tiny.manifest
    config = {c.folder: c.config for c in components("flux")}["transformer"]
    axes = tuple(config.get("axes_dims_rope", (16, 56, 56)))
    manifest = dataclasses.replace(manifest, rotary=b.Rotary(manifest.rotary.theta, axes))
    rows = []
    # The largest first, while the disk holds nothing else.
    for name in sorted(manifest.parts, key=lambda name: name != "backbone"):
        with tempfile.TemporaryDirectory(prefix="part-", dir=folder) as own:
            made, row = make_part(name, tiny, Path(own), blocks)
            spec = made.manifest.parts[name]
            for file in (spec.graph, spec.weights):
                shutil.move(made.path(file), out / file)
        files = {file: made.manifest.files[file] for file in (spec.graph, spec.weights)}
        manifest = dataclasses.replace(
            manifest, parts={**manifest.parts, name: spec}, files={**manifest.files, **files}
        )
        rows.append(row)
        print(f"{name}: {row}", file=sys.stderr)
    manifest = dataclasses.replace(manifest, version=manifest.needed_version)
    (out / b.MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Bundle.open(out), rows


def floor(size_px: int, blocks: tuple[int, int] | None) -> dict[str, Any]:
    """Multiply-add operations of one image, and this machine's speed in one large product, in int8 and float32."""
    sizes = call_sizes(size_px, size_px, TEXT_TOKENS, STEPS)
    with tempfile.TemporaryDirectory() as configs:
        flops = {
            name: part_work(part, sizes).flops for name, part in flux_parts(Path(configs), "float32", blocks).items()
        }
    flops["backbone"] *= STEPS
    return {"operations": flops, "per_second": {kind: _speed(kind) for kind in ("int8", "float32")}}


def _speed(kind: str) -> float:
    """Operations per second of one product, the best of five runs."""
    rows, inner, columns = _PRODUCT
    rng, h = np.random.default_rng(0), onnx.helper
    types = onnx.TensorProto
    if kind == "int8":
        node, weight = "MatMulInteger", rng.integers(-127, 128, (inner, columns), np.int8)
        x, out = rng.integers(0, 256, (rows, inner), np.uint8), types.INT32
        extra = [onnx.numpy_helper.from_array(np.array(128, np.uint8), "zero")]
    else:
        node, weight = "MatMul", rng.standard_normal((inner, columns), np.float32)
        x, out, extra = rng.standard_normal((rows, inner), np.float32), types.FLOAT, []
    graph = h.make_graph(
        [h.make_node(node, ["x", "w", *(t.name for t in extra)], ["y"])],
        kind,
        [h.make_tensor_value_info("x", h.np_dtype_to_tensor_dtype(x.dtype), x.shape)],
        [h.make_tensor_value_info("y", out, (rows, columns))],
        [onnx.numpy_helper.from_array(weight, "w"), *extra],
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        session.run(None, {"x": x})
        best = min(best, time.perf_counter() - began)
    return 2 * rows * inner * columns / best


def measure(folder: Path, size_px: int, blocks: tuple[int, int] | None) -> dict[str, Any]:
    """Make the bundle in `folder`, and generate one image with it.

    Raises:
        MeasureError: a command failed; its message is on stderr.
    """
    if blocks is None and (free := shutil.disk_usage(folder).free) < _NEEDED_BYTES:
        raise MeasureError(
            f"{folder} must have {_NEEDED_BYTES / 1e9:.0f} GB free, got {free / 1e9:.0f} GB; use another disk"
        )
    load = os.getloadavg()
    bundle, rows = make_bundle(folder, blocks)
    drop_cache([bundle.path(p.weights) for p in bundle.manifest.parts.values()])
    png = folder / "image.png"
    sizes = ("--height", str(size_px), "--width", str(size_px), "--steps", str(STEPS), "--seed", "0")
    before = os.getloadavg()
    printed, used = run_arcflow("generate", str(bundle.root), PROMPT, *sizes, "--memory", "low", "--out", str(png))
    pixels = np.asarray(Image.open(png))
    disk = sum(f.stat().st_size for f in bundle.root.rglob("*") if f.is_file())
    return {
        "command": f"python benchmarks/full_image.py --size {size_px}"
        + ("" if blocks is None else f" --blocks {blocks[0]},{blocks[1]}"),
        "machine": describe_machine() | {"load_average": load, "load_average_generating": before},
        "size_px": size_px,
        "text_tokens": TEXT_TOKENS,
        "steps": STEPS,
        "policy": POLICY,
        "parts": rows,
        "disk_bytes": disk,
        "generate": used | {"printed": printed},
        "floor": floor(size_px, blocks),
        "image": {"shape": list(pixels.shape), "mean": float(pixels.mean()), "std": float(pixels.std())},
        "criterion": {
            "max_disk_bytes": MAX_DISK_BYTES,
            "disk_met": disk <= MAX_DISK_BYTES,
            "max_resident_bytes": MAX_RESIDENT_BYTES,
            "resident_met": used["peak_resident_bytes"] <= MAX_RESIDENT_BYTES,
        },
    }


def _size(bundle: Bundle, part: str) -> int:
    spec = bundle.manifest.parts[part]
    return sum(bundle.manifest.files[name].bytes for name in (spec.graph, spec.weights))


def main() -> int:
    """Parse the command line and measure; returns 0 if the criteria are met, 1 if not or if an error occurred."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: the temporary folder)")
    parser.add_argument("--size", type=int, default=512, metavar="PX", help="image side (default: %(default)s)")
    parser.add_argument("--blocks", metavar="DOUBLE,SINGLE", help="fewer blocks, for a trial")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "full_image_flux.json")
    args = parser.parse_args()
    blocks = None
    if args.blocks is not None:
        double, single = map(int, args.blocks.split(","))
        blocks = (double, single)
    try:
        with tempfile.TemporaryDirectory(prefix="full-image-", dir=args.folder) as folder:
            result = measure(Path(folder), args.size, blocks)
    except (MeasureError, OSError) as e:
        print(f"full_image: error: {e}", file=sys.stderr)
        return 1
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    met = result["criterion"]
    print(json.dumps({key: result[key] for key in ("disk_bytes", "image", "criterion", "floor")}, indent=2))
    print(
        f"generated in {result['generate']['wall_s']:.0f} s, "
        f"peak resident {result['generate']['peak_resident_bytes'] / 2**30:.2f} GiB"
    )
    return 0 if met["disk_met"] and met["resident_met"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
