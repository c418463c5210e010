"""Time a bundle stage by stage.

The cached text embeddings and modulations are dropped before every run, so that each run encodes its prompt. On a GPU,
the times of condition, backbone, update, decode and copy are measured on the device.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from arcflow_runtime.backends import DEFAULT_BACKEND, choices
from arcflow_runtime.disk.outputs import check_writable
from arcflow_runtime.engines.modes import MODES
from arcflow_runtime.errors import RequestError

if TYPE_CHECKING:
    from arcflow_runtime.generate.pipeline import Pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", type=Path, help="directory of the bundle, or OWNER/NAME[@REVISION] on the hub")
    parser.add_argument("--height", type=int, help="pixels (default: 1024 or the nearest allowed)")
    parser.add_argument("--width", type=int, help="pixels (default: as for --height)")
    parser.add_argument("--steps", type=int, help="number of denoising steps (default: the bundle's)")
    parser.add_argument("--batch", type=int, default=1, help="images per run (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="timed runs (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="untimed runs before them (default: %(default)s)")
    parser.add_argument(
        "--prompt", default="a large red circle on a blue background", help="text prompt (default: %(default)r)"
    )
    parser.add_argument("--backend", choices=choices(), default=DEFAULT_BACKEND, help="engine (default: %(default)s)")
    parser.add_argument("--memory", choices=MODES, help="memory mode (default: by the free memory)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: one per core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE as JSON")


def run(args: argparse.Namespace) -> int:
    """Time the pipeline and print the table."""
    if args.runs < 1 or args.warmup < 0:
        raise RequestError(f"--runs must be at least 1 and --warmup at least 0, got {args.runs} and {args.warmup}")
    if args.json is not None and not args.json.parent.is_dir():
        raise RequestError(f"--json must be in a directory that exists, got {str(args.json)!r}")
    if args.json is not None:
        check_writable(args.json, "--json")
    from tqdm import trange

    from arcflow_runtime.generate.pipeline import Pipeline

    timings: list[dict[str, float]] = []
    with Pipeline.load(args.bundle, args.backend, args.memory, threads=args.threads) as pipeline:
        for i in trange(args.warmup + args.runs, desc="runs", disable=None, leave=False):
            measured = _time(pipeline, args)
            if i >= args.warmup:
                timings.append(measured)
    stages = {name: _summary([t[name] for t in timings]) for name in timings[0]}
    print(_table(stages))
    report = {"machine": describe_machine(args.threads), "request": _request(args), "stages_ms": stages}
    print("\n" + ", ".join(f"{k} {v}" for k, v in describe_machine(args.threads).items()))
    if args.json is not None:
        temporary = args.json.with_name(f".{args.json.name}.tmp")
        temporary.write_text(json.dumps(report, indent=2) + "\n")
        os.replace(temporary, args.json)
    return 0


def describe_machine(threads: int | None) -> dict[str, str | int]:
    """The machine that was measured: processor, cores, threads, versions and GPU."""
    import numpy
    import onnxruntime

    from arcflow_runtime.engines.gpus import find_gpu

    gpu = find_gpu()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "processor": _processor(),
        "cores": cores,
        "threads": threads or "default",
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "onnxruntime": onnxruntime.__version__,
        **_version("openvino"),
        **({} if gpu is None else {"gpu": gpu.name}),
    }


def _version(package: str) -> dict[str, str]:
    try:
        return {package: metadata.version(package)}
    except metadata.PackageNotFoundError:
        return {}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _time(pipeline: Pipeline, args: argparse.Namespace) -> dict[str, float]:
    pipeline.clear_cache()
    output = pipeline(
        args.prompt,
        height=args.height,
        width=args.width,
        num_inference_steps=args.steps,
        seed=0,
        num_images_per_prompt=args.batch,
    )
    stages = dict(output.timings_ms)
    total = stages.pop("total")
    return stages | {"between": total - sum(stages.values()), "total": total}


def _request(args: argparse.Namespace) -> dict[str, object]:
    names = ("height", "width", "steps", "batch", "runs", "warmup", "prompt", "backend", "memory")
    return {"bundle": str(args.bundle)} | {name: getattr(args, name) for name in names}


def _summary(values: Sequence[float]) -> dict[str, float]:
    """The 50th, 90th and 99th percentiles, in milliseconds."""
    if len(values) == 1:
        return {"p50": values[0], "p90": values[0], "p99": values[0]}
    percentiles = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{n}": percentiles[n - 1] for n in (50, 90, 99)}


def _table(stages: dict[str, dict[str, float]]) -> str:
    lines = [f"{'stage':10} {'p50 ms':>10} {'p90':>10} {'p99':>10}"]
    lines += [f"{n:10} {s['p50']:10.3f} {s['p90']:10.3f} {s['p99']:10.3f}" for n, s in stages.items()]
    return "\n".join(lines)
