"""The whole way from a stand-in of the hub to engines, with the real stages: minutes, so `make check` runs them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from arcflow_runtime.disk.bundle import Bundle
from tests.conftest import GOLDEN
from tests.hub import Hub, release

pytestmark = pytest.mark.slow
TRTX = ("--precision", "fp8", "--backend", "tensorrt-rtx", "--target", "sm89")
SMALL = ("--limit", "2", "--size", "64x64")


def start(*arguments, **environment):
    command = [sys.executable, "-m", "arcflow_runtime.cli", "compile", *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Where this process ignores Ctrl-C, as in the background of a shell, its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def compile_(*arguments, **environment):
    run = start(*arguments, "--json", **environment)
    out, err = run.communicate()
    assert run.returncode == 0, err.decode()
    return json.loads(out)


def contents(folder: Path) -> dict[str, str]:
    """What must be the same however often a run was stopped: SHA-256 of scales and of every file of the bundles."""
    found = {p.name: json.loads(p.read_text())["digest"] for p in folder.glob("*-scales.json")}
    for path in folder.glob("*/manifest.json"):
        files = Bundle.open(path.parent, "full").manifest.files
        found |= {f"{path.parent.name}/{name}": entry.sha256 for name, entry in files.items()}
    return found


@pytest.fixture(scope="module", autouse=True)
def builder():
    pytest.importorskip("tensorrt_rtx")


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_from_the_hub_to_engines(tmp_path, family):
    """Each preset by its name alone; the second run reads nothing from the hub and does nothing again."""
    arguments = (family, *TRTX, *SMALL, "--out", tmp_path / "out")
    with Hub(release(tmp_path / "hub")) as hub:
        environment = hub.environment(tmp_path / "home")
        first = compile_(*arguments, **environment)
        stages = ["download", "export", "calibrate", "quantize", "verify", "build"]
        assert [(s["stage"], s["state"]) for s in first["stages"]] == [(s, "ran") for s in stages]
        assert len(hub.downloads) == len(set(hub.downloads))
        base = hub.commit("black-forest-labs/FLUX.1-dev" if family == "flux" else "Qwen/Qwen-Image")
        assert Bundle.open(first["bundle"]).manifest.provenance.base.revision == base
        hub.requests.clear()
        second = compile_(*arguments, **environment)
        assert [s["state"] for s in second["stages"]] == ["done"] * 5 + ["ran"]
        assert hub.downloads == []
    assert list((tmp_path / "out" / f"{family}-fp8" / "engines").rglob("*.engine*")) != []


@pytest.mark.lengthy
def test_at_1024_px(tmp_path):
    """The presets' own size, with one prompt."""
    with Hub(release(tmp_path / "hub")) as hub:
        found = compile_(
            "flux",
            *TRTX,
            "--limit",
            1,
            "--out",
            tmp_path / "out",
            **hub.environment(tmp_path / "home"),
        )
    for stage in found["stages"]:
        assert stage["peak_bytes"] < 8 << 30, stage


@pytest.mark.lengthy
def test_killed_at_random_moments(tmp_path):
    """The same bundles and scales come out, and nothing is left beside them."""
    student = GOLDEN / "flux-tiny" / "student.toml"
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    arguments = (student, *TRTX, *SMALL)
    took = sum(s["seconds"] for s in compile_(*arguments, "--out", whole)["stages"])
    moments = random.Random(0)
    for _ in range(10):
        run = start(*arguments, "--out", torn)
        try:
            run.communicate(timeout=moments.uniform(0.5, took / 4))
        except subprocess.TimeoutExpired:
            run.send_signal(moments.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
            run.communicate()
    compile_(*arguments, "--out", torn)
    assert contents(torn) == contents(whole)
    names = [sorted(p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file()) for f in (torn, whole)]
    assert names[0] == names[1]
