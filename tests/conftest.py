"""Shared fixtures: bundles exported once per run from the golden checkpoints. Only these import torch."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from arcflow_runtime import Pipeline, cli
from arcflow_runtime.maths import noise, speedups, update
from tests.cpp import build_library, build_target, embed, library_of
from tests.host_cuda.build import CannotBuildError, host_driver
from tests.kernel_source import build_host

if TYPE_CHECKING:
    from arcflow_export.student.load import Student

GOLDEN = Path(__file__).parent / "golden"
SHAPES = Path(__file__).parent.parent / "models" / "shapes"
FAMILIES = ("flux-tiny", "qwen-tiny")
#: Its cases run in processes of their own; its conftest needs cuda-core.
collect_ignore = ["host_cuda"]
#: What extras bring and tests import; the runtime works without.
EXTRAS = (
    "diffusers",
    "fastapi",
    "fastapi_offline",
    "filelock",
    "fpng",
    "httptools",
    "httpx2",
    "huggingface_hub",
    "hypothesis",
    "markdown_it",
    "matplotlib",
    "ml_dtypes",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "openai",
    "playwright",
    "prometheus_client",
    "pydantic",
    "torch",
    "transformers",
    "uvicorn",
)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Skip, and say so, a test file that imports a package of an extra that is not installed."""
    report = yield
    if report.failed and isinstance(collector, pytest.Module):
        missing = report.call.excinfo.value.__cause__
        name = (getattr(missing, "name", None) or "").partition(".")[0]
        if isinstance(missing, ModuleNotFoundError) and name in EXTRAS and importlib.util.find_spec(name) is None:
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), None, f"Skipped: needs {name}, which is not installed")
    return report


def golden_student(name: str, loras: list | None = None) -> Student:
    return _load_student(GOLDEN / name / "base", GOLDEN / name / "adapter", loras or [])


def shapes_student() -> Student:
    return _load_student(SHAPES / "teacher", SHAPES / "adapter", [])


def _load_student(base: Path, adapter: Path, loras: list) -> Student:
    from arcflow_export.checkpoint.sources import Location
    from arcflow_export.student.load import load_student

    return load_student(Location(str(base)), Location(str(adapter)), loras)


#: Of the shapes model's bundle, as `make engine` exports it.
SHAPES_OPTIONS = {"max_px": 64, "max_sequence_length": 12}


def export(student: Student, out: Path, **options) -> Path:
    from arcflow_export.export.export import export_bundle, plan_export
    from arcflow_export.options import ExportOptions

    return export_bundle(plan_export(student, ExportOptions(**options)), out, "test")


