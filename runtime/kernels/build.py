"""Compile the CUDA kernels with nvcc: their source -> `arcflow.fatbin` with a JSON record, and a table of registers.

    python runtime/kernels/build.py [--nvcc NVCC] [--arch 75,90] [--out FOLDER] [--json]

Fails if a kernel spills registers or needs a stack on any architecture. The fatbin holds machine code for each
architecture that this nvcc supports, and PTX for the newest, which drivers compile for newer GPUs. The record,
`arcflow.fatbin.json`, has the source's hash and the architectures, by which the runtime decides whether to use it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
#: The file that includes all others.
MAIN = "noise.cu"
#: Compute capabilities, as in sm_75, to compile for; those that nvcc does not support are skipped.
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 103, 110, 120, 121)

_INCLUDE = re.compile(r'^#include "(.*)"\n', re.MULTILINE)
_KERNEL = re.compile(r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\d+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


class BuildError(Exception):
    """nvcc is missing or failed, or a kernel spills."""


@dataclass(frozen=True)
class Usage:
    """Resources of one kernel on one architecture, from ptxas's report."""

    arch: int
    kernel: str
    registers: int
    stack_bytes: int
    spill_bytes: int


def find_nvcc(named: str | None = None) -> str | None:
    """The path of nvcc: the `named` one, or else one on PATH or in CUDA's usual folder; None if there is none."""
    candidates = [named] if named else ["nvcc", f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc"]
    return next((found for c in candidates if c and (found := shutil.which(c))), None)


def known_architectures(nvcc: str) -> list[int]:
    """The members of `ARCHITECTURES` that this nvcc supports."""
    listed = _run([nvcc, "--list-gpu-arch"])
    return [a for a in ARCHITECTURES if re.search(rf"^compute_{a}$", listed, re.MULTILINE)]


def program() -> str:
    """The kernels as one text: each file that `MAIN` includes stands once, before the file that includes it.

    The runtime gives the same text to NVRTC, and looks for its SHA-256 in the fatbin's record.
    """
    seen: set[str] = set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (HERE / name).read_text(encoding="utf-8")
        return "".join(map(expand, _INCLUDE.findall(text))) + _INCLUDE.sub("", text)

    return expand(MAIN)


def compile_fatbin(nvcc: str, architectures: list[int], out: Path) -> list[Usage]:
    """Compile into the file `out`, and return the resources of every kernel.

    Raises:
        BuildError: nvcc fails or warns, or its report lacks a kernel.
    """
    command = [nvcc, "-std=c++17", "-O3", "--fatbin", "--threads", "0", "-Xptxas", "-v"]
    command += ["-Xfatbin", "-compress-all", "--Werror", "all-warnings"]
    for arch in architectures:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    command += ["-gencode", f"arch=compute_{architectures[-1]},code=compute_{architectures[-1]}"]
    source = out.with_suffix(".cu")
    source.write_text(program(), encoding="utf-8")
    report = parse_report(_run([*command, str(source), "-o", str(out)]))
    kernels = {u.kernel for u in report}
    if len(report) != len(kernels) * len(architectures) or not kernels:
        raise BuildError(f"nvcc's report has {len(report)} entries for {architectures} and {sorted(kernels)}")
    return report


def parse_report(text: str) -> list[Usage]:
    """Parse the report of `-Xptxas -v`, in its order."""
    found, kernel, stack = [], None, None
    for line in text.splitlines():
        if match := _KERNEL.search(line):
            kernel = (int(match["arch"]), match["kernel"])
        elif match := _STACK.search(line):
            stack = [int(n) for n in match.groups()]
        elif (match := _REGISTERS.search(line)) and kernel and stack:
            found.append(Usage(*kernel, int(match[1]), stack[0], stack[1] + stack[2]))
            kernel = stack = None
    return found


def check_spills(report: list[Usage]) -> None:
    """Check that no kernel spills registers or needs a stack.

    Raises:
        BuildError: some do; the message lists them.
    """
    bad = [u for u in report if u.stack_bytes or u.spill_bytes]
    if bad:
        rows = "\n".join(f"  sm_{u.arch} {u.kernel}: stack {u.stack_bytes}, spills {u.spill_bytes} bytes" for u in bad)
        raise BuildError(f"kernels must not spill registers:\n{rows}")


def main(arguments: list[str] | None = None) -> int:
    """Compile, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description="Compile the kernels with nvcc.")
    parser.add_argument("--nvcc", help="the compiler; by default that of the path or of CUDA_HOME")
    parser.add_argument("--arch", help="compute capabilities, such as 75,90; by default all that nvcc has")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the fatbin; by default beside the source")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    try:
        nvcc = find_nvcc(options.nvcc)
        if nvcc is None:
            raise BuildError("nvcc was not found; install the CUDA toolkit, or name it with --nvcc")
        wanted = [int(a) for a in options.arch.split(",")] if options.arch else known_architectures(nvcc)
        options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.out) as scratch:
            fatbin = Path(scratch) / "arcflow.fatbin"
            report = compile_fatbin(nvcc, wanted, fatbin)
            check_spills(report)
            about = Path(scratch) / "arcflow.fatbin.json"
            about.write_text(json.dumps(_describe(nvcc, wanted, fatbin), indent=2) + "\n", encoding="utf-8")
            for path in (fatbin, about):
                os.replace(path, options.out / path.name)
    except (BuildError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps([asdict(u) for u in report], indent=2))
    else:
        for u in report:
            print(f"sm_{u.arch:<4} {u.kernel:40} {u.registers:4} registers, no spills")
    return 0


def _describe(nvcc: str, architectures: list[int], fatbin: Path) -> dict[str, object]:
    return {
        "source_sha256": hashlib.sha256(program().encode()).hexdigest(),
        "sha256": hashlib.sha256(fatbin.read_bytes()).hexdigest(),
        "architectures": [str(a) for a in architectures],
        "nvcc": _run([nvcc, "--version"]).strip().splitlines()[-1],
    }


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
