"""Files that the C++ TensorRT backend uses besides engines: a bundle's weights, and the cache of TensorRT-RTX.

Weights are compared with what the onnx package reads, the cache with the Python runtime's.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import onnx
import pytest

from arcflow_runtime import Bundle
from arcflow_runtime.gpu.runtime_cache import RuntimeCacheFile
from tests.conftest import FAMILIES


@pytest.fixture
def tool(trt_tool):
    return trt_tool


# Weights of engines without them.


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_the_graph(tool, bundles, family):
    # Every constant of every part, byte for byte as the onnx package reads it.
    bundle = Bundle.open(bundles(family, steps=(2, 4)))
    for part, spec in bundle.manifest.parts.items():
        model = onnx.load(bundle.path(spec.graph))
        asked, expected = [], {}
        for tensor in model.graph.initializer:
            asked += [tensor.name, tensor.data_type, math.prod(tensor.dims)]
            expected[tensor.name] = hashlib.sha256(tensor.raw_data).hexdigest()
        assert any(t.dims for t in model.graph.initializer) and "Constant" not in {n.op_type for n in model.graph.node}
        code, said = tool("weights", bundle.root, part, *asked)
        assert code == 0, said
        assert dict(line.rsplit(" ", 1) for line in said.splitlines()) == expected


# The cache of TensorRT-RTX.

_KEY = ("a" * 64, "1.7.1.116", "13.1", "NVIDIA GeForce RTX 5090")


@pytest.mark.parametrize(
    "environment",
    [
        {"ARCFLOW_CACHE": "{}/named", "XDG_CACHE_HOME": "{}/xdg"},
        {"ARCFLOW_CACHE": "", "XDG_CACHE_HOME": "{}/xdg"},
        {"ARCFLOW_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "{}"},
    ],
)
def test_both_keep_what_was_compiled_in_one_file(tool, tmp_path, monkeypatch, environment):
    environment = {name: value.format(tmp_path) for name, value in environment.items()}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    theirs = RuntimeCacheFile(_KEY)
    assert theirs.path.is_relative_to(tmp_path)
    assert tool("cache", *_KEY, "from C++") == (0, f"{theirs.path} nothing")
    assert theirs.read() == b"from C++"
    theirs.write(b"from Python")
    assert tool("cache", *_KEY, "from C++ again") == (0, f"{theirs.path} from Python")
    assert RuntimeCacheFile(_KEY).read() == b"from C++ again"
    assert sorted(p.suffix for p in theirs.path.parent.iterdir()) == [".cache", ".lock"]


def test_one_waits_for_the_others_lock(tool, tmp_path):
    file = RuntimeCacheFile(_KEY, tmp_path)
    with ThreadPoolExecutor(1) as threads:
        with file.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
            writing = threads.submit(tool, "cache", *_KEY, "kernels", ARCFLOW_CACHE=str(tmp_path))
            with pytest.raises(TimeoutError):
                writing.result(timeout=1)
            assert not file.path.exists()
        assert writing.result() == (0, f"{file.path} nothing")
    assert file.read() == b"kernels"


def test_a_cache_that_cannot_be_written_is_a_warning(tool, tmp_path):
    (tmp_path / "file").write_text("")
    command = [tool.path, "cache", *_KEY, "kernels"]
    done = subprocess.run(command, env=os.environ | {"ARCFLOW_CACHE": str(tmp_path / "file")}, capture_output=True)
    assert done.returncode == 0
    folder = tmp_path / "file"
    assert done.stderr.decode().startswith(f"arcflow: what TensorRT-RTX compiled cannot be kept in {folder}: ")
