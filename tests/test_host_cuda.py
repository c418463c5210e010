"""The GPU runtime on a CUDA driver of host memory: the real cuda-core, captures, kernels, whole images, every failure.

The cases are in `tests/host_cuda/*_cases.py`. They run in one process of their own, whose `libcuda.so.1` is the driver
that is built here: this process must not have it, for other tests say what happens without a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.host_cuda.build import CannotBuildError, build

ROOT = Path(__file__).parent.parent
HERE = ROOT / "tests" / "host_cuda"
FILES = sorted(HERE.glob("*_cases.py"))
CASES = [
    (path.stem, name)
    for path in FILES
    for name in re.findall(r"^def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
]
#: Of all cases together, which take about a minute on two busy cores.
TIMEOUT_S = 900


@pytest.fixture(scope="module")
def environment(tmp_path_factory, request):
    """Variables of a process that has the driver; skips where it cannot be built."""
    for module in ("cuda.core", "cuda.bindings.nvrtc"):
        if importlib.util.find_spec(module.split(".")[0]) is None or importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: the GPU runtime cannot be tried")
    folder = Path(os.environ.get("ARCFLOW_HOST_CUDA_BUILD") or tmp_path_factory.mktemp("host_cuda"))
    try:
        build(folder)
    except CannotBuildError as e:
        pytest.skip(str(e))
    cache = getattr(request.config, "cache", None)
    kernels = cache.mkdir("kernels") if cache else tmp_path_factory.mktemp("kernels")
    return os.environ | {
        "LD_LIBRARY_PATH": str(folder),
        "ARCFLOW_CACHE": str(kernels),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


@pytest.fixture(scope="module")
def run_cases(environment, bundles, tmp_path_factory):
    """A function (*pytest's arguments, **variables) that runs cases in a process with the driver.

    It returns by file and function what each case came to: its name, what kept it from passing or "", whether it was
    skipped.
    """
    roots = {
        "flux": bundles("flux-tiny"),
        "qwen": bundles("qwen-tiny"),
        "conditioner": bundles("qwen-tiny", keep_conditioner=True),
        "float16": bundles("flux-tiny", dtype="float16"),
    }
    own = {"HOST_CUDA_BUNDLES": json.dumps({name: str(root) for name, root in roots.items()})}

    def run(*arguments, **variables):
        report = tmp_path_factory.mktemp("cases") / "report.xml"
        # `-c`: without the options of this project, some of which name modules that a runtime does not have.
        options = ["-c", os.devnull, "--rootdir", ROOT, "--confcutdir", HERE, "-p", "no:cacheprovider"]
        command = [sys.executable, "-X", "faulthandler", "-m", "pytest", *options, f"--junit-xml={report}", *arguments]
        done = subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env=environment | own | variables,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        if not report.is_file():
            end = done.stdout[-4000:] + done.stderr[-8000:]
            pytest.fail(f"the process of the cases ended with {done.returncode}:\n{end}")
        found: dict[tuple[str, str], list[tuple[str, str, bool]]] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            wrong = [child for child in case if child.tag in ("failure", "error", "skipped")]
            text = "\n".join(f"{c.get('message', '')}\n{c.text or ''}" for c in wrong)
            key = (case.get("classname", "").split(".")[-1], case.get("name", "").split("[")[0])
            skipped = bool(wrong) and all(c.tag == "skipped" for c in wrong)
            found.setdefault(key, []).append((case.get("name", ""), text, skipped))
        return found

    return run


@pytest.fixture(scope="module")
def outcomes(run_cases):
    """All cases, run once."""
    return run_cases(*FILES)


@pytest.mark.parametrize(("file", "name"), CASES)
def test_on_the_host_driver(file, name, outcomes):
    assert (file, name) in outcomes, "the case was not run"
    judge(outcomes[file, name])


def judge(cases):
    """Fail or skip as the cases of one function did."""
    failed = [f"{case}: {text}" for case, text, skipped in cases if text and not skipped]
    if failed:
        pytest.fail("\n\n".join(failed), pytrace=False)
    if all(skipped for _, _, skipped in cases):
        pytest.skip(cases[0][1].strip())


@pytest.mark.slow
def test_a_thousand_images_of_many_threads(run_cases):
    """12 images of three shapes, each 84 times."""
    outcomes = run_cases(HERE / "image_cases.py", "-k", "changing_shapes", HOST_CUDA_AGAIN="84")
    judge(outcomes["image_cases", "test_changing_shapes_of_many_threads"])


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
