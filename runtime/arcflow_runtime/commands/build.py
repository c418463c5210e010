"""Build TensorRT engines for a bundle, or OpenVINO tokenizers for the C++ library.

TensorRT and TensorRT-RTX need one engine per part and target. TensorRT-RTX (RTX cards) builds on any machine, without a
GPU; TensorRT (data centre) builds on the GPU that the engine is for. OpenVINO runs the bundle's graphs directly, so
only the tokenizers are built. An existing result is reused if nothing that it depends on has changed. Ctrl-C stops the
build and leaves no unfinished files.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from arcflow_runtime.errors import RequestError

if TYPE_CHECKING:
    from arcflow_runtime.build.build import BuildSettings
    from arcflow_runtime.build.plan import BuildJob
    from arcflow_runtime.disk.bundle import Bundle
    from arcflow_runtime.engines.store import BuildReport, BuiltEngine
    from arcflow_runtime.engines.tensorrt_library import Library

BACKENDS = ("tensorrt", "tensorrt-rtx", "openvino")
MAX_OPTIMIZATION_LEVEL = 5
#: Builds that take longer than this are announced with their time and memory.
_SHORT_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", type=Path, help="directory of the bundle, or OWNER/NAME[@REVISION] on the hub")
    parser.add_argument("--backend", choices=BACKENDS, required=True, help="the library that builds")
    parser.add_argument(
        "--target", metavar="SM[,SM...]", help="compute capabilities such as sm89,sm120 (default: this machine's GPU)"
    )
    parser.add_argument("--parts", metavar="PART[,PART...]", help="parts of the bundle to build (default: all)")
    shapes = parser.add_argument_group("shapes")
    shapes.add_argument(
        "--resolutions",
        metavar="SIZE[,SIZE...]",
        help="image sizes in pixels: 1024x768 (height x width), 1024, or ranges such as 512-1536 or 768-1024x512; each "
        "becomes an optimisation profile, and an engine needs scratch memory for its largest (default: one profile for "
        "the bundle's sizes up to 1024 pixels)",
    )
    shapes.add_argument("--batch", default="1", metavar="N[-M]", help="images per call (default: %(default)s)")
    builder = parser.add_argument_group("builder")
    builder.add_argument(
        "--optimization-level", type=int, metavar="N", help=f"0 to {MAX_OPTIMIZATION_LEVEL} (default: the library's)"
    )
    builder.add_argument("--workspace", type=float, metavar="GIB", help="limit of GPU scratch memory (default: all)")
    builder.add_argument(
        "--timing-cache", type=Path, metavar="FILE", help="kernel timings to read and update; tensorrt only"
    )
    builder.add_argument("--weight-streaming", action="store_true", help="let part of the weights stay in host memory")
    builder.add_argument(
        "--strip-weights", action="store_true", help="build without weights; they are read from the bundle at load"
    )
    parser.add_argument("--anyway", action="store_true", help="build even if too little memory is free")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Build every engine or tokenizer that is missing or out of date."""
    if args.backend == "openvino":
        return _build_tokenizers(args)
    from arcflow_runtime.build.plan import plan_builds
    from arcflow_runtime.build.profiles import parse_batch, parse_sizes
    from arcflow_runtime.disk.bundle import Bundle
    from arcflow_runtime.engines.store import locked_store
    from arcflow_runtime.engines.tensorrt_library import LIBRARIES
    from arcflow_runtime.hub.bundles import find_bundle

    settings = _settings(args)
    sizes = parse_sizes(args.resolutions) if args.resolutions is not None else ()
    batch = parse_batch(args.batch)
    bundle = Bundle.open(find_bundle(args.bundle).path)
    jobs = plan_builds(bundle, args.backend, _list(args.target), _list(args.parts), sizes, batch, settings)
    rows = []
    with locked_store(bundle):
        for job in jobs:
            row = _build_one(bundle, LIBRARIES[args.backend], job, settings, args.anyway)
            rows.append(row)
            if not args.json:
                print(_line(row), flush=True)
    if args.json:
        print(json.dumps({"bundle": str(args.bundle), "engines": rows}, indent=2))
    return 0


def _build_tokenizers(args: argparse.Namespace) -> int:
    from arcflow_runtime.build.tokenizers.build import build_tokenizers
    from arcflow_runtime.disk.bundle import Bundle
    from arcflow_runtime.hub.bundles import find_bundle

    bundle = Bundle.open(find_bundle(args.bundle).path)
    rows = build_tokenizers(bundle)
    if args.json:
        print(
            json.dumps({"bundle": str(args.bundle), "tokenizers": [dataclasses.asdict(row) for row in rows]}, indent=2)
        )
        return 0
    for row in rows:
        what = "unchanged" if row.reused else "built"
        what += f"; changed: {', '.join(row.changed)}" if row.changed else ""
        print(f"{row.name:24}{row.bytes:>16,} bytes  {what}")
    return 0


