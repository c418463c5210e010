"""Measure the update kernel's bandwidth on a GPU, beside a device-to-device copy that moves as many bytes.

The kernel reads heads and latents and writes latents twice. The copy reads half of these bytes and writes the other
half. Both use several buffers in turn, which together are larger than the GPU's cache, and runs of the two alternate.

    python benchmarks/update_kernel.py --json benchmarks/results/update_kernel.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

from arcflow_runtime.disk.manifest import DType
from arcflow_runtime.engines.gpus import find_gpu
from arcflow_runtime.errors import ArcFlowError
from arcflow_runtime.gpu.kernels import UpdateShape, load_kernels

#: Tokens of one image of 512, 1024 and 1536 pixels, and of four images of 1024 pixels.
TOKENS = (1024, 4096, 9216, 16384)
DTYPES: tuple[DType, ...] = ("bfloat16", "float16", "float32")
MODES, CHANNELS, SUB_PIXELS = 16, 64, 4
#: Larger than the cache of any GPU, so that every run reads from memory.
WORKING_SET_BYTES = 512 << 20
#: Launches timed together, because one launch is too short for an event, which resolves about half a microsecond.
LAUNCHES = 20
GOAL = 0.8


def head_bytes(shape: UpdateShape) -> int:
    """Bytes of means, logweights and loggammas of one call."""
    per_token = MODES * CHANNELS + MODES * SUB_PIXELS + (MODES - 1) * SUB_PIXELS
    return shape.tokens * per_token * (4 if shape.heads == "float32" else 2)


def moved_bytes(shape: UpdateShape) -> int:
    """Bytes that one launch reads and writes."""
    input_bytes = 4 if shape.engine_input == "float32" else 2
    return head_bytes(shape) + shape.tokens * CHANNELS * (4 + 4 + input_bytes)


class Bench:
    """Runs and times kernels on a device."""

    def __init__(self) -> None:
        from cuda.core import Device

        self.device = Device()
        self.device.set_current()
        self.stream = self.device.create_stream()
        self.kernels = load_kernels(self.device)

    def put(self, array: np.ndarray) -> Any:
        """Copy an array to the device, into a `cuda.core` Buffer."""
        from cuda.bindings import driver

        buffer = self.device.allocate(array.nbytes, stream=self.stream)
        self.stream.sync()
        (error,) = driver.cuMemcpyHtoD(int(buffer.handle), array.ctypes.data, array.nbytes)
        if error:
            raise SystemExit(f"error: copying to the GPU failed: {error}")
        return buffer

    def spread(self, enqueues: dict[str, Any], runs: int) -> dict[str, dict[str, float]]:
        """Time the functions in turn: microseconds per launch of each. A function gets the number of the launch."""
        from cuda.core import EventOptions

        timed = EventOptions(timing_enabled=True)
        times: dict[str, list[float]] = {name: [] for name in enqueues}
        launch = 0
        for run in range(runs + 2):  # the first two warm up
            for name, enqueue in enqueues.items():
                begin = self.stream.record(options=timed)
                for _ in range(LAUNCHES):
                    enqueue(launch)
                    launch += 1
                end = self.stream.record(options=timed)
                end.sync()
                if run >= 2:
                    times[name].append((end - begin) * 1e3 / LAUNCHES)
        return {name: _spread(us) for name, us in times.items()}

    def measure(self, shape: UpdateShape, runs: int) -> dict[str, Any]:
        """Measure one row of the table."""
        sets = max(2, -(-WORKING_SET_BYTES // moved_bytes(shape)))
        rng = np.random.default_rng(0)
        buffers = []
        for _ in range(sets):
            sizes = (MODES * CHANNELS, MODES * SUB_PIXELS, (MODES - 1) * SUB_PIXELS, CHANNELS, CHANNELS)
            arrays = [rng.standard_normal((shape.tokens, n), np.float32) for n in sizes]
            heads = [_narrow(x, shape.heads) for x in arrays[:3]]
            buffers.append([self.put(x) for x in (*heads, arrays[3], _narrow(arrays[4], shape.engine_input))])
        sigmas = self.put(np.array([1, 0.7619047619, 0]))
        half = moved_bytes(shape) // 2
        copies = [[self.device.allocate(half, stream=self.stream) for _ in range(2)] for _ in range(sets)]

        def update(launch: int) -> None:
            means, logweights, loggammas, latents, engine_input = (int(b.handle) for b in buffers[launch % sets])
            addresses = (means, logweights, loggammas, latents, latents, engine_input, int(sigmas.handle))
            self.kernels.update(self.stream, shape, *addresses, 0)

        def copy(launch: int) -> None:
            target, source = copies[launch % sets]
            target.copy_from(source, stream=self.stream)

        rows = self.spread({"update": update, "copy": copy}, runs)
        fraction = rows["copy"]["median_us"] / rows["update"]["median_us"]
        return {
            "tokens": shape.tokens,
            "heads": shape.heads,
            "engine_input": shape.engine_input,
            "moved_bytes": moved_bytes(shape),
            **rows,
            "update_bytes_per_s": moved_bytes(shape) / rows["update"]["median_us"] * 1e6,
            "fraction_of_copy": fraction,
            "goal_met": fraction >= GOAL,
        }


def _narrow(x: np.ndarray, dtype: DType) -> np.ndarray:
    """Cast `x` to a dtype; bfloat16 is truncated, and stored as uint16."""
    if dtype == "bfloat16":
        return (x.view(np.uint32) >> 16).astype(np.uint16)
    return x.astype(dtype)


def _spread(us: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(us, n=10)
    return {"median_us": statistics.median(us), "p10_us": deciles[0], "p90_us": deciles[-1]}


def main() -> int:
    """Measure every size and dtype, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--runs", type=int, default=50, help="timed runs of each; at least 2")
    args = parser.parse_args()
    gpu = find_gpu()
    if gpu is None:
        print("error: this benchmark needs an NVIDIA GPU, and the CUDA driver finds none here", file=sys.stderr)
        return 1
    try:
        bench = Bench()
    except ArcFlowError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    results = [
        bench.measure(UpdateShape(tokens, MODES, CHANNELS, SUB_PIXELS, dtype, dtype), args.runs)
        for dtype in DTYPES
        for tokens in TOKENS
    ]
    machine = describe() | {"gpu": gpu.name, "target": gpu.target}
    print(f"{gpu.name} ({gpu.target}); {machine['versions']}")
    print(f"{'heads':10}{'tokens':>8}{'MB':>8}{'update us (p10-p90)':>26}{'copy us (p10-p90)':>26}{'of copy':>9}")
    for r in results:
        cells = [f"{r[n]['median_us']:.1f} ({r[n]['p10_us']:.1f}-{r[n]['p90_us']:.1f})" for n in ("update", "copy")]
        missed = "" if r["goal_met"] else f"  below {GOAL:.0%}"
        print(
            f"{r['heads']:10}{r['tokens']:>8}{r['moved_bytes'] / 1e6:>8.1f}{cells[0]:>26}{cells[1]:>26}"
            f"{r['fraction_of_copy']:>9.0%}{missed}"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        data = {"command": " ".join(sys.argv), "machine": machine, "goal": GOAL, "results": results}
        args.json.write_text(json.dumps(data, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
