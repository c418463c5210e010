"""Find the linears of a part's graph, quantised or not, and undo the quantisation of some of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from arcflow_export.graph.nvfp4 import DYNAMIC_QUANTIZE
from arcflow_runtime.maths.dtypes import E2M1_MAX

#: Nodes allowed between a weight and its MatMul, and between an activation's QuantizeLinear and the MatMul.
_WEIGHT_CHAIN = ("DequantizeLinear", "Cast", "Transpose", "Reshape", "Identity")
_ACTIVATION_CHAIN = ("DequantizeLinear", "Cast", "Identity")


@dataclass(frozen=True)
class GraphLinear:
    """One product with a weight, MatMul or MatMulInteger.

    `source` is its activation before quantisation, `output` its result after dequantisation, and `weight` the
    initializer. `scale` is the activation's scale and `scale_name` the name of the scale's tensor, which several
    linears may share; both are None if the activation has no constant scale. `quantized` is True if the weight or the
    activation is quantised.
    """

    name: str
    node: ir.Node
    source: ir.Value
    output: ir.Value
    weight: ir.Value
    scale: float | None
    scale_name: str | None
    quantized: bool


def linears(model: ir.Model) -> dict[str, GraphLinear]:
    """The graph's linears by name, in graph order; the name is the weight's without `.weight`."""
    found = {}
    for node in model.graph:
        if node.op_type not in ("MatMul", "MatMulInteger"):
            continue
        linear = _linear(node) if node.op_type == "MatMul" else _integer_linear(node)
        if linear is not None:
            found[linear.name] = linear
    return found


def quantized_layers(model: ir.Model) -> list[str]:
    """Names of the quantised linears."""
    return [name for name, linear in linears(model).items() if linear.quantized]


def block_of(layer: str) -> str:
    """The block of a layer, such as `transformer_blocks.0`, or the layer's own name if it is not in a block."""
    match = re.match(r"(?:[^.]+\.)+?\d+(?=\.)", layer)
    return match[0] if match else layer


def leave_out(model: ir.Model, layers: Collection[str], weights: Mapping[str, GraphLinear]) -> ir.Model:
    """Undo the quantisation of some linears in place: use the unquantised activation and the reference's weight.

    Args:
        model: the quantised graph.
        layers: names of the linears to undo.
        weights: the reference's linears, for their weights, which are rounded to the precision of the MatMul.

    Returns:
        The same model.
    """
    graph = model.graph
    for name, linear in linears(model).items():
        if name not in layers:
            continue
        node = linear.node
        dtype = linear.output.dtype or ir.DataType.FLOAT
        activation = linear.source
        if activation.dtype is not None and activation.dtype != dtype:
            cast = ir.node("Cast", [activation], attributes={"to": dtype})
            cast.outputs[0].dtype = dtype
            graph.insert_before(node, cast)
            activation = cast.outputs[0]
        constant = weights[name].weight.const_value
        assert constant is not None
        weight = add_initializer(graph, f"{name}.weight.unquantized", _cast_later(constant, dtype))
        if node.op_type == "MatMul":
            node.replace_input_with(0, activation)
            node.replace_input_with(1, weight)
        else:
            last = linear.output.producer()
            assert last is not None and not linear.output.is_graph_output(), "heads are not quantised"
            product = ir.node("MatMul", [activation, weight])
            product.outputs[0].type, product.outputs[0].shape = linear.output.type, linear.output.shape
            graph.insert_before(last, product)
            linear.output.replace_all_uses_with(product.outputs[0])
    common.RemoveUnusedNodesPass()(model)
    return model


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Add a constant to the graph."""
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.initializers[name] = value
    return value


def _cast_later(tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.LazyTensor:
    """The tensor in another dtype; it is read and cast only when its values are needed."""
    shape = ir.Shape(tensor.shape.numpy())
    return ir.LazyTensor(lambda: ir.tensor(tensor.numpy().astype(dtype.numpy())), dtype=dtype, shape=shape)


def _linear(node: ir.Node) -> GraphLinear | None:
    weight, dequantized = node.inputs[1], False
    while weight is not None and (producer := weight.producer()) is not None and producer.op_type in _WEIGHT_CHAIN:
        dequantized |= producer.op_type == "DequantizeLinear"
        weight = producer.inputs[0]
    if weight is None or not weight.is_initializer() or weight.name is None or not weight.name.endswith(".weight"):
        return None
    source, scale, scale_name = node.inputs[0], None, None
    assert source is not None
    value: ir.Value | None = source
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type in ("QuantizeLinear", DYNAMIC_QUANTIZE):
            assert producer.inputs[0] is not None and producer.inputs[1] is not None
            source, scale, scale_name = producer.inputs[0], _scalar(producer.inputs[1]), producer.inputs[1].name
            if producer.op_type == DYNAMIC_QUANTIZE:
                scale *= E2M1_MAX  # the largest input is 6 times the largest block scale, 448
            break
        if producer.op_type not in _ACTIVATION_CHAIN:
            break
        value = producer.inputs[0]
    name, quantized = weight.name.removesuffix(".weight"), dequantized or scale is not None
    return GraphLinear(name, node, source, node.outputs[0], weight, scale, scale_name, quantized)


def _integer_linear(node: ir.Node) -> GraphLinear:
    """A linear in the form of rule B15: QuantizeLinear of the scaled source, the product, a cast and two scales."""
    codes, weight = node.inputs[0], node.inputs[1]
    assert codes is not None and weight is not None and weight.name is not None
    quantize = codes.producer()
    assert quantize is not None and quantize.inputs[0] is not None, "an integer product reads a QuantizeLinear"
    scaled = quantize.inputs[0].producer()
    assert scaled is not None and scaled.inputs[0] is not None, "tokens are divided by their scales"
    output = node.outputs[0]
    for _ in ("Cast", "Mul by the token's scale", "Mul by the weight's scale"):
        ((user, _index),) = output.uses()
        output = user.outputs[0]
    return GraphLinear(weight.name.removesuffix(".weight"), node, scaled.inputs[0], output, weight, None, None, True)


def _scalar(value: ir.Value) -> float:
    """The value of a constant scale; looks through casts."""
    while value.const_value is None and (producer := value.producer()) is not None:
        assert producer.inputs[0] is not None
        value = producer.inputs[0]
    assert value.const_value is not None, f"{value.name}: scales are constants"
    return float(np.asarray(value.const_value.numpy(), np.float64).max())
