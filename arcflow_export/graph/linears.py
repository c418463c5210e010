"""Find the linears of an exported ONNX graph: a model -> its MatMul nodes by a weight, by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

_ARITHMETIC = (ir.DataType.FLOAT, ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class LinearNode:
    """One linear of a graph: `node` multiplies by the weight `<name>.weight` [in_features, out_features]."""

    name: str
    node: ir.Node
    in_features: int
    out_features: int

    @property
    def parameters(self) -> int:
        """Elements of the weight."""
        return self.in_features * self.out_features

    @property
    def input(self) -> ir.Value:
        """The activation [..., in_features]."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def dtype(self) -> ir.DataType:
        """The dtype of the linear's arithmetic and of its scales."""
        assert self.input.dtype in _ARITHMETIC
        return self.input.dtype


def find_linears(model: ir.Model) -> dict[str, LinearNode]:
    """The linears of a graph by name, in graph order: each MatMul that the exporter named after its weight's module."""
    found = {}
    for node in model.graph:
        if node.op_type != "MatMul" or node.name is None or node.inputs[1] is None:
            continue
        weight = node.inputs[1]
        if weight.name == f"{node.name}.weight" and weight.is_initializer() and weight.shape is not None:
            rows, columns = weight.shape.numpy()
            found[node.name] = LinearNode(node.name, node, rows, columns)
    return found


def shared_inputs(linears: Iterable[LinearNode]) -> list[tuple[LinearNode, ...]]:
    """Group linears by the tensor that they read; keeps the graph's order."""
    groups: dict[ir.Value, list[LinearNode]] = {}
    for linear in linears:
        groups.setdefault(linear.input, []).append(linear)
    return [tuple(group) for group in groups.values()]
