"""Add LoRA slots to an ONNX graph: each chosen linear gets two inputs, the factors of a LoRA.

A linear y = x W + bias becomes y = (x W + (x A) B) + bias. Scale, alpha and rank are folded into B before a request.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import onnx_ir.passes.common as common

from arcflow_export.graph.linears import LinearNode, find_linears
from arcflow_runtime.disk.manifest import RANK_MULTIPLE, lora_a, lora_b


class AddLoraSlots(ir.passes.InPlacePass):
    """Add the inputs `<name>.lora_a` [in, R/8, 8] and `<name>.lora_b` [R/8, 8, out] to the named linears.

    1. Requires: every name is a linear of the graph, and no linear has been quantised.
    2. A rank is a multiple of 8, and the inputs have it as two axes, so that an engine's builder knows that it is. From
       one axis of any length, the builder makes kernels that pad.
    3. Every linear has a rank of its own, so that a LoRA of few linears costs nothing in the others.
    4. The branch reads the linear's own input, and its sum comes before the bias. So the quantiser, which inserts its
       nodes between that input and the product, leaves the branch in the linear's dtype; and the engine can still join
       the bias with what follows it.
    5. Ensures: the graph has exactly two new inputs for each named linear.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        super().__init__()
        self._layers = tuple(layers)

    def requires(self, model: ir.Model) -> None:
        """Rule 1; raises `ir.passes.PreconditionError`."""
        if missing := sorted(set(self._layers) - find_linears(model).keys()):
            raise ir.passes.PreconditionError(f"not linears of the graph: {missing}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rules 2 to 4."""
        found = find_linears(model)
        for name in self._layers:
            _add_slot(model.graph, found[name])
        return ir.passes.PassResult(model, modified=bool(self._layers))

    def ensures(self, model: ir.Model) -> None:
        """Rule 5; raises `ir.passes.PostconditionError`."""
        names = {value.name for value in model.graph.inputs}
        missing = [n for n in self._layers if not {lora_a(n), lora_b(n)} <= names]
        if missing:
            raise ir.passes.PostconditionError(f"linears without slots: {missing}")


def remove_lora_slots(model: ir.Model) -> ir.Model:
    """Undo `AddLoraSlots` in place, for tools that run a graph without LoRAs; returns the model."""
    graph = model.graph
    slots = [value for value in graph.inputs if str(value.name).endswith((lora_a(""), lora_b("")))]
    sums = {f"{str(value.name).removesuffix(lora_a(''))}.lora_add" for value in slots}
    for node in [node for node in graph if node.name in sums]:
        base = node.inputs[0]
        assert base is not None
        for reader, index in list(node.outputs[0].uses()):
            reader.replace_input_with(index, base)
    common.RemoveUnusedNodesPass()(model)
    for value in slots:
        graph.inputs.remove(value)
    return model


def _add_slot(graph: ir.Graph, linear: LinearNode) -> None:
    name, dtype, base = linear.name, linear.dtype, linear.node.outputs[0]
    assert not any(base is output for output in graph.outputs), f"{name}: a linear's product is no output of a part"
    groups = f"{name}.lora_rank".replace(".", "_")
    rank = f"{RANK_MULTIPLE}*{groups}"
    a = _value(lora_a(name), dtype, [linear.in_features, groups, RANK_MULTIPLE])
    b = _value(lora_b(name), dtype, [groups, RANK_MULTIPLE, linear.out_features])
    graph.inputs.extend([a, b])
    flat_a = _value(f"{name}.lora_a_flat", dtype, [linear.in_features, rank])
    flat_b = _value(f"{name}.lora_b_flat", dtype, [rank, linear.out_features])
    low, product, total = (_value(f"{name}.lora_{what}", dtype) for what in ("low", "product", "sum"))
    assert base.shape is not None
    low.shape, product.shape, total.shape = ir.Shape([*list(base.shape)[:-1], rank]), base.shape, base.shape
    uses = list(base.uses())
    nodes = [
        ir.node("Reshape", [a, _shape(graph, linear.in_features, -1)], outputs=[flat_a], name=f"{name}.lora_a_reshape"),
        ir.node(
            "Reshape", [b, _shape(graph, -1, linear.out_features)], outputs=[flat_b], name=f"{name}.lora_b_reshape"
        ),
        ir.node("MatMul", [linear.input, flat_a], outputs=[low], name=f"{name}.lora_down"),
        ir.node("MatMul", [low, flat_b], outputs=[product], name=f"{name}.lora_up"),
        ir.node("Add", [base, product], outputs=[total], name=f"{name}.lora_add"),
    ]
    graph.insert_after(linear.node, nodes)
    for node, index in uses:
        node.replace_input_with(index, total)


def _shape(graph: ir.Graph, *sizes: int) -> ir.Value:
    name = "lora_shape_" + "_".join(str(size).replace("-", "m") for size in sizes)
    if name not in graph.initializers:
        value = _value(name, ir.DataType.INT64, [len(sizes)])
        value.const_value = ir.tensor(sizes, dtype=ir.DataType.INT64, name=name)
        graph.initializers[name] = value
    return graph.initializers[name]


def _value(name: str, dtype: ir.DataType, shape: Sequence[int | str] | None = None) -> ir.Value:
    return ir.Value(name=name, shape=None if shape is None else ir.Shape(shape), type=ir.TensorType(dtype))