@dataclass(frozen=True)
class CommandRun:
    """What `arcflow export` wrote and printed."""

    bundle: Path
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def traces(request, tmp_path_factory):
    """Equal parts are traced once."""
    pytest.importorskip("torch")
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    from tests.traces import Traces

    cache = getattr(request.config, "cache", None)
    kept = Traces(cache.mkdir("traces") if cache else tmp_path_factory.mktemp("traces"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arcflow_export.graph.trace._convert", kept.convert)
        # torch reads the source of its converters again for each program: a second a part.
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="session", autouse=True)
def _traces_with_torch(request):
    """`traces` for tests that export on their own, but no import of torch for those that need none."""
    if "torch" in sys.modules:
        request.getfixturevalue("traces")


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """A function (key, make) -> the folder that `make` filled, once per run for all of xdist's workers."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once"
    root.mkdir(exist_ok=True)

    def get(key: str, make) -> Path:
        from filelock import FileLock

        folder = root / sha256(key.encode()).hexdigest()[:16]
        with FileLock(folder.with_suffix(".lock")):
            if not (done := folder / "done").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def command_run(traces, once) -> CommandRun:
    """The golden FLUX student exported in bfloat16 by the command, once per run."""

    def make(folder: Path) -> None:
        bundle = folder / "out" / "bundle"
        bundle.parent.mkdir()
        arguments = ["--base", GOLDEN / "flux-tiny" / "base", "--adapter", GOLDEN / "flux-tiny" / "adapter"]
        arguments += ["--out", bundle, "--dtype", "bfloat16", "--json"]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(["export", *map(str, arguments)])
        said = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
        (folder / "said.json").write_text(json.dumps(said), encoding="utf-8")

    folder = once("arcflow export", make)
    return CommandRun(folder / "out" / "bundle", **json.loads((folder / "said.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def bundles(traces, once):
    """A function (golden name or "shapes", **options) -> bundle, exported on first use and shared by all tests."""

    from arcflow_export.options import ExportOptions

    @functools.cache
    def get(name: str, **options) -> Path:
        if name != "shapes":
            options = {"steps": (2, 4)} | options  # the same bundle for those who need four steps

        def make(folder: Path) -> None:
            student = shapes_student() if name == "shapes" else golden_student(name)
            export(student, folder / "bundle", **options)

        return once(f"bundle {name} {ExportOptions(**options)}", make) / "bundle"

    return get


@pytest.fixture(scope="session")
def cpp_build(tmp_path_factory) -> Path:
    """The build folder of the C++ library: ARCFLOW_CPP_BUILD, where only what changed is built, or a new one."""
    folder = Path(os.environ.get("ARCFLOW_CPP_BUILD") or tmp_path_factory.mktemp("cpp"))
    build_library(folder)
    return folder


@pytest.fixture(scope="session")
def trt_tool(tmp_path_factory):
    """A function (arguments, environment) -> exit code and what trt_tool said."""
    named = os.environ.get("ARCFLOW_CPP_BUILD")
    folder = Path(named or tmp_path_factory.mktemp("cpp_trt"))
    build_target(folder, "trt_tool", "-DARCFLOW_OPENVINO=OFF")
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
def cpp_bundles(bundles, once):
    """A function (golden name or "shapes") -> bundle with the tokenizers that the C++ library reads."""

    @functools.cache
    def get(name: str) -> Path:
        def make(folder: Path) -> None:
            source = bundles(name, **(SHAPES_OPTIONS if name == "shapes" else {"steps": (2, 4)}))
            built = shutil.copytree(source, folder / name)
            with contextlib.redirect_stdout(io.StringIO()):
                assert cli.main(["build", str(built), "--backend", "openvino"]) == 0

        return once(f"built {name}", make) / name

    return get


@pytest.fixture(scope="session")
def cpp_pipes(cpp_library, cpp_bundles):
    """A function (golden name or "shapes") -> pipeline of the C++ library, opened once."""
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
    """A function -> the Python pipeline of the same bundle."""
    made: dict[str, Pipeline] = {}

    def get(name: str) -> Pipeline:
        if name not in made:
            made[name] = Pipeline.load(cpp_bundles(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def kernel_host(tmp_path_factory):
    """The kernels' source built for this CPU."""
    return build_host(tmp_path_factory.mktemp("kernel"))


@pytest.fixture(scope="session")
def on_host_driver(once, request, tmp_path_factory):
    """The environment of a process that loads the CUDA driver made of host memory; skips where it cannot be built."""
    for module in ("cuda", "cuda.core", "cuda.bindings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed, and the GPU runtime needs it")
    try:
        folder = host_driver(once)
    except CannotBuildError as e:
        pytest.skip(str(e))
    cache = getattr(request.config, "cache", None)
    kernels = cache.mkdir("kernels") if cache else tmp_path_factory.mktemp("kernels")
    return os.environ | {"LD_LIBRARY_PATH": str(folder), "ARCFLOW_CACHE": str(kernels)}


@pytest.fixture(params=["compiled", "numpy"])
def both_ways(request, monkeypatch):
    """The runtime's compiled part, then numpy in its place."""
    if request.param == "compiled" and speedups.compiled is None:
        pytest.skip("the runtime was installed without a C++ compiler")
    if request.param == "numpy":
        for module in (noise, update):
            monkeypatch.setattr(module, "compiled", None)
