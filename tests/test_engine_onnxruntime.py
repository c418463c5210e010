import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from fake_bundle import edit_manifest, list_files, make_bundle
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from arcflow_runtime.bundle import Bundle, Part, TensorSpec
from arcflow_runtime.engines import open_backend
from arcflow_runtime.errors import EngineError, RequestError

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def write_graph(root: Path, location: str = "p.safetensors", offset: int | None = None) -> None:
    """y = x @ W, with W in a safetensors file beside the graph, at its offset in the file."""
    save_file({"W": WEIGHT}, root / "p.safetensors")
    if offset is None:
        offset = (root / "p.safetensors").stat().st_size - WEIGHT.nbytes
    weight = TensorProto(name="W", data_type=TensorProto.FLOAT, dims=WEIGHT.shape)
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", WEIGHT.nbytes)):
        weight.external_data.add(key=key, value=str(value))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "p",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 4])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (root / "p.onnx").write_bytes(model.SerializeToString())


def bundle_with(root: Path, inputs=("x",), outputs=("y",)) -> Bundle:
    """A bundle whose parts include "p"; the manifest is not written, the engine only reads the object."""
    bundle = Bundle.open(root)
    spec = Part(
        "p.onnx",
        "p.safetensors",
        "float32",
        12,
        tuple(TensorSpec(n, "float32", ("B", 3)) for n in inputs),
        tuple(TensorSpec(n, "float32", ("B", 4)) for n in outputs),
    )
    manifest = dataclasses.replace(bundle.manifest, parts={"p": spec}, files=list_files(root))
    return Bundle(root, manifest)


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


def test_a_graph_that_is_not_onnx(root):
    (root / "p.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"^p: ONNX Runtime cannot load p\.onnx: "):
        open_backend("onnxruntime").open(bundle_with(root), "p")


@pytest.mark.parametrize("absolute", [False, True])
def test_weights_outside_the_bundle_are_refused(root, tmp_path, absolute):
    write_graph(root)
    outside = tmp_path / "outside.bin"
    outside.write_bytes(WEIGHT.tobytes())
    write_graph(root, str(outside) if absolute else "../outside.bin", 0)
    with pytest.raises(EngineError, match=r"^p: ONNX Runtime cannot load p\.onnx: "):
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
