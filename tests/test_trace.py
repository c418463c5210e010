"""The graphs themselves: standard operators, the manifest's shapes, checkpoint names, weights outside."""

from __future__ import annotations

from collections import Counter

import onnx
import pytest
from onnx import TensorProto
from safetensors import safe_open

from arcflow_runtime import Bundle
from tests.conftest import FAMILIES

PARTS = [
    (family, part)
    for family in FAMILIES
    for part in ("text_encoder", "text_encoder_2", "conditioner", "backbone", "vae_decoder")
    if family == "flux-tiny" or part not in ("text_encoder_2", "conditioner")  # Qwen has one encoder, and is baked
]
#: One per layer of an encoder and block of a backbone; the wide head of a VAE has no fused kernel anywhere.
ATTENTIONS = {
    ("flux-tiny", "text_encoder"): 2,
    ("flux-tiny", "text_encoder_2"): 2,
    ("flux-tiny", "backbone"): 2 + 3,
    ("qwen-tiny", "text_encoder"): 2,
    ("qwen-tiny", "backbone"): 3,
}
#: What a graph may hold itself: shapes, scalars, and the ones of a norm without weights.
SMALL = 64


@pytest.fixture(params=[pytest.param(20, marks=pytest.mark.slow), 23], ids=["opset20", "opset23"])
def opset(request):
    return request.param


@pytest.fixture(params=PARTS, ids=["-".join(p) for p in PARTS])
def graph(request, opset, bundles):
    """(family, part), the bundle, and the part's model without its weights."""
    family, part = request.param
    bundle = Bundle.open(bundles(family, opset=opset, steps=(2, 4)))
    path = bundle.path(bundle.manifest.parts[part].graph)
    return request.param, bundle, onnx.load(path, load_external_data=False)


def initializers(model):
    return {i.name: i for i in model.graph.initializer}


def test_standard_operators_only(graph, opset):
    _, bundle, model = graph
    assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
    assert bundle.manifest.opset == opset
    assert {n.domain for n in model.graph.node} == {""}
    assert not model.functions
    assert not any(a.HasField("g") for n in model.graph.node for a in n.attribute), "no subgraphs"


def test_attention_is_one_node_from_opset_23(graph, opset):
    key, _, model = graph
    count = Counter(n.op_type for n in model.graph.node)
    assert count["Attention"] == (ATTENTIONS.get(key, 0) if opset == 23 else 0)
    assert opset == 23 or count["RMSNormalization"] == 0


def test_no_float64_and_no_complex_numbers(graph):
    _, _, model = graph
    banned = {TensorProto.DOUBLE, TensorProto.COMPLEX64, TensorProto.COMPLEX128}
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    types = {v.type.tensor_type.elem_type for v in values} | {i.data_type for i in model.graph.initializer}
    types |= {a.i for n in model.graph.node if n.op_type == "Cast" for a in n.attribute if a.name == "to"}
    assert not types & banned
    named = {v.name for v in values} | {i.name for i in model.graph.initializer}
    assert {o for n in model.graph.node for o in n.output if o} <= named, "a value without a type was not looked at"


def test_inputs_and_outputs_are_the_manifests(graph):
    (_, part), bundle, model = graph
    spec = bundle.manifest.parts[part]
    for values, specs in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
        assert [v.name for v in values] == [s.name for s in specs]
        for value, s in zip(values, specs, strict=True):
            tensor = value.type.tensor_type
            assert TensorProto.DataType.Name(tensor.elem_type) == {"float32": "FLOAT"}.get(s.dtype, s.dtype.upper())
            shape = tuple(d.dim_param if d.HasField("dim_param") else d.dim_value for d in tensor.shape.dim)
            assert shape == s.shape


def test_weights_are_outside_and_where_the_graph_says(graph):
    (_, part), bundle, model = graph
    spec = bundle.manifest.parts[part]
    outside = {}
    for name, tensor in initializers(model).items():
        if tensor.data_location == TensorProto.EXTERNAL:
            outside[name] = {e.key: e.value for e in tensor.external_data}
        else:
            assert len(tensor.dims) <= 1 and sum(tensor.dims) <= SMALL, name
    path = bundle.path(spec.weights)
    data = path.read_bytes()
    with safe_open(path, framework="numpy") as f:
        assert set(f.keys()) == set(outside)
        for name, place in outside.items():
            assert place["location"] == spec.weights
            start = int(place["offset"])
            assert start % 4 == 0
            tensor = f.get_tensor(name)
            assert tensor.tobytes() == data[start : start + int(place["length"])]
            assert list(tensor.shape) == list(initializers(model)[name].dims)
        count = sum(f.get_tensor(n).size for n in outside if not n.startswith("constant."))
    assert count == spec.parameters


def test_matrix_products_are_called_by_their_modules(graph):
    _, _, model = graph
    weights = initializers(model)
    named = [n for n in model.graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in weights]
    assert all(f"{n.name}.weight" == n.input[1] for n in named)
    assert not any(n.op_type == "Gemm" for n in model.graph.node)
    # Nothing transposes a weight at load or, worse, at every run.
    assert not any(n.op_type == "Transpose" and n.input[0] in weights for n in model.graph.node)


def test_every_backbone_linear_is_a_named_node(bundles):
    bundle = Bundle.open(bundles("flux-tiny", opset=23, steps=(2, 4)))
    model = onnx.load(bundle.path("backbone.onnx"), load_external_data=False)
    names = {n.name for n in model.graph.node if n.op_type == "MatMul"}
    assert len(names) == sum(n.op_type == "MatMul" for n in model.graph.node)
    single = {"attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"}
    assert {f"single_transformer_blocks.{i}.{name}" for i in range(3) for name in single} <= names
    assert {"proj_out_means", "proj_out_logweights", "proj_out_loggamma"} <= names


def test_shapes_are_constant_where_they_can_be(graph, opset):
    """With attention and norms as operators, only convolutions' reshapes have two unknown dimensions."""
    (_, part), _, model = graph
    constant = initializers(model)
    computed = [n.name for n in model.graph.node if n.op_type == "Reshape" and n.input[1] not in constant]
    assert not computed or opset == 20 or part == "vae_decoder"
    shapes = {v.name: v.type.tensor_type.shape.dim for v in [*model.graph.value_info, *model.graph.input]}
    for node in model.graph.node:
        if node.op_type == "Reshape" and node.name in computed:
            old, new = shapes[node.input[0]], shapes[node.output[0]]
            unknown = [
                i
                for i, d in enumerate(new)
                if not d.HasField("dim_value")
                and not (i < len(old) and d.dim_param and old[i].dim_param == d.dim_param)
            ]
            assert len(unknown) > 1, node.name


def test_no_trace_of_the_machine(graph):
    _, _, model = graph
    assert model.producer_name == "arcflow"
    assert not model.metadata_props
    assert not any(n.doc_string or n.metadata_props for n in model.graph.node)


def test_checker(graph):
    (_, part), bundle, _ = graph
    onnx.checker.check_model(str(bundle.path(bundle.manifest.parts[part].graph)), full_check=True)
