"""Fixtures for all tests: bundles exported once per run from the golden checkpoints, the C++ library, the kernels."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry

from arcflow_export.checkpoint.sources import Location
from arcflow_export.export.export import export_bundle, plan_export
from arcflow_export.options import ExportOptions
from arcflow_export.student.load import Student, load_student
from arcflow_runtime import Pipeline, cli
from arcflow_runtime.maths import noise, speedups, update
from tests.cpp import build_library, configure_cpp, embed, library_of
from tests.kernel_source import build_host, open_gpu
from tests.traces import Traces

GOLDEN = Path(__file__).parent / "golden"
SHAPES = Path(__file__).parent.parent / "models" / "shapes"
FAMILIES = ("flux-tiny", "qwen-tiny")


def golden_student(name: str, loras: list | None = None) -> Student:
    return load_student(Location(str(GOLDEN / name / "base")), Location(str(GOLDEN / name / "adapter")), loras or [])


def shapes_student() -> Student:
    return load_student(Location(str(SHAPES / "teacher")), Location(str(SHAPES / "adapter")), [])


#: Export options of the shapes model's bundle, as in `make engine`.
SHAPES_OPTIONS = {"max_px": 64, "max_sequence_length": 12}


def export(student: Student, out: Path, **options) -> Path:
    return export_bundle(plan_export(student, ExportOptions(**options)), out, "test")


@dataclass(frozen=True)
class CommandRun:
    """The result of `arcflow export`: its bundle, exit code and output."""

    bundle: Path
    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def traces(request, tmp_path_factory):
    """Trace each part once and reuse the result, also in later runs; see `Traces`."""
    cache = getattr(request.config, "cache", None)
    kept = Traces(cache.mkdir("traces") if cache else tmp_path_factory.mktemp("traces"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arcflow_export.graph.trace._convert", kept.convert)
        # torch parses the source of its converters again for each program, which takes a second per part.
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="session")
def command_run(tmp_path_factory) -> CommandRun:
    """The golden FLUX student, exported in bfloat16 by the command once per test run."""
    bundle = tmp_path_factory.mktemp("command") / "bundle"
    arguments = ["--base", GOLDEN / "flux-tiny" / "base", "--adapter", GOLDEN / "flux-tiny" / "adapter"]
    arguments += ["--out", bundle, "--dtype", "bfloat16", "--json"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["export", *map(str, arguments)])
    return CommandRun(bundle, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """A function (golden name or "shapes", **export options) -> bundle, exported on first use, shared by all tests."""
    root, made = tmp_path_factory.mktemp("bundles"), {}

    def get(name: str, **options) -> Path:
        key = (name, tuple(sorted(options.items())))
        if key not in made:
            student = shapes_student() if name == "shapes" else golden_student(name)
            made[key] = export(student, root / str(len(made)), **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def cpp_build(tmp_path_factory) -> Path:
    """The build folder of the C++ library: $ARCFLOW_CPP_BUILD, which is built incrementally, or a new folder."""
    folder = Path(os.environ.get("ARCFLOW_CPP_BUILD") or tmp_path_factory.mktemp("cpp"))
    build_library(folder)
    return folder


@pytest.fixture(scope="session")
def trt_tool(tmp_path_factory):
    """A function that runs `trt_tool`: (arguments, environment) -> exit code and its output."""
    named = os.environ.get("ARCFLOW_CPP_BUILD")
    folder = Path(named or tmp_path_factory.mktemp("cpp_trt"))
    if not (folder / "CMakeCache.txt").exists():
        configure_cpp(folder, "-DARCFLOW_OPENVINO=OFF")
    subprocess.run(["cmake", "--build", folder, "--target", "trt_tool"], check=True)
    path = folder / "tests" / "trt_tool"

    def run(*arguments, **environment):
        command = [str(path), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
        assert done.returncode in (0, 1), done.stderr
        return done.returncode, (done.stderr if done.returncode else done.stdout).rstrip("\n")

    run.path = path
    return run


@pytest.fixture(scope="session")
def cpp_library(cpp_build):
    return embed.load(str(library_of(cpp_build)))


@pytest.fixture(scope="session")
def cpp_bundles(bundles, tmp_path_factory):
    """A function (golden name or "shapes") -> bundle with built OpenVINO tokenizers, for the C++ library."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            source = bundles(name, **(SHAPES_OPTIONS if name == "shapes" else {"steps": (2, 4)}))
            made[name] = shutil.copytree(source, tmp_path_factory.mktemp("built") / name)
            with contextlib.redirect_stdout(io.StringIO()):
                assert cli.main(["build", str(made[name]), "--backend", "openvino"]) == 0
        return made[name]

    return get


@pytest.fixture(scope="session")
def cpp_pipes(cpp_library, cpp_bundles):
    """A function (golden name or "shapes") -> pipeline of the C++ library, loaded on first use."""
    made: dict[str, embed.Pipeline] = {}

    def get(name: str):
        if name not in made:
            made[name] = embed.Pipeline(cpp_library, cpp_bundles(name))
        return made[name]

    yield get
    for pipe in made.values():
        pipe.close()


@pytest.fixture(scope="session")
def python_pipes(cpp_bundles):
    """A function (golden name or "shapes") -> Python pipeline of the same bundle, loaded on first use."""
    made: dict[str, Pipeline] = {}

    def get(name: str) -> Pipeline:
        if name not in made:
            made[name] = Pipeline.load(cpp_bundles(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def kernel_host(tmp_path_factory):
    """The kernels' source compiled for this CPU, as a ctypes library."""
    return build_host(tmp_path_factory.mktemp("kernel"))


@pytest.fixture(scope="session")
def kernel_gpu():
    """A GPU, a stream and the kernels loaded on it; skips where there is no GPU."""
    return open_gpu()


@pytest.fixture(params=["compiled", "numpy"])
def both_ways(request, monkeypatch):
    """Run the test with the compiled noise and update, and again with numpy."""
    if request.param == "compiled" and speedups.compiled is None:
        pytest.skip("the runtime was installed without a C++ compiler")
    if request.param == "numpy":
        for module in (noise, update):
            monkeypatch.setattr(module, "compiled", None)
