"""`arcflow build` as a user types it, with a builder that writes a few bytes: options, reuse, messages."""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

import pytest
from fake_bundle import make_bundle

from arcflow_runtime import Bundle, cli
from arcflow_runtime.build import build, plan
from arcflow_runtime.engines.gpus import Gpu
from arcflow_runtime.engines.store import BuildReport
from arcflow_runtime.errors import EngineError

RTX = ["--backend", "tensorrt-rtx", "--target", "sm89"]
PARTS = ["text_encoder", "text_encoder_2", "conditioner", "backbone", "vae_decoder"]


class Builder:
    """Stands for both libraries; `calls` holds what was asked of it."""

    def __init__(self):
        self.calls = []
        self.error = None
        self.report = BuildReport(0.25)

    def __call__(self, library, bundle, part, target, profiles, settings, out, progress):
        progress.update(1, 2, "Building")
        self.calls.append((library.name, part, target, settings))
        out.write(f"engine of {part}".encode())
        if self.error is not None:
            raise self.error
        return self.report


@pytest.fixture
def builder(monkeypatch):
    found = Builder()
    monkeypatch.setattr(build, "build_engine", found)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.7.1"))
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4.0"))
    monkeypatch.setattr(plan, "find_gpu", lambda: None)
    return found


@pytest.fixture
def root(tmp_path, builder):
    return str(make_bundle(tmp_path / "bundle"))


def run(root, *arguments):
    return cli.main(["build", root, *arguments])


def fails(capsys, code, message, root, *arguments):
    before = sorted(os.listdir(root))
    assert run(root, *arguments) == code
    assert capsys.readouterr().err.splitlines()[-1] == f"arcflow build: error: {message}"
    assert sorted(os.listdir(root)) == before


def test_every_part_and_target(root, builder, capsys):
    assert run(root, "--backend", "tensorrt-rtx", "--target", "sm89,sm120,sm89") == 0
    assert [(part, target) for _, part, target, _ in builder.calls] == [
        (part, target) for part in PARTS for target in ("sm89", "sm120")
    ]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[0] == "text_encoder    sm89                  22 bytes  built in 0.2 s"
    assert len(os.listdir(os.path.join(root, "engines"))) == 20


def test_unchanged_engines_are_not_built_again(root, builder, capsys):
    assert run(root, *RTX) == 0
    builder.calls.clear()
    capsys.readouterr()
    assert run(root, *RTX) == 0
    assert builder.calls == []
    assert [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()] == ["unchanged"] * 5


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        (["--batch", "2"], "the shape profile"),
        (["--resolutions", "64"], "the shape profile"),
        (["--optimization-level", "0"], "optimization_level (none to 0)"),
        (["--workspace", "0.5"], "workspace_bytes (none to 536870912)"),
        (["--weight-streaming"], "flags (-TF32+REQUIRE_USER_ALLOCATION to -TF32+WEIGHT_STREAMING)"),
        (
            ["--strip-weights"],
            "flags (-TF32+REQUIRE_USER_ALLOCATION to -TF32+REFIT_IDENTICAL+REQUIRE_USER_ALLOCATION+STRIP_PLAN)",
        ),
    ],
)
def test_what_changed_is_said(root, builder, capsys, arguments, changed):
    assert run(root, *RTX, "--parts", "backbone") == 0
    capsys.readouterr()
    assert run(root, *RTX, "--parts", "backbone", *arguments) == 0
    assert capsys.readouterr().out.endswith(f" bytes  built in 0.2 s; changed: {changed}\n")
    assert len(builder.calls) == 2


