"""Weights on their way to FP8, block by block, and what a quantisation counts: against numbers worked out by hand."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file

from arcflow_export.checkpoint import merge
from arcflow_export.checkpoint.tensors import TensorIndex
from arcflow_export.errors import QuantizeError
from arcflow_export.graph.linears import LinearNode, find_linears, shared_inputs
from arcflow_export.quantize import quantize, weights
from arcflow_export.quantize.coverage import _flops, cover_part
from arcflow_export.quantize.format import StoredTensor
from arcflow_export.quantize.fp8 import E4M3, encode, make_scale
from arcflow_export.quantize.graph import QuantizeLinears, is_quantized
from arcflow_export.quantize.weights import QuantizedWeights, scan_weights
from arcflow_runtime.disk.bundle import Bundle
from tests.fake_bundle import make_bundle

#: Rows of "a": the largest of each column is in another row, the second one's is negative.
A = torch.tensor([[9.0, 1.0, 2.0], [1.0, -7.0, 1.0], [0.5, 2.0, 1.0], [1.0, 1.0, 1.0], [2.0, 1.0, 8.0]])
B = torch.tensor([[0.25, -0.5], [3.0, 0.125]])


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def stored(request, tmp_path):
    """A file with two linears, one that is not asked for, and a bias."""
    path = tmp_path / "part.safetensors"
    tensors = {"a.weight": A, "b.weight": B, "other.weight": 100 * B, "a.bias": torch.tensor([50.0, 60.0, 70.0])}
    save_file({name: t.to(request.param) for name, t in tensors.items()}, path)
    return path, request.param


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 100])
def test_ranges_are_of_all_blocks(stored, rows, monkeypatch):
    """Whatever block a column's largest number is in: the first, one between, or a last one that is shorter."""
    path, dtype = stored
    monkeypatch.setattr(weights, "BLOCK_BYTES", rows * 3 * dtype.itemsize)
    read: list[int] = []
    digest, amax = scan_weights(path, ["a", "b"], read.append)
    assert {name: value.tolist() for name, value in amax.items()} == {"a": [9, 7, 8], "b": [3, 0.5]}
    assert all(value.dtype == torch.float32 for value in amax.values())
    data = path.read_bytes()
    assert digest == hashlib.sha256(data).hexdigest()
    assert sum(read) == len(data) - 8 - int.from_bytes(data[:8], "little")
    if rows == 1:
        assert read.count(3 * dtype.itemsize) >= 5, "it was read in rows"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 4])
def test_nan_and_infinity_are_found_in_every_block(tmp_path, monkeypatch, value, row):
    monkeypatch.setattr(weights, "BLOCK_BYTES", 12)
    bad = A.clone()
    bad[row, 1] = value
    save_file({"a.weight": bad, "b.weight": B}, tmp_path / "w")
    with pytest.raises(QuantizeError, match=r"tensor 'a\.weight' holds NaN or Inf"):
        scan_weights(tmp_path / "w", ["a", "b"], lambda _: None)
    assert list(scan_weights(tmp_path / "w", ["b"], lambda _: None)[1]) == ["b"], (
        "a linear that is not asked for may hold it"
    )


def test_a_file_that_was_cut_is_refused(stored):
    path, _ = stored
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(QuantizeError, match="ended early"):
        scan_weights(path, ["a"], lambda _: None)


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_blocks_are_encoded_with_the_scale_of_their_columns(stored, rows, monkeypatch):
    """Scales 0.5, 1 and 2 by hand: 9 / 0.5 = 18, -7 / 1, 8 / 2 = 4. All are numbers of E4M3."""
    path, dtype = stored
    monkeypatch.setattr(merge, "BLOCK_BYTES", rows * 3 * 4)
    scale, activation = torch.tensor([0.5, 1.0, 2.0], dtype=dtype), torch.tensor(0.25, dtype=dtype)
    tensors = (
        StoredTensor("a.weight", (5, 3), E4M3, encode=lambda blocks: (encode(b, scale) for b in blocks)),
        StoredTensor("a.weight_scale", (3,), dtype, scale),
        StoredTensor("a.input_scale", (), dtype, activation, of_input=True),
    )
    source = QuantizedWeights(TensorIndex.open(path, "part"), {"a": tensors}, ["a"])
    blocks = list(source.blocks("a.weight", torch.float8_e4m3fn))
    got = torch.cat([block.float() for block in blocks])
    assert all(block.dtype == torch.float8_e4m3fn for block in blocks)
    assert got.tolist() == (A / torch.tensor([0.5, 1.0, 2.0])).tolist() and len(blocks) >= (3 if rows < 3 else 1)
    assert torch.equal(torch.cat(list(source.blocks("b.weight", dtype))), B.to(dtype))
    names = ["a.weight", "b.weight", "other.weight", "a.bias", "a.weight_scale", "a.input_scale"]
    assert sorted(p.name for p in source.parameters()) == sorted(names)
    assert [p.name for p in source.parameters()][-2:] == names[-2:]
    assert next(source.blocks("a.weight_scale", dtype)) is scale
    assert next(source.blocks("a.input_scale", dtype)) is activation
    assert [source.shape(k) for k in ("a.weight_scale", "a.input_scale", "a.weight")] == [(3,), (), (5, 3)]


