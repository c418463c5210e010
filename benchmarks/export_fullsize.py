"""Measure `arcflow export` of a checkpoint of benchmarks/fullsize.py: time and peak memory, beside a plain copy's time.

The copy writes as many bytes as the bundle's weights have, in blocks of 16 MiB, from files that are not in the page
cache. For a random checkpoint it copies the checkpoint, before the export and again after it, and the faster copy
counts. For a sparse checkpoint, whose holes cost nothing to read, it copies the bundle after the export. Criterion:
peak resident memory at most 4 GiB, and wall time at most that of tracing plus twice the copy. Copy and bundle are
deleted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from machine import describe as describe_machine

COPY_BLOCK_BYTES = 16 << 20
#: If the disk has no room for a whole copy, leave this much free, copy what fits, and scale the time.
SPARE_BYTES = 2 << 30
MAX_RESIDENT_BYTES = 4 << 30
SAMPLE_S = 0.2


class MeasureError(Exception):
    """The measurement cannot be made; the message says why and what to do."""


def drop_cache(files: list[Path]) -> None:
    """Write dirty pages to disk and drop the files' pages from the page cache."""
    os.sync()
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def copy_seconds(files: list[Path], num_bytes: int, folder: Path) -> tuple[float, int]:
    """Copy `num_bytes` of `files` (repeated if they are shorter) into `folder`, and delete the copy.

    Returns:
        The seconds, scaled to `num_bytes` if the disk had room for less, and the number of bytes copied.
    """
    left = min(num_bytes, shutil.disk_usage(folder).free - SPARE_BYTES)
    if left < num_bytes // 4:
        raise MeasureError(f"{folder} has no room for a quarter of a copy of {num_bytes / 1e9:.1f} GB")
    copied = 0
    drop_cache(files)
    with tempfile.TemporaryDirectory(prefix="copy-", dir=folder) as temporary:
        began = time.perf_counter()
        for i, file in enumerate(itertools.cycle(files)):
            with file.open("rb", buffering=0) as source, (Path(temporary) / str(i)).open("wb", buffering=0) as target:
                while left > 0 and (block := source.read(min(COPY_BLOCK_BYTES, left))):
                    copied += target.write(block)
                    left -= len(block)
            if left <= 0:
                break
        seconds = time.perf_counter() - began
    return seconds * num_bytes / copied, copied


class _Sampler(threading.Thread):
    """Peaks of a process's anonymous and file-backed resident memory, read every 0.2 s."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.peaks = {"RssAnon": 0, "RssFile": 0, "VmRSS": 0}
        self._status = Path(f"/proc/{pid}/status")
        self._done = threading.Event()

    def run(self) -> None:
        """Sample until `stop` or the process ends."""
        while not self._done.wait(SAMPLE_S):
            try:
                lines = self._status.read_text().splitlines()
            except OSError:
                return
            for line in lines:
                name, _, value = line.partition(":")
                if name in self.peaks:
                    self.peaks[name] = max(self.peaks[name], int(value.split()[0]) << 10)

    def stop(self) -> None:
        """Stop sampling."""
        self._done.set()
        self.join()


def run_arcflow(*arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run `arcflow ARGUMENTS --json` in its own process.

    Returns:
        The printed JSON; and its wall and CPU seconds and peaks of resident memory in bytes.

    Raises:
        MeasureError: the command failed; its message is on stderr.
    """
    with tempfile.TemporaryFile("w+") as output:
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "arcflow_runtime.cli", *arguments, "--json"], stdout=output)
        sampler = _Sampler(process.pid)
        sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        sampler.stop()
        if process.returncode:
            raise MeasureError(f"arcflow {arguments[0]} ended with exit code {process.returncode}")
        output.seek(0)
        printed: dict[str, Any] = json.load(output)
    return printed, {
        "wall_s": round(seconds, 2), "user_s": round(usage.ru_utime, 2), "system_s": round(usage.ru_stime, 2),
        "peak_resident_bytes": usage.ru_maxrss << 10, "sampled_peak_resident_bytes": sampler.peaks["VmRSS"],
        "sampled_peak_anonymous_bytes": sampler.peaks["RssAnon"],
        "sampled_peak_file_mapped_bytes": sampler.peaks["RssFile"],
    }  # fmt: skip


