"""The GPU runtime on a CUDA driver made of host memory: real cuda-core, captures, kernels, images and every failure.

The cases are in `tests/host_cuda/*_cases.py`. Each of those files runs in a process of its own, whose `libcuda.so.1` is
the driver. The process of the other tests must not load it, because they check what happens without a GPU.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
HERE = ROOT / "tests" / "host_cuda"
#: Ends a process that hangs. The longest file takes about 45 s of one core.
TIMEOUT_S = 600


def functions(path):
    """The test functions of a file of cases as pytest's parameters, those that it marks slow marked too."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            slow = any(ast.unparse(d) == "pytest.mark.slow" for d in node.decorator_list)
            yield pytest.param(node.name, "slow" if slow else "not slow", marks=[pytest.mark.slow] * slow, id=node.name)


CASES = [
    pytest.param(path.stem, *case.values, marks=case.marks, id=f"{path.stem}-{case.id}")
    for path in sorted(HERE.glob("*_cases.py"))
    for case in functions(path)
]


@pytest.fixture(scope="module")
def environment(on_host_driver):
    """The environment of a process that loads the driver and imports the tests' modules."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return on_host_driver | {"PYTHONPATH": path}


@pytest.fixture(scope="module")
def run_cases(environment, bundles, once):
    """A function (file, *pytest's arguments, **variables) that runs cases once, in a process with the driver.

    It returns a dict: the name of a test function -> its cases, each as (name, message, skipped). The message is empty
    if the case passed.
    """
    roots = {
        "flux": bundles("flux-tiny"),
        "qwen": bundles("qwen-tiny", steps=(2, 4)),
        "conditioner": bundles("qwen-tiny", keep_conditioner=True),
        "float16": bundles("flux-tiny", dtype="float16"),
        "slots": bundles("flux-tiny", lora_slots=("*",), lora_max_rank=32),
        "qwen slots": bundles("qwen-tiny", lora_slots=("*",), lora_max_rank=32),
    }
    given = environment | {"HOST_CUDA_BUNDLES": json.dumps({name: str(root) for name, root in roots.items()})}

    def run(file, *arguments, **variables):
        def make(folder):
            # `-c`: without this project's options for pytest.
            options = ["-c", os.devnull, "--rootdir", ROOT, "--confcutdir", HERE, "-p", "no:cacheprovider"]
            command = [sys.executable, "-X", "faulthandler", "-m", "pytest", *options]
            command += [f"--junit-xml={folder / 'report.xml'}", *arguments, HERE / f"{file}.py"]
            with (folder / "output").open("w") as output, contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    [str(c) for c in command],
                    cwd=ROOT,
                    env=given | variables,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=TIMEOUT_S,
                )

        folder = once(f"cases on the driver: {file} {arguments} {variables}", make)
        if not (folder / "report.xml").is_file():
            end = (folder / "output").read_text(errors="replace")[-8000:]
            pytest.fail(f"the process crashed or hung:\n{end}", pytrace=False)
        return read_report(folder / "report.xml")

    return run


def read_report(path):
    """See `run_cases`."""
    found: dict[str, list[tuple[str, str, bool]]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name = case.get("name", "")
        wrong = [child for child in case if child.tag in ("failure", "error", "skipped")]
        message = "\n".join(f"{c.get('message', '')}\n{c.text or ''}" for c in wrong)
        skipped = bool(wrong) and all(c.tag == "skipped" for c in wrong)
        found.setdefault(name.split("[")[0], []).append((name, message, skipped))
    return found


def judge(cases):
    """Fail or skip as the cases of one test function did."""
    failed = [f"{name}: {message}" for name, message, skipped in cases if message and not skipped]
    if failed:
        pytest.fail("\n\n".join(failed), pytrace=False)
    if all(skipped for _, _, skipped in cases):
        pytest.skip(cases[0][1].strip())


@pytest.mark.parametrize(("file", "name", "lane"), CASES)
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
