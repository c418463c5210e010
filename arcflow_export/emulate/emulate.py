"""Emulate a bfloat16 or float16 graph on a CPU: compute in float32 and round each result to the graph's precision.

An engine that accumulates in float32 computes the same, so the emulation shows a part's real error, and overflows where
the engine does. ONNX Runtime cannot do this on a CPU: it has no bfloat16 kernels, and runs chains of float16 operators
in float32. The drift gate and `arcflow verify` use the emulation. It is not for serving, because weights are expanded
to float32.

The output of a DequantizeLinear is not rounded. An engine multiplies the FP8 values themselves and applies both scales
to the float32 sum, so a dequantised number never exists there.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from arcflow_export.graph.lora import remove_lora_slots
from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.external_data import checked_graph
from arcflow_runtime.disk.manifest import Part, TensorSpec
from arcflow_runtime.maths.dtypes import to_float32

#: Operators that only move values; their results need no rounding.
MOVES = {
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
_UNROUNDED = MOVES | {"DequantizeLinear"}
_NARROW = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
_FLOAT = ir.TensorType(ir.DataType.FLOAT)


def load_graph(bundle: Bundle, part: str) -> ir.Model:
    """Load a part's graph without its LoRA slots; its weights stay in their file until they are used.

    onnx-ir refuses a relative path to a weights file with several hard links, which tools that link equal files make.
    So the full path is given, after the check of rule B8.

    Raises:
        BundleError: a tensor lies in another file.
    """
    weights = bundle.path(bundle.manifest.parts[part].weights)
    model = ir.load(checked_graph(bundle, part))
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        value.const_value = ir.ExternalTensor(
            weights, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name, base_dir=""
        )
    return remove_lora_slots(model)


def widened(bundle: Bundle) -> Bundle:
    """The bundle with the signatures that an emulated part has: bfloat16 and float16 as float32, and no LoRA slots."""

    def spec(s: TensorSpec) -> TensorSpec:
        return dataclasses.replace(s, dtype="float32") if s.dtype in ("bfloat16", "float16") else s

    def part(p: Part) -> Part:
        inputs, outputs = (tuple(map(spec, tensors)) for tensors in (p.inputs, p.outputs))
        return dataclasses.replace(p, inputs=inputs, outputs=outputs, lora=None)

    parts = {name: part(p) for name, p in bundle.manifest.parts.items()}
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, parts=parts))


def emulate(model: ir.Model, rounded: bool = True) -> ir.Model:
    """Rewrite a graph in place: float32 arithmetic, every result in bfloat16 or float16 rounded to its dtype.

    Args:
        model: the graph; weights in bfloat16 and float16 are expanded when they are read.
        rounded: False leaves out the rounding, so that nothing overflows.
    """
    graph = model.graph
    for value in graph.initializers.values():
        if value.dtype in _NARROW:
            assert value.const_value is not None
            value.const_value, value.type = _widened(value.const_value), _FLOAT
    nodes = list(graph)  # before the casts below are inserted
    for value in list(graph.inputs):
        if (dtype := value.dtype) in _NARROW:
            value.type = _FLOAT
            if rounded:
                _round(graph, value, dtype, None)
    for node in nodes:
        to = node.attributes.get("to")
        if node.op_type == "Cast" and to is not None and to.as_int() in _NARROW:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
        for output in node.outputs:
            if (dtype := output.dtype) in _NARROW:
                output.type = _FLOAT
                if rounded and node.op_type not in _UNROUNDED:
                    _round(graph, output, dtype, node)
    return model


def _round(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, after: ir.Node | None) -> None:
    """Insert casts that round `value` to `dtype` and back; all readers of `value` read the result."""
    narrow = ir.node("Cast", [value], attributes={"to": dtype})
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


def release(tensor: ir.TensorProtocol) -> None:
    """Unmap the file of a tensor, because mapped pages count as resident memory; the next read maps it again."""
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()


def _widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def expand() -> ir.TensorProtocol:
        array = tensor.numpy()
        wide = to_float32(array.view(np.uint16) if tensor.dtype == ir.DataType.BFLOAT16 else array)
        del array  # a mapping cannot be closed while an array refers to it
        release(tensor)
        return ir.tensor(wide, name=tensor.name)

    return ir.LazyTensor(expand, dtype=ir.DataType.FLOAT, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)
