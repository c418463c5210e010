"""`pytest tests/gpu -m gpu` where there is no GPU: on the CUDA driver made of host memory, and without any driver.

Both run in a process of their own, which does not load tests/conftest.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from arcflow_runtime.engines.gpus import find_gpu

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 300
NO_GPU = "needs an NVIDIA GPU; the CUDA driver finds none here"
HOST_MEMORY = "the driver made of host memory runs only this project's kernels"
FILES = sorted(path.stem for path in (ROOT / "tests" / "gpu").glob("test_*.py"))


def run_folder(folder, environment):
    """Run tests/gpu, with the report and the output in `folder`."""
    options = ["-m", "gpu", f"--junit-xml={folder / 'report.xml'}", ROOT / "tests" / "gpu"]
    command = [sys.executable, "-m", "pytest", *map(str, options)]
    with (folder / "output").open("w") as output:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=TIMEOUT_S)


def read(folder):
    """{file: {test: (outcome, what was said if it was skipped or failed)}}, and the output."""
    output = (folder / "output").read_text()
    assert (folder / "report.xml").is_file(), output
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        wrong = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        said = ("passed", "") if wrong is None else (wrong.tag, wrong.get("message", ""))
        found.setdefault(case.get("classname", "").split(".")[-1], {})[case.get("name", "")] = said
    return found, output


@pytest.fixture(scope="module")
def on_the_driver(once, on_host_driver):
    return read(once("tests/gpu on the driver", lambda folder: run_folder(folder, on_host_driver)))


@pytest.mark.parametrize("file", FILES)
def test_on_the_driver(file, on_the_driver):
    found, output = on_the_driver
    wrong = {name: said for name, said in found[file].items() if said not in (("passed", ""), ("skipped", HOST_MEMORY))}
    assert wrong == {}, output
    ran = [name for name, (outcome, _) in found[file].items() if outcome == "passed"]
    assert bool(ran) == (file != "test_images_on_gpu")


@pytest.mark.skipif(find_gpu() is not None, reason="there is a GPU")
def test_without_a_gpu_each_test_is_skipped_and_says_why(tmp_path):
    run_folder(tmp_path, dict(os.environ))
    found, output = read(tmp_path)
    assert sorted(found) == FILES
    assert {said for tests in found.values() for said in tests.values()} == {("skipped", NO_GPU)}, output


def test_only_the_runtime_and_pytest_are_imported():
    """At the top of a file, which is what collecting the tests needs. Some tests import more, or skip without it."""
    allowed = {"numpy", "pytest", "cuda", "arcflow_runtime", "tests"}
    checked = [*(ROOT / "tests" / "gpu").glob("*.py")]
    assert checked
    for path in checked:
        top = re.findall(r"^(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(top) - allowed <= set(sys.stdlib_module_names), path
        ours = re.findall(r"^(?:from|import) tests\.(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(ours) <= {"gpu"}, path
