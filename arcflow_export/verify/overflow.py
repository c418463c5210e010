"""A part in float16 and real inputs -> how far its values reach into float16's range, and which linears to keep wider.

The graph runs in float32 without rounding, so that nothing overflows and every place that would is found in one run;
beside each value stands its largest magnitude. Values that only saturate a Tanh, Sigmoid or Erf do no harm, nor do
negative ones that only a Softmax reads: a mask adds as low a number as there is.
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

#: Bounded functions whose limits at infinity are right.
_SATURATING = {"Tanh", "Sigmoid", "Erf"}
#: What a value may pass on its way to one of them.
_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Pow", "Neg", "Cast"}
#: What passes float32 on, beside these and what only moves values.
_PASS_ON = _ELEMENTWISE | MOVES | {"Clip", "Gelu", "Max", "Min", "Relu", "Where", *_SATURATING}


@dataclass(frozen=True)
class Reach:
    """The value of a part that reaches furthest, over float16's largest number; above 1 it overflows.

    `node` is the first that overflows, or the one that reaches furthest; `layers` are the linears to keep in float32,
    in the order of the graph. What a kept linear gives stays in float32 until the next linear or norm, so one may
    stand for many values.
    """

    share: float
    node: str
    layers: tuple[str, ...]

    def joined(self, other: Reach) -> Reach:
        """Of two runs: the further share, the first's node if it overflowed, and the layers of both."""
        leading = self if self.share > 1 or self.share >= other.share else other
        return Reach(max(self.share, other.share), leading.node, tuple(dict.fromkeys((*self.layers, *other.layers))))


@dataclass(frozen=True)
class _Watch:
    """A float16 value: what gives it, and the linears to keep for it."""

    node: str
    linears: tuple[ir.Node, ...]


class OverflowCheck:
    """Runs one part of a `widened` bundle and tells how far its float16 values reach."""

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
        # Infinity in float32 is meant: a mask.
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
    """Every float16 value that a node computes and whose overflow would do harm, in the order of the graph."""
    left_out = _harmless(graph) | _limits(graph)
    watched = {}
    for node in graph:
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT16 and value not in left_out and _has_elements(value):
                watched[value] = _Watch(_name(node), tuple(_remedy(value)))
    return watched


def _harmless(graph: ir.Graph) -> set[ir.Value]:
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
    """Values chosen among constants: the limits of a clamp, such as 65504 itself."""
    found: set[ir.Value] = set()
    for node in graph:
        floats = [v for v in node.inputs if v is not None and v.dtype in (ir.DataType.FLOAT16, ir.DataType.FLOAT)]
        if node.op_type in ("Where", "Neg", "Cast") and all(v.is_initializer() or v in found for v in floats):
            found |= set(node.outputs)
    return found


def _has_elements(value: ir.Value) -> bool:
    return value.shape is None or 0 not in [d for d in value.shape if isinstance(d, int)]


def _remedy(value: ir.Value) -> list[ir.Node]:
    """The nearest linear that `value` comes from, and those that take it: with them kept it is float32 throughout."""
    nodes = [value.producer()]
    for node in nodes:  # breadth first; it grows
        if node is None or _is_linear(node):
            break
        producers = [source.producer() for source in node.inputs if source is not None]
        nodes += [producer for producer in producers if producer is not None and producer not in nodes]
    else:
        node = None
    takers = [user for user, index in value.uses() if index == 0]
    return [n for n in dict.fromkeys([node, *takers]) if n is not None and _layer(n)]


def _widened(linear: ir.Node) -> set[ir.Value]:
    """The values that are float32 if this linear is kept."""
    found = set(linear.outputs)
    reached = list(linear.outputs)
    for value in reached:  # it grows
        for user, _ in value.uses():
            if user.op_type in _PASS_ON and not found.issuperset(user.outputs):
                found |= set(user.outputs)
                reached += user.outputs
    return found


def _is_linear(node: ir.Node) -> bool:
    return node.op_type == "MatMul" and (weight := node.inputs[1]) is not None and weight.is_initializer()


def _layer(node: ir.Node) -> str | None:
    """The layer name of a linear in float16."""
    weight = node.inputs[1] if _is_linear(node) else None
    return node.name if weight is not None and weight.dtype == ir.DataType.FLOAT16 else None


def _name(node: ir.Node) -> str:
    """The layer of a linear's product or bias, or what the node does and its name."""
    if name := _layer(node):
        return name
    inputs = [v for v in node.inputs if v is not None]
    if node.op_type == "Add" and any(v.is_initializer() for v in inputs):
        for v in inputs:
            if (producer := v.producer()) is not None and (name := _layer(producer)):
                return name
    return f"{node.op_type} {node.name}"


def _add_peaks(graph: ir.Graph, values: list[ir.Value]) -> list[str]:
    """Give the graph the largest magnitude of each value as its outputs, and only those.

    Of what only a Softmax reads it is the largest value.
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
