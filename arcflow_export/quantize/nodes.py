"""Make initializers and values for the nodes of a quantised linear."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

#: Dtype of a linear's arithmetic in the graph -> torch's.
TORCH_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT16: torch.float16,
}


def add_initializer(graph: ir.Graph, name: str, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
    """Add an initializer without a value, which `write.attach` points into the weights file."""
    value = make_value(name, ir.Shape(shape), dtype)
    graph.initializers[name] = value
    return value


def add_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Add a small initializer with its value, which is stored in the graph; several calls share one."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(array, name=name)
    value = add_initializer(graph, name, array.shape, tensor.dtype)
    value.const_value = tensor
    return value


def make_value(name: str, shape: ir.Shape | None, dtype: ir.DataType) -> ir.Value:
    """A value for the output of a new node."""
    return ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
