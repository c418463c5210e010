"""Check a float16 part for overflow on real inputs, and find the linears to keep in float32.

`arcflow verify` runs it on its cases. The graph runs in float32 without rounding and records the largest magnitude of
each value. So nothing overflows, and one run finds every value that would in float16. Two kinds of large values are
harmless: those that only saturate a Tanh, Sigmoid or Erf, and large negative ones that only a Softmax reads, because
they come from a mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from arcflow_export.emulate.blocks import BlockEngine
from arcflow_export.emulate.emulate import MOVES, load_graph
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.maths.dtypes import FLOAT16_MAX

#: Bounded functions: an infinite input gives their correct limit.
_SATURATING = {"Tanh", "Sigmoid", "Erf"}
#: Operators that a value may pass through on its way to one of them.
_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Pow", "Neg", "Cast"}
#: Operators whose output is float32 if their input is.
_PASS_ON = _ELEMENTWISE | MOVES | {"Clip", "Gelu", "Max", "Min", "Relu", "Where", *_SATURATING}


@dataclass(frozen=True)
class Reach:
    """How far a part's values reach into float16's range.

    `share` is the largest value divided by float16's largest number; above 1 it overflows. `node` is the first node
    that overflows, or the one with the largest value. `layers` are the linears to keep in float32, in graph order. The
    output of a kept linear stays in float32 until the next linear or norm, so one linear may fix many values.
    """

    share: float
    node: str
    layers: tuple[str, ...]

    def joined(self, other: Reach) -> Reach:
        """Combine two runs: the larger share, the node of the first overflow (else of the larger share), all layers."""
        leading = self if self.share > 1 or self.share >= other.share else other
        return Reach(max(self.share, other.share), leading.node, tuple(dict.fromkeys((*self.layers, *other.layers))))


@dataclass(frozen=True)
class _Watch:
    """A float16 value to watch: the name of its node, and the linears to keep in float32 if it overflows."""

    node: str
    linears: tuple[ir.Node, ...]


class OverflowCheck:
    """Runs one part of a bundle from `emulate.widened` and measures how far its float16 values reach."""

    def __init__(self, bundle: Bundle, part: str):
        """Load the part; raises `EngineError`."""
        model = load_graph(bundle, part)
        watched = _watch(model.graph)
        self._peaks = _add_peaks(model.graph, list(watched))
        self._watched = watched
        self._engine = BlockEngine(part, model, rounded=False)

    def run(self, inputs: Mapping[str, np.ndarray]) -> Reach:
        """Measure on one set of inputs; raises `EngineError`."""
        found = self._engine.run(inputs)
        # A value that is infinite even in float32 belongs to a mask.
        peaks = [float(p) if np.isfinite(p) else 0.0 for p in map(found.__getitem__, self._peaks)]
        furthest = int(np.argmax(peaks))
        values = zip(self._watched.items(), peaks, strict=True)
        over = [(value, watch) for (value, watch), peak in values if peak > FLOAT16_MAX]
        if not over:
            return Reach(peaks[furthest] / FLOAT16_MAX, list(self._watched.values())[furthest].node, ())
        layers: dict[str, None] = {}
        widened: set[ir.Value] = set()
        for value, watch in over:
            if value not in widened:
                layers |= dict.fromkeys(str(linear.name) for linear in watch.linears)
                widened.update(*map(_widened, watch.linears))
        return Reach(peaks[furthest] / FLOAT16_MAX, over[0][1].node, tuple(layers))


def _watch(graph: ir.Graph) -> dict[ir.Value, _Watch]:
    """Every computed float16 value whose overflow would change the result, in graph order."""
    left_out = _harmless(graph) | _limits(graph)
    watched = {}
    for node in graph:
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT16 and value not in left_out and _has_elements(value):
                watched[value] = _Watch(_name(node), tuple(_remedy(value)))
    return watched


def _harmless(graph: ir.Graph) -> set[ir.Value]:
    """Values that may overflow, because they only reach functions that saturate."""
    found: set[ir.Value] = set()
    outputs = set(graph.outputs)
    for node in reversed(graph):
        for value in node.outputs:
            users = [user for user, _ in value.uses()]
            if users and value not in outputs and all(_absorbs(user, found) for user in users):
                found.add(value)
    return found


def _absorbs(node: ir.Node, harmless: set[ir.Value]) -> bool:
    return node.op_type in _SATURATING or (node.op_type in _ELEMENTWISE and node.outputs[0] in harmless)


def _only_softmax(value: ir.Value) -> bool:
    users = [user for user, _ in value.uses()]
    return bool(users) and all(
        user.op_type == "Softmax" or (user.op_type == "Cast" and _only_softmax(user.outputs[0])) for user in users
    )


def _limits(graph: ir.Graph) -> set[ir.Value]:
    """Values that are selected from constants, such as the limit of a clamp at 65504; they cannot overflow."""
    found: set[ir.Value] = set()
    for node in graph:
        floats = [v for v in node.inputs if v is not None and v.dtype in (ir.DataType.FLOAT16, ir.DataType.FLOAT)]
        if node.op_type in ("Where", "Neg", "Cast") and all(v.is_initializer() or v in found for v in floats):
            found |= set(node.outputs)
    return found


def _has_elements(value: ir.Value) -> bool:
    return value.shape is None or 0 not in [d for d in value.shape if isinstance(d, int)]


def _remedy(value: ir.Value) -> list[ir.Node]:
    """The nearest linear before `value` and the linears that read it: if they are kept, `value` is in float32."""
    nodes = [value.producer()]
    for node in nodes:  # breadth first; the list grows in the loop
        if node is None or _is_linear(node):
            break
        producers = [source.producer() for source in node.inputs if source is not None]
        nodes += [producer for producer in producers if producer is not None and producer not in nodes]
    else:
        node = None
    takers = [user for user, index in value.uses() if index == 0]
    return [n for n in dict.fromkeys([node, *takers]) if n is not None and _layer(n)]


def _widened(linear: ir.Node) -> set[ir.Value]:
    """The values that are in float32 if this linear is kept."""
    found = set(linear.outputs)
    reached = list(linear.outputs)
    for value in reached:  # the list grows in the loop
        for user, _ in value.uses():
            if user.op_type in _PASS_ON and not found.issuperset(user.outputs):
                found |= set(user.outputs)
                reached += user.outputs
    return found


def _is_linear(node: ir.Node) -> bool:
    return node.op_type == "MatMul" and (weight := node.inputs[1]) is not None and weight.is_initializer()


def _layer(node: ir.Node) -> str | None:
    """The layer name of a float16 linear; None for other nodes."""
    weight = node.inputs[1] if _is_linear(node) else None
    return node.name if weight is not None and weight.dtype == ir.DataType.FLOAT16 else None


def _name(node: ir.Node) -> str:
    """A node's name for the user: the layer if it is a linear's product or bias, else its operator and name."""
    if name := _layer(node):
        return name
    inputs = [v for v in node.inputs if v is not None]
    if node.op_type == "Add" and any(v.is_initializer() for v in inputs):
        for v in inputs:
            if (producer := v.producer()) is not None and (name := _layer(producer)):
                return name
    return f"{node.op_type} {node.name}"


def _add_peaks(graph: ir.Graph, values: list[ir.Value]) -> list[str]:
    """Replace the graph's outputs by the largest magnitude of each value; returns their names.

    For a value that only a Softmax reads, it is the largest value instead.
    """
    graph.outputs.clear()
    names = []
    for i, value in enumerate(values):
        magnitude = ir.node("Identity" if _only_softmax(value) else "Abs", [value])
        peak = ir.node("ReduceMax", [magnitude.outputs[0]], attributes={"keepdims": 0})
        out = peak.outputs[0]
        out.name, out.type, out.shape = f"peak.{i}", ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
        producer = value.producer()
        assert producer is not None
        graph.insert_after(producer, [magnitude, peak])
        graph.outputs.append(out)
        names.append(f"peak.{i}")
    return names
