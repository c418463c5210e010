"""Store weights in fewer bits that no integer product multiplies: token embeddings in int8, other weights in float16.

The graph widens them before they are used, so its arithmetic stays as it was. A token embedding in int8 has one scale
per token:

    y = Cast(Gather(codes, ids)) * Gather(scale, ids)

so only the rows that a prompt needs are widened. A weight in float16 is followed by a Cast, which engines do once, as
they load the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch

from arcflow_export.errors import QuantizeError
from arcflow_export.formats.policy import Storage
from arcflow_export.quantize.format import StoredTensor
from arcflow_export.quantize.int8 import encode, make_scale
from arcflow_export.quantize.nodes import add_initializer, make_value
from arcflow_runtime.maths.dtypes import FLOAT16_MAX

_SUFFIX = ".weight"


@dataclass(frozen=True)
class PlainWeight:
    """A weight `<name>.weight` of a graph that is not quantised, with two dimensions or more.

    `embedding` is True for a token embedding: a table whose rows are looked up by an input of the graph.
    """

    name: str
    value: ir.Value
    embedding: bool

    @property
    def elements(self) -> int:
        """Number of elements."""
        assert self.value.shape is not None
        return int(torch.Size(self.value.shape.numpy()).numel())


def find_weights(model: ir.Model) -> dict[str, PlainWeight]:
    """The weights of a graph by name, in the graph's order: initializers `<name>.weight` of two dimensions or more."""
    found = {}
    for key, value in model.graph.initializers.items():
        if key.endswith(_SUFFIX) and value.shape is not None and len(value.shape) > 1:
            name = key.removesuffix(_SUFFIX)
            readers = [node for node, _ in value.uses()]
            embedding = len(value.shape) == 2 and bool(readers) and all(_looks_up(node, value) for node in readers)
            found[name] = PlainWeight(name, value, embedding)
    return found


def tensors(weight: PlainWeight, storage: Storage, amax: torch.Tensor | None) -> tuple[StoredTensor, ...]:
    """The tensors that replace `<name>.weight`; the first of them has that name.

    Args:
        weight: the weight.
        storage: how to store it.
        amax: for int8, the largest absolute value of each row, [rows] float32.
    """
    assert weight.value.shape is not None
    shape, key = tuple(weight.value.shape.numpy()), f"{weight.name}{_SUFFIX}"
    if storage == "float16":
        return (StoredTensor(key, shape, torch.float16, encode=lambda blocks: _halve(key, blocks)),)
    assert amax is not None
    scale = make_scale(amax)[:, None]

    def codes(blocks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        start = 0
        for block in blocks:
            yield encode(block, scale[start : start + len(block)])
            start += len(block)

    return (
        StoredTensor(key, shape, torch.int8, encode=codes),
        StoredTensor(f"{key}_scale", tuple(scale.shape), torch.float32, scale),
    )


def insert(graph: ir.Graph, stored: Mapping[str, Storage], weights: Mapping[str, PlainWeight]) -> None:
    """Widen the stored weights where they are read; they become initializers without values.

    Args:
        graph: the graph that `weights` were found in.
        stored: how to store each weight, by name.
        weights: from `find_weights`.
    """
    for name, storage in stored.items():
        value = weights[name].value
        assert value.dtype is not None
        dtype, value.const_value = value.dtype, None
        if storage == "int8":
            scale = add_initializer(graph, f"{name}{_SUFFIX}_scale", (_rows(value), 1), ir.DataType.FLOAT)
            value.dtype = ir.DataType.INT8
            for reader in list(value.consumers()):
                _look_up(graph, reader, scale, dtype)
        elif dtype == ir.DataType.FLOAT:
            wide = make_value(f"{name}{_SUFFIX}_float32", value.shape, dtype)
            value.replace_all_uses_with(wide)
            value.dtype = ir.DataType.FLOAT16
            cast = ir.node("Cast", [value], attributes={"to": dtype}, outputs=[wide], name=f"{name}{_SUFFIX}_cast")
            graph.insert_before(graph[0], cast)


def narrowed(stored: Mapping[str, Storage], weights: Mapping[str, PlainWeight]) -> dict[str, Storage]:
    """Those of the weights that change: one of 16 bits stays as it is in place of float16."""
    return {
        name: storage
        for name, storage in stored.items()
        if storage == "int8" or weights[name].value.dtype == ir.DataType.FLOAT
    }


def row_layers(stored: Mapping[str, Storage]) -> Iterable[str]:
    """Names of the weights whose rows have scales."""
    return [name for name, storage in stored.items() if storage == "int8"]


def _look_up(graph: ir.Graph, gather: ir.Node, scale: ir.Value, dtype: ir.DataType) -> None:
    """Widen the rows that a Gather of codes gives; what read them reads the widened rows."""
    rows, ids, name = gather.outputs[0], gather.inputs[1], str(gather.name)
    assert ids is not None
    shape = rows.shape
    factor = make_value(f"{name}.row_scale", None if shape is None else ir.Shape([*shape[:-1], 1]), ir.DataType.FLOAT)
    wide = make_value(f"{name}.rows_float", shape, ir.DataType.FLOAT)
    product = make_value(f"{name}.rows", shape, ir.DataType.FLOAT)
    nodes = [
        ir.node("Gather", [scale, ids], attributes={"axis": 0}, outputs=[factor], name=f"{name}.row_scale_gather"),
        ir.node("Cast", [rows], attributes={"to": ir.DataType.FLOAT}, outputs=[wide], name=f"{name}.rows_cast"),
        ir.node("Mul", [wide, factor], outputs=[product], name=f"{name}.rows_rescale"),
    ]
    result = product
    if dtype != ir.DataType.FLOAT:
        result = make_value(f"{name}.rows_rounded", shape, dtype)
        nodes.append(
            ir.node("Cast", [product], attributes={"to": dtype}, outputs=[result], name=f"{name}.rows_rounded_cast")
        )
    for i, out in enumerate(graph.outputs):
        if out is rows:
            rows.name, result.name, graph.outputs[i] = f"{name}.row_codes", rows.name, result
    rows.replace_all_uses_with(result)
    nodes[1].replace_input_with(0, rows)
    rows.dtype = ir.DataType.INT8
    graph.insert_after(gather, nodes)


def _halve(key: str, blocks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    for block in blocks:
        half = block.to(torch.float16)
        if not torch.isfinite(half).all():
            raise QuantizeError(
                f"tensor {key!r} has the value {block.abs().max().item():.6g}, beyond float16's {FLOAT16_MAX:g}; leave "
                "it out of the policy's stored.float16"
            )
        yield half


def _rows(value: ir.Value) -> int:
    assert value.shape is not None
    return int(value.shape.numpy()[0])


def _looks_up(node: ir.Node, table: ir.Value) -> bool:
    """True if the node looks up rows of `table` by an input of the graph."""
    if node.op_type != "Gather" or node.inputs[0] is not table or node.inputs[1] is None:
        return False
    axis = node.attributes.get("axis")
    return node.inputs[1].is_graph_input() and (axis is None or axis.as_int() == 0)
