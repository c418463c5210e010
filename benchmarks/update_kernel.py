"""Measure the kernels on a GPU: the update's bandwidth beside a device-to-device copy of as many bytes, the noise's
time.

The update reads heads and latents and writes latents twice. The copy reads half of these bytes and writes the other
half. Both use several buffers in turn, which together are larger than the GPU's cache, and runs of the two alternate.
Each run is one CUDA graph of many launches, because the host needs longer to launch a kernel than a small one takes.

    python benchmarks/update_kernel.py --json benchmarks/results/update_kernel.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import GPU_PACKAGES, describe

from arcflow_runtime.disk.manifest import DType
from arcflow_runtime.engines.gpus import find_gpu
from arcflow_runtime.errors import ArcFlowError
from arcflow_runtime.gpu.cuda import open_device
from arcflow_runtime.gpu.device import Graph, Memory
from arcflow_runtime.gpu.kernels import NoiseShape, UpdateShape
from arcflow_runtime.maths.noise import streams

#: Tokens of one image of 512, 1024 and 1536 pixels, and of four images of 1024 pixels.
TOKENS = (1024, 4096, 9216, 16384)
DTYPES: tuple[DType, ...] = ("bfloat16", "float16", "float32")
MODES, CHANNELS, SUB_PIXELS = 16, 64, 4
#: Larger than the cache of any GPU, so that every run reads from memory.
WORKING_SET_BYTES = 512 << 20
#: A graph has at least as many launches, because an event resolves only about half a microsecond.
LAUNCHES = 20
#: How long each row runs before it is timed: an idle GPU has a fraction of its clock rate.
WARM_UP_S = 0.2
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
        self.device = open_device()
        self.stream = self.device.make_stream()
        self.kernels = self.device.kernels()
        self._memory: list[Memory] = []

    def empty(self, nbytes: int) -> int:
        """The address of new memory on the device."""
        self._memory.append(self.device.allocate(nbytes))
        return self._memory[-1].address

    def put(self, array: np.ndarray) -> int:
        """The address of a copy of `array` on the device."""
        address, pinned = self.empty(array.nbytes), self.device.allocate_pinned(array.nbytes)
        pinned.array[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.stream.copy(address, pinned.address, array.nbytes)
        self.stream.wait()
        pinned.close()
        return address

    def free(self) -> None:
        """Free everything that `empty` and `put` allocated."""
        while self._memory:
            self._memory.pop().close()

    def capture(self, enqueue: Callable[[int], None], launches: int) -> Graph:
        """Capture `enqueue(0)`, ..., `enqueue(launches - 1)` in one graph. They run once before, as a warm-up."""
        for launch in range(launches):
            enqueue(launch)
        self.stream.wait()
        self.stream.begin_capture()
        for launch in range(launches):
            enqueue(launch)
        return self.stream.end_capture()

    def time_in_turn(
        self, enqueues: dict[str, Callable[[int], None]], launches: int, runs: int
    ) -> dict[str, dict[str, float]]:
        """Time the functions in turn: microseconds per launch of each. A function gets the number of the launch."""
        graphs = {name: self.capture(enqueue, launches) for name, enqueue in enqueues.items()}
        begin, end = self.device.make_event(), self.device.make_event()
        times: dict[str, list[float]] = {name: [] for name in graphs}
        started = time.perf_counter()
        while min(map(len, times.values())) < runs:
            warm = time.perf_counter() - started > WARM_UP_S
            for name, graph in graphs.items():
                self.stream.record(begin)
                graph.launch()
                self.stream.record(end)
                end.wait()
                if warm:
                    times[name].append(end.ms_since(begin) * 1e3 / launches)
        for graph in graphs.values():
            graph.close()
        return {name: _spread(us) for name, us in times.items()}

    def measure(self, shape: UpdateShape, runs: int, working_set_bytes: int) -> dict[str, Any]:
        """Measure the update at one size and dtype."""
        sets = max(2, -(-working_set_bytes // moved_bytes(shape)))
        rng = np.random.default_rng(0)
        sizes = (MODES * CHANNELS, MODES * SUB_PIXELS, (MODES - 1) * SUB_PIXELS, CHANNELS, CHANNELS)
        arrays = [rng.standard_normal((shape.tokens, n), np.float32) for n in sizes]
        arrays = [*(_narrow(x, shape.heads) for x in arrays[:3]), arrays[3], _narrow(arrays[4], shape.engine_input)]
        first = [self.put(x) for x in arrays]
        buffers = [first]
        for _ in range(sets - 1):
            buffers.append([self.empty(x.nbytes) for x in arrays])
            for target, source, x in zip(buffers[-1], first, arrays, strict=True):
                self.stream.copy(target, source, x.nbytes)
        sigmas = self.put(np.array([1, 0.7619047619, 0]))
        half = moved_bytes(shape) // 2
        copies = [[self.empty(half) for _ in range(2)] for _ in range(sets)]

        def update(launch: int) -> None:
            means, logweights, loggammas, latents, engine_input = buffers[launch % sets]
            addresses = (means, logweights, loggammas, latents, latents, engine_input, sigmas)
            self.kernels.update(self.stream, shape, *addresses, 0)

        def copy(launch: int) -> None:
            target, source = copies[launch % sets]
            self.stream.copy(target, source, half)

        # Whole rounds of the buffers, so that a graph never finds its first ones in the cache.
        launches = sets * -(-LAUNCHES // sets)
        rows = self.time_in_turn({"update": update, "copy": copy}, launches, runs)
        self.free()
        fraction = rows["copy"]["median_us"] / rows["update"]["median_us"]
        return {
            "tokens": shape.tokens,
            "heads": shape.heads,
            "engine_input": shape.engine_input,
            "moved_bytes": moved_bytes(shape),
            "launches": launches,
            **rows,
            "update_bytes_per_s": moved_bytes(shape) / rows["update"]["median_us"] * 1e6,
            "copy_bytes_per_s": 2 * half / rows["copy"]["median_us"] * 1e6,
            "fraction_of_copy": fraction,
            "goal_met": fraction >= GOAL,
        }

    def measure_noise(self, tokens: int, runs: int) -> dict[str, Any]:
        """Measure the noise of one image of `tokens` tokens, which one block of threads generates."""
        side = round(tokens**0.5)
        shape = NoiseShape(1, CHANNELS // SUB_PIXELS, 2 * side, 2 * side, 2, "bfloat16")
        numbers = side * side * CHANNELS
        sources = self.put(streams([1], 1, numbers))
        latents, second = self.empty(4 * numbers), self.empty(2 * numbers)
        noise = {"noise": lambda launch: self.kernels.noise(self.stream, shape, sources, latents, second)}
        row = self.time_in_turn(noise, 2, runs)["noise"]
        self.free()
        return {"tokens": side * side, "noise": row}


def _narrow(x: np.ndarray, dtype: DType) -> np.ndarray:
    """Cast `x` to a dtype; bfloat16 is truncated, and stored as uint16."""
    if dtype == "bfloat16":
        return (x.view(np.uint32) >> 16).astype(np.uint16)
    return x.astype(dtype)


def _spread(us: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(us, n=10)
    return {"median_us": statistics.median(us), "p10_us": deciles[0], "p90_us": deciles[-1]}


def print_table(results: Sequence[dict[str, Any]], noise: Sequence[dict[str, Any]]) -> None:
    """Print both tables."""
    print(f"{'heads':10}{'tokens':>8}{'MB':>8}{'update us (p10-p90)':>26}{'copy us (p10-p90)':>26}{'of copy':>9}")
    for r in results:
        cells = [f"{r[n]['median_us']:.1f} ({r[n]['p10_us']:.1f}-{r[n]['p90_us']:.1f})" for n in ("update", "copy")]
        missed = "" if r["goal_met"] else f"  below {GOAL:.0%}"
        print(
            f"{r['heads']:10}{r['tokens']:>8}{r['moved_bytes'] / 1e6:>8.1f}{cells[0]:>26}{cells[1]:>26}"
            f"{r['fraction_of_copy']:>9.0%}{missed}"
        )
    for r in noise:
        print(f"noise of {r['tokens']} tokens: {r['noise']['median_us']:.1f} us")


def main() -> int:
    """Measure every size and dtype, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here, after every row")
    parser.add_argument("--runs", type=int, default=50, help="timed runs of each; at least 2")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="(default: %(default)s)")
    parser.add_argument(
        "--working-set-bytes", type=int, default=WORKING_SET_BYTES, help="of all buffers (default: %(default)s)"
    )
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
    machine = describe(GPU_PACKAGES) | {"gpu": gpu.name, "target": gpu.target}
    data: dict[str, Any] = {"command": " ".join(sys.argv), "machine": machine, "goal": GOAL, "results": [], "noise": []}

    def keep() -> None:
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(data, indent=2) + "\n")

    for dtype in DTYPES:
        for tokens in args.tokens:
            shape = UpdateShape(tokens, MODES, CHANNELS, SUB_PIXELS, dtype, dtype)
            data["results"].append(bench.measure(shape, args.runs, args.working_set_bytes))
            keep()
    for tokens in args.tokens:
        data["noise"].append(bench.measure_noise(tokens, args.runs))
        keep()
    print(f"{gpu.name} ({gpu.target}); {machine['versions']}")
    print_table(data["results"], data["noise"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
