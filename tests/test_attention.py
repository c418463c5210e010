"""Attention some rows at a time: the same results, with scores that stay within the bound."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from arcflow_export.emulate import attention
from arcflow_export.emulate.attention import plan_rows, split_rows
from arcflow_export.emulate.blocks import BlockEngine
from arcflow_export.emulate.emulate import load_graph, widened
from arcflow_runtime.disk.bundle import Bundle
from tests.test_blocks import ROUNDING

#: Image tokens, latents of the decoder and text tokens: enough rows for several pieces, and not a multiple of them.
TOKENS, SIDE, TEXT = 323, 17, 45


def inputs_of(bundle: Bundle, part: str) -> dict[str, np.ndarray]:
    sizes = {"batch": 2, "image_tokens": TOKENS, "text_tokens": TEXT, "latent_height": SIDE, "latent_width": 19}
    draw, found = np.random.default_rng(0), {}
    for spec in bundle.manifest.parts[part].inputs:
        shape = [sizes[d] if isinstance(d, str) else d for d in spec.shape]
        numbers = draw.integers(0, 30, shape) if spec.dtype == "int64" else draw.standard_normal(shape)
        found[spec.name] = numbers.astype(np.int64 if spec.dtype == "int64" else np.float32)
    return found


@pytest.mark.parametrize("part", ["backbone", "text_encoder_2", "vae_decoder"])
@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"opset": 20}, marks=pytest.mark.slow), {"dtype": "bfloat16"}],
    ids=["one operator", "opset 20", "bfloat16"],
)
def test_pieces_give_the_same(bundles, command_run, monkeypatch, part, options):
    """With a mask (T5's bias differs from row to row), without one, as one operator and as three."""
    root = command_run.bundle if options.get("dtype") else bundles("flux-tiny", **options)
    bundle = widened(Bundle.open(root))
    batch = inputs_of(bundle, part)
    whole = BlockEngine(part, load_graph(bundle, part))
    expected = whole.run(batch)
    monkeypatch.setattr(attention, "SCORES_BYTES", 4 * 2 * 2 * TEXT * TEXT // 2)
    pieces = BlockEngine(part, load_graph(bundle, part))
    found = pieces.run(batch)
    assert not whole._open[0] and pieces._open[0] and all(count > 1 for _, count in pieces._open[0])
    for name, array in expected.items():
        bound = 1 if array.dtype == np.uint8 else ROUNDING * np.abs(array).max()
        np.testing.assert_allclose(found[name].astype(np.float64), array, atol=bound, rtol=0)


@pytest.mark.slow
def test_scores_stay_within_the_bound(bundles, monkeypatch):
    """The decoder's one attention over 4 * 17 * 19 tokens: every value that has them twice is cut."""
    monkeypatch.setattr(attention, "SCORES_BYTES", 1 << 20)
    graph = load_graph(Bundle.open(bundles("flux-tiny", opset=20)), "vae_decoder").graph
    sizes = {"batch": 1, "latent_height": SIDE, "latent_width": 19}
    tokens = 4 * SIDE * 19
    ((name, pieces),) = plan_rows(graph, sizes)
    assert pieces == -(-4 * tokens * tokens // (1 << 20))
    split_rows(graph, ((name, pieces),))
    assert sum(node.op_type == "Softmax" for node in graph) == pieces
    assert name in {v.name for node in graph for v in node.outputs}


def test_a_softmax_that_is_no_attention_stays():
    """One over another axis, and one whose result is read twice."""
    x, w = (ir.Value(name=n, shape=ir.Shape(["b", 4096, 4096]), type=ir.TensorType(ir.DataType.FLOAT)) for n in "xw")
    scores = ir.node("MatMul", [x, w])
    other = ir.node("Softmax", [scores.outputs[0]], attributes={"axis": 1})
    other.outputs[0].shape = x.shape
    out = ir.node("MatMul", [other.outputs[0], w])
    out.outputs[0].shape = x.shape
    graph = ir.Graph([x, w], [out.outputs[0]], nodes=[scores, other, out], opset_imports={"": 20})
    assert plan_rows(graph, {"b": 1}) == ()


@pytest.mark.parametrize(("causal", "count"), [(1, 0), (0, 1)])
def test_a_causal_attention_stays(causal, count):
    values = [ir.Value(name=n, shape=ir.Shape([1, 8, 9000, 64]), type=ir.TensorType(ir.DataType.FLOAT)) for n in "qkv"]
    node = ir.node("Attention", values, attributes={"is_causal": causal})
    node.outputs[0].shape, node.outputs[0].name = values[0].shape, "out"
    graph = ir.Graph(values, [node.outputs[0]], nodes=[node], opset_imports={"": 23})
    assert len(plan_rows(graph, {})) == count
