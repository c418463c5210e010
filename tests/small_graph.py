"""Make a bundle with one small graph, `p`: y = x @ W with W in a safetensors file. Also edits that misplace W."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.manifest import Part, TensorSpec
from tests.fake_bundle import list_files

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def write_graph(root: Path, location: str = "p.safetensors", offset: int | None = None) -> None:
    """Write p.onnx and p.safetensors. The graph says that W is at `location` and `offset`; by default, that is true."""
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
    """A bundle whose only part is "p". Its manifest exists only in memory, not in the file."""
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


def edit_graph(path: Path, change) -> None:
    """Load a graph without its weights, call `change(model)`, and write it back."""
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


def set_external(key: str, value: str):
    """A change for `edit_graph`: sets a key of the first external initializer. `{old}` in `value` is the old value."""

    def change(model) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        entry = next(e for e in tensor.external_data if e.key == key)
        entry.value = value.format(old=entry.value)

    return change


def _hidden() -> TensorProto:
    tensor = TensorProto(name="hidden", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def set_in_subgraph(model) -> None:
    """Add external data in a constant inside a branch of an If node, which a check of initializers alone would miss."""
    constant = helper.make_node("Constant", [], ["c"], value=_hidden())
    branch = helper.make_graph([constant], "branch", [], [])
    model.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch))


def set_in_function_default(model) -> None:
    """Add external data in the default value of a function's attribute."""
    function = model.functions.add(name="f", domain="d")
    function.attribute_proto.append(helper.make_attribute("a", _hidden()))


def set_two_values(model) -> None:
    """Give one entry two values: a wrong location first, then the right one in an unknown field of the message."""
    entry = next(e for t in model.graph.initializer for e in t.external_data if e.key == "location")
    good = entry.value.encode()
    entry.ParseFromString(b"\x0a\x08location\x12\x09../secret\x1a" + bytes([len(good)]) + good)


def without_location(model) -> None:
    """Mark a tensor as external without a location."""
    del next(t for t in model.graph.initializer if t.external_data).external_data[:]


#: Changes that put external data elsewhere, and a part of the error of each; `{weights}` is the part's weights file.
ELSEWHERE = [
    (set_external("location", "../secret"), "must lie in the part's weights {weights}, got '../secret'; export"),
    (set_external("location", "/etc/passwd"), "got '/etc/passwd'; export the bundle again"),
    (set_external("location", "backbone.safetensors"), "got 'backbone.safetensors'"),
    (set_external("location", "link/../{old}"), "got 'link/../{weights}'"),
    (set_external("location", "*/_ORT_MEM_ADDR_/*"), "got '*/_ORT_MEM_ADDR_/*'"),
    (set_external("location", ""), "must lie in the part's weights {weights}, got ''"),
    (set_external("offset", "-8"), "offset must be a number of bytes, got '-8'"),
    (set_external("offset", "99999999999"), "got bytes 99999999999 to 99999999999 + "),
    (set_external("length", "18446744073709551615"), " + 18446744073709551615; export"),
    (set_in_subgraph, "external data of tensor 'hidden' must lie in the part's weights"),
    (set_in_function_default, "external data of tensor 'hidden' must lie in the part's weights"),
    (set_two_values, "got '../secret'; export the bundle again"),
    (without_location, "has external data without a location; export the bundle again"),
]
