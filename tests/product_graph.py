"""Make a bundle with one real part, `p`: softmax(x x^T) x in float32. Scratch memory is quadratic in the rows of x."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from fake_bundle import list_files
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.engine_record import Profile, ShapeRange
from arcflow_runtime.disk.manifest import Part, TensorSpec

WIDTH = 8


def product_bundle(root: Path) -> Bundle:
    """A bundle whose only part takes and gives [S, WIDTH], of any S."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "x"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["S", WIDTH]) for name in "xy")
    graph = helper.make_graph(nodes, "p", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (root / "p.onnx").write_bytes(model.SerializeToString())
    save_file({"unused": np.zeros(1, np.float32)}, root / "p.safetensors")
    bundle = Bundle.open(root)
    inputs, outputs = ((TensorSpec(name, "float32", ("S", WIDTH)),) for name in "xy")
    spec = Part("p.onnx", "p.safetensors", "float32", 1, inputs, outputs)
    return Bundle(root, dataclasses.replace(bundle.manifest, opset=20, parts={"p": spec}, files=list_files(root)))


def product_profile(largest: int) -> Profile:
    """The profile of S from 1 to `largest`."""
    return {"x": ShapeRange((1, WIDTH), (min(1024, largest), WIDTH), (largest, WIDTH))}
