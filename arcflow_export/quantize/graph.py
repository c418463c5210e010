"""Insert QuantizeLinear (Q) and DequantizeLinear (DQ) nodes around named linears of an ONNX graph.

A quantised linear is MatMul(DQ(Q(x, s_x)), DQ(w, s_w)). The activation has one scale per tensor; the weight is stored
in E4M3 with one scale per output channel. Linears that read the same tensor share one Q and DQ, so that an engine can
join them into one product, as it does for queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from arcflow_export.graph.linears import LinearNode, find_linears

#: QuantizeLinear takes its output type from the zero point. This works in opset 20, which has no attribute for it, and
#: in 23.
_ZERO_POINT = "constant.e4m3_zero_point"
#: The output axis of a weight [in, out].
_OUTPUT_AXIS = 1


def shared_inputs(linears: Iterable[LinearNode]) -> list[tuple[LinearNode, ...]]:
    """Group linears by the tensor that they read; keeps the graph's order."""
    groups: dict[ir.Value, list[LinearNode]] = {}
    for linear in linears:
        groups.setdefault(linear.input, []).append(linear)
    return [tuple(group) for group in groups.values()]


class QuantizeLinears(ir.passes.InPlacePass):
    """Put Q and DQ around the named linears; their scales become initializers without values, for `write.attach`.

    1. Requires: every name is a linear of the graph, and the graph has no Q or DQ yet.
    2. Linears that read the same tensor share one Q and DQ. These, and the scale `<name>.input_scale` [], are named
       after the first of the linears.
    3. A weight becomes E4M3 and is read through a DQ with the scale `<name>.weight_scale` [out].
    4. Scales have the dtype of the linear's arithmetic, because in a strongly typed network the output of DQ has the
       dtype of its scale.
    5. Ensures: each named linear reads two DQ, and no other node reads one.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        super().__init__()
        self._layers = tuple(layers)

    def requires(self, model: ir.Model) -> None:
        """Rule 1; raises `ir.passes.PreconditionError`."""
        if missing := sorted(set(self._layers) - find_linears(model).keys()):
            raise ir.passes.PreconditionError(f"not linears of the graph: {missing}")
        if is_quantized(model):
            raise ir.passes.PreconditionError("the graph has Q or DQ already")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rules 2 to 4."""
        found = find_linears(model)
        chosen = [linear for name, linear in found.items() if name in set(self._layers)]
        if chosen:
            zero = ir.tensor(np.zeros((), ml_dtypes.float8_e4m3fn), name=_ZERO_POINT)
            zero_point = _initializer(model.graph, _ZERO_POINT, (), ir.DataType.FLOAT8E4M3FN)
            zero_point.const_value = zero
            for group in shared_inputs(chosen):
                _quantize_input(model.graph, group, zero_point)
            for linear in chosen:
                _quantize_weight(model.graph, linear)
        return ir.passes.PassResult(model, modified=bool(chosen))

    def ensures(self, model: ir.Model) -> None:
        """Rule 5; raises `ir.passes.PostconditionError`."""
        readers = {n.name for n in model.graph if [_producer(v) for v in n.inputs].count("DequantizeLinear")}
        if readers != set(self._layers):
            raise ir.passes.PostconditionError(f"other nodes than the named read DQ: {sorted(map(str, readers))}")


def is_quantized(model: ir.Model) -> bool:
    """True if the graph has any Q or DQ node."""
    return any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph)


def _quantize_input(graph: ir.Graph, group: tuple[LinearNode, ...], zero_point: ir.Value) -> None:
    first = group[0]
    source = first.input
    scale = _initializer(graph, f"{first.name}.input_scale", (), first.dtype)
    codes = _value(f"{first.name}.input_quantized", source.shape, ir.DataType.FLOAT8E4M3FN)
    values = _value(f"{first.name}.input_dequantized", source.shape, first.dtype)
    nodes = [
        ir.node("QuantizeLinear", [source, scale, zero_point], outputs=[codes], name=f"{first.name}.input_quantize"),
        ir.node("DequantizeLinear", [codes, scale], outputs=[values], name=f"{first.name}.input_dequantize"),
    ]
    graph.insert_before(first.node, nodes)
    for linear in group:
        linear.node.replace_input_with(0, values)


def _quantize_weight(graph: ir.Graph, linear: LinearNode) -> None:
    weight = linear.node.inputs[1]
    assert weight is not None
    scale = _initializer(graph, f"{linear.name}.weight_scale", (linear.out_features,), linear.dtype)
    values = _value(f"{linear.name}.weight_dequantized", weight.shape, linear.dtype)
    weight.dtype, weight.const_value = ir.DataType.FLOAT8E4M3FN, None
    node = ir.node(
        "DequantizeLinear",
        [weight, scale],
        attributes={"axis": _OUTPUT_AXIS},
        outputs=[values],
        name=f"{linear.name}.weight_dequantize",
    )
    graph.insert_before(linear.node, node)
    linear.node.replace_input_with(1, values)


def _initializer(graph: ir.Graph, name: str, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
    value = _value(name, ir.Shape(shape), dtype)
    graph.initializers[name] = value
    return value


def _value(name: str, shape: ir.Shape | None, dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))


def _producer(value: ir.Value | None) -> str | None:
    node = None if value is None else value.producer()
    return None if node is None else node.op_type
