"""The GPU runtime on a CUDA driver made of host memory: real cuda-core, captures, kernels, images and every failure.

The cases are in `tests/host_cuda/*_cases.py`. Each of those files runs in a process of its own, whose `libcuda.so.1` is
the driver. The process of the other tests must not load it, because they check what happens without a GPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.host_cuda.process import ROOT, case_runner, cases_in, judge
from tests.straight_bundle import with_straight

HERE = ROOT / "tests" / "host_cuda"
#: Ends a process that hangs. The longest file takes about 45 s of one core.
TIMEOUT_S = 600


@pytest.fixture(scope="module")
def environment(on_host_driver):
    """The environment of a process that loads the driver and imports the tests' modules."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return on_host_driver | {"PYTHONPATH": path}


@pytest.fixture(scope="module")
def run_cases(environment, bundles, once):
    """A function (file, *pytest's arguments, **variables) that runs cases once; see `case_runner`."""
    roots = {
        "flux": bundles("flux-tiny"),
        "qwen": bundles("qwen-tiny", steps=(2, 4)),
        "conditioner": bundles("qwen-tiny", keep_conditioner=True),
        "slots": bundles("flux-tiny", lora_slots=("*",), lora_max_rank=32),
        "qwen slots": bundles("qwen-tiny", lora_slots=("*",), lora_max_rank=32),
    }

    run = case_runner(once, environment, TIMEOUT_S)

    def run_file(file, *arguments, **variables):
        others = {"float16": bundles("flux-tiny", dtype="float16")} if "slow" in arguments else {}
        given = with_straight(roots | others, once)
        variables["HOST_CUDA_BUNDLES"] = json.dumps({name: str(root) for name, root in given.items()})
        return run(HERE / f"{file}.py", *arguments, **variables)

    return run_file


@pytest.mark.parametrize(("file", "name", "lane"), cases_in(HERE.glob("*_cases.py")))
def test_on_the_driver(file, name, lane, run_cases):
    judge(run_cases(file, "-m", lane)[name])


@pytest.mark.lengthy
@pytest.mark.slow
def test_a_thousand_images_of_many_threads(run_cases):
    """12 images of three shapes, each generated 84 times."""
    name = "test_changing_shapes_of_many_threads"
    judge(run_cases("image_cases", "-k", name, HOST_CUDA_AGAIN="84")[name])


@pytest.mark.parametrize("driver", ["without a device", "absent"])
@pytest.mark.parametrize("backend", ["tensorrt-rtx", "tensorrt", "onnxruntime-cuda"])
def test_the_command_without_a_gpu(backend, driver, environment, bundles):
    code = "import sys\nfrom arcflow_runtime.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "generate", str(bundles("flux-tiny")), "x", "--backend", backend]
    given = environment | ({"HOST_CUDA_DEVICES": "0"} if driver == "without a device" else {"LD_LIBRARY_PATH": ""})
    done = subprocess.run(command, env=given, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(
        r"arcflow generate: error: [^\n]*; (run: [^\n]*|check that nvidia-smi lists one)\n", done.stderr
    ), done.stderr


def test_without_a_device(environment):
    code = "from arcflow_runtime.gpu.cuda import open_device\nopen_device()"
    absent = environment | {"HOST_CUDA_DEVICES": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=absent, capture_output=True, text=True)
    assert re.search(
        r"^arcflow_runtime\.errors\.EngineError: the CUDA driver finds no GPU here \(CUDA_ERROR_NO_DEVICE.*\); "
        r"check that nvidia-smi lists one$",
        done.stderr,
        re.MULTILINE,
    ), done.stderr
