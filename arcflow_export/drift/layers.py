"""Measure each quantised linear by itself, on the reference's inputs: its output error, and how its scale fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from arcflow_export.drift.graphs import GraphLinear, add_initializer, linears
from arcflow_export.drift.measures import root_ratio
from arcflow_export.emulate.blocks import BlockEngine
from arcflow_export.emulate.emulate import load_graph
from arcflow_export.formats.thresholds import Thresholds, times
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.maths.dtypes import E4M3_MAX

#: A scale is too small if the largest input exceeds its range this many times. Percentile and MSE calibration clip
#: outliers, but never that much.
TOO_SMALL = 2.0
#: An input counts as clipped if its largest value exceeds the scale's range by more than this factor. The margin of 1 %
#: allows for the rounding of scales.
_CLIPPED = 1.01
#: A scale is called too large if its range exceeds the largest input this many times.
TOO_LARGE = 4.0


@dataclass(frozen=True)
class LayerDrift:
    """The drift of one quantised linear, with one value per step (a text encoder has one step).

    `errors`: relative RMS error of its output, given the reference's input; mean over prompts. `reach`: the largest
    |input| of all prompts divided by the largest number that the activation's scale can represent. Above 1 the input is
    clipped; far below 1 the scale is too large. `scale`: the layer that the scale `<layer>.input_scale` is named after;
    linears with the same input share it. `reach` and `scale` are None if the activation is not quantised.
    """

    part: str
    layer: str
    errors: tuple[float, ...]
    reach: tuple[float, ...] | None
    scale: str | None = None

    @property
    def error(self) -> float:
        """The error of the worst step."""
        return max(self.errors)

    @property
    def headroom(self) -> float | None:
        """The scale's range divided by the largest input of any step; None if every input was 0."""
        return 1 / max(self.reach) if self.reach is not None and max(self.reach) > 0 else None

    def badness(self, limits: Thresholds) -> float:
        """The factor by which its error or its scale exceeds a limit; at most 1 if none is exceeded."""
        return max(times(self.error, limits.layers), times(self.headroom or 0.0, limits.headroom))

    def scale_at_fault(self, limits: Thresholds) -> bool:
        """True if the input scale is wrong, rather than the weight's scale."""
        return self.reach is not None and (
            max(self.reach) > TOO_SMALL or times(self.headroom or 0.0, limits.headroom) > 1
        )

    def reason(self) -> str:
        """A sentence on how the input scale may explain the error."""
        if self.reach is None or self.headroom is None:
            return ""
        largest = max(self.reach)
        if largest > _CLIPPED:
            what = "the scale is too small" if largest > TOO_SMALL else "it is clipped"
            return f"its largest input is {largest:.3g} times what its input scale can hold: {what}"
        if largest < 1 / TOO_LARGE:
            return f"its input scale can hold {self.headroom:.3g} times its largest input: the scale is too large"
        return f"its largest input is {largest:.3g} of what its input scale can hold: look at the weight's scale"


@dataclass
class LayerErrors:
    """Measurements of a part's quantised linears, by name and step: the relative RMS error of the output for each of n
    inputs, [n], and the largest |input| of all.
    """

    errors: dict[str, list[np.ndarray]]
    largest: dict[str, list[float]]

    def extend(self, more: LayerErrors) -> None:
        """Add the measurements on more inputs."""
        for name, steps in self.errors.items():
            steps[:] = [np.concatenate(pair) for pair in zip(steps, more.errors[name], strict=True)]
            largest = self.largest[name]
            largest[:] = [max(pair) for pair in zip(largest, more.largest[name], strict=True)]


def measure_layers(
    reference: Bundle,
    candidate: Bundle,
    part: str,
    inputs: Sequence[Sequence[Mapping[str, np.ndarray]]],
    progress: Callable[[], None] = lambda: None,
) -> LayerErrors:
    """Measure every quantised linear of a part on the reference's inputs, one linear after the other.

    Args:
        reference: the unquantised bundle.
        candidate: the quantised bundle.
        part: name of the part.
        inputs: for each step, the part's inputs in the reference's run, batch by batch.
        progress: called after each batch.
    """
    theirs = linears(load_graph(candidate, part))
    layers = [name for name, linear in theirs.items() if linear.quantized]
    model = load_graph(reference, part)
    _probe(model, theirs, layers)
    result = LayerErrors({name: [] for name in layers}, {name: [] for name in layers})
    with closing(BlockEngine(part, model)) as engine:
        for step in inputs:
            found: dict[str, list[np.ndarray]] = {f"{name}:{i}": [] for name in layers for i in range(3)}
            for outputs in engine.run_all(step):
                for name, array in outputs.items():
                    found[name].append(array)
                progress()
            for name in layers:
                error, energy, largest = (np.concatenate(found[f"{name}:{i}"]) for i in range(3))
                result.errors[name].append(root_ratio(error, energy))
                result.largest[name].append(float(largest.max()))
    return result


