"""Compare the service with the pipeline alone, Ray Serve, Triton, and PyTorch behind FastAPI: speed, latency, memory.

All run the shapes student in float32. Each runs in a process of its own, one after the other, and gets the same
requests: closed loops, in which each client waits for its image before it asks again, and open loops, in which requests
come at random times. Every prompt is new, so no text states are reused. The clients of the services are threads of
this process; those of the pipeline are threads of its own. Triton answers with raw pixels, the others with PNG.

    make build/ray/.installed build/triton/.installed
    python benchmarks/serve.py --json benchmarks/results/serve.json

The machine must be idle: clients and servers share its cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine import describe
from serve_load import Send, closed_loop, http_sender, memory_of, open_loop, triton_sender
from tables import serve_lines

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


def run_lanes(bundle: Path, args: argparse.Namespace) -> dict[str, Any]:
    """As many lanes as the service has, without HTTP."""
    service = Settings()
    asked = {
        "bundle": str(bundle),
        "lanes": service.lanes,
        "threads": service.engine_threads,
        "size_px": SIZE_PX,
        "steps": STEPS,
        "clients": args.clients,
        "rates_per_s": args.rate,
        "requests": args.requests,
        "warmup": args.warmup,
    }
    command = [sys.executable, str(HERE / "serve_lanes.py")]
    done = subprocess.run(command, input=json.dumps(asked), stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run_service(bundle: Path, args: argparse.Namespace) -> dict[str, Any]:
    """`arcflow serve` with its defaults."""
    return _measure([sys.executable, "-m", "arcflow_runtime.cli", "serve", str(bundle), "--port", "0"], args)


def run_ray(bundle: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One replica with the lanes of the service."""
    return _measure([str(_python("ray")), str(HERE / "serve_ray.py"), str(bundle)], args)


def run_triton(bundle: Path, args: argparse.Namespace) -> dict[str, Any]:
    """As many instances as the service has lanes."""
    command = [str(_python("triton")), str(HERE / "serve_triton.py"), str(bundle), "--name", "shapes"]
    return _measure(command, args, lambda url: triton_sender(url, "shapes", SIZE_PX, STEPS))


def run_torch(bundle: Path, args: argparse.Namespace) -> dict[str, Any]:
    """PyTorch behind FastAPI; it loads the checkpoint, not the bundle."""
    student = [str(SHAPES / "teacher"), str(SHAPES / "adapter")]
    options = ["--max-sequence-length", str(TEXT_TOKENS)]
    return _measure([sys.executable, str(HERE / "serve_torch.py"), *student, *options], args)


#: Name -> (bundle, arguments) -> results.
SERVERS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "lanes": run_lanes,
    "service": run_service,
    "ray": run_ray,
    "triton": run_triton,
    "torch": run_torch,
}


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
def _server(command: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Start a server; its address and process id. It prints its address when it can be reached."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        match = re.search(r" on (http://\S+)$", said)
        if match is None:
            raise RuntimeError(f"{' '.join(command)} must print its address first, got {said!r}; run it by itself")
        yield match[1], process.pid
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _measure(
    command: Sequence[str],
    args: argparse.Namespace,
    sender: Callable[[str], Send] = lambda url: http_sender(url, SIZE_PX, STEPS),
) -> dict[str, Any]:
    with _server(command) as (url, pid):
        send = sender(url)
        closed_loop(send, max(args.clients), args.warmup)
        runs = [closed_loop(send, clients, args.requests) for clients in args.clients]
        runs += [open_loop(send, rate, args.requests) for rate in args.rate]
        return {"runs": runs} | memory_of(pid)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--bundle", type=Path, help="bundle of the shapes student (default: export it)")
    parser.add_argument("--only", choices=SERVERS, action="append", help="measure this one; repeatable")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="clients of the closed loops")
    parser.add_argument("--rate", type=float, nargs="*", default=[50.0, 100.0], help="requests per second, open loops")
    parser.add_argument("--requests", type=int, default=2000, help="requests of each loop (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=100, help="requests before (default: %(default)s)")
    args = parser.parse_args(argv)
    load = os.getloadavg()
    names = args.only or list(SERVERS)
    machine = describe(_PACKAGES)
    # Also finds an environment that is missing, before anything is measured.
    machine["versions"] |= _versions(names)
    with tempfile.TemporaryDirectory() as folder:
        bundle = args.bundle or export_shapes(Path(folder) / "shapes")
        results = {name: SERVERS[name](bundle, args) for name in names}
    data = {
        "command": " ".join(["python", "benchmarks/serve.py", *(sys.argv[1:] if argv is None else argv)]),
        "machine": machine | {"load_average": load},
        "size_px": SIZE_PX,
        "steps": STEPS,
        "lanes": Settings().lanes,
        "results": results,
    }
    print(serve_lines(data))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(data, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
