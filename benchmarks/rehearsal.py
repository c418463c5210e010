"""Rehearse every stage of `arcflow compile` with FLUX.1-dev at full size and random weights, and measure each stage.

It works in DIR, which needs 75 GB: a checkpoint of `fullsize.py`, then export, calibration (one prompt, 256 px,
bfloat16), quantisation, the drift gate (one prompt, 256 px), and the backbone's engine for sm89. Files that later
stages do not need are deleted. Each figure is printed beside the estimate of `arcflow plan`, made with the machine's
speeds just before the stage. The same command continues a stopped run; `--until STAGE` stops after a stage. Criteria:
at most 20 GiB in every stage; time within a factor of 1.5 of the estimate, memory within 1.2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from export_fullsize import MeasureError, drop_cache
from machine import describe as describe_machine

from arcflow_export.commands.sources import quiet_libraries
from arcflow_export.costs.machine import Machine, measure
from arcflow_export.pipeline.forecast import forecast
from arcflow_export.pipeline.stages import CompileJob
from arcflow_export.pipeline.students import load_student_file

MAX_RESIDENT_BYTES = 20 << 30
TIME_FACTOR, MEMORY_FACTOR = 1.5, 1.2
STAGES = ("export", "calibrate", "quantize", "verify", "build")
SAMPLE_S = 0.2
_HERE = Path(__file__).resolve().parent
_STUDENT = """\
name = "rehearsal"
base = "checkpoint/base"
adapter = "checkpoint/adapter"
precision = "fp8"

[arguments]
export = "--max-px 1024"
calibrate = "--dtype bfloat16 --limit 1 --sizes 256x256"
verify = "--limit 1 --height 256 --width 256"
build = "--parts backbone --resolutions 1024"
"""


def commands(folder: Path) -> dict[str, list[str]]:
    """Each stage's command."""
    source = ["--base", str(folder / "checkpoint/base"), "--adapter", str(folder / "checkpoint/adapter")]
    bf16, fp8, scales = str(folder / "bf16"), str(folder / "fp8"), str(folder / "scales.json")
    report = str(folder / "drift")
    return {
        "export": ["export", *source, "--dtype", "bfloat16", "--max-px", "1024", "--out", bf16, "--overwrite"],
        "calibrate": [
            "calibrate", *source, "--dtype", "bfloat16", "--limit", "1", "--sizes", "256x256", "--out", scales,
            "--overwrite",
        ],
        "quantize": ["quantize", bf16, "--scales", scales, "--out", fp8, "--overwrite"],
        "verify": [
            "verify", fp8, "--against", bf16, "--limit", "1", "--height", "256", "--width", "256", "--report", report,
        ],
        "build": [
            "build", fp8, "--backend", "tensorrt-rtx", "--target", "sm89", "--parts", "backbone", "--resolutions",
            "1024",
        ],
    }  # fmt: skip


def run_stage(name: str, arguments: list[str], log: Path) -> dict[str, Any]:
    """Run one stage in its own process.

    Returns:
        Its exit code, wall and CPU seconds, bytes read from disk, peak resident memory, and peak anonymous memory,
        which excludes pages of mapped files (the kernel drops those when memory is needed).

    Raises:
        MeasureError: the stage failed. A drift gate past its thresholds is not a failure, because weights are random.
    """
    with log.open("wb") as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "arcflow_runtime.cli", *arguments], stdout=output, stderr=subprocess.STDOUT
        )
        read = anonymous = 0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            read = max(read, _field(process.pid, "io", "read_bytes:"))
            anonymous = max(anonymous, _field(process.pid, "status", "RssAnon:") << 10)
            time.sleep(SAMPLE_S)
        seconds = time.perf_counter() - began
    code = process.returncode = os.waitstatus_to_exitcode(status)
    if code and not (name == "verify" and code == 1 and (log.parent / "drift" / "drift.json").exists()):
        raise MeasureError(f"{name} ended with exit code {code}; its output is in {log}")
    return {
        "exit_code": code, "wall_s": round(seconds, 1), "user_s": round(usage.ru_utime, 1),
        "system_s": round(usage.ru_stime, 1), "peak_resident_bytes": usage.ru_maxrss << 10,
        "peak_anonymous_bytes": anonymous, "read_bytes": read,
    }  # fmt: skip


