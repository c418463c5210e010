"""Rewrite an exported program in place so that every operator has an ONNX converter. `trace.py` calls this.

`torch.onnx.export` uses `ExportedProgram.run_decompositions` for that, which traces the whole program again and takes
longer than the first trace. Only a few operators of our parts need it, and each has a simple equivalent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch._ops import OperatorBase, OpOverload
from torch.export import ExportedProgram
from torch.fx import Node

aten = torch.ops.aten
Table = dict[OpOverload, Callable[..., Any]]


class _UnknownError(Exception):
    """Raised for an operator, or a use of one, that must be left to `run_decompositions`."""


def lower(program: ExportedProgram, table: Table) -> ExportedProgram:
    """Replace `run_decompositions(table)` for an inference program; changes the program's own graph.

    Args:
        program: the result of `torch.export.export`; its graph is changed.
        table: the operators without a converter, as `torch.onnx.export` passes them to `run_decompositions`.

    Returns:
        `program`. If it uses an operator that is not known here, the result of `run_decompositions` instead.
    """
    lowering = _Lowering(program, table)
    try:
        for node in list(program.graph.nodes):
            if isinstance(node.target, OperatorBase):
                lowering.rewrite(node)
    except _UnknownError:
        program.graph_module.recompile()
        return ExportedProgram.run_decompositions(program, table)
    program.graph.lint()
    return program


class _Lowering:
    def __init__(self, program: ExportedProgram, table: Table) -> None:
        self._program, self._graph, self._table = program, program.graph, table
        inputs = [n for n in self._graph.nodes if n.op == "placeholder"]
        self._first = inputs[-1].next
        self._inputs = {
            size.node.expr: (n, axis)
            for n in reversed(inputs)
            for axis, size in reversed(list(enumerate(n.meta["val"].shape)))
            if isinstance(size, torch.SymInt)
        }
        self._sizes: dict[Any, Node] = {}

    def rewrite(self, node: Node) -> None:
        """Rewrite one node. The program computes the same as before, also if no other node is rewritten."""
        op, value = node.target, cast(Any, node.meta.get("val"))
        source: Any = node.args[0] if node.args else None
        if op is aten._assert_tensor_metadata.default:
            self._graph.erase_node(node)
        elif _is_identity(node):
            node.replace_all_uses_with(source)
            self._program.graph_signature.replace_all_uses(node.name, source.name)
            self._graph.erase_node(node)
        elif op is aten.to.dtype:
            _become(node, aten._to_copy.default, source, dtype=value.dtype)
        elif op is aten.add_.Tensor and _owns(node, source):
            _become(node, aten.add.Tensor, *node.args, **node.kwargs)
        elif op is aten.min.other:
            _become(node, aten.minimum.default, *node.args)
        elif op is aten.chunk.default and isinstance(size := value[0].shape[_axis(node, 2, 0)], int):
            _become(node, aten.split.Tensor, source, size, _axis(node, 2, 0))
        elif op is aten.unflatten.int:
            axis = _axis(node, 1, 0)
            self._reshape(node, axis, axis, node.args[2])
        elif op is aten.flatten.using_ints:
            self._reshape(node, _axis(node, 1, 0), _axis(node, 2, -1), [-1])
        elif op is not aten.reshape.default and (op in self._table or not _is_kept(op)):
            raise _UnknownError

    def _reshape(self, node: Node, first: int, last: int, sizes: Any) -> None:
        """Turn `node` into a reshape that replaces the input's axes `first` to `last` by `sizes`."""
        source = cast(Node, node.args[0])
        shape = source.meta["val"].shape
        kept = [self._size(node, i) if not first <= i <= last else None for i in range(len(shape))]
        _become(node, aten.reshape.default, source, [*kept[:first], *sizes, *kept[last + 1 :]])

    def _size(self, node: Node, axis: int) -> int | Node:
        """The size of an axis of a node's input: an int, or a `sym_size` node, on a graph input where possible."""
        source = cast(Node, node.args[0])
        size = source.meta["val"].shape[axis]
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression in self._inputs:
            if expression not in self._sizes:
                with self._graph.inserting_before(self._first):
                    self._sizes[expression] = self._sym_size(*self._inputs[expression])
            return self._sizes[expression]
        with self._graph.inserting_before(node):
            return self._sym_size(source, axis)

    def _sym_size(self, source: Node, axis: int) -> Node:
        size = self._graph.call_function(aten.sym_size.int, (source, axis))
        size.meta["val"] = source.meta["val"].shape[axis]
        return size


def _become(node: Node, op: OpOverload, *args: Any, **kwargs: Any) -> None:
    node.target, node.args, node.kwargs = op, args, kwargs


def _is_identity(node: Node) -> bool:
    """True if the node only returns or copies its input."""
    source: Any = node.args[0] if node.args else None
    if node.target is aten.dropout.default:
        return node.args[2] is False
    if node.target is aten.to.dtype:
        return bool(source.meta["val"].dtype == node.meta["val"].dtype)
    if node.target is aten.reshape.default:
        return _shape(source) == _shape(node)
    return node.target is aten.contiguous.default


def _shape(node: Node) -> list[Any]:
    """A tensor's sizes, with expressions for symbolic ones: comparing those adds no guard to the program."""
    return [size.node.expr if isinstance(size, torch.SymInt) else size for size in node.meta["val"].shape]


def _axis(node: Node, argument: int, default: int) -> int:
    axis = cast(int, node.args[argument]) if len(node.args) > argument else default
    return axis % cast(Node, node.args[0]).meta["val"].dim()


def _owns(node: Node, source: Node) -> bool:
    """True if `source` is newly allocated and only `node` reads it, so that an in-place operator may be replaced."""
    return (
        set(source.users) == {node}
        and isinstance(source.target, OpOverload)
        and torch.Tag.pointwise in source.target.tags
        and not _aliases(source.target)
    )


def _is_kept(op: Any) -> bool:
    """True if `run_decompositions` keeps this operator when its table does not name it."""
    return isinstance(op, OpOverload) and not op._schema.is_mutable and not (op._can_decompose() and _aliases(op))


def _aliases(op: OpOverload) -> bool:
    return torch.Tag.maybe_aliasing_or_mutating in op.tags or any(a.alias_info for a in op._schema.arguments)