def test_scales_by_hand():
    """2^-8 x 448 = 1.75 has an exact scale; one unit of float32 more is rounded up; 0 has the scale 1."""
    above = np.nextafter(np.float64(1.75), 2)
    got = make_scale(torch.tensor([1.75, above, 0.0], dtype=torch.float64), torch.float32)
    assert got.tolist() == [2**-8, 2**-8 * (1 + 2**-23), 1.0]


# The graph.


def graph(shape=("B", "N", 4)) -> ir.Model:
    """x -> a [4, 2] and b [4, 3]; y -> c [4, 2]; a product without a stored matrix, and one that was not named."""

    def value(name, dims, dtype=ir.DataType.FLOAT):
        return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))

    x, y = value("x", shape), value("y", ("B", 4))
    nodes, weights_ = [], []
    for name, source, columns in (("a", x, 2), ("c", y, 2), ("b", x, 3), (None, x, 2)):
        key = f"{name or 'lost'}.weight"
        weight = ir.Value(
            name=key,
            shape=ir.Shape((4, columns)),
            type=ir.TensorType(ir.DataType.FLOAT),
            const_value=ir.tensor(np.ones((4, columns), np.float32), name=key),
        )
        weights_.append(weight)
        node = ir.node("MatMul", [source, weight], name=name)
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        nodes.append(node)
    nodes.append(ir.node("MatMul", [x, x], name="product"))
    outputs = [n.outputs[0] for n in nodes]
    return ir.Model(
        ir.Graph([x, y], outputs, nodes=nodes, initializers=weights_, opset_imports={"": 20}), ir_version=10
    )


def test_linears_are_named_products_with_a_stored_matrix():
    found = find_linears(graph())
    assert [(n, x.in_features, x.out_features, x.parameters) for n, x in found.items()] == [
        ("a", 4, 2, 8),
        ("c", 4, 2, 8),
        ("b", 4, 3, 12),
    ]
    assert [[x.name for x in group] for group in shared_inputs(found.values())] == [["a", "b"], ["c"]]


def test_linears_of_one_input_share_its_codes_and_others_are_left():
    model = graph()
    QuantizeLinears(dict.fromkeys(("a", "b"), "fp8_e4m3"))(model)
    nodes = {n.name: n for n in model.graph}
    assert nodes["a"].inputs[0] is nodes["b"].inputs[0] and nodes["c"].inputs[0].name == "y"
    quantize_node = nodes["a.input_quantize"]
    assert [v.name for v in quantize_node.inputs] == ["x", "a.input_scale", "constant.e4m3_zero_point"]
    for name in ("a", "b"):
        dequantize = nodes[name].inputs[1].producer()
        assert [v.name for v in dequantize.inputs] == [f"{name}.weight", f"{name}.weight_scale"]
        assert dequantize.attributes["axis"].as_int() == 1
    shapes = {n: list(v.shape) for n, v in model.graph.initializers.items() if n.endswith("scale")}
    assert shapes == {"a.input_scale": [], "a.weight_scale": [2], "b.weight_scale": [3]}
    assert is_quantized(model) and not is_quantized(graph())
    again = [n.op_type for n in model.graph]
    assert (again.count("QuantizeLinear"), again.count("DequantizeLinear")) == (1, 3)


def test_unknown_linears_and_quantised_graphs_are_refused():
    with pytest.raises(ir.passes.PreconditionError, match=r"not linears of the graph: \['d'\]"):
        QuantizeLinears({"a": "fp8_e4m3", "d": "fp8_e4m3"})(graph())
    model = graph()
    QuantizeLinears({"a": "fp8_e4m3"})(model)
    with pytest.raises(ir.passes.PreconditionError, match="must be unquantised, got one that is quantised already"):
        QuantizeLinears({"c": "fp8_e4m3"})(model)


def test_flops_of_one_linear():
    """Two per multiplication: 2 x (2 x 5 rows) x 4 x 3."""
    linear: LinearNode = find_linears(graph())["b"]
    assert _flops(linear, {"B": 2, "N": 5}) == 240


def test_coverage_of_a_part_by_hand(tmp_path):
    """64 x 96 pixels are 24 tokens: a 2 x 24 x 8, b 2 x 24 x 12, and c, which sees one vector, 2 x 8."""
    manifest = Bundle.open(make_bundle(tmp_path / "bundle")).manifest
    found = cover_part(manifest, "backbone", find_linears(graph()), ("a",), {}, 64, 96)
    assert (found.part, found.linears, found.quantized_linears, found.left) == ("backbone", 3, 1, ("c", "b"))
    assert (found.parameters, found.quantized_parameters) == (7, 8), "the bundle's parts say that they have 7"
    assert (found.flops, found.quantized_flops) == (384 + 576 + 16, 384)


def test_linears_of_one_tensor_get_the_largest_of_their_own_ranges_only():
    """ "c" reads another tensor, and a linear that is not quantised does not count."""
    ranges = {"a": 0.1, "b": 1.0, "c": 0.01}

    class Scales:
        def amax(self, part, layer):
            assert part == "backbone"
            return ranges[layer]

    def ranges_of(*chosen):
        found = find_linears(graph())
        return quantize._input_ranges(Scales(), "backbone", shared_inputs(found[name] for name in chosen))

    assert ranges_of("a", "b", "c") == {"a": 1.0, "b": 1.0, "c": 0.01}
    assert ranges_of("a", "c") == {"a": 0.1, "c": 0.01}
