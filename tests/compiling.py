"""Run `arcflow compile` in a temporary folder with fake stages (`fake_stage.py`), which are quick and write a log."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arcflow_export.pipeline import process
from arcflow_runtime import cli

# The command plans an export, whatever the stages are.
pytest.importorskip("torch")
HERE = Path(__file__).parent
STAGES = ("export", "calibrate", "quantize", "verify", "build")
FP8 = ("--precision", "fp8", "--backend", "tensorrt-rtx", "--target", "sm89")
STUDENT = """
name = "some"
base = "base"
adapter = "adapter"

[arguments]
calibrate = "--prompts prompts.txt"
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A temporary working folder with a student file; stages of `arcflow compile` are fake ones."""
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    (tmp_path / "prompts.txt").write_text("a prompt\n")
    (tmp_path / "student.toml").write_text(STUDENT)
    (tmp_path / "fake").mkdir()
    monkeypatch.setenv("FAKE", str(tmp_path / "fake"))
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-S", str(HERE / "fake_stage.py")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compile_(*arguments):
    return cli.main(["compile", "student.toml", *FP8, *arguments])


def log(what="start"):
    """The stages that logged `what` since the last call of this function."""
    path = Path("fake/log")
    lines = path.read_text().splitlines() if path.exists() else []
    path.write_text("")
    return [line.split()[1] for line in lines if line.split()[0] == what]


def records():
    return json.loads(Path("out/.some.stages.json").read_text())


def start(place, *arguments, **environment):
    """Start the command as a separate process."""
    command = [sys.executable, str(HERE / "fake_compile.py"), "student.toml", *FP8, *arguments]
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | environment | {"PYTHONPATH": path}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A child inherits an ignored SIGINT, for example from tests in the background of a shell.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def reached(what, stage):
    """Wait until a stage logs `what`, and return its process id."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for line in Path("fake/log").read_text().splitlines() if Path("fake/log").exists() else ():
            if line.split()[:2] == [what, stage]:
                return int(line.split()[2])
        time.sleep(0.01)
    raise AssertionError(f"{stage} did not log {what!r} within a minute")


def said(run):
    """The next line on the process's stderr; "" after a minute without one."""
    ready, _, _ = select.select([run.stderr], [], [], 60)
    return run.stderr.readline() if ready else ""


def files():
    return sorted(str(p.relative_to("out")) for p in Path("out").rglob("*") if p.is_file())


#: All output files of a finished run.
WHOLE = [
    ".some.lock",
    ".some.stages.json",
    "some-bf16/manifest.json",
    "some-bf16/weights",
    "some-drift/drift.json",
    "some-fp8/engines/engine",
    "some-fp8/manifest.json",
    "some-fp8/weights",
    "some-scales.json",
]
