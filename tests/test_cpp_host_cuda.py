"""The C++ library on the CUDA driver made of host memory: real captures and kernels, images and every failure.

The cases are in tests/host_cuda/cpp_*.py, which run in processes of their own, as those of test_host_cuda.py do.
Real bundles go through the library's C API; OpenVINO runs in the place of a GPU's engines.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from arcflow_export.checkpoint.sources import Location
from arcflow_runtime import Bundle
from arcflow_runtime.engines.gpus import find_gpu
from tests.conftest import export, golden_student
from tests.cpp import build_target, embed
from tests.host_cuda.build import CannotBuildError, host_driver
from tests.host_cuda.process import ROOT, case_runner, cases_in, judge
from tests.lora_slots import write_lora
from tests.straight_bundle import with_straight

#: They need a build of their own. `make test` runs the C++ tests of the driver's plans with CTest.
pytestmark = pytest.mark.slow
HERE = ROOT / "tests" / "host_cuda"
#: A bundle with LoRA slots.
SLOTS = {"lora_slots": ("*",), "lora_max_rank": 32}
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
        folder = host_driver(once)
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
def merged(bundles, once):
    """A LoRA of the bundle "slots", and a bundle in which it is merged with a scale of 0.8."""

    def make(folder):
        lora = write_lora(folder / "ink.safetensors", Bundle.open(bundles("flux-tiny", **SLOTS)).manifest.slots())
        export(golden_student("flux-tiny", [(Location(str(lora)), 0.8)]), folder / "bundle")

    folder = once("flux-tiny with a merged LoRA", make)
    return {"lora": str(folder / "ink.safetensors"), "bundle": str(folder / "bundle")}


@pytest.fixture(scope="module")
def run_cases(environment, bundles, once, merged):
    """A function (file, *pytest's arguments, **variables) that runs cases once; see `case_runner`."""
    roots = {
        "flux": bundles("flux-tiny", steps=(2, 4)),
        "qwen": bundles("qwen-tiny", steps=(2, 4)),
        "conditioner": bundles("qwen-tiny", keep_conditioner=True),
        "float16": bundles("flux-tiny", dtype="float16"),
        "slots": bundles("flux-tiny", **SLOTS),
        "qwen slots": bundles("qwen-tiny", **SLOTS),
    }

    given = {
        "HOST_CUDA_BUNDLES": json.dumps({name: str(root) for name, root in with_straight(roots, once).items()}),
        "HOST_CUDA_MERGED": json.dumps(merged),
    }
    run = case_runner(once, environment | given, TIMEOUT_S)
    return lambda file, *arguments, **variables: run(HERE / f"{file}.py", *arguments, **variables)


@pytest.mark.parametrize(("file", "name", "lane"), cases_in(HERE.glob("cpp_*.py")))
def test_on_the_driver(file, name, lane, run_cases):
    judge(run_cases(file, "-m", lane)[name])


@pytest.mark.lengthy
def test_a_thousand_images_of_many_threads(run_cases):
    """12 images of three shapes, each generated 84 times."""
    name = "test_changing_shapes_of_many_threads"
    judge(run_cases("cpp_images", "-k", name, HOST_CUDA_AGAIN="84")[name])


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
