"""Show the contents of a bundle: parts, sizes, shapes, schedule, provenance and the engines built from it.

With --gpu-memory, say what the bundle needs on a GPU in each memory mode. Nothing is loaded for that.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arcflow_runtime.disk.bundle import Bundle
    from arcflow_runtime.disk.manifest import Manifest, Part, TensorSpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", type=Path, help="directory of the bundle, or OWNER/NAME[@REVISION] on the hub")
    parser.add_argument("--check", action="store_true", help="hash every file, not only the small ones")
    parser.add_argument(
        "--gpu-memory",
        type=_gigabytes,
        metavar="GB",
        help="say which sizes and memory modes fit a GPU with GB of memory",
    )
    parser.add_argument("--json", action="store_true", help="print the manifest and sizes as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the bundle's description."""
    from arcflow_runtime.disk.bundle import Bundle
    from arcflow_runtime.disk.checked import open_checked
    from arcflow_runtime.hub.bundles import find_bundle

    root = find_bundle(args.bundle).path
    bundle = open_checked(root) if args.check else Bundle.open(root)
    described = _describe(bundle) if args.json else {}
    lines = [] if args.json else [_table(bundle, args.check)]
    if args.gpu_memory is not None:
        from arcflow_runtime.commands import gpu_memory

        report = gpu_memory.report(bundle, args.gpu_memory)
        described["gpu_memory"] = gpu_memory.as_dict(report)
        lines += ["", *gpu_memory.as_lines(report)]
    print(json.dumps(described, indent=2) if args.json else "\n".join(lines))
    return 0


def _gigabytes(text: str) -> int:
    """GB as bytes."""
    try:
        nbytes = round(float(text) * 1e9)
    except (ValueError, OverflowError):
        nbytes = 0
    if nbytes <= 0:
        raise argparse.ArgumentTypeError(f"must be a number of GB such as 16, got {text!r}")
    return nbytes


def _sigmas(manifest: Manifest) -> list[float]:
    from arcflow_runtime.maths.schedule import sigmas

    return [float(s) for s in sigmas(manifest.schedule.num_inference_steps, manifest.schedule)]


def _part_bytes(manifest: Manifest, part: Part) -> int:
    return sum(manifest.files[name].bytes for name in {part.graph, part.weights})


def _fp8_parameters(bundle: Bundle, part: Part) -> int:
    """Number of weight elements in FP8, read from the header of the weights file."""
    if part.quantization is None:
        return 0
    from safetensors import SafetensorError, safe_open

    from arcflow_runtime.errors import BundleError

    path = bundle.path(part.weights)
    try:
        with safe_open(path, framework="numpy") as f:
            shapes = [f.get_slice(f"{layer}.weight").get_shape() for layer in part.quantization.layers]
    except SafetensorError as e:
        raise BundleError(
            f"{path} does not hold the weights that the manifest says are in FP8 ({e}); export again"
        ) from None
    return sum(math.prod(shape) for shape in shapes)


def _precision(bundle: Bundle, part: Part) -> str:
    if part.quantization is None:
        return part.precision
    share = _fp8_parameters(bundle, part) / max(1, part.parameters)
    return f"{part.precision}, {len(part.quantization.layers)} linears in FP8 ({share:.1%} of the parameters)"


def _describe(bundle: Bundle) -> dict[str, object]:
    """The manifest as a dict, plus each part's bytes and FP8 parameters, the sigmas, the total size and the engines."""
    m = bundle.manifest
    data = dataclasses.asdict(m)
    for name, part in m.parts.items():
        data["parts"][name]["bytes"] = _part_bytes(m, part)
        data["parts"][name]["fp8_parameters"] = _fp8_parameters(bundle, part)
    data["schedule"]["sigmas"] = _sigmas(m)
    data["bytes"] = sum(entry.bytes for entry in m.files.values())
    data["engines"] = _engines(bundle)
    return data


