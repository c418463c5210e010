"""The C++ library on the CUDA driver made of host memory: real captures and kernels, images and every failure.

The cases are in tests/host_cuda/cpp_images.py, which runs in a process of its own, as those of test_host_cuda.py do.
Real bundles go through the library's C API; OpenVINO runs in the place of a GPU's engines.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from arcflow_runtime.engines.gpus import find_gpu
from tests.cpp import build_target, embed
from tests.host_cuda.build import CannotBuildError, build
from tests.test_host_cuda import ROOT, functions, judge, read_report

CASES = ROOT / "tests" / "host_cuda" / "cpp_images.py"
#: Ends a process that hangs.
TIMEOUT_S = 1200


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The tests' library, runtime/cpp/tests/host_backends.cpp."""
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("needs the package openvino")
    named = os.environ.get("ARCFLOW_CPP_BUILD")
    folder = Path(named or tmp_path_factory.mktemp("cpp_host_cuda"))
    build_target(folder, "arcflow_host_cuda", "-DARCFLOW_OPENVINO=ON")
    return next((folder / "tests").glob("libarcflow_host_cuda.*"))


@pytest.fixture(scope="module")
def environment(once, request, tmp_path_factory, library):
    """The environment of a process that loads the driver and the library; skips where the driver cannot be built."""
    spec = importlib.util.find_spec("nvidia.cu13") if importlib.util.find_spec("nvidia") else None
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("NVRTC is not installed: pip install nvidia-cuda-nvrtc")
    try:
        folder = once("driver of host memory", build)
    except CannotBuildError as e:
        pytest.skip(str(e))
    cache = getattr(request.config, "cache", None)
    kernels = cache.mkdir("kernels") if cache else tmp_path_factory.mktemp("kernels")
    (toolkit,) = spec.submodule_search_locations
    return os.environ | {
        "LD_LIBRARY_PATH": os.pathsep.join([str(folder), f"{toolkit}/lib"]),
        "ARCFLOW_CACHE": str(kernels),
        "HOST_CUDA_CPP": str(library),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


@pytest.fixture(scope="module")
def run_cases(environment, bundles, once):
    """A function (*pytest's arguments, **variables) that runs the cases once; see test_host_cuda.run_cases."""
    roots = {
        "flux": bundles("flux-tiny", steps=(2, 4)),
        "qwen": bundles("qwen-tiny", steps=(2, 4)),
        "conditioner": bundles("qwen-tiny", keep_conditioner=True),
        "float16": bundles("flux-tiny", dtype="float16"),
    }
    given = environment | {"HOST_CUDA_BUNDLES": json.dumps({name: str(root) for name, root in roots.items()})}

    def run(*arguments, **variables):
        def make(folder):
            options = ["-c", os.devnull, "--rootdir", ROOT, "--confcutdir", CASES.parent, "-p", "no:cacheprovider"]
            command = [sys.executable, "-X", "faulthandler", "-m", "pytest", *options]
            command += [f"--junit-xml={folder / 'report.xml'}", *arguments, CASES]
            with (folder / "output").open("w") as output, contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    [str(c) for c in command],
                    cwd=ROOT,
                    env=given | variables,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=TIMEOUT_S,
                )

        folder = once(f"the C++ library on the driver: {arguments} {variables}", make)
        if not (folder / "report.xml").is_file():
            end = (folder / "output").read_text(errors="replace")[-8000:]
            pytest.fail(f"the process crashed or hung:\n{end}", pytrace=False)
        return read_report(folder / "report.xml")

    return run


@pytest.mark.parametrize(("name", "lane"), functions(CASES))
def test_on_the_driver(name, lane, run_cases):
    judge(run_cases("-m", lane)[name])


@pytest.mark.lengthy
@pytest.mark.slow
def test_a_thousand_images_of_many_threads(run_cases):
    """12 images of three shapes, each generated 84 times."""
    name = "test_changing_shapes_of_many_threads"
    judge(run_cases("-k", name, HOST_CUDA_AGAIN="84")[name])


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"HOST_CUDA_DEVICES": "0"}, r"CUDA_ERROR_NO_DEVICE \(.*\)"),
        ({"LD_LIBRARY_PATH": ""}, "libcuda.so.1 is not installed|CUDA_ERROR_.*"),
    ],
    ids=["no-device", "no-driver"],
)
def test_without_a_device(variables, why, environment, bundles):
    if find_gpu() is not None:
        pytest.skip("there is a GPU here")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import embed\n"
        "try: embed.Pipeline(embed.load(sys.argv[2]), sys.argv[3], backend=b'host-cuda')\n"
        "except embed.ArcFlowError as e: print(e.status, e)\n"
    )
    folder = Path(embed.__file__).parent
    command = [sys.executable, "-c", code, folder, environment["HOST_CUDA_CPP"], bundles("flux-tiny", steps=(2, 4))]
    done = subprocess.run([str(c) for c in command], env=environment | variables, capture_output=True, text=True)
    assert re.fullmatch(rf"3 the CUDA driver finds no NVIDIA GPU here: ({why})\n", done.stdout), done
