"""The installed C++ library: a folder that can be moved, and that runs without the Python that built it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cpp import CPP, run

#: Where Linux keeps the libraries of the system.
SYSTEM = ("/lib", "/usr/lib")
PROMPT = "a large red circle on the left, blue background"


@pytest.fixture(scope="module")
def installed(cpp_build, tmp_path_factory) -> Path:
    """The installed folder, after it was moved."""
    folder = tmp_path_factory.mktemp("install")
    run(["cmake", "--install", cpp_build, "--prefix", folder / "first"])
    (folder / "first").rename(folder / "moved")
    return folder / "moved"


@pytest.fixture(scope="module")
def libraries(installed) -> Path:
    """The folder of the installed libraries, `lib` or `lib64`."""
    return next(installed.rglob("libarcflow.so")).parent


def configure_consumer(installed: Path, build: Path, *options: str) -> subprocess.CompletedProcess:
    """Configure a project that asks for the installed library."""
    command = ["cmake", "-S", CPP / "tests" / "consumer", "-B", build, f"-DCMAKE_PREFIX_PATH={installed}", *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


@pytest.fixture(scope="module")
def consumer(installed, tmp_path_factory) -> Path:
    """The build folder of a project that found the moved library."""
    build = tmp_path_factory.mktemp("consumer")
    done = configure_consumer(installed, build)
    assert done.returncode == 0, done.stderr
    run(["cmake", "--build", build])
    return build


def test_it_runs_with_nothing_but_itself_and_the_system(installed, consumer, cpp_bundles, cpp_pipes, tmp_path):
    out = tmp_path / "out.ppm"
    bundle = cpp_bundles("shapes")
    # The program alone, with no variable that could name a library; the loader lists what it loads.
    done = run(
        [consumer / "generate", bundle, PROMPT, out, "42"], env={"LD_DEBUG": "files", "PATH": os.environ["PATH"]}
    )
    expected = cpp_pipes("shapes").generate([PROMPT], seeds=[42]).pixels[0]
    np.testing.assert_array_equal(np.asarray(Image.open(out)), expected)
    loaded = {Path(path) for path in re.findall(r"calling init: (/\S+)", done.stderr)}
    ours = {path.name for path in loaded if installed in path.parents}
    assert {name.partition(".")[0] for name in ours} >= {
        "libarcflow",
        "libopenvino",
        "libopenvino_intel_cpu_plugin" if os.uname().machine == "x86_64" else "libopenvino_arm_cpu_plugin",
        "libopenvino_onnx_frontend",
        "libopenvino_tokenizers",
        "libtbb",
    }
    others = {path for path in loaded if installed not in path.parents}
    assert all(str(path).startswith(SYSTEM) for path in others), others


def test_its_libraries_look_beside_themselves_only(libraries):
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    files = [p for p in libraries.iterdir() if ".so" in p.name and not p.is_symlink()]
    assert len(files) >= 6
    for library in files:
        found = run(["readelf", "-d", library]).stdout
        assert set(re.findall(r"\(R(?:UN)?PATH\).*\[(.*)\]", found)) <= {"$ORIGIN"}, library


def test_it_names_no_folder_of_the_build(installed, libraries, cpp_build):
    files = [*libraries.rglob("*.cmake"), *libraries.rglob("*.pc")]
    assert len(files) >= 4
    for file in [*files, *libraries.glob("libarcflow*")]:
        data = file.read_bytes()
        for folder in (cpp_build, Path(sys.prefix), installed.parent / "first"):
            assert os.fsencode(folder) not in data, (file, folder)


def test_its_licences_are_there(installed):
    texts = {p.relative_to(installed).parts[3]: p.read_text() for p in (installed / "share").rglob("LICENSE")}
    assert texts.keys() == {"arcflow", "nlohmann_json", "openvino", "openvino_tokenizers"}
    assert "Apache License" in texts["arcflow"] and "MIT License" in texts["nlohmann_json"]
    third_party = {p.name for p in (installed / "share").rglob("*third-party*")}
    assert {"onetbb_third-party-programs.txt", "runtime-third-party-programs.txt"} <= third_party


@pytest.mark.parametrize(("version", "found"), [("0.1", True), ("0.1.0", True), ("0.2", False), ("1.0", False)])
def test_a_project_gets_the_version_that_it_asks_for(installed, tmp_path, version, found):
    done = configure_consumer(installed, tmp_path, f"-DWANTED={version}")
    assert (done.returncode == 0) == found
    if not found:
        assert "compatible with requested version" in done.stderr