def _field(pid: int, file: str, name: str) -> int:
    """A number from a process's file in /proc; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)


def planned(folder: Path, name: str, machine: Machine) -> dict[str, Any]:
    """The estimate of `arcflow plan` for a stage on a machine with these speeds."""
    student = folder / "student.toml"
    student.write_text(_STUDENT, encoding="utf-8")
    job = CompileJob(load_student_file(str(student)), folder, "fp8", "tensorrt-rtx", "sm89")
    return dataclasses.asdict(next(cost for cost in forecast(job, machine) if cost.stage == name))


def clear(folder: Path, name: str) -> None:
    """Delete what later stages do not need.

    That is the checkpoint's weights after calibration, and the unquantised bundle after the gate.

    Weight files become holes of the same size, because the estimates need the sizes.
    """
    if name == "calibrate":
        for file in (folder / "checkpoint").rglob("*.safetensors"):
            size = file.stat().st_size
            os.truncate(file, 0)
            os.truncate(file, size)
    if name == "verify":
        shutil.rmtree(folder / "bf16", ignore_errors=True)


def rehearse(folder: Path, until: str) -> dict[str, Any]:
    """Run the stages that are not done; the record in `folder` is written after each stage.

    Raises:
        MeasureError: a stage failed.
    """
    record = folder / "rehearsal.json"
    result: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {"stages": {}}
    if not (folder / "checkpoint").exists():
        make = [sys.executable, str(_HERE / "fullsize.py"), "--model", "flux", "--out", str(folder / "checkpoint")]
        subprocess.run(make, check=True)
    for name, arguments in commands(folder).items():
        if name not in result["stages"]:
            speeds = measure(folder)
            drop_cache([f for f in folder.rglob("*") if f.is_file()])
            load = os.getloadavg()
            ran = run_stage(name, arguments, folder / f"{name}.log")
            result["stages"][name] = ran | {"speeds": dataclasses.asdict(speeds), "load_average_before": load}
            clear(folder, name)
            result["machine"] = describe_machine()
            with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as f:
                json.dump(result, f, indent=2)
            os.replace(f.name, record)
        row = result["stages"][name]
        row["planned"] = planned(folder, name, Machine(**row["speeds"]))
        print(describe(name, row), flush=True)
        if name == until:
            break
    return result


def describe(name: str, row: dict[str, Any]) -> str:
    """One stage as a line of text."""
    plan = row["planned"]
    return (
        f"{name:10} {row['wall_s']:7.0f} s of {plan['seconds']:7.0f} planned   "
        f"{row['peak_resident_bytes'] / 2**30:6.2f} GiB of {plan['memory_bytes'] / 2**30:6.2f} planned   "
        f"{row['read_bytes'] / 1e9:6.1f} GB read"
    )


def met(row: dict[str, Any]) -> bool:
    """True if a stage meets the criteria."""
    time_ratio = row["wall_s"] / row["planned"]["seconds"]
    memory_ratio = row["peak_resident_bytes"] / row["planned"]["memory_bytes"]
    return (
        row["peak_resident_bytes"] <= MAX_RESIDENT_BYTES
        and 1 / TIME_FACTOR <= time_ratio <= TIME_FACTOR
        and 1 / MEMORY_FACTOR <= memory_ratio <= MEMORY_FACTOR
    )


def main() -> int:
    """Parse the command line and rehearse; returns 0 if the criteria are met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="existing directory to work in")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage to run (default: all)")
    parser.add_argument("--json", type=Path, default=_HERE / "results" / "rehearsal_flux.json", metavar="FILE")
    args = parser.parse_args()
    try:
        quiet_libraries()
        if not args.folder.is_dir():
            raise MeasureError(f"--folder: {args.folder} is not a directory; create it first")
        result = rehearse(args.folder.absolute(), args.until)
    except (MeasureError, OSError, subprocess.CalledProcessError) as e:
        print(f"rehearsal: error: {e}", file=sys.stderr)
        return 1
    result["command"] = "python benchmarks/rehearsal.py --folder DIR"
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if all(met(row) for row in result["stages"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
