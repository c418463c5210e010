"""Everything to ask of a GPU on the first day, in one command of at most eight minutes: -> JSON, a log and a summary.

For a card without TensorRT and a machine without this project's extras: it needs numpy, torch with CUDA 13 and pytest.
cuda-core 1.2 and cuda-bindings 13 may come as wheels. No network is used.

    python benchmarks/gpu/first_contact.py --out DIR [--wheels DIR]

Each step runs in a process of its own and is killed at its time limit. A step that fails or is killed does not stop the
next one. DIR/first_contact.json is written after each step, DIR/first_contact.log has the steps' output, and
DIR/summary.md the answers in words. Started again with the same DIR, it keeps the steps that were answered, unless the
source or the machine changed, and runs the others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from steps import CANNOT_RUN, ROOT, STEPS, Mode, Step

sys.path.insert(0, str(ROOT / "benchmarks"))
from machine import GPU_PACKAGES, describe

FORMAT = "arcflow-first-contact"
LIMIT_S = 480.0
#: A step is not started with less time left than this.
LEAST_S = 10.0
#: Each step's limit is as many times longer on the driver made of host memory, where other programs use the same cores.
HOST_DRIVER_FACTOR = 5
ANSWERED, FAILED, KILLED, CANNOT = "answered", "failed", "killed", "cannot run"
#: What the steps' answers depend on.
_SOURCES = ("runtime", "benchmarks", "tests/gpu")
_SUFFIXES = {".py", ".cu", ".h", ".ini"}
_GPU = (
    "import json\nfrom arcflow_runtime.engines.gpus import find_gpu\ngpu = find_gpu()\n"
    "print(json.dumps(gpu and {'gpu': gpu.name, 'target': gpu.target}))"
)


def write(path: Path, text: str) -> None:
    """Replace a file in one step, so that an interruption leaves the old one."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def sources_sha256() -> str:
    """The digest of the files that the answers depend on."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in _SUFFIXES and path.is_file():
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def install_wheels(wheels: Path, site: Path) -> str | None:
    """Install every wheel of a folder into `site`, without network; returns what went wrong, or None."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        return f"{wheels} has no wheels"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
    done = subprocess.run([*command, *files], capture_output=True, text=True)
    return None if done.returncode == 0 else f"the wheels cannot be installed: {_last_line(done.stderr)}"


