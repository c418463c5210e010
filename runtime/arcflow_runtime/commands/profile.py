"""Time a bundle layer by layer: print a table of the slowest layers, and write a trace for a browser.

The engine's own profiler times the layers, one part after the other. On a GPU this runs without the CUDA graph that
`arcflow generate` uses. Open the trace in chrome://tracing or ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcflow_runtime.backends import BACKENDS, DEFAULT_BACKEND, open_backend
from arcflow_runtime.disk.outputs import check_writable
from arcflow_runtime.errors import EngineError, RequestError

if TYPE_CHECKING:
    from arcflow_runtime.disk.bundle import Bundle
    from arcflow_runtime.engines.base import LayerTime, ProfiledEngine, ProfilingBackend

#: Part -> the timed layers of all its runs.
Layers = Mapping[str, "Sequence[LayerTime]"]
_NAME_WIDTH = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", type=Path, help="directory of the bundle, or OWNER/NAME[@REVISION] on the hub")
    parser.add_argument("--height", type=int, help="pixels (default: 1024 or the nearest allowed)")
    parser.add_argument("--width", type=int, help="pixels (default: as for --height)")
    parser.add_argument("--steps", type=int, help="number of denoising steps (default: the bundle's)")
    parser.add_argument("--batch", type=int, default=1, help="images per run (default: %(default)s)")
    parser.add_argument(
        "--prompt", default="a large red circle on a blue background", help="text prompt (default: %(default)r)"
    )
    parser.add_argument("--top", type=int, default=20, help="layers in the table (default: %(default)s)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="also write a Chrome trace of the run")
    parser.add_argument(
        "--backend", choices=sorted(BACKENDS), default=DEFAULT_BACKEND, help="engine (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: one per core)")
    parser.add_argument("--json", action="store_true", help="print every layer as JSON")


def run(args: argparse.Namespace) -> int:
    """Generate twice, the first time to warm up, and print the layers of the second run."""
    if args.top < 1:
        raise RequestError(f"--top must be at least 1, got {args.top}")
    if args.trace is not None and not args.trace.absolute().parent.is_dir():
        raise RequestError(f"--trace must be in a directory that exists, got {str(args.trace)!r}")
    if args.trace is not None:
        check_writable(args.trace, "--trace")
    from arcflow_runtime.disk.bundle import Bundle
    from arcflow_runtime.hub.bundles import find_bundle

    layers = profile(Bundle.open(find_bundle(args.bundle).path), args)
    if args.trace is not None:
        temporary = args.trace.with_name(f".{args.trace.name}.tmp")
        temporary.write_text(json.dumps({"traceEvents": trace_events(layers), "displayTimeUnit": "ms"}))
        os.replace(temporary, args.trace)
    rows = summarise(layers)
    print(json.dumps({"bundle": str(args.bundle), "layers": rows}, indent=2) if args.json else _table(rows, args.top))
    return 0


def profile(bundle: Bundle, args: argparse.Namespace) -> Layers:
    """The timed layers of the second of two runs, by part.

    Raises:
        EngineError: the backend cannot time layers, or an engine failed.
        RequestError: an argument is out of range.
    """
    from arcflow_runtime.engines.base import ProfilingBackend
    from arcflow_runtime.generate.pipeline import Pipeline

    backend = open_backend(args.backend, args.threads)
    if not isinstance(backend, ProfilingBackend):
        raise EngineError(f"{args.backend} cannot time layers; use another --backend")
    profiling = _Profiling(backend)
    with Pipeline(bundle, profiling) as pipeline:
        marks = {}
        for _ in range(2):
            pipeline.clear_cache()
            marks = dict(profiling.runs)
            pipeline(
                args.prompt,
                height=args.height,
                width=args.width,
                num_inference_steps=args.steps,
                seed=0,
                num_images_per_prompt=args.batch,
            )
        layers = {part: engine.layer_times() for part, engine in profiling.engines.items()}
    return {part: _after(layers[part], marks[part], profiling.runs[part]) for part in layers if profiling.runs[part]}


def summarise(layers: Layers) -> list[dict[str, Any]]:
    """One row per layer, slowest first: part, layer, operator, number of runs, total milliseconds."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for part, times in layers.items():
        for t in times:
            new = {"part": part, "layer": t.layer, "operator": t.operator, "runs": 0, "ms": 0.0}
            row = rows.setdefault((part, t.layer), new)
            row["runs"] += 1
            row["ms"] += t.duration_us / 1e3
    return sorted(rows.values(), key=lambda row: -row["ms"])


def trace_events(layers: Layers) -> list[dict[str, Any]]:
    """Events in the Chrome trace format, one row per part; time 0 is the start of the first layer."""
    start = min((t.start_us for times in layers.values() for t in times), default=0.0)
    events: list[dict[str, Any]] = []
    for row, (part, times) in enumerate(layers.items()):
        events.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": row, "args": {"name": part}})
        events += [
            {
                "name": t.layer,
                "cat": t.operator or part,
                "ph": "X",
                "pid": 0,
                "tid": row,
                "ts": round(t.start_us - start, 3),
                "dur": round(t.duration_us, 3),
            }
            for t in times
        ]
    return events


class _Profiling:
    """A backend that loads engines with layer timing and counts their runs; it has no denoiser."""

    def __init__(self, backend: ProfilingBackend) -> None:
        self._backend = backend
        self.engines: dict[str, ProfiledEngine] = {}
        self.runs: dict[str, int] = {}

    def check(self, bundle: Bundle) -> None:
        self._backend.check(bundle)  # type: ignore[attr-defined]

    def open(self, bundle: Bundle, part: str) -> _Counting:
        self.engines[part] = self._backend.open_profiled(bundle, part)
        self.runs[part] = 0
        return _Counting(self, part)


class _Counting:
    def __init__(self, profiling: _Profiling, part: str) -> None:
        self._profiling, self._part = profiling, part

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self._profiling.runs[self._part] += 1
        return self._profiling.engines[self._part].run(inputs)

    def close(self) -> None:
        self._profiling.engines[self._part].close()


def _after(times: Sequence[LayerTime], earlier: int, runs: int) -> Sequence[LayerTime]:
    """The layers without those of the first `earlier` of `runs` runs; every run has the same number of layers."""
    return times[len(times) * earlier // runs :]


def _table(rows: list[dict[str, Any]], top: int) -> str:
    total = sum(row["ms"] for row in rows) or 1.0
    parts: dict[str, float] = {}
    for row in rows:
        parts[row["part"]] = parts.get(row["part"], 0.0) + row["ms"]
    lines = [f"{'part':16} {'layer':{_NAME_WIDTH}} {'operator':16} {'runs':>5} {'ms':>10} {'%':>6}"]
    for row in rows[:top]:
        layer = row["layer"] if len(row["layer"]) <= _NAME_WIDTH else "..." + row["layer"][3 - _NAME_WIDTH :]
        lines.append(
            f"{row['part']:16} {layer:{_NAME_WIDTH}} {row['operator']:16} {row['runs']:5} {row['ms']:10.3f} "
            f"{100 * row['ms'] / total:6.1f}"
        )
    if len(rows) > top:
        rest = sum(row["ms"] for row in rows[top:])
        lines.append(f"{'':16} {f'and {len(rows) - top} more':{_NAME_WIDTH}} {'':16} {'':5} {rest:10.3f}")
    lines += ["", *(f"{part:16} {ms:10.3f} ms {100 * ms / total:6.1f} %" for part, ms in parts.items())]
    return "\n".join(lines)
