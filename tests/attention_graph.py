"""Make a bundle with one real part, `p`: a single Attention operator with a chosen head size; for tests of builders."""

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

HEADS, TOKENS = 4, 16


def attention_bundle(root: Path, head: int, precision: str = "bfloat16") -> Bundle:
    """A bundle whose only part computes y = Attention(q, k, v), each of shape [1, HEADS, TOKENS, head]."""
    shape = (1, HEADS, TOKENS, head)
    kind = {"bfloat16": TensorProto.BFLOAT16, "float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}[precision]
    graph = helper.make_graph(
        [helper.make_node("Attention", [*"qkv"], ["y"], name="the_attention")],
        "p",
        [helper.make_tensor_value_info(name, kind, shape) for name in "qkv"],
        [helper.make_tensor_value_info("y", kind, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    (root / "p.onnx").write_bytes(model.SerializeToString())
    save_file({"unused": np.zeros(1, np.float32)}, root / "p.safetensors")
    bundle = Bundle.open(root)
    inputs, outputs = (tuple(TensorSpec(name, precision, shape) for name in names) for names in ("qkv", "y"))
    spec = Part("p.onnx", "p.safetensors", precision, 1, inputs, outputs)
    manifest = dataclasses.replace(bundle.manifest, opset=23, parts={"p": spec}, files=list_files(root))
    return Bundle(root, manifest)


def attention_profile(head: int) -> Profile:
    """The profile of the only shape that the part accepts."""
    return {name: ShapeRange(*[(1, HEADS, TOKENS, head)] * 3) for name in "qkv"}