def environment(site: Path, scratch: Path, host_driver: Path | None) -> dict[str, str]:
    """The environment of the steps: this checkout, then the wheels, then what the machine has."""
    paths = [str(ROOT), str(ROOT / "runtime"), str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    env.setdefault("ARCFLOW_CACHE", str(scratch / "kernels"))
    if host_driver is not None:
        env["LD_LIBRARY_PATH"] = str(host_driver)
    return env


def run_step(step: Step, mode: Mode, limit_s: float, env: dict[str, str], out: Path, log: Path) -> dict[str, Any]:
    """Run one step and wait for it: its entry in the results."""
    results = out / f"running-{step.name}"
    results.unlink(missing_ok=True)
    begun = time.monotonic()
    with log.open("ab") as output:
        output.write(f"\n== {step.name}: {step.question}\n".encode())
        output.flush()
        start = output.tell()
        process = subprocess.Popen(
            [sys.executable, *step.command(results, mode)],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # The whole group: torch.compile has workers. Also when this process is interrupted.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    said = _last_line(log.read_bytes()[start:].decode(errors="replace"))
    entry = {"question": step.question, "seconds": round(time.monotonic() - begun, 1), "limit_s": round(limit_s, 1)}
    result = _read(step, results)
    results.unlink(missing_ok=True)
    return {**entry, **_judge(step, code, said, result, limit_s), "result": result}


def _read(step: Step, results: Path) -> dict[str, Any] | None:
    """The results that a step wrote, or None if it wrote none or was killed while it wrote."""
    try:
        return step.read(results)
    except (OSError, ValueError, SyntaxError):  # SyntaxError: XML's ParseError
        return None


def _judge(step: Step, code: int | None, said: str, result: dict[str, Any] | None, limit_s: float) -> dict[str, str]:
    """Status and sentence of a step that ended with an exit code, or was killed (None)."""
    so_far = "it had measured nothing" if result is None else f"so far: {step.answer(result)}"
    if code is None:
        return {"status": KILLED, "said": f"killed after {limit_s:.0f} s, its last line: {said}; {so_far}"}
    if code == CANNOT_RUN:
        return {"status": CANNOT, "said": said}
    if "No module named pytest" in said:
        return {"status": CANNOT, "said": "pytest is not installed; add its wheel and those of iniconfig and pluggy"}
    if result is None:
        return {"status": FAILED, "said": f"exit status {code}: {said}; {so_far}"}
    if (skipped := result.get("skipped")) and not result["passed"] and not result["failed"]:
        return {"status": CANNOT, "said": skipped[0]["message"]}
    if code != 0 and not result.get("failed"):
        return {"status": FAILED, "said": f"exit status {code}: {said}; {so_far}"}
    return {"status": FAILED if result.get("failed") else ANSWERED, "said": step.answer(result)}


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "it printed nothing"


def summary(data: dict[str, Any]) -> str:
    """The answers as a Markdown table."""
    m = data["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    lines = [f"First contact with {m['gpu']} ({m['target']}); Python {m['python']}, {versions}.", ""]
    lines += ["| question | outcome | answer | s |", "|---|---|---|---|"]
    for step in STEPS:
        entry = data["steps"].get(step.name, {"status": "not reached", "said": "", "seconds": ""})
        said = entry["said"].replace("|", "/")
        lines.append(f"| {step.question} | {entry['status']} | {said} | {entry['seconds']} |")
    return "\n".join(lines) + "\n"


def load(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    """The results so far in `path` if they are of the same source, machine and mode; otherwise new ones."""
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        return now | {"steps": {}}
    if not isinstance(before, dict) or {k: before.get(k) for k in now} != now:
        print(f"{path} is of another source, machine or mode: every step runs again", flush=True)
        return now | {"steps": {}}
    return before


def chosen(only: Iterable[str] | None) -> list[Step]:
    """The steps named, or all."""
    return [step for step in STEPS if only is None or step.name in set(only)]


def main() -> int:
    """Run the steps that are not answered yet; 0 if none of them failed or was killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="folder of wheels to use, such as cuda-core's")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="of the whole (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=[s.name for s in STEPS], metavar="STEP", help="run these steps")
    parser.add_argument(
        "--host-driver", type=Path, metavar="DIR", help="for tests: use the driver that tests/host_cuda/build.py built"
    )
    args = parser.parse_args()
    begun = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a running step is killed
    args.out.mkdir(parents=True, exist_ok=True)
    mode = Mode(small=args.host_driver is not None, host_driver=args.host_driver is not None)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        site = scratch / "site"
        if args.wheels and (wrong := install_wheels(args.wheels, site)) is not None:
            print(f"{wrong}; going on without them", flush=True)
        env = environment(site, scratch, args.host_driver)
        found = subprocess.run([sys.executable, "-c", _GPU], env=env, capture_output=True, text=True)
        if found.returncode != 0:
            print(f"error: this checkout's runtime cannot be imported: {_last_line(found.stderr)}", file=sys.stderr)
            return 1
        gpu = json.loads(found.stdout)
        if gpu is None:
            print("error: the CUDA driver finds no GPU here; check that nvidia-smi lists one", file=sys.stderr)
            return 1
        sys.path.append(str(site))  # for the wheels' versions
        machine = describe((*GPU_PACKAGES, "pytest")) | gpu
        path, log = args.out / "first_contact.json", args.out / "first_contact.log"
        data = load(path, {"format": FORMAT, "sources": sources_sha256(), "machine": machine, "small": mode.small})
        longer = HOST_DRIVER_FACTOR if mode.host_driver else 1
        steps = [s for s in chosen(args.only) if data["steps"].get(s.name, {}).get("status") != ANSWERED]
        for step in steps:
            left = args.limit_s - (time.monotonic() - begun)
            if left < LEAST_S:
                said = f"no time was left of {args.limit_s:.0f} s; start again with the same --out"
                entry = {"question": step.question, "status": CANNOT, "said": said, "seconds": 0, "result": None}
            else:
                print(f"{step.name} ...", flush=True)
                entry = run_step(step, mode, min(step.limit_s * longer, left), env, args.out, log)
            data["steps"][step.name] = entry
            write(path, json.dumps(data, indent=2) + "\n")
            write(args.out / "summary.md", summary(data))
            print(f"{step.name}: {entry['status']}: {entry['said']}", flush=True)
        print("\n" + summary(data), flush=True)
    return 1 if any(data["steps"][s.name]["status"] in (FAILED, KILLED) for s in steps) else 0


if __name__ == "__main__":
    sys.exit(main())
