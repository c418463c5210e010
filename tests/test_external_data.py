import dataclasses
import io

import numpy as np
import onnxruntime
import pytest
from fake_bundle import make_bundle
from small_graph import ELSEWHERE, WEIGHT, bundle_with, edit_graph, set_external, write_graph

from arcflow_runtime.backends import open_backend
from arcflow_runtime.build.build import BuildSettings, build_engine
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.external_data import checked_graph
from arcflow_runtime.engines.tensorrt_library import LIBRARIES
from arcflow_runtime.errors import BundleError


@pytest.fixture
def root(tmp_path):
    root = make_bundle(tmp_path / "bundle")
    write_graph(root)
    return root


def test_the_parts_own_weights_are_taken(root):
    bundle = bundle_with(root)
    assert checked_graph(bundle, "p") == root / "p.onnx"
    edit_graph(root / "p.onnx", set_external("location", "./p.safetensors"))
    assert checked_graph(bundle, "p") == root / "p.onnx"


@pytest.mark.parametrize(("change", "message"), ELSEWHERE)
def test_nothing_outside_is_opened(root, monkeypatch, change, message):
    """The error comes before ONNX Runtime sees the graph: 1.23 would read the file."""
    edit_graph(root / "p.onnx", change)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: pytest.fail("the engine saw the graph"))
    with pytest.raises(BundleError) as error:
        open_backend("onnxruntime").open(bundle_with(root), "p")
    assert str(error.value).startswith(f"{root / 'p.onnx'}: ")
    assert message.format(weights="p.safetensors") in str(error.value)


def test_the_builder_of_engines_sees_no_such_graph(root):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed", exc_type=ImportError)
    write_graph(root, "../secret.bin")
    with pytest.raises(BundleError, match=r"got '\.\./secret\.bin'; export the bundle again$"):
        build_engine(LIBRARIES["tensorrt-rtx"], bundle_with(root), "p", "sm89", (), BuildSettings(), io.BytesIO())


def test_what_is_not_a_graph(root):
    path = root / "p.onnx"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(BundleError) as error:
        checked_graph(bundle_with(root), "p")
    assert str(error.value) == f"{path} is not an ONNX graph; export the bundle again"


def test_a_graph_in_another_folder_than_its_weights(root):
    bundle = bundle_with(root)
    (root / "graphs").mkdir()
    spec = dataclasses.replace(bundle.manifest.parts["p"], graph="graphs/p.onnx")
    files = bundle.manifest.files | {"graphs/p.onnx": bundle.manifest.files["p.onnx"]}
    bundle = Bundle(root, dataclasses.replace(bundle.manifest, parts={"p": spec}, files=files))
    (root / "p.onnx").rename(root / "graphs" / "p.onnx")
    with pytest.raises(BundleError, match=r"must lie in the part's weights p\.safetensors, got 'p\.safetensors'"):
        checked_graph(bundle, "p")
    edit_graph(root / "graphs" / "p.onnx", set_external("location", "../p.safetensors"))
    assert checked_graph(bundle, "p") == root / "graphs" / "p.onnx"


def test_a_name_of_another_format_is_read_as_onnx(root):
    """ONNX Runtime takes a file whose name ends in .ort for its own format, which is not what was checked."""
    bundle = bundle_with(root)
    spec = dataclasses.replace(bundle.manifest.parts["p"], graph="p.ort")
    files = bundle.manifest.files | {"p.ort": bundle.manifest.files["p.onnx"]}
    bundle = Bundle(root, dataclasses.replace(bundle.manifest, parts={"p": spec}, files=files))
    (root / "p.onnx").rename(root / "p.ort")
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(open_backend("onnxruntime", 1).open(bundle, "p").run({"x": x})["y"], x @ WEIGHT)
