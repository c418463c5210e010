"""Measure the host's time per image outside the engines, in Python and in C++, and where it goes.

Use a tiny bundle at 64 px; text embeddings are cached, the seed is given, and images are decoded to pixels. Runs
alternate between the two runtimes, so that a change in the machine's load affects both. Engine time is the time of the
calls into the engine (ONNX Runtime in Python, OpenVINO in C++); the rest is the host's time. With another `--backend`
for Python, engine time is the device's, measured by its own events.

    python benchmarks/host_time.py BUNDLE --library build/libarcflow.so --json benchmarks/results/host_time.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe
from soak import load_embed
from tqdm import trange

from arcflow_runtime import Pipeline
from arcflow_runtime.maths import noise, update

PROMPT = "a large red circle on a blue background"
#: Numbers appended to the prompt, for --new-prompts.
NUMBERS = itertools.count()
#: Stages without an engine call. Time of the other stages outside their engine calls is called "around engines".
HOST_STAGES = ("tokenize", "noise", "rotary", "update")
ENGINE_STAGES = ("encode", "condition", "backbone", "decode")
#: Stages of a denoiser that runs on a device, timed by its own events.
DEVICE_STAGES = ("copy", "noise", "condition", "backbone", "update", "decode")


class TimedEngine:
    """Wraps an engine and adds up the time of its runs."""

    def __init__(self, engine: Any) -> None:
        self._engine, self.ms = engine, 0.0

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the engine."""
        started = time.perf_counter()
        try:
            outputs: dict[str, np.ndarray] = self._engine.run(inputs)
            return outputs
        finally:
            self.ms += (time.perf_counter() - started) * 1e3

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()


def python_runner(
    bundle: Path, size_px: int, threads: int, prompt: Callable[[], str]
) -> Callable[[], dict[str, float]]:
    """A function that generates an image in Python and returns each stage's time in ms, and "engines"."""
    pipe = Pipeline.load(bundle, threads=threads)
    engines = {name: TimedEngine(engine) for name, engine in pipe._parts._engines.items()}
    pipe._parts._engines.update(engines)

    def generate() -> dict[str, float]:
        for engine in engines.values():
            engine.ms = 0.0
        timings = pipe(prompt(), size_px, size_px, seed=1, output_type="pil").timings_ms
        return dict(timings) | {"engines": sum(e.ms for e in engines.values())}

    return generate


def device_runner(
    bundle: Path, backend: str, size_px: int, prompt: Callable[[], str]
) -> Callable[[], dict[str, float]]:
    """The same with a backend that keeps the denoising loop on its device."""
    pipe = Pipeline.load(bundle, backend=backend)
    if pipe._denoiser is None:
        raise SystemExit(f"error: {backend} does not keep the loop on its device here; see its warnings")
    pipe.warm_up([(1, size_px, size_px)])

    def generate() -> dict[str, float]:
        timings = dict(pipe(prompt(), size_px, size_px, seed=1, output_type="pil").timings_ms)
        engines = sum(timings.get(stage, 0.0) for stage in DEVICE_STAGES)
        # Count the device's stages as one call of the backbone.
        return timings | dict.fromkeys(DEVICE_STAGES, 0.0) | {"backbone": engines, "engines": engines}

    return generate


def cpp_runner(
    bundle: Path, library: Path, size_px: int, threads: int, prompt: Callable[[], str]
) -> Callable[[], dict[str, float]]:
    """The same in C++."""
    embed = load_embed()
    pipe = embed.Pipeline(embed.load(str(library)), bundle, threads=threads)

    def generate() -> dict[str, float]:
        timings: dict[str, float] = pipe.generate([prompt()], seeds=[1], height=size_px, width=size_px).timings_ms
        return timings

    return generate


def new_prompt() -> str:
    """A prompt that was not used before."""
    return f"{PROMPT} {next(NUMBERS)}"


def host_share(timings: Mapping[str, float]) -> dict[str, float]:
    """One image's time outside the engines in ms: the total, and its shares."""
    shares = {stage: timings[stage] for stage in HOST_STAGES}
    shares["around engines"] = sum(timings[stage] for stage in ENGINE_STAGES) - timings["engines"]
    host = timings["total"] - timings["engines"]
    return {"host": host, **shares, "rest": host - sum(shares.values())}


def main() -> int:
    """Measure both runtimes, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle with the tokenizers of `arcflow build --backend openvino`")
    parser.add_argument("--library", type=Path, help="libarcflow; without it, Python alone")
    parser.add_argument("--backend", default="onnxruntime", help="for Python (default: %(default)s)")
    parser.add_argument("--size-px", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--runs", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="per engine (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--new-prompts", action="store_true", help="use a new prompt for each image")
    parser.add_argument("--numpy", action="store_true", help="run Python without its compiled extension")
    args = parser.parse_args()
    if args.numpy:
        noise.compiled = update.compiled = None
    prompt = new_prompt if args.new_prompts else lambda: PROMPT
    on_host = args.backend == "onnxruntime"
    runners = {
        "python": python_runner(args.bundle, args.size_px, args.threads, prompt)
        if on_host
        else device_runner(args.bundle, args.backend, args.size_px, prompt)
    }
    if args.library:
        runners["cpp"] = cpp_runner(args.bundle, args.library, args.size_px, args.threads, prompt)
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in runners}
    engines: dict[str, list[float]] = {name: [] for name in runners}
    for i in trange(-5, args.runs, desc="runs", disable=None):
        for name, generate in runners.items():
            timings = generate()
            if i >= 0:
                measured[name].append(host_share(timings))
                engines[name].append(timings["engines"])
    machine = describe()
    if args.library:
        machine["versions"] |= {name: metadata.version(name) for name in ("openvino", "openvino-tokenizers")}
    print(f"{machine['cpu']}, {machine['cores']} cores; {machine['versions']}")
    results = []
    for name, rows in measured.items():
        host = [row["host"] for row in rows]
        deciles = statistics.quantiles(host, n=10)
        medians = {share: statistics.median(row[share] for row in rows) for share in rows[0]}
        result = {
            "runtime": name,
            "backend": args.backend if name == "python" else "openvino",
            "size_px": args.size_px,
            "runs": args.runs,
            "threads": args.threads,
            "median_ms": medians.pop("host"),
            "p10_ms": deciles[0],
            "p90_ms": deciles[-1],
            "shares_ms": medians,
            "engines_median_ms": statistics.median(engines[name]),
        }
        results.append(result)
        shares = ", ".join(f"{share} {ms:.3f}" for share, ms in medians.items())
        print(
            f"{name:7} {result['median_ms']:.3f} ms outside engines "
            f"(p10-p90 {result['p10_ms']:.3f}-{result['p90_ms']:.3f}): {shares}; "
            f"engines {result['engines_median_ms']:.2f}"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        data = {"command": " ".join(sys.argv), "machine": machine, "results": results}
        args.json.write_text(json.dumps(data, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