def _engines(bundle: Bundle) -> list[dict[str, object]]:
    """The records in the bundle's engines folder: key, size and `fault`, the reason why the engine cannot be loaded."""
    from arcflow_runtime.disk.engine_record import part_key_fields, read_record
    from arcflow_runtime.disk.manifest import ENGINES
    from arcflow_runtime.engines.store import check_engine
    from arcflow_runtime.errors import EngineError

    found: list[dict[str, object]] = []
    for path in sorted((bundle.root / ENGINES).glob("*.json")):
        try:
            record = read_record(path)
        except EngineError as e:
            found.append({"record": path.name, "fault": str(e)})
            continue
        key = record.key
        shown = {"record": path.name, "bytes": record.bytes, **dataclasses.asdict(key)}
        try:
            check_engine(path.parent / record.file, record)
            now = part_key_fields(bundle, key.part) if key.part in bundle.manifest.parts else {}
            old = [name for name in ("graph", "weights", "precision") if getattr(key, name) != now.get(name)]
            fault = f"built from another {' and '.join(old)} than the bundle's" if old else None
        except EngineError as e:
            fault = str(e)
        found.append(shown | {"fault": fault})
    return found


def _engine_lines(bundle: Bundle) -> list[str]:
    lines = []
    for e in _engines(bundle):
        if "builder" not in e:
            lines.append(f"  {e['fault']}")
            continue
        where = e["target"] if e["gpu"] is None else f"{e['target']} ({e['gpu']})"
        line = (
            f"  {e['part']}: {e['builder']} {e['builder_version']} for {where}, {e['platform']}, {e['bytes']:,} bytes"
        )
        lines.append(line if e["fault"] is None else f"{line}; WILL NOT LOAD: {e['fault']}")
    return ["", "engines", *lines] if lines else []


def _table(bundle: Bundle, checked: bool) -> str:
    m = bundle.manifest
    total = sum(entry.bytes for entry in m.files.values())
    rows = [("part", "parameters", "bytes", "precision")]
    rows += [(n, f"{p.parameters:,}", f"{_part_bytes(m, p):,}", _precision(bundle, p)) for n, p in m.parts.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{bundle.root}: {m.family} bundle, version {m.version}, {total:,} bytes in {len(m.files)} files",
        "",
    ]
    lines += [f"  {a:{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
    lines += ["", "shapes"]
    for name, part in m.parts.items():
        lines.append(f"  {name}")
        lines += [f"    {_shape(spec)}" for spec in part.inputs]
        lines += [f"    -> {_shape(spec)}" for spec in part.outputs]
    lines += [*_engine_lines(bundle), "", *_facts(m)]
    lines.append(f"{'every file matches its' if checked else 'small files match their'} SHA-256")
    return "\n".join(lines)


def _shape(spec: TensorSpec) -> str:
    return f"{spec.name} [{', '.join(str(d) for d in spec.shape)}] {spec.dtype}"


def _facts(m: Manifest) -> list[str]:
    r, s, p = m.ranges, m.schedule, m.provenance
    baked = "none" if m.modulation is None else ", ".join(str(n) for n in m.modulation.num_inference_steps)
    sigmas = ", ".join(f"{x:.4f}" for x in _sigmas(m))
    steps = f"{s.num_inference_steps} steps, shift {s.shift:g}, timestep ratio {s.timestep_ratio:g}"
    loras = ", ".join(f"{x.name} x {x.scale:g}" for x in p.loras if x.scale is not None) or "none"
    slots = m.slots()
    others = "".join(f", {name} in {p.precision}" for name, p in m.parts.items() if p.precision != m.dtype)
    facts = {
        "dtype": f"{m.dtype}{others}, conditioning as the reference in {m.reference_dtype}, opset {m.opset}",
        "schedule": f"{steps}: sigma {sigmas}",
        "baked": f"modulation for step counts: {baked}",
        "guidance": "yes" if m.guidance else "no",
        "slots": ", ".join(f"{len(s.layers)} linears of {p} up to rank {s.max_rank}" for p, s in slots.items())
        or "none",
        "modes": f"K {m.latents.num_gaussians}, P {m.latents.logweights_channels}",
        "text": f"up to {m.text.max_sequence_length} tokens",
        "ranges": f"batch {r.batch.min}-{r.batch.max}, height {r.height_px.min}-{r.height_px.max} px, "
        f"width {r.width_px.min}-{r.width_px.max} px",
        "base": _source(p.base.name, p.base.revision),
        "adapter": _source(p.adapter.name, p.adapter.revision),
        "loras": loras,
        "made": f"{p.created} by {', '.join(f'{k} {v}' for k, v in p.tools.items())}",
        "command": p.command,
    }
    return [f"{key:9} {value}" for key, value in facts.items()]


def _source(name: str, revision: str | None) -> str:
    return name if revision is None else f"{name} at {revision}"
