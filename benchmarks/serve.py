"""Compare the service with the pipeline alone, Ray Serve, Triton, and PyTorch behind FastAPI: speed, latency, memory.

All run the shapes student in float32. Each runs in a process of its own and gets the same requests: closed loops, in
which each client waits for its image before it asks again, and open loops, in which requests come at random times.
The service and the pipeline take turns, --rounds for each loop, because a machine's speed changes within minutes; the
others come one after the other. Every prompt is new, so no text states are reused. The clients of the services are
threads of this process; those of the pipeline are threads of its own. Triton answers with raw pixels, the others with
PNG.

    make build/ray/.installed build/triton/.installed
    python benchmarks/serve.py --json benchmarks/results/serve.json

The machine must be idle: clients and servers share its cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from machine import describe
from serve_load import Load, Reply, Sample, Send, http_sender, memory_of, send_all, summary, triton_sender
from speed_tables import serve_lines

from arcflow_serve.settings import Settings

HERE = Path(__file__).parent
SHAPES = HERE.parent / "models" / "shapes"
SIZE_PX, STEPS, TEXT_TOKENS = 64, 2, 12
STOP_S = 60
_PACKAGES = ("fastapi", "uvicorn")


def export_shapes(out: Path) -> Path:
    """Export the shapes student as `make engine` does."""
    # Imported here: exporting needs torch, and a bundle that is given does not.
    from arcflow_export.checkpoint.sources import Location
    from arcflow_export.export.export import export_bundle, plan_export
    from arcflow_export.options import ExportOptions
    from arcflow_export.student.load import load_student

    student = load_student(Location(str(SHAPES / "teacher")), Location(str(SHAPES / "adapter")), [])
    options = ExportOptions(max_px=SIZE_PX, max_sequence_length=TEXT_TOKENS)
    return export_bundle(plan_export(student, options), out, "benchmark")


@dataclass(frozen=True)
class Running:
    """A server that runs: how requests of a load are sent to it, by their numbers, and its process id."""

    send_all: Callable[[Load, range], Sample]
    pid: int


@contextmanager
def start_lanes(bundle: Path) -> Iterator[Running]:
    """As many lanes as the service has, without HTTP."""
    service = Settings()
    given = {
        "bundle": str(bundle),
        "lanes": service.lanes,
        "threads": service.engine_threads,
        "size_px": SIZE_PX,
        "steps": STEPS,
    }
    command = [sys.executable, str(HERE / "serve_lanes.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        to, answers = process.stdin, process.stdout

        def send_all(load: Load, numbers: range) -> Sample:
            print(json.dumps({"load": asdict(load), "numbers": (numbers.start, numbers.stop)}), file=to, flush=True)
            found = json.loads(answers.readline())
            return Sample([(ms, Reply(status, size)) for ms, status, size in found["results"]], found["seconds"])

        print(json.dumps(given), file=to, flush=True)
        # The process ends when its standard input does.
        yield Running(send_all, process.pid)


def start_service(bundle: Path) -> AbstractContextManager[Running]:
    """`arcflow serve` with its defaults."""
    return _server([sys.executable, "-m", "arcflow_runtime.cli", "serve", str(bundle), "--port", "0"])


def start_ray(bundle: Path) -> AbstractContextManager[Running]:
    """One replica with the lanes of the service."""
    return _server([str(_python("ray")), str(HERE / "serve_ray.py"), str(bundle)])


def start_triton(bundle: Path) -> AbstractContextManager[Running]:
    """As many instances as the service has lanes."""
    command = [str(_python("triton")), str(HERE / "serve_triton.py"), str(bundle), "--name", "shapes"]
    return _server(command, lambda url: triton_sender(url, "shapes", SIZE_PX, STEPS))


def start_torch(_: Path) -> AbstractContextManager[Running]:
    """PyTorch behind FastAPI; it loads the checkpoint, not the bundle."""
    student = [str(SHAPES / "teacher"), str(SHAPES / "adapter")]
    options = ["--max-sequence-length", str(TEXT_TOKENS)]
    return _server([sys.executable, str(HERE / "serve_torch.py"), *student, *options])


#: Name -> a bundle -> the server that runs it. Those of a row take turns.
SERVERS: list[dict[str, Callable[[Path], AbstractContextManager[Running]]]] = [
    {"lanes": start_lanes, "service": start_service},
    {"ray": start_ray},
    {"triton": start_triton},
    {"torch": start_torch},
]
NAMES = [name for row in SERVERS for name in row]


def _python(environment: str) -> Path:
    """The Python of an environment that the Makefile makes.

    Raises:
        FileNotFoundError: it was not made.
    """
    path = HERE.parent / "build" / environment / "bin" / "python"
    if not (path.parent.parent / ".installed").exists():
        raise FileNotFoundError(f"build/{environment} must be there; run: make build/{environment}/.installed")
    return path


def _versions(names: Sequence[str]) -> dict[str, str]:
    """Versions of the servers that have environments of their own."""
    packages = {"ray": "ray", "triton": "nvidia-pytriton"}
    text = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
    found = {}
    for name in [name for name in names if name in packages]:
        line = [str(_python(name)), "-c", text, packages[name]]
        found[packages[name]] = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    return found


@contextmanager
def _server(
    command: Sequence[str], sender: Callable[[str], Send] = lambda url: http_sender(url, SIZE_PX, STEPS)
) -> Iterator[Running]:
    """Start a server, which prints its address when it can be reached."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        match = re.search(r" on (http://\S+)$", said)
        if match is None:
            raise RuntimeError(f"{' '.join(command)} must print its address first, got {said!r}; run it by itself")
        yield Running(partial(send_all, sender(match[1])), process.pid)
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _measure(running: Mapping[str, Running], loads: Sequence[Load], args: argparse.Namespace) -> dict[str, Any]:
    """The results of servers that take turns, by name."""
    for one in running.values():
        one.send_all(Load(clients=max(args.clients)), range(args.warmup))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
    bounds = [round(i * args.requests / args.rounds) for i in range(args.rounds + 1)]
    for load in loads:
        samples: dict[str, list[Sample]] = {name: [] for name in running}
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            # Each of them is as often the first.
            for name in list(running)[:: -1 if i % 2 else 1]:
                samples[name].append(running[name].send_all(load, range(start, end)))
        for name, found in samples.items():
            runs[name].append(summary(load, found))
    return {name: {"runs": runs[name]} | memory_of(one.pid) for name, one in running.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--bundle", type=Path, help="bundle of the shapes student (default: export it)")
    parser.add_argument("--only", choices=NAMES, action="append", help="measure this one; repeatable")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="clients of the closed loops")
    parser.add_argument("--rate", type=float, nargs="*", default=[50.0, 100.0], help="requests per second, open loops")
    parser.add_argument("--requests", type=int, default=2000, help="requests of each loop (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="parts of each loop (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=100, help="requests before (default: %(default)s)")
    args = parser.parse_args(argv)
    load = os.getloadavg()
    names = args.only or NAMES
    loads = [*(Load(clients=n) for n in args.clients), *(Load(rate_per_s=rate) for rate in args.rate)]
    machine = describe(_PACKAGES)
    # Also finds an environment that is missing, before anything is measured.
    machine["versions"] |= _versions(names)
    with tempfile.TemporaryDirectory() as folder:
        bundle = args.bundle or export_shapes(Path(folder) / "shapes")
        results: dict[str, Any] = {}
        for row in SERVERS:
            with ExitStack() as stack:
                running = {name: stack.enter_context(start(bundle)) for name, start in row.items() if name in names}
                results |= _measure(running, loads, args)
    data = {
        "command": " ".join(["python", "benchmarks/serve.py", *(sys.argv[1:] if argv is None else argv)]),
        "machine": machine | {"load_average": load},
        "size_px": SIZE_PX,
        "steps": STEPS,
        "lanes": Settings().lanes,
        "rounds": args.rounds,
        "results": results,
    }
    print(serve_lines(data))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(data, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
