"""A bfloat16 bundle on a machine without bfloat16 kernels: each operator in float32, its result rounded to bfloat16.

This is what a bfloat16 engine with float32 accumulation computes, so it measures such a bundle's real error on a
CPU. It is for checking, not for serving: the weights are expanded to float32.

What a DequantizeLinear gives is not rounded: an engine multiplies the FP8 numbers themselves and the float32 sum by
both scales, so no dequantised number exists there.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

from arcflow_runtime.bundle import Bundle, Part, TensorSpec
from arcflow_runtime.engines.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeEngine
from arcflow_runtime.errors import EngineError

#: Operators whose results are not rounded: those that only move values, and DequantizeLinear (above).
_UNROUNDED = {
    "DequantizeLinear",
    "Concat",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
    "GatherElements",
}


class EmulatedBackend:
    """Runs bundles of any precision with ONNX Runtime on a CPU; bfloat16 parts are emulated."""

    def check(self, bundle: Bundle) -> None:
        """Every bundle can be run."""

    def open(self, bundle: Bundle, part: str) -> OnnxRuntimeEngine:
        """Load part `part`; raises `EngineError` as ONNX Runtime's backend does."""
        model = load_graph(bundle, part)
        if not any(v.dtype == ir.DataType.BFLOAT16 for v in model.graph.initializers.values()):
            return OnnxRuntimeBackend(None).open(bundle, part)
        with tempfile.TemporaryDirectory() as folder:
            ir.save(emulate_bfloat16(model), Path(folder) / bundle.manifest.parts[part].graph)
            return OnnxRuntimeBackend(None).open(dataclasses.replace(bundle, root=Path(folder)), part)


def load_graph(bundle: Bundle, part: str) -> ir.Model:
    """The part's graph; its weights stay in their file until they are used.

    onnx-ir refuses a weights file with several hard links, which the unchanged parts of a quantised bundle have. So the
    path is checked here: it must be the part's own file (B8), which `Bundle.open` found inside the bundle.

    Raises:
        EngineError: a tensor lies in another file.
    """
    spec = bundle.manifest.parts[part]
    graph, weights = bundle.path(spec.graph), bundle.path(spec.weights)
    model = ir.load(graph)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        if graph.parent / tensor.location != weights:
            raise EngineError(
                f"{part}: {tensor.name!r} must lie in {spec.weights}, got {str(tensor.location)!r}; "
                "export the bundle again"
            )
        value.const_value = ir.ExternalTensor(
            weights, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name, base_dir=""
        )
    return model


def widened(bundle: Bundle) -> Bundle:
    """The bundle as the emulation shows it: bfloat16 inputs and outputs are float32."""

    def spec(s: TensorSpec) -> TensorSpec:
        return dataclasses.replace(s, dtype="float32") if s.dtype == "bfloat16" else s

    def part(p: Part) -> Part:
        return dataclasses.replace(p, inputs=tuple(map(spec, p.inputs)), outputs=tuple(map(spec, p.outputs)))

    parts = {name: part(p) for name, p in bundle.manifest.parts.items()}
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, parts=parts))


def emulate_bfloat16(model: ir.Model) -> ir.Model:
    """Rewrite a graph in place: float32 arithmetic, every bfloat16 result rounded to bfloat16."""
    graph = model.graph
    for value in graph.initializers.values():
        # Into memory all of them: the rewritten graph is saved elsewhere than the weights.
        assert value.const_value is not None
        array = value.const_value.numpy()
        if value.dtype == ir.DataType.BFLOAT16:
            array = array.astype(np.float32)
            value.dtype = ir.DataType.FLOAT
        value.const_value = ir.tensor(np.array(array), name=value.name)
    nodes = list(graph)  # without the casts that are put in below
    for value in list(graph.inputs):
        if value.dtype == ir.DataType.BFLOAT16:
            value.dtype = ir.DataType.FLOAT
            _round(graph, value, None)
    for node in nodes:
        to = node.attributes.get("to")
        if node.op_type == "Cast" and to is not None and to.as_int() == ir.DataType.BFLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
        for output in node.outputs:
            if output.dtype == ir.DataType.BFLOAT16:
                output.dtype = ir.DataType.FLOAT
                if node.op_type not in _UNROUNDED:
                    _round(graph, output, node)
    return model


def _round(graph: ir.Graph, value: ir.Value, after: ir.Node | None) -> None:
    """Round `value` to bfloat16 and back before anyone reads it."""
    narrow = ir.node("Cast", [value], attributes={"to": ir.DataType.BFLOAT16})
    wide = ir.node("Cast", [narrow.outputs[0]], attributes={"to": ir.DataType.FLOAT})
    for node, index in list(value.uses()):
        if node is not narrow:
            node.replace_input_with(index, wide.outputs[0])
    for i, out in enumerate(graph.outputs):
        if out is value:
            wide.outputs[0].name, value.name = value.name, f"{value.name}.unrounded"
            wide.outputs[0].type, wide.outputs[0].shape = value.type, value.shape
            graph.outputs[i] = wide.outputs[0]
    if after is None:
        graph.insert_before(graph[0], [narrow, wide])
    else:
        graph.insert_after(after, [narrow, wide])