def measure(model: str, checkpoint: Path, dtype: str, out: Path) -> dict[str, Any]:
    """Measure copy and export of one checkpoint; see the module's docstring.

    Raises:
        MeasureError: the checkpoint is not valid, the disk is too small, or the export failed.
    """
    files = sorted(checkpoint.glob("*/**/*.safetensors"))
    if not files or not out.parent.is_dir():
        raise MeasureError(f"{checkpoint} must be a directory of benchmarks/fullsize.py, and {out.parent} must exist")
    arguments = ["--base", str(checkpoint / "base"), "--adapter", str(checkpoint / "adapter"), "--dtype", dtype,
                 "--out", str(out)]  # fmt: skip
    stored = sum(f.stat().st_blocks * 512 for f in files)
    size = sum(f.stat().st_size for f in files)
    plan, _ = run_arcflow("export", *arguments, "--dry-run")
    free = shutil.disk_usage(out.parent).free
    if free < plan["bytes"]:
        raise MeasureError(f"{out.parent} has {free / 1e9:.1f} GB free, the bundle needs {plan['bytes'] / 1e9:.1f} GB")
    sparse = stored <= size // 2
    copies, copied = {}, 0
    if not sparse:
        copies["before"], copied = copy_seconds(files, plan["bytes"], out.parent)
    drop_cache(files)
    try:
        printed, export = run_arcflow("export", *arguments)
        written = sorted(f for f in out.rglob("*") if f.is_file())
        bundle_bytes = sum(f.stat().st_size for f in written)
        if sparse:
            copies["after"], copied = copy_seconds(written, plan["bytes"], out.parent)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    if not sparse:
        copies["after"], copied = copy_seconds(files, plan["bytes"], out.parent)
    copy = min(copies.values())
    trace = sum(s["seconds"] for s in printed["stages"] if s["stage"].endswith(": tracing"))
    limit = trace + 2 * copy
    return {
        "command": f"python benchmarks/export_fullsize.py --model {model} --checkpoint CHECKPOINT --dtype {dtype} "
                   "--out BUNDLE",
        "export_command": f"arcflow export --base CHECKPOINT/base --adapter CHECKPOINT/adapter --dtype {dtype} "
                          "--out BUNDLE",
        "model": model,
        "checkpoint": {"bytes": size, "bytes_on_disk": stored, "fill": "sparse" if sparse else "random"},
        "bundle_bytes": bundle_bytes,
        "machine": describe_machine() | {"disk_free_bytes": free, "load_average": os.getloadavg()},
        "copy": {"of": "bundle" if sparse else "checkpoint", "bytes": plan["bytes"], "copied_bytes": copied,
                 "runs_s": {k: round(v, 2) for k, v in copies.items()}, "seconds": round(copy, 2)},
        "export": export | {"trace_s": round(trace, 2), "other_s": round(export["wall_s"] - trace, 2),
                            "stages": printed["stages"]},
        "criterion": {
            "max_resident_bytes": MAX_RESIDENT_BYTES,
            "resident_met": export["peak_resident_bytes"] <= MAX_RESIDENT_BYTES,
            "max_wall_s": round(limit, 2), "wall_met": export["wall_s"] <= limit,
        },
    }  # fmt: skip


def describe(result: dict[str, Any]) -> str:
    """A result of `measure` as a table."""
    m, e, c, criterion = result["machine"], result["export"], result["copy"], result["criterion"]
    source = result["checkpoint"]
    lines = [
        f"{result['model']}: {source['fill']} checkpoint of {source['bytes'] / 1e9:.1f} GB, "
        f"bundle of {result['bundle_bytes'] / 1e9:.1f} GB",
        f"{m['cpu']}, {m['cores']} cores, {m['memory_bytes'] / 2**30:.1f} GiB, "
        f"{m['disk_free_bytes'] / 1e9:.0f} GB of disk free, load {m['load_average'][0]:.1f}",
        f"Python {m['python']}, " + ", ".join(f"{n} {v}" for n, v in m["versions"].items()),
        "",
        f"  {'copy of the ' + c['of']:28}{c['seconds']:>10.1f} s   "
        f"({c['copied_bytes'] / 1e9:.1f} GB copied: {c['runs_s']})",
    ]
    for stage in e["stages"]:
        rate = f"   {stage['bytes'] / stage['seconds'] / 1e6:,.0f} MB/s" if stage["bytes"] and stage["seconds"] else ""
        lines.append(f"  {stage['stage']:28}{stage['seconds']:>10.1f} s{rate}")
    verdict = {True: "met", False: "MISSED"}
    wall, resident = verdict[criterion["wall_met"]], verdict[criterion["resident_met"]]
    lines += [
        f"  {'export':28}{e['wall_s']:>10.1f} s   at most {criterion['max_wall_s']:.1f}: {wall}",
        f"  {'peak resident':28}{e['peak_resident_bytes'] / 2**30:>10.2f} GiB at most 4: {resident} (sampled: "
        f"{e['sampled_peak_anonymous_bytes'] / 2**30:.2f} anonymous, "
        f"{e['sampled_peak_file_mapped_bytes'] / 2**30:.2f} of files)",
    ]
    return "\n".join(lines)


def main() -> int:
    """Parse the command line and measure; returns 0 if the criterion is met, 1 if it is missed or an error occurred."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("flux", "qwen"), required=True)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="from benchmarks/fullsize.py")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="written, measured and deleted")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/export_MODEL.json")
    args = parser.parse_args()
    target = args.json or Path(__file__).parent / "results" / f"export_{args.model}.json"
    try:
        if args.out.exists():
            raise MeasureError(f"--out: {args.out} exists; remove it or give another name")
        result = measure(args.model, args.checkpoint, args.dtype, args.out)
    except (MeasureError, OSError) as e:
        print(f"export_fullsize: error: {e}", file=sys.stderr)
        return 1
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(describe(result))
    return 0 if result["criterion"]["resident_met"] and result["criterion"]["wall_met"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
