import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_bundle import edit_manifest, make_bundle
from small_graph import WEIGHT, bundle_with, edit_graph, write_graph

from arcflow_runtime.backends import open_backend
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.errors import EngineError, RequestError


@pytest.fixture
def root(tmp_path):
    root = make_bundle(tmp_path / "bundle")
    write_graph(root)
    return root


def test_runs_a_graph_with_weights_in_safetensors(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = open_backend("onnxruntime", threads=1).open(bundle_with(Path("bundle")), "p")
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(engine.run({"x": x})["y"], x @ WEIGHT)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match=r"^p: the engine is closed; load the pipeline again$"):
        engine.run({"x": x})


def test_a_run_that_fails_names_the_part_and_the_shapes(root):
    engine = open_backend("onnxruntime").open(bundle_with(root), "p")
    with pytest.raises(EngineError, match=r"^p: ONNX Runtime failed on inputs \{'x': 'float32\[2, 5\]'\}: "):
        engine.run({"x": np.ones((2, 5), np.float32)})


def test_a_graph_that_onnxruntime_does_not_take(root):
    edit_graph(root / "p.onnx", lambda model: setattr(model.graph.node[0], "op_type", "NoSuchOperator"))
    with pytest.raises(EngineError, match=r"^p: ONNX Runtime cannot load p\.onnx: .*NoSuchOperator"):
        open_backend("onnxruntime").open(bundle_with(root), "p")


def test_inputs_and_outputs_must_be_the_manifests(root):
    backend = open_backend("onnxruntime")
    with pytest.raises(
        EngineError,
        match=r"^p: the inputs of p\.onnx must be \['x', 'z'\], as in the manifest, got \['x'\]; "
        r"export the bundle again$",
    ):
        backend.open(bundle_with(root, inputs=("x", "z")), "p")
    with pytest.raises(EngineError, match=r"^p: the outputs of p\.onnx must be \['q'\]"):
        backend.open(bundle_with(root, outputs=("q",)), "p")


def test_bfloat16_is_refused_before_anything_is_loaded(tmp_path):
    root = make_bundle(tmp_path / "b")
    backend = open_backend("onnxruntime")
    backend.check(Bundle.open(root))
    edit_manifest(root, parts__backbone__precision="bfloat16")
    message = "backbone is in bfloat16, which ONNX Runtime cannot run on a CPU; export the bundle with --dtype float32"
    with pytest.raises(EngineError, match=f"^{re.escape(message)}$"):
        backend.check(Bundle.open(root))


def test_threads():
    with pytest.raises(RequestError, match=r"^threads must be at least 1, got 0; leave it out to use every core$"):
        open_backend("onnxruntime", threads=0)
    cores = os.cpu_count()
    open_backend("onnxruntime", threads=cores)
    message = (
        f"threads must be at most {cores}, one per core of this machine, got 100000; leave it out to use every core"
    )
    with pytest.raises(RequestError, match=f"^{message}$"):
        open_backend("onnxruntime", threads=100_000)


def test_onnxruntime_sends_no_telemetry(root, tmp_path):
    """It would keep a device id in the home directory, and connect to a server."""
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from arcflow_runtime.backends import open_backend
from small_graph import bundle_with
open_backend("onnxruntime").open(bundle_with(Path({str(root)!r})), "p")
"""
    home = tmp_path / "home"
    home.mkdir()
    subprocess.run([sys.executable, "-c", code], check=True, env={"HOME": str(home), "PATH": os.environ["PATH"]})
    assert list(home.iterdir()) == []
