"""`arcflow compile --backend auto`: what is built for, on machines with and without a GPU, and what is said of it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from arcflow_export.pipeline import backend, check
from arcflow_runtime import cli
from arcflow_runtime.engines.gpus import Gpu
from arcflow_runtime.errors import RequestError
from tests import compiling

place = compiling.place
BF16_NEEDS_A_TARGET = (
    "there is no GPU here, and ONNX Runtime has no bf16 on a CPU: give the GPU to build for, such as --target sm89 for "
    "RTX 40 cards (with make: TARGET=sm89), or --precision fp32 for this CPU"
)
NVFP4_NEEDS_A_TARGET = (
    "--precision nvfp4 runs on GPUs only and there is none here: give the GPU to build for, such as --target sm120 for "
    "RTX 50 cards (with make: TARGET=sm120), or --precision int8 for this CPU"
)
NOT_HERE = (
    "--target must be among sm75, sm80, sm86, sm89, sm120, sm121 for a GPU that is not here, got {}; run the command "
    "on a machine with that GPU, where TensorRT builds for it"
)


@pytest.fixture
def machine(monkeypatch):
    """A function (GPU's capability or None, installed modules of both libraries): from then on, this machine is so."""

    def be(target, *installed):
        gpu = None if target is None else Gpu("a GPU", target)
        real = importlib.util.find_spec

        def find_spec(name):
            if name in ("tensorrt", "tensorrt_rtx"):
                return SimpleNamespace() if name in installed else None
            return real(name)

        for module in (backend, check):
            monkeypatch.setattr(module, "find_spec", find_spec)
        monkeypatch.setattr(backend, "find_gpu", lambda: gpu)
        monkeypatch.setattr("arcflow_runtime.engines.gpus.find_gpu", lambda: gpu)

    return be


BOTH = ("tensorrt", "tensorrt_rtx")


@pytest.mark.parametrize(
    ("gpu", "installed", "target", "chosen"),
    [
        # The GPU here.
        ("sm89", BOTH, None, "tensorrt-rtx"),
        ("sm89", ("tensorrt_rtx",), None, "tensorrt-rtx"),
        ("sm89", ("tensorrt",), None, "tensorrt"),
        ("sm89", (), None, "tensorrt-rtx"),  # the next check says how to install it
        ("sm90", BOTH, None, "tensorrt"),
        ("sm90", ("tensorrt_rtx",), None, "tensorrt"),
        # A target that is the GPU here is no other.
        ("sm90", BOTH, "sm90", "tensorrt"),
        ("sm89", ("tensorrt",), "sm89", "tensorrt"),
        # Other targets need a library that builds without their GPU.
        ("sm90", BOTH, "sm89", "tensorrt-rtx"),
        ("sm89", ("tensorrt",), "sm89, sm120", "tensorrt-rtx"),
        (None, BOTH, "sm89,sm120", "tensorrt-rtx"),
        # This CPU.
        (None, BOTH, None, "onnxruntime"),
    ],
)
def test_what_is_chosen(machine, gpu, installed, target, chosen):
    machine(gpu, *installed)
    assert backend.choose_backend(target, "fp8") == chosen


@pytest.mark.parametrize(
    ("gpu", "target", "precision", "message"),
    [
        (None, None, "bf16", BF16_NEEDS_A_TARGET),
        (None, None, "nvfp4", NVFP4_NEEDS_A_TARGET),
        (None, "sm90", "fp8", NOT_HERE.format("sm90")),
        ("sm90", "sm90,sm100,sm89", "fp8", NOT_HERE.format("sm100, sm90")),
    ],
)
def test_what_nothing_builds_for(machine, gpu, target, precision, message):
    machine(gpu, *BOTH)
    with pytest.raises(RequestError) as error:
        backend.choose_backend(target, precision)
    assert str(error.value) == message


def compile_(*arguments):
    return cli.main(["compile", "student.toml", *arguments])


def last_line(capsys):
    return capsys.readouterr().out.splitlines()[-1]


def test_without_a_gpu_the_bundle_is_for_this_cpu(place, machine, capsys):
    machine(None, *BOTH)
    assert compile_("--precision", "fp32") == 0
    assert last_line(capsys) == (
        "out/some-fp32 is for CPUs, because there is no GPU here and no --target was given; next: arcflow generate "
        'out/some-fp32 "a prompt"'
    )
    assert "build" not in compiling.log()
    assert compile_("--precision", "fp32", "--backend", "onnxruntime") == 0
    assert last_line(capsys) == 'out/some-fp32 is for CPUs; next: arcflow generate out/some-fp32 "a prompt"'


def test_a_precision_that_no_cpu_runs_needs_a_target(place, machine, capsys):
    machine(None, *BOTH)
    assert compile_() == 2
    assert capsys.readouterr().err == f"arcflow compile: error: {BF16_NEEDS_A_TARGET}\n"
    assert not Path("out").exists()
    assert compile_("--backend", "onnxruntime") == 0
    assert last_line(capsys) == (
        "out/some-bf16 has no engines, and no CPU runs it; next: arcflow build out/some-bf16 --backend tensorrt-rtx"
    )


def test_engines_for_a_target(place, machine, capsys):
    machine(None, *BOTH)
    assert compile_("--target", "sm89") == 0
    out = capsys.readouterr().out
    assert "build: arcflow build out/some-bf16 --backend tensorrt-rtx --target sm89\n" in out
    assert out.splitlines()[-1] == (
        "out/some-bf16 has engines of tensorrt-rtx for sm89; next, on a machine with such a GPU: arcflow generate "
        'out/some-bf16 "a prompt" --backend tensorrt-rtx'
    )


def test_engines_for_the_gpu_here(place, machine, capsys):
    machine("sm90", *BOTH)
    assert compile_() == 0
    out = capsys.readouterr().out
    assert "build: arcflow build out/some-bf16 --backend tensorrt\n" in out
    assert out.splitlines()[-1] == (
        'out/some-bf16 has engines of tensorrt for sm90; next: arcflow generate out/some-bf16 "a prompt" '
        "--backend tensorrt"
    )
    assert compile_("--json") == 0
    assert json.loads(capsys.readouterr().out)["backend"] == "tensorrt"


def test_a_library_that_is_missing_for_the_gpu_here(place, machine, capsys):
    machine("sm120")
    assert compile_() == 1
    assert capsys.readouterr().err == (
        "arcflow compile: error: tensorrt-rtx is not installed; run: pip install 'tensorrt-rtx>=1.7,<1.8'\n"
    )


def test_stages_are_estimated_for_the_chosen_backend(place, machine, monkeypatch):
    machine(None, *BOTH)
    asked = []
    from arcflow_export.pipeline import run

    real = run.run_process

    def spy(command, *rest):
        asked.append(command)
        return real(command, *rest)

    monkeypatch.setattr(run, "run_process", spy)
    assert compile_("--precision", "fp8") == 0
    plan = next(command for command in asked if command[0] == "plan")
    assert plan[plan.index("--backend") + 1] == "onnxruntime"
