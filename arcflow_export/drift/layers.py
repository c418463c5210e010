"""Each quantised linear by itself: the reference's inputs -> the error of its output, and its scale's reach."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from arcflow_runtime.bundle import Bundle, TensorSpec

from ..emulate import load_graph
from .graphs import E4M3_MAX, Linear, add_initializer, linears, opened, quantized_layers
from .measures import root_ratio
from .thresholds import Thresholds, times

#: An input beyond this many times a scale's range: percentiles and MSE clip outliers, but not most of a range.
TOO_SMALL = 2.0
#: Above this the largest input is clipped; scales are rounded.
_CLIPPED = 1.01
#: A scale beyond this many times its largest input is said to be too large.
TOO_LARGE = 4.0


@dataclass(frozen=True)
class LayerDrift:
    """One quantised linear, by step; text encoders have one.

    `errors`: RMS of the difference of its output over RMS of the reference's, both given the reference's input, mean
    over prompts. `reach`: the largest |input| of all prompts over the largest number that the activation's scale can
    hold: above 1 it is clipped, far below 1 the scale is too large. `scale`: whose `<layer>.input_scale` it is; linears
    with one input share it. Both None where the activation is not quantised.
    """

    part: str
    layer: str
    errors: tuple[float, ...]
    reach: tuple[float, ...] | None
    scale: str | None = None

    @property
    def error(self) -> float:
        """Of the worst step."""
        return max(self.errors)

    @property
    def headroom(self) -> float | None:
        """How many times the largest input of any step the scale reaches; None where every input was 0."""
        return 1 / max(self.reach) if self.reach is not None and max(self.reach) > 0 else None

    def badness(self, limits: Thresholds) -> float:
        """Above 1: its error or its scale is past the limits, by that factor."""
        return max(times(self.error, limits.layers), times(self.headroom or 0.0, limits.headroom))

    def scale_at_fault(self, limits: Thresholds) -> bool:
        """Whether the input scale, rather than the weight's, is what is wrong."""
        return self.reach is not None and (
            max(self.reach) > TOO_SMALL or times(self.headroom or 0.0, limits.headroom) > 1
        )

    def reason(self) -> str:
        """What its scale says about its error."""
        if self.reach is None or self.headroom is None:
            return ""
        largest = max(self.reach)
        if largest > _CLIPPED:
            what = "the scale is too small" if largest > TOO_SMALL else "it is clipped"
            return f"its largest input is {largest:.3g} times what its input scale can hold: {what}"
        if largest < 1 / TOO_LARGE:
            return f"its input scale can hold {self.headroom:.3g} times its largest input: the scale is too large"
        return f"its largest input is {largest:.3g} of what its input scale can hold: look at the weight's scale"


def drift_of_layers(
    reference: Bundle,
    candidate: Bundle,
    part: str,
    inputs: list[Iterable[Mapping[str, np.ndarray]]],
    progress: Callable[[], None] = lambda: None,
) -> list[LayerDrift]:
    """The local error of every quantised linear of a part, in the graph's order.

    Args:
        reference: the unquantised bundle.
        candidate: the quantised one.
        part: its name.
        inputs: for each step the part's inputs in the reference's run, batch by batch.
        progress: called after each batch.
    """
    layers = quantized_layers(load_graph(candidate, part))
    if not layers:
        return []
    model = load_graph(reference, part)
    theirs = linears(load_graph(candidate, part))
    _probe(model, theirs, layers)
    outputs = tuple(TensorSpec(f"{name}:{i}", "float32", ("B",)) for i, name in _outputs(layers))
    errors: dict[str, list[float]] = {name: [] for name in layers}
    largest: dict[str, list[float]] = {name: [] for name in layers}
    with opened(reference, part, model, outputs) as run:
        for step in inputs:
            found: dict[str, list[np.ndarray]] = {spec.name: [] for spec in outputs}
            for batch in step:
                for name, array in run(batch).items():
                    found[name].append(array)
                progress()
            for name in layers:
                error, energy, reach = (np.concatenate(found[f"{name}:{i}"]) for i in range(3))
                errors[name].append(float(root_ratio(error, energy).mean()))
                largest[name].append(float(reach.max()))
    return [
        LayerDrift(part, name, tuple(errors[name]), _reach(largest[name], theirs[name].scale), _owner(theirs[name]))
        for name in layers
    ]


