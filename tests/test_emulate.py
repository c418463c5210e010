"""bfloat16 on a machine without it: every operator's result is rounded, and nothing else is."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from arcflow_export.emulate.emulate import emulate

BF16 = TensorProto.BFLOAT16


def run(nodes, inputs, outputs, weights, feeds, others=()):
    """Emulate a graph whose tensors are all bfloat16 but for `others` and run it; float32 in and out."""
    values = [helper.make_tensor_value_info(n, BF16, s) for n, s in inputs.items()]
    results = [helper.make_tensor_value_info(n, BF16, s) for n, s in outputs.items()]
    held = [helper.make_tensor(n, BF16, w.shape, w.float().flatten().tolist()) for n, w in weights.items()]
    graph = helper.make_graph(nodes, "g", values, results, [*held, *others])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    emulated = emulate(ir.from_proto(onnx.shape_inference.infer_shapes(proto)))
    session = ort.InferenceSession(ir.to_proto(emulated).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(list(outputs), feeds)


def whole(shape, seed, limit=127):
    return torch.randint(-limit, limit + 1, shape, generator=torch.manual_seed(seed)).to(torch.bfloat16)


def test_matmul_and_add_as_torch_does_them_in_bfloat16():
    """Whole numbers: products and sums are exact in float32, so only the two roundings are left, and must be equal."""
    x, w, b = whole((5, 64), 0), whole((64, 7), 1), whole((7,), 2)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Add", ["y", "b"], ["z"])]
    (got,) = run(nodes, {"x": [5, 64]}, {"z": [5, 7]}, {"w": w, "b": b}, {"x": x.float().numpy()})
    product = torch.matmul(x.double(), w.double())
    expected = product.to(torch.bfloat16) + b
    assert np.array_equal(got, expected.float().numpy())
    assert torch.equal(expected, torch.matmul(x, w) + b)
    once = (product + b.double()).to(torch.bfloat16)
    assert not np.array_equal(got, once.float().numpy()), "these numbers do not tell one rounding from two"


def test_inputs_are_rounded():
    x = np.array([1.001, 3.1415927], np.float32)
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    (got,) = run(nodes, {"x": [2]}, {"y": [2]}, {}, {"x": x})
    assert np.array_equal(got, torch.from_numpy(x).bfloat16().float().numpy())


def test_an_output_that_is_also_read_inside_is_rounded_for_both():
    x = whole((4, 64), 3)
    w = whole((64, 4), 4)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Mul", ["y", "y"], ["z"])]
    y, z = run(nodes, {"x": [4, 64]}, {"y": [4, 4], "z": [4, 4]}, {"w": w}, {"x": x.float().numpy()})
    expected = torch.matmul(x.double(), w.double()).to(torch.bfloat16)
    assert np.array_equal(y, expected.float().numpy())
    assert np.array_equal(z, (expected * expected).float().numpy())


def test_float32_islands_are_left_alone():
    """Between a cast to float32 and one back nothing is rounded."""
    x = whole((3,), 5)
    third = helper.make_tensor("third", TensorProto.FLOAT, [], [1 / 3])
    nodes = [
        helper.make_node("Constant", [], ["t"], value=third),
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["a", "t"], ["b"]),
        helper.make_node("Mul", ["b", "t"], ["c"]),
        helper.make_node("Cast", ["c"], ["y"], to=BF16),
    ]
    (got,) = run(nodes, {"x": [3]}, {"y": [3]}, {}, {"x": x.float().numpy()})
    third32 = torch.tensor(1 / 3, dtype=torch.float32)
    assert np.array_equal(got, (x.float() * third32 * third32).bfloat16().float().numpy())


def test_fp8_linears_are_multiplied_before_they_are_rounded():
    """Small whole numbers times powers of two: the sums are exact in float32, so only the last rounding is left."""
    x, w = whole((5, 64), 6, 31), whole((64, 7), 7, 15)
    codes = [
        helper.make_tensor("w", TensorProto.FLOAT8E4M3FN, w.shape, w.float().flatten().tolist()),
        helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0]),
    ]
    scales = {"sx": torch.tensor(0.5), "sw": torch.tensor([2.0**i for i in range(-3, 4)])}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "sx", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "sx"], ["a"]),
        helper.make_node("DequantizeLinear", ["w", "sw"], ["b"], axis=1),
        helper.make_node("MatMul", ["a", "b"], ["y"]),
    ]
    (got,) = run(nodes, {"x": [5, 64]}, {"y": [5, 7]}, scales, {"x": x.float().numpy()}, codes)
    a = (x.float() * 2).to(torch.float8_e4m3fn).double() / 2
    assert not torch.equal(a.float(), x.float()), "these numbers are all in E4M3"
    expected = (a @ (w.double() * scales["sw"])).to(torch.bfloat16)
    assert np.array_equal(got, expected.float().numpy())
