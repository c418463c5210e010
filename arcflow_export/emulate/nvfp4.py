"""Compute NVFP4 linears with standard operators: a graph with FP4 nodes -> one that ONNX Runtime runs on a CPU.

ONNX Runtime has no FP4 on a CPU. Weights are expanded to float32 when they are read. An input is rounded as
`TRT_FP4DynamicQuantize` rounds it: the block scale is max |x| / (6 * s) in E4M3, at most 448, and x / (block scale * s)
becomes an E2M1 number between -6 and 6. Both are rounded from float32 to nearest even. A block whose scale is rounded
to 0 becomes 0.

Dequantised values are not rounded to the graph's precision, as in `emulate.py`: an engine multiplies the FP4 numbers
themselves and applies the scales to the float32 sum.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from arcflow_export.emulate.emulate import release
from arcflow_export.graph.nvfp4 import DYNAMIC_QUANTIZE
from arcflow_runtime.maths.dtypes import E2M1_MAX, E4M3_MAX, NVFP4_BLOCK

#: The least divisor, so that a block of zeros is not divided by 0: the smallest normal float32.
_TINY = float(np.finfo(np.float32).tiny)
_FLOAT = ir.DataType.FLOAT


def lower_nvfp4(model: ir.Model) -> ir.Model:
    """Replace the FP4 nodes of a graph by standard ones, in place; a graph without FP4 stays as it is."""
    nodes = list(model.graph)
    for node in nodes:
        if node.op_type == DYNAMIC_QUANTIZE:
            _quantize(model.graph, node)
    for node in nodes:
        if node.op_type == "DequantizeLinear" and "block_size" in node.attributes:
            _dequantize(model.graph, node)
    return model


class _Lowering:
    """Collects the nodes that replace one node."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node = graph, node
        self._nodes: list[ir.Node] = []

    def __call__(self, op: str, *inputs: ir.Value | float | tuple[int, ...], **attributes: int) -> ir.Value:
        """Add a node; numbers become float32 constants, tuples int64 ones. Its output is float32."""
        given = [v if isinstance(v, ir.Value) else self._constant(v) for v in inputs]
        node = ir.node(op, given, attributes=attributes or None)
        node.outputs[0].dtype = _FLOAT
        self._nodes.append(node)
        return node.outputs[0]

    def replace(self, *outputs: ir.Value) -> None:
        """Insert the nodes, give their outputs to the readers of the replaced node's, and remove that node."""
        self._graph.insert_before(self._node, self._nodes)
        for old, new in zip(self._node.outputs, outputs, strict=True):
            new.shape = old.shape
            # The cast to the linear's precision is left out, because the value must not be rounded.
            for reader, _ in list(old.uses()):
                if reader.op_type == "Cast":
                    reader.outputs[0].replace_all_uses_with(new)
                    self._graph.remove(reader, safe=True)
            old.replace_all_uses_with(new)
        self._graph.remove(self._node, safe=True)

    def _constant(self, value: float | tuple[int, ...]) -> ir.Value:
        array = np.array(value, np.int64 if isinstance(value, tuple) else np.float32)
        node = ir.node("Constant", [], attributes={"value": ir.tensor(array)})
        node.outputs[0].type = ir.TensorType(_FLOAT if array.dtype == np.float32 else ir.DataType.INT64)
        self._nodes.append(node)
        return node.outputs[0]


def _quantize(graph: ir.Graph, node: ir.Node) -> None:
    """Lower a TRT_FP4DynamicQuantize node to E2M1 numbers [..., in] in float32 and block scales [..., in / 16] in E4M3."""
    add, (source, scale) = _Lowering(graph, node), node.inputs
    assert source is not None and scale is not None and source.shape is not None
    leading = (0,) * (len(source.shape) - 1)  # for Reshape, 0 keeps an axis
    blocks = add("Reshape", add("Cast", source, to=_FLOAT), (*leading, -1, NVFP4_BLOCK))
    largest = add("ReduceMax", add("Abs", blocks), (-1,), keepdims=0)
    ratio = add("Min", add("Div", largest, add("Mul", scale, E2M1_MAX)), E4M3_MAX)
    block_scales = add("Cast", ratio, to=ir.DataType.FLOAT8E4M3FN)
    block_scales.dtype = ir.DataType.FLOAT8E4M3FN
    divisor = add("Unsqueeze", add("Max", add("Mul", add("Cast", block_scales, to=_FLOAT), scale), _TINY), (-1,))
    values = add("Clip", add("Div", blocks, divisor), -E2M1_MAX, E2M1_MAX)
    # E2M1 numbers are 0.5 apart below 2, 1 apart below 4, and then 2. Round takes ties to the even multiple, which has
    # the even code.
    size = add("Abs", values)
    step = add("Where", _less(add, size, 2.0), 0.5, add("Where", _less(add, size, 4.0), 1.0, 2.0))
    numbers = add("Mul", add("Round", add("Div", values, step)), step)
    add.replace(add("Reshape", numbers, (*leading, -1)), block_scales)


def _less(add: _Lowering, value: ir.Value, limit: float) -> ir.Value:
    result = add("Less", value, limit)
    result.dtype = ir.DataType.BOOL
    return result


def _dequantize(graph: ir.Graph, node: ir.Node) -> None:
    """Lower a DequantizeLinear of E2M1 numbers by float32 scales, one for each block along its axis."""
    add, (numbers, scales) = _Lowering(graph, node), node.inputs[:2]
    assert numbers is not None and scales is not None and numbers.shape is not None
    if numbers.is_initializer():
        assert numbers.const_value is not None
        numbers.const_value, numbers.dtype = _expanded(numbers.const_value), _FLOAT
    rank = len(numbers.shape)
    axis = node.attributes["axis"].as_int() % rank
    before, after = (0,) * axis, tuple(int(d) for d in numbers.shape[axis + 1 :])
    blocks = add("Reshape", numbers, (*before, -1, NVFP4_BLOCK, *after))
    add.replace(
        add("Reshape", add("Mul", blocks, add("Unsqueeze", scales, (axis + 1,))), (*before, -1, *after))
    )


def _expanded(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    """E2M1 numbers in float32, expanded when they are read."""

    def expand() -> ir.TensorProtocol:
        wide = tensor.numpy().astype(np.float32)
        release(tensor)
        return ir.tensor(wide, name=tensor.name)

    return ir.LazyTensor(expand, dtype=_FLOAT, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)