def test_the_memory_that_an_engine_needs_is_said(root, builder, capsys):
    builder.report = BuildReport(0.25, (1_200_000_000, 340_000_000))
    assert run(root, *RTX, "--parts", "backbone") == 0
    assert capsys.readouterr().out.endswith("built in 0.2 s; needs 1.20 GB of scratch memory on the GPU\n")
    builder.report = BuildReport(0.25, None, True)
    allocates = "allocates more in each run, so it has no CUDA graph: smaller --resolutions avoid that"
    assert run(root, *RTX, "--parts", "vae_decoder") == 0
    assert capsys.readouterr().out.endswith(f"built in 0.2 s; {allocates}\n")
    # It is in the records, so a later run says it too.
    assert run(root, *RTX, "--parts", "backbone,vae_decoder") == 0
    backbone, decoder = capsys.readouterr().out.splitlines()
    assert backbone.endswith("unchanged; needs 1.20 GB of scratch memory on the GPU")
    assert decoder.endswith(f"unchanged; {allocates}")
    assert run(root, *RTX, "--parts", "backbone,vae_decoder", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["engines"]
    assert [(row["activation_bytes"], row["allocates_when_run"]) for row in rows] == [
        ([1_200_000_000, 340_000_000], False),
        (None, True),
    ]


def test_another_version_of_the_library_builds_again(root, builder, capsys, monkeypatch):
    assert run(root, *RTX, "--parts", "backbone") == 0
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.7.2"))
    assert run(root, *RTX, "--parts", "backbone") == 0
    assert capsys.readouterr().out.endswith("built in 0.2 s; changed: builder_version (1.7.1 to 1.7.2)\n")


def test_json(root, builder, capsys):
    assert run(root, *RTX, "--parts", "backbone", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["engines"]
    assert (row["part"], row["target"]) == ("backbone", "sm89")
    assert (row["reused"], row["changed"], row["bytes"], row["build_seconds"]) == (False, [], 18, 0.25)
    assert os.path.getsize(row["file"]) == 18
    assert run(root, *RTX, "--parts", "backbone", "--json") == 0
    (again,) = json.loads(capsys.readouterr().out)["engines"]
    assert again == row | {"reused": True}


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (EngineError("backbone: no"), 1, "error: backbone: no"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_stopped_build_leaves_nothing(root, builder, capsys, error, code, message):
    builder.error = error
    assert run(root, *RTX, "--parts", "backbone") == code
    assert capsys.readouterr().err.endswith(f"arcflow build: {message}\n")
    assert "engines" not in os.listdir(root)


def test_a_part_that_was_damaged_is_not_built(root, builder, capsys, monkeypatch):
    # Larger than what every load hashes, so that only the build finds it.
    monkeypatch.setattr("arcflow_runtime.disk.bundle.FAST_HASH_BYTES", 4)
    path = os.path.join(root, "backbone.safetensors")
    with open(path, "r+b") as f:
        f.write(b"W")
    message = f"{path} does not match its SHA-256 in manifest.json; it was edited or damaged, export or copy it again"
    fails(capsys, 1, message, root, *RTX, "--parts", "backbone")
    assert builder.calls == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--backend", "tensorrt-rtx"], 2, "--target must be given on a machine without a GPU, such as --target sm89"),
        (
            ["--backend", "tensorrt-rtx", "--target", "sm90"],
            2,
            "--target must be among sm75, sm80, sm86, sm89, sm120, sm121 for tensorrt-rtx, got 'sm90'",
        ),
        (
            ["--backend", "tensorrt"],
            1,
            "tensorrt can build only on the GPU that it builds for, and the CUDA driver finds none here; "
            "build on the GPU's machine, or with --backend tensorrt-rtx, which needs no GPU",
        ),
        ([*RTX, "--parts", "backbone,vea"], 2, "--parts must be among " + ", ".join(PARTS) + ", got vea"),
        ([*RTX, "--resolutions", "big"], 2, "--resolutions must be a number or a range such as 1-4, got 'big'"),
        (
            [*RTX, "--resolutions", "1024"],
            2,
            "--resolutions: height must be between 16 and 256 for this bundle, got 1024; "
            "export a bundle with a wider range, or choose values within it",
        ),
        ([*RTX, "--batch", "0"], 2, "--batch: a range must be LOW-HIGH with 1 <= LOW <= HIGH, got '0'"),
        ([*RTX, "--optimization-level", "6"], 2, "--optimization-level must be between 0 and 5, got 6"),
        ([*RTX, "--workspace", "0"], 2, "--workspace must be a positive number of GiB, got 0"),
        ([*RTX, "--workspace", "nan"], 2, "--workspace must be a positive number of GiB, got nan"),
        (
            [*RTX, "--timing-cache", "no/cache"],
            2,
            "--timing-cache must be in a directory that exists, got 'no/cache'",
        ),
        (
            [*RTX, "--timing-cache", "cache"],
            2,
            "--timing-cache: tensorrt-rtx builds without timing kernels; leave it out",
        ),
    ],
)
def test_bad_options(root, builder, capsys, arguments, code, message):
    fails(capsys, code, message, root, *arguments)
    assert builder.calls == []


def test_no_backend(root, capsys):
    fails(capsys, 2, "the following arguments are required: --backend", root)


def test_a_library_that_is_not_installed(root, builder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    message = "tensorrt-rtx is not installed; run: pip install 'tensorrt-rtx>=1.7,<1.8'"
    fails(capsys, 1, message, root, *RTX)


def test_bfloat16_before_ampere(tmp_path, builder, capsys):
    root = str(make_bundle(tmp_path / "half", precision="bfloat16"))
    message = "text_encoder is in bfloat16, which sm75 does not support; export the bundle with --dtype float16"
    fails(capsys, 1, message, root, "--backend", "tensorrt-rtx", "--target", "sm75")


def test_tensorrt_builds_for_the_gpu_here(root, builder, capsys, monkeypatch):
    monkeypatch.setattr(plan, "find_gpu", lambda: Gpu("NVIDIA H200", "sm90"))
    assert run(root, "--backend", "tensorrt", "--parts", "backbone", "--timing-cache", f"{root}.cache") == 0
    ((library, part, target, _),) = builder.calls
    assert (library, part, target) == ("tensorrt", "backbone", "sm90")
    # An engine for one product is not taken for another of the same compute capability.
    monkeypatch.setattr(plan, "find_gpu", lambda: Gpu("NVIDIA H100 80GB HBM3", "sm90"))
    assert run(root, "--backend", "tensorrt", "--parts", "backbone") == 0
    assert len(builder.calls) == 2
    capsys.readouterr()
    fails(
        capsys,
        2,
        "--target must be sm90 for tensorrt on this NVIDIA H100 80GB HBM3, got 'sm100'",
        root,
        "--backend",
        "tensorrt",
        "--target",
        "sm100",
    )


def test_engines_are_no_part_of_the_bundle(root, builder, capsys):
    assert run(root, *RTX) == 0
    Bundle.open(root, "full")
    capsys.readouterr()
    assert cli.main(["inspect", root, "--check"]) == 0
