"""A small stand-in for `arcflow quantize`: a float32 bundle -> the same with Q/DQ around the backbone's block linears."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from arcflow_runtime.bundle import Bundle
from tests.fake_bundle import list_files, write_manifest

E4M3 = ml_dtypes.float8_e4m3fn


def quantize(source: Path, out: Path, scale: float = 0.05, scales: Mapping[str, float] | None = None) -> Path:
    """Quantise every linear of the blocks; activations with `scale`, or their own in `scales`, by layer."""
    shutil.copytree(source, out)
    bundle = Bundle.open(source)
    part = bundle.manifest.parts["backbone"]
    model = ir.load(source / part.graph)
    shared: dict[ir.Value, ir.Value] = {}
    zero = _add(model.graph, "zero_point", np.zeros((), E4M3))
    for node in list(model.graph):
        if node.op_type != "MatMul" or "blocks." not in (node.name or ""):
            continue
        name, activation, weight = node.name, node.inputs[0], node.inputs[1]
        array = weight.const_value.numpy().astype(np.float32)
        weight_scale = np.abs(array).max(0) / 448
        del model.graph.initializers[weight.name]
        codes = _add(model.graph, f"{name}.weight", (array / weight_scale).astype(E4M3))
        factors = _add(model.graph, f"{name}.weight_scale", weight_scale)
        dequantize = ir.node("DequantizeLinear", [codes, factors], attributes={"axis": 1})
        model.graph.insert_before(node, dequantize)
        node.replace_input_with(1, dequantize.outputs[0])
        if activation not in shared:
            own = np.array((scales or {}).get(name, scale), np.float32)
            factor = _add(model.graph, f"{name}.input_scale", own)
            q = ir.node("QuantizeLinear", [activation, factor, zero])
            dq = ir.node("DequantizeLinear", [q.outputs[0], factor])
            model.graph.insert_before(node, [q, dq])
            shared[activation] = dq.outputs[0]
        node.replace_input_with(0, shared[activation])
    (out / part.weights).unlink()
    ir.save(model, out / part.graph, external_data=part.weights)
    write_manifest(out, dataclasses.replace(bundle.manifest, files=list_files(out)))
    return out


def edit_scale(bundle: Path, out: Path, tensor: str, factor: float) -> Path:
    """A copy of a bundle in which one constant of the backbone is multiplied."""
    shutil.copytree(bundle, out)
    opened = Bundle.open(bundle)
    part = opened.manifest.parts["backbone"]
    model = ir.load(bundle / part.graph)
    value = model.graph.initializers[tensor]
    array = value.const_value.numpy()
    value.const_value = ir.tensor((array.astype(np.float32) * factor).astype(array.dtype), name=tensor)
    (out / part.weights).unlink()
    ir.save(model, out / part.graph, external_data=part.weights)
    write_manifest(out, dataclasses.replace(opened.manifest, files=list_files(out)))
    return out


def _add(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.initializers[name] = value
    return value
