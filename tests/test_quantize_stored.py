"""Weights stored in fewer bits: what ONNX Runtime computes from them, which weights qualify, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from arcflow_export.errors import QuantizeError
from arcflow_export.formats.policy import PartPolicy, StoredPolicy, load_policy, select_stored
from arcflow_export.quantize.int8 import encode, make_scale
from arcflow_export.quantize.stored import find_weights, insert, narrowed, tensors

F32, BF16, I64 = ir.DataType.FLOAT, ir.DataType.BFLOAT16, ir.DataType.INT64
WEIGHTS = ["embed", "position", "conv", "proj"]


def value(name: str, shape: list[int | str], dtype: ir.DataType, array: np.ndarray | None = None) -> ir.Value:
    tensor = None if array is None else ir.tensor(array, name=name)
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)


def model(dtype: ir.DataType = F32) -> ir.Model:
    """embed[ids] + position[other], and a product with `proj`; `other` is computed from the ids."""
    rng = np.random.default_rng(0)
    ids = value("input_ids", ["batch", "tokens"], I64)
    rows = np.array([1, 1e-3, 50, 1, 0], np.float32)[:, None]
    arrays = {
        "embed": rng.standard_normal((5, 8)).astype(np.float32) * rows,
        "position": rng.standard_normal((5, 8)).astype(np.float32),
        "proj": rng.standard_normal((8, 3)).astype(np.float32),
    }
    stored = {
        name: value(f"{name}.weight", list(a.shape), dtype, a.astype(dtype.numpy())) for name, a in arrays.items()
    }
    embed = ir.node("Gather", [stored["embed"], ids], name="embed")
    other = ir.node("Abs", [ids], name="other")
    position = ir.node("Gather", [stored["position"], other.outputs[0]], name="position")
    add = ir.node("Add", [embed.outputs[0], position.outputs[0]], name="add")
    proj = ir.node("MatMul", [add.outputs[0], stored["proj"]], name="proj")
    nodes, width = [embed, other, position, add, proj], {"proj": 3}
    for node in nodes:
        out = node.outputs[0]
        out.name, out.type = f"{node.name}_out", ir.TensorType(I64 if node is other else dtype)
        out.shape = ids.shape if node is other else ir.Shape(["batch", "tokens", width.get(str(node.name), 8)])
    outputs = [embed.outputs[0], proj.outputs[0]]
    graph = ir.Graph([ids], outputs, nodes=nodes, initializers=list(stored.values()), opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


def narrow(found: ir.Model, stored: dict) -> ir.Model:
    """The graph with weights stored as `stored` says, with their values."""
    weights = find_weights(found)
    before = {name: torch.from_numpy(w.value.const_value.numpy().astype(np.float32)) for name, w in weights.items()}
    made = [
        (name, t)
        for name, how in stored.items()
        for t in tensors(weights[name], how, before[name].abs().amax(1) if how == "int8" else None)
    ]
    insert(found.graph, stored, weights)
    for name, tensor in made:
        array = tensor.value if tensor.encode is None else torch.cat(list(tensor.encode(iter(before[name].split(2)))))
        initializer = found.graph.initializers[tensor.name]
        assert tuple(initializer.shape.numpy()) == tensor.shape == tuple(array.shape)
        initializer.const_value = ir.tensor(array.numpy(), name=tensor.name)
    return found


def run(found: ir.Model, ids: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(found).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"input_ids": ids})


def test_rows_that_are_looked_up_are_codes_times_their_scales():
    """Also where the rows are an output of the graph. Both products are of two float32 numbers, so they are exact."""
    ids = np.array([[0, 1, 2], [3, 4, 2]], np.int64)
    table = torch.from_numpy(model().graph.initializers["embed.weight"].const_value.numpy())
    scale = make_scale(table.abs().amax(1))[:, None]
    wanted = (encode(table, scale) * scale).numpy()[ids]
    rows, product = run(narrow(model(), {"embed": "int8"}), ids)
    np.testing.assert_array_equal(rows, wanted)
    assert (np.abs(rows - table.numpy()[ids]) <= scale.numpy()[ids] * (0.5 + 127 * 2**-23)).all()
    position, proj = (model().graph.initializers[f"{n}.weight"].const_value.numpy() for n in ("position", "proj"))
    exact = (wanted.astype(np.float64) + position[ids]) @ proj
    # Sums of 8 products of numbers of at most 160 in float32.
    np.testing.assert_allclose(product, exact, rtol=0, atol=9 * 2**-24 * 160 * 8)


def test_a_weight_in_float16_is_widened_before_it_is_read():
    ids = np.array([[2, 4]], np.int64)
    plain = model()
    proj = plain.graph.initializers["proj.weight"]
    proj.const_value = ir.tensor(proj.const_value.numpy().astype(np.float16).astype(np.float32), name="proj.weight")
    np.testing.assert_array_equal(run(narrow(model(), {"proj": "float16"}), ids)[1], run(plain, ids)[1])


def test_rows_of_a_bfloat16_table_are_rounded_to_it():
    found = narrow(model(BF16), {"embed": "int8"})
    rounded = found.graph.outputs[0].producer()
    assert rounded.op_type == "Cast" and rounded.outputs[0].dtype == BF16
    assert [v.name for v in found.graph.outputs] == ["embed_out", "proj_out"]


def test_embeddings_are_looked_up_by_an_input():
    weights = find_weights(model())
    assert {name: w.embedding for name, w in weights.items()} == {"embed": True, "position": False, "proj": False}
    weights = find_weights(model(BF16))
    assert narrowed({"embed": "int8", "proj": "float16"}, weights) == {"embed": "int8"}, "16 bits already"


def test_a_weight_beyond_float16():
    weights = find_weights(model())
    (stored,) = tensors(weights["proj"], "float16", None)
    message = (
        "tensor 'proj.weight' has the value 70000, beyond float16's 65504; leave it out of the policy's stored.float16"
    )
    with pytest.raises(QuantizeError, match=f"^{re.escape(message)}$"):
        list(stored.encode(iter([torch.tensor([[70000.0]])])))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (StoredPolicy(("conv",)), "parts.p.stored.int8: 'conv' matches none of the 1 token embeddings of p"),
        (
            StoredPolicy((), ("convs",)),
            "parts.p.stored.float16: 'convs' matches none of the 4 weights of p that are not quantised; similar names "
            "are 'conv'",
        ),
    ],
)
def test_patterns_that_match_nothing(stored, message):
    with pytest.raises(QuantizeError, match=f"^policy: {re.escape(message)}$"):
        select_stored(PartPolicy(stored=stored), "p", WEIGHTS, ["embed"])


def test_selection():
    chosen = select_stored(PartPolicy(stored=StoredPolicy(("*",), ("conv", "pro*"))), "p", WEIGHTS, ["embed"])
    assert chosen == {"embed": "int8", "conv": "float16", "proj": "float16"}
    assert select_stored(PartPolicy(("a",)), "p", WEIGHTS, ["embed"]) == {}
    message = "policy: parts.p.stored: 'embed' must match one of int8 and float16, got both"
    with pytest.raises(QuantizeError, match=f"^{message}$"):
        select_stored(PartPolicy(stored=StoredPolicy(("*",), ("*",))), "p", WEIGHTS, ["embed"])


def test_a_part_may_only_be_stored(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text('name = "t"\nformat = "int8"\n[parts.vae_decoder.stored]\nfloat16 = ["*"]\n')
    assert load_policy(str(path)).parts == {"vae_decoder": PartPolicy(stored=StoredPolicy((), ("*",)))}
    path.write_text('name = "t"\nformat = "int8"\n[parts.vae_decoder.stored]\n')
    message = "parts.vae_decoder: stored must have patterns for int8 or float16; or leave it out"
    with pytest.raises(QuantizeError, match=re.escape(message)):
        load_policy(str(path))