def _build_one(
    bundle: Bundle, library: Library, job: BuildJob, settings: BuildSettings, anyway: bool
) -> dict[str, Any]:
    from tqdm import tqdm

    from arcflow_runtime.build.build import BuildProgress, build_engine
    from arcflow_runtime.build.cost import GIB, builder_bytes, builder_seconds, check_memory
    from arcflow_runtime.engines.host_memory import available_bytes
    from arcflow_runtime.engines.store import find_built, write_engine

    found, changed = find_built(bundle, job.key)
    if found is not None:
        return _row(job, found, reused=True, changed=[])
    weights = bundle.manifest.files[bundle.manifest.parts[job.part].weights].bytes
    if not anyway:
        check_memory(job.part, weights, available_bytes())
    needed, seconds = builder_bytes(weights) / GIB, builder_seconds(weights)
    if seconds > _SHORT_S:
        print(f"{job.part}: about {seconds / 60:.0f} min, {needed:.1f} GiB of memory", file=sys.stderr)
    _check_files(bundle, job.part)
    with tqdm(desc=f"{job.part} {job.target}", unit="step", disable=None, leave=False) as bar:

        class ProgressBar(BuildProgress):
            def update(self, done: int, total: int, phase: str) -> None:
                bar.total = total
                bar.set_postfix_str(phase, refresh=False)
                bar.update(done - bar.n)

        def build(out: BinaryIO) -> BuildReport:
            return build_engine(library, bundle, job.part, job.target, job.key.profiles, settings, out, ProgressBar())

        built = write_engine(bundle, job.key, build)
    return _row(job, built, reused=False, changed=changed)


def _check_files(bundle: Bundle, part: str) -> None:
    """Hash the part's files, large ones too, because the engine's key contains their SHA-256 from the manifest."""
    from tqdm import tqdm

    spec = bundle.manifest.parts[part]
    names = (spec.graph, spec.weights)
    total = sum(bundle.manifest.files[name].bytes for name in names)
    with tqdm(total=total, desc=f"{part}: hashing", unit="B", unit_scale=True, delay=1, disable=None) as bar:
        for name in names:
            bundle.check_file(name, "full", bar.update)


def _row(job: BuildJob, built: BuiltEngine, reused: bool, changed: list[str]) -> dict[str, Any]:
    record = built.record
    return {
        "part": job.part,
        "target": job.target,
        "file": str(built.path),
        "bytes": record.bytes,
        "reused": reused,
        "changed": changed,
        "build_seconds": record.build_seconds,
        "activation_bytes": record.activation_bytes,
        "allocates_when_run": record.allocates_when_run,
        "key": job.key.digest(),
    }


def _line(row: dict[str, Any]) -> str:
    if row["reused"]:
        what = "unchanged"
    else:
        what = f"built in {row['build_seconds']:.1f} s"
        if row["changed"]:
            what += f"; changed: {', '.join(row['changed'])}"
    if row["activation_bytes"]:
        what += f"; needs {max(row['activation_bytes']) / 1e9:.2f} GB of scratch memory on the GPU"
    if row["allocates_when_run"]:
        what += "; allocates more in each run, so it has no CUDA graph: smaller --resolutions avoid that"
    return f"{row['part']:16}{row['target']:8}{row['bytes']:>16,} bytes  {what}"


def _list(text: str | None) -> list[str]:
    return [] if text is None else [item.strip() for item in text.split(",")]


def _settings(args: argparse.Namespace) -> BuildSettings:
    from arcflow_runtime.build.build import BuildSettings

    level, workspace = args.optimization_level, args.workspace
    if level is not None and not 0 <= level <= MAX_OPTIMIZATION_LEVEL:
        raise RequestError(f"--optimization-level must be between 0 and {MAX_OPTIMIZATION_LEVEL}, got {level}")
    if workspace is not None and not 0 < workspace < float("inf"):
        raise RequestError(f"--workspace must be a positive number of GiB, got {workspace:g}")
    cache = args.timing_cache
    if cache is not None and not cache.absolute().parent.is_dir():
        raise RequestError(f"--timing-cache must be in a directory that exists, got {str(cache)!r}")
    return BuildSettings(
        optimization_level=level,
        workspace_bytes=None if workspace is None else int(workspace * (1 << 30)),
        strip_weights=args.strip_weights,
        weight_streaming=args.weight_streaming,
        timing_cache=cache,
    )
