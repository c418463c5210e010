"""The wheel in an environment with nothing but the runtime: its commands, an image, and the runtime's own tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from arcflow_runtime.cli import COMMANDS
from tests.conftest import SHAPES_OPTIONS

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
#: Files of tests that must run there; the others may be skipped for want of an extra.
RUNTIME_TESTS = (
    "bundle",
    "cli",
    "engine_shapes",
    "engine_store",
    "golden",
    "kernel_update",
    "noise",
    "pipeline",
    "request",
    "rotary",
    "schedule",
    "sheet",
    "speedups",
    "text",
    "update",
)


def run(*command, **options) -> str:
    # What finds this checkout's packages would hide what the wheel lacks.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_ADDOPTS", "LD_PRELOAD")}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """The programs of an environment with the wheel, pytest, and what they need."""
    folder = tmp_path_factory.mktemp("packaging")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    (wheel,) = folder.glob("arcflow-*.whl")
    run(sys.executable, "-m", "venv", folder / "bare")
    programs = folder / "bare" / "bin"
    constraints = ROOT / "constraints.txt"
    run(*pip, "--python", programs / "python", "install", "--constraint", constraints, wheel, "pytest", "pytest-xdist")
    # The service's extra is in an environment of its own.
    run(sys.executable, "-m", "venv", folder / "serve")
    serve = folder / "serve" / "bin" / "python"
    run(*pip, "--python", serve, "install", "--constraint", constraints, f"{wheel}[serve]")
    missing = "import importlib.util as u; assert not [x for x in ('torch', 'transformers', 'onnx') if u.find_spec(x)]"
    run(programs / "python", "-c", missing, cwd=folder)
    return programs


def test_help_of_every_command(bare, tmp_path):
    assert "usage: arcflow" in run(bare / "arcflow", "--help", cwd=tmp_path)
    for command in COMMANDS:
        assert f"usage: arcflow {command}" in run(bare / "arcflow", command, "--help", cwd=tmp_path)


def test_the_doctor_needs_no_extra(bare, tmp_path):
    assert run(bare / "arcflow", "doctor", cwd=tmp_path).endswith("\nno check failed\n")
    command = [bare / "arcflow", "doctor", "flux", "--backend", "tensorrt-rtx", "--target", "sm89"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == ""
    assert "-> run: pip install 'arcflow[export]'\n" in done.stdout


def test_a_small_image_is_the_one_made_here(bare, bundles, tmp_path):
    bundle = bundles("shapes", **SHAPES_OPTIONS)
    arguments = ("generate", bundle, "a red circle", "--seed", "1", "--out")
    run(bare / "arcflow", *arguments, tmp_path / "there.png", cwd=tmp_path)
    run(Path(sys.executable).with_name("arcflow"), *arguments, tmp_path / "here.png", cwd=tmp_path)
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()


def test_the_service_needs_its_extra_and_no_more(bare, bundles, tmp_path):
    bundle = bundles("shapes", **SHAPES_OPTIONS)
    programs = bare.parent.parent / "serve" / "bin"
    said = run(programs / "arcflow", "serve", bundle, "--check", cwd=tmp_path)
    assert said.endswith(" s, the image of the pipeline alone\n")
    missing = "import importlib.util as u; assert not [x for x in ('torch', 'onnx', 'openai') if u.find_spec(x)]"
    run(programs / "python", "-c", missing, cwd=tmp_path)
    command = [bare / "arcflow", "serve", bundle, "--check"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("which is not installed; run: pip install 'arcflow[serve]'\n")


def test_the_compiled_part_and_data_are_in_the_wheel(bare, tmp_path):
    code = (
        "from importlib import resources\n"
        "from arcflow_runtime.maths.speedups import compiled\n"
        "assert compiled is not None\n"
        "for package, names in {'arcflow_runtime.kernels': ['update.cu', 'update_math.h'],\n"
        "                       'arcflow_runtime': ['py.typed'],\n"
        "                       'arcflow_export.pipeline': ['students'],\n"
        "                       'arcflow_serve': ['page/index.html'],\n"
        "                       'arcflow_export.formats': ['policies', 'prompt_sets']}.items():\n"
        "    for name in names:\n"
        "        path = resources.files(package) / name\n"
        "        assert path.is_file() or any(path.iterdir()), path\n"
    )
    run(bare / "python", "-c", code, cwd=tmp_path)


def test_the_runtimes_tests_pass_without_torch(bare, tmp_path):
    report = tmp_path / "report.xml"
    said = run(
        bare / "pytest",
        *("-q", "-p", "no:cacheprovider", "--numprocesses", "2", "--junitxml", report, ROOT / "tests"),
        cwd=ROOT,
    )
    assert re.search(r"SKIPPED .*needs torch, which is not installed", said)
    passed = {
        case.get("classname").removeprefix("tests.test_")
        for case in ElementTree.parse(report).iter("testcase")
        if case.find("skipped") is None
    }
    assert [name for name in RUNTIME_TESTS if name not in passed] == []
