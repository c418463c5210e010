"""Servers with environments of their own, Ray and Triton: make the environment, and start the server in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

ROOT = Path(__file__).parent.parent
START_S = 300


def python_of(name: str, module: str) -> Path:
    """The Python of `build/NAME`, which `make` installs if it is not up to date; skips if `module` has no wheel."""
    if shutil.which("make") is None:
        pytest.skip(f"needs make, which installs build/{name}")
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "PYTHONPATH")}
    with FileLock(build / f"{name}.lock"):
        line = ["make", f"build/{name}/.installed", f"PYTHON={sys.executable}"]
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    python = build / name / "bin" / "python"
    if subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode:
        pytest.skip(f"needs {module}, which has no wheel for this platform")
    return python


@contextmanager
def started(python: Path, script: str, *arguments, home: Path) -> Iterator[SimpleNamespace]:
    """A server of `benchmarks/`; .line is what it printed, .process runs it. Its own files are in `home`."""
    log = home / "server.log"
    line = [python, ROOT / "benchmarks" / script, *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HOME": str(home)}
    with log.open("w") as errors:
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        try:
            said = process.stdout.readline()
            assert " on " in said, said + log.read_text()
            yield SimpleNamespace(process=process, line=said.strip(), url=re.search(r"http://\S+$", said)[0], log=log)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
