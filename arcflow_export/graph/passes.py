"""Clean up a freshly traced ONNX graph: optimise it, name its dimensions, give weights their checkpoint names."""

from __future__ import annotations

import re

import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxscript.optimizer
from onnxscript.rewriter import RewriteRuleSet
from onnxscript.rewriter.rules import common as rules

from arcflow_export.models.layers import ModelPart, parameters

_RULES = RewriteRuleSet(
    [
        rules.add_0_rule,
        rules.sub_0_rule,
        rules.mul_by_1_rule,
        rules.div_by_1_rule,
        rules.no_op_cast_rule,
        rules.cast_cast_rule,
        rules.no_op_transpose_rule,
        rules.transpose_transpose_rule,
        rules.no_op_expand_rule,
        rules.reshape_reshape_rule,
        rules.squeeze_reshape_1d_rule,
        rules.unsqueeze_unsqueeze_rule,
        rules.collapse_slice_rule,
        rules.collapse_slice2_rule,
        rules.max_min_rule,
        rules.min_max_rule,
    ]
)


def finish(model: ir.Model, part: ModelPart) -> ir.Model:
    """Optimise a traced graph in place and return it.

    1. The fake values of weights are removed, so that no pass tries to read them.
    2. Constants are folded, trivial nodes simplified and dead nodes removed. This is what onnxscript's optimizer does,
       without its rule that joins Slices to a Split, whose time grows with the square of the number of nodes.
    3. Dimensions get the names of the part's specs.
    4. A Reshape to a computed shape becomes a Reshape to a constant shape if at most one dimension is unknown.
    5. Initializers get their checkpoint names, or `constant.<name>`. Nodes that read a weight get the name of its
       module, so that a quantisation policy can name them. The tracer's source locations are removed.
    """
    for value in model.graph.initializers.values():
        if not _is_real(value):
            value.const_value = None
    _optimize(model)
    _name_dimensions(model, part)
    simplify_reshapes(model)
    _optimize(model)
    _name_initializers(model, part)
    return model


def _optimize(model: ir.Model) -> None:
    """Fold constants, simplify and remove dead nodes, twice (a third time changes nothing); merge equal constants."""
    common.InlinePass()(model)
    for _ in range(2):
        onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True)
        _RULES.apply_to_model(model)
        common.RemoveUnusedNodesPass()(model)
    passes = ir.passes.Sequential(
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.NameFixPass(),
    )
    passes(model)


def _is_real(value: ir.Value) -> bool:
    raw = getattr(value.const_value, "raw", None)
    return (
        value.const_value is not None
        and type(raw).__name__ != "FakeTensor"
        and (type(getattr(raw, "data", None)).__name__ != "FakeTensor")
    )


def _name_dimensions(model: ir.Model, part: ModelPart) -> None:
    """Replace the tracer's symbols (s24, s27 ...) by the names in the part's specs, in every value's shape."""
    names: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, part.inputs, strict=True):
        assert value.shape is not None
        for dim, wanted in zip(value.shape, spec.shape, strict=True):
            if isinstance(wanted, str):
                names[str(dim)] = wanted
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b") if names else None

    def rename(value: ir.Value) -> None:
        if value.shape is not None and pattern:
            value.shape = ir.Shape(
                [
                    d if isinstance(d, int) or d.value is None else pattern.sub(lambda m: names[m[0]], d.value)
                    for d in value.shape
                ]
            )

    for value in model.graph.inputs:
        rename(value)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            rename(value)
    for value, out in zip(model.graph.outputs, part.outputs, strict=True):
        value.shape = ir.Shape(list(out.shape))


def simplify_reshapes(model: ir.Model) -> bool:
    """Give Reshape nodes a constant shape where the known shapes allow it; returns True if any node changed.

    A dimension equal to the input's dimension at the same position becomes 0 (copy); one other unknown dimension
    becomes -1. The Shape, Squeeze and Concat nodes that computed the shape are dead afterwards.
    """
    changed = False
    for node in list(model.graph):
        if node.op_type != "Reshape" or node.inputs[1] is None or node.inputs[1].const_value is not None:
            continue
        source, target = node.inputs[0], node.outputs[0]
        if source is None or source.shape is None or target.shape is None:
            continue
        shape: list[int] = []
        for i, dim in enumerate(target.shape):
            if isinstance(dim, int):
                shape.append(dim)
            elif dim.value is not None and i < len(source.shape) and source.shape[i] == dim:
                shape.append(0)
            else:
                shape.append(-1)
        if shape.count(-1) > 1:
            continue
        value = _constant(model, shape)
        node.replace_input_with(1, value)
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
        changed = True
    return changed


def _constant(model: ir.Model, values: list[int]) -> ir.Value:
    name = "shape_" + "_".join(str(v).replace("-", "m") for v in values)
    if name not in model.graph.initializers:
        tensor = ir.tensor(values, dtype=ir.DataType.INT64, name=name)
        value = ir.Value(
            name=name, shape=ir.Shape([len(values)]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor
        )
        model.graph.initializers[name] = value
    return model.graph.initializers[name]


def _name_initializers(model: ir.Model, part: ModelPart) -> None:
    for p in parameters(part):
        value = model.graph.initializers.pop(p.name, None)
        if value is None:
            continue  # not used by the graph, so a pass removed it
        value.name = p.key if p.key is not None else f"constant.{p.name}"
        model.graph.initializers[value.name] = value
        if p.key is not None and p.name.endswith(".weight"):
            for node in value.consumers():
                node.name = p.key.removesuffix(".weight")
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version = "arcflow", None