def _reach(largest: list[float], scale: float | None) -> tuple[float, ...] | None:
    if scale is None:
        return None
    return tuple(x / (E4M3_MAX * scale) if scale > 0 else float("inf") for x in largest)


def _owner(linear: Linear) -> str | None:
    return None if linear.scale_name is None else linear.scale_name.removesuffix(".input_scale")


def _outputs(layers: list[str]) -> list[tuple[int, str]]:
    return [(i, name) for name in layers for i in range(3)]


def _probe(model: ir.Model, candidate: Mapping[str, Linear], layers: list[str]) -> None:
    """Give the reference's graph other outputs: per quantised linear and image the squared error, the squared output
    and the largest |input|, the candidate's linear being grafted onto the reference's activation.
    """
    graph, own = model.graph, linears(model)
    graph.outputs.clear()
    known: dict[ir.Value, ir.Value] = {}
    axes = add_initializer(graph, "drift.axes", np.array([1], np.int64))
    for name in layers:
        theirs, ours = candidate[name], own[name]
        if theirs.source not in known:
            known[theirs.source] = _cast(graph, ours.source, theirs.source.dtype)
        output = _cast(graph, _graft(graph, theirs.node.outputs[0], known), ir.DataType.FLOAT)
        reference = _cast(graph, ours.node.outputs[0], ir.DataType.FLOAT)
        difference = _node(graph, "Sub", [output, reference])
        for i, value in enumerate((difference, reference)):
            square = _node(graph, "Flatten", [_node(graph, "Mul", [value, value])])
            _output(graph, f"{name}:{i}", _node(graph, "ReduceSum", [square, axes], keepdims=0))
        size = _node(graph, "Flatten", [_node(graph, "Abs", [_cast(graph, ours.source, ir.DataType.FLOAT)])])
        _output(graph, f"{name}:2", _node(graph, "ReduceMax", [size, axes], keepdims=0))
    common.RemoveUnusedNodesPass()(model)


def _graft(graph: ir.Graph, value: ir.Value, known: dict[ir.Value, ir.Value]) -> ir.Value:
    """Copy what computes `value` in another graph to the end of this one, down to values that are known here."""
    if value in known:
        return known[value]
    if value.is_initializer():
        assert value.const_value is not None
        tensor = value.const_value
        copy = ir.Value(
            name=f"candidate.{value.name}",
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        assert copy.name is not None
        graph.initializers[copy.name] = copy
    else:
        node = value.producer()
        assert node is not None and len(node.outputs) == 1, "a linear's Q/DQ nodes have one output"
        inputs = [None if v is None else _graft(graph, v, known) for v in node.inputs]
        new = ir.node(node.op_type, inputs, attributes={k: a.value for k, a in node.attributes.items()})
        graph.append(new)
        copy = new.outputs[0]
        copy.type = value.type
    known[value] = copy
    return copy


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    if dtype is None or value.dtype == dtype:
        return value
    cast = _node(graph, "Cast", [value], to=dtype)
    cast.dtype = dtype
    return cast


def _node(graph: ir.Graph, op: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
    node = ir.node(op, inputs, attributes=attributes or None)
    graph.append(node)
    node.outputs[0].dtype = ir.DataType.FLOAT
    return node.outputs[0]


def _output(graph: ir.Graph, name: str, value: ir.Value) -> None:
    value.name, value.shape = name, ir.Shape(["B"])
    graph.outputs.append(value)