def drift_of_layers(candidate: Bundle, part: str, found: LayerErrors) -> list[LayerDrift]:
    """The drift of a part's quantised linears, in the graph's order."""
    theirs = linears(load_graph(candidate, part))
    return [
        LayerDrift(
            part,
            name,
            tuple(float(step.mean()) for step in errors),
            _reach(found.largest[name], theirs[name].scale),
            _owner(theirs[name]),
        )
        for name, errors in found.errors.items()
    ]


def _reach(largest: list[float], scale: float | None) -> tuple[float, ...] | None:
    if scale is None:
        return None
    return tuple(x / (E4M3_MAX * scale) if scale > 0 else float("inf") for x in largest)


def _owner(linear: GraphLinear) -> str | None:
    return None if linear.scale_name is None else linear.scale_name.removesuffix(".input_scale")


def _probe(model: ir.Model, candidate: Mapping[str, GraphLinear], layers: list[str]) -> None:
    """Replace the outputs of the reference's graph: for each quantised linear and image, give the sum of the squared
    error, the sum of the squared output, and the largest |input|.

    The candidate's linear is copied into the graph and reads the reference's activation. Its nodes directly follow the
    reference's linear, so that no values of one linear are kept while the next one runs.
    """
    graph, own = model.graph, linears(model)
    graph.outputs.clear()
    known: dict[ir.Value, ir.Value] = {}
    axes = add_initializer(graph, "drift.axes", ir.tensor(np.array([1], np.int64)))
    for name in layers:
        theirs, ours = candidate[name], own[name]
        graft = _Graft(graph, known)
        if theirs.source not in known:
            known[theirs.source] = graft.cast(ours.source, theirs.source.dtype)
        output = graft.cast(graft.copy(theirs.output), ir.DataType.FLOAT)
        reference = graft.cast(ours.output, ir.DataType.FLOAT)
        difference = graft.node("Sub", [output, reference])
        for i, value in enumerate((difference, reference)):
            square = graft.node("Flatten", [graft.node("Mul", [value, value])])
            _output(graph, f"{name}:{i}", graft.node("ReduceSum", [square, axes], keepdims=0))
        size = graft.node("Flatten", [graft.node("Abs", [graft.cast(ours.source, ir.DataType.FLOAT)])])
        _output(graph, f"{name}:2", graft.node("ReduceMax", [size, axes], keepdims=0))
        graph.insert_after(ours.node, graft.nodes)
    graph.sort()


class _Graft:
    """Collects nodes to insert at one place of a graph; `known` maps the other graph's values to this graph's."""

    def __init__(self, graph: ir.Graph, known: dict[ir.Value, ir.Value]) -> None:
        self._graph, self._known = graph, known
        self.nodes: list[ir.Node] = []

    def copy(self, value: ir.Value) -> ir.Value:
        """Copy the nodes that compute `value` in the other graph, back to values that are known here."""
        if value in self._known:
            return self._known[value]
        if value.is_initializer():
            assert value.const_value is not None
            copy = add_initializer(self._graph, f"candidate.{value.name}", value.const_value)
        else:
            node = value.producer()
            assert node is not None
            inputs = [None if v is None else self.copy(v) for v in node.inputs]
            new = ir.node(
                node.op_type,
                inputs,
                attributes={k: a.value for k, a in node.attributes.items()},
                domain=node.domain,
                num_outputs=len(node.outputs),
            )
            self.nodes.append(new)
            for old, made in zip(node.outputs, new.outputs, strict=True):
                made.type, made.shape = old.type, old.shape
                self._known[old] = made
            return self._known[value]
        self._known[value] = copy
        return copy

    def cast(self, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
        """The value cast to `dtype`, or the value itself if it has that dtype."""
        if dtype is None or value.dtype == dtype:
            return value
        cast = self.node("Cast", [value], to=dtype)
        cast.dtype = dtype
        return cast

    def node(self, op: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        """Add a node and return its output, in float32."""
        node = ir.node(op, inputs, attributes=attributes or None)
        self.nodes.append(node)
        node.outputs[0].dtype = ir.DataType.FLOAT
        return node.outputs[0]


def _output(graph: ir.Graph, name: str, value: ir.Value) -> None:
    value.name, value.shape = name, ir.Shape(["B"])
    graph.outputs.append(value)
