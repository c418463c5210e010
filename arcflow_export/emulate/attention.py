"""Rewrite a graph to compute attention for some rows at a time, so that the scores take little memory.

The scores of one attention are [batch, heads, tokens, tokens]: 2 GB in float32 for FLUX at 1024 px. Each row depends
on one query only. So the queries are split into pieces and the results joined, which gives the same sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt, prod

import onnx_ir as ir

from arcflow_export.emulate.sizes import Sizes, dimensions

#: Largest size of one piece's scores in float32.
SCORES_BYTES = 32 << 20
#: Operators allowed between the two matrix products and the softmax of an attention.
_BETWEEN = ("Add", "Mul", "Div", "Cast", "Where")
#: (name of an attention's output, number of pieces in which to compute it) pairs.
Rows = tuple[tuple[str, int], ...]


def plan_rows(graph: ir.Graph, sizes: Sizes) -> Rows:
    """Find the attentions that are too large for one piece, and the number of pieces for each.

    Args:
        graph: a graph with attention as one operator, or as MatMul, Softmax, MatMul.
        sizes: the size of each symbolic dimension.
    """
    found = []
    for node in graph:
        if (result := _result(node)) is None:
            continue
        dims = dimensions(result, sizes)
        rows = dims[-2]
        if None in dims[:-1] or not rows:
            continue
        pieces = -(-4 * prod(d or 1 for d in dims[:-1]) * rows // SCORES_BYTES)
        # Split makes equal pieces and a smaller last one, which is not empty if there are more than pieces**2 rows. The
        # number is halved, because a shorter text has fewer rows.
        pieces = min(pieces, isqrt(rows) // 2)
        if pieces > 1:
            found.append((str(result.name), pieces))
    return tuple(found)


def split_rows(graph: ir.Graph, plan: Rows) -> None:
    """Split the attentions that `plan` names into pieces, in place."""
    pieces = dict(plan)
    for node in list(graph):
        result = _result(node)
        if result is not None and result.name in pieces:
            _split(graph, node, result, pieces[str(result.name)])


def _result(node: ir.Node) -> ir.Value | None:
    """The output of an attention, if the node is an Attention or an attention's Softmax; else None."""
    if node.op_type == "Attention":
        causal = node.attributes.get("is_causal")
        plain = len(node.outputs) == 1 and len(node.inputs) <= 4 and (causal is None or not causal.as_int())
        return node.outputs[0] if plain else None
    if node.op_type != "Softmax":
        return None
    chain = _chain(node)
    return None if chain is None else chain[-1].outputs[0]


def _chain(softmax: ir.Node) -> list[ir.Node] | None:
    """The nodes from the query-key product to the product with the values; None if this is another softmax."""
    axis = softmax.attributes.get("axis")
    rank = None if softmax.outputs[0].shape is None else len(softmax.outputs[0].shape)
    if axis is not None and axis.as_int() not in (-1, None if rank is None else rank - 1):
        return None
    before: list[ir.Node] = [softmax]
    while before[0].op_type != "MatMul":
        producers = [v.producer() for v in before[0].inputs if v is not None]
        paths = [p for p in producers if p is not None and p.op_type in (*_BETWEEN, "MatMul") and _alone(p)]
        if len(paths) != 1:
            return None
        before.insert(0, paths[0])
    after = [softmax]
    while after[-1].op_type != "MatMul":
        if not _alone(after[-1]):
            return None
        ((user, place),) = after[-1].outputs[0].uses()
        if user.op_type not in (*_BETWEEN, "MatMul") or (user.op_type == "MatMul" and place != 0):
            return None
        after.append(user)
    products = (before[0], after[-1])
    if any(v is None or v.is_initializer() for product in products for v in product.inputs):
        return None
    return before + after[1:]


def _alone(node: ir.Node) -> bool:
    """True if exactly one node reads this node's output."""
    return len(node.outputs) == 1 and len(node.outputs[0].uses()) == 1 and not node.outputs[0].is_graph_output()


def _split(graph: ir.Graph, node: ir.Node, result: ir.Value, pieces: int) -> None:
    chain = [node] if node.op_type == "Attention" else _chain(node)
    assert chain is not None
    first, last = chain[0], chain[-1]
    queries = first.inputs[0]
    assert queries is not None
    new: list[ir.Node] = []
    cut: dict[ir.Value, Sequence[ir.Value]] = {}

    def of(value: ir.Value, i: int) -> ir.Value:
        """Piece i of a value that is split along its rows."""
        if value not in cut:
            split = ir.node("Split", [value], attributes={"axis": -2, "num_outputs": pieces}, num_outputs=pieces)
            new.append(split)
            for out in split.outputs:
                out.type = value.type
            cut[value] = split.outputs
        return cut[value][i]

    ends = []
    for i in range(pieces):
        made: dict[ir.Value, ir.Value] = {}
        for old in chain:
            beside = old.inputs[3:] if old.op_type == "Attention" else old.inputs if old.op_type in _BETWEEN else ()
            inputs: list[ir.Value | None] = []
            for value in old.inputs:
                if value in made:
                    value = made[value]
                elif value is not None and (
                    (old is first and value is queries) or (value in beside and _has_rows(value))
                ):
                    value = of(value, i)
                inputs.append(value)
            copy = ir.node(old.op_type, inputs, attributes=dict(old.attributes), domain=old.domain)
            copy.outputs[0].type = old.outputs[0].type
            made[old.outputs[0]] = copy.outputs[0]
            new.append(copy)
        ends.append(made[result])
    joined = ir.node("Concat", ends, attributes={"axis": -2})
    new.append(joined)
    _replace(graph, last, result, joined.outputs[0], new)
    graph.remove(reversed(chain), safe=True)


def _has_rows(value: ir.Value) -> bool:
    """True if a value that is combined with the scores has one row per query, such as a mask per query."""
    return value.shape is not None and len(value.shape) > 1 and value.shape[-2] != 1


def _replace(graph: ir.Graph, at: ir.Node, old: ir.Value, new: ir.Value, nodes: list[ir.Node]) -> None:
    """Insert `nodes` before `at` and replace all uses of `old` by `new`."""
    graph.insert_before(at, nodes)
    new.type, new.shape, name = old.type, old.shape, old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name, new.name = f"{name}.whole", name
