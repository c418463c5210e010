"""FP8 E4M3 (3 mantissa bits, largest value 448, no infinity): ranges -> scales, weights -> FP8 values, and the nodes.

A quantised linear is MatMul(DQ(Q(x, s_x)), DQ(w, s_w)), with QuantizeLinear (Q) and DequantizeLinear (DQ). The
activation has one scale per tensor; the weight is stored in E4M3 with one scale per output channel. Linears that read
the same tensor share one Q and DQ, so that an engine can join them into one product, as it does for queries, keys and
values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from arcflow_export.graph.linears import LinearNode, shared_inputs
from arcflow_export.quantize.format import StoredTensor
from arcflow_export.quantize.nodes import TORCH_DTYPES, add_constant, add_initializer, make_value
from arcflow_runtime.maths.dtypes import E4M3_MAX

E4M3 = torch.float8_e4m3fn
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
#: QuantizeLinear takes its output type from the zero point. This works in opset 20, which has no attribute for it, and
#: in 23.
_ZERO_POINT = "constant.e4m3_zero_point"
#: The output axis of a weight [in, out].
_OUTPUT_AXIS = 1


def make_scale(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """amax / 448 in `dtype`, or 1 where amax is 0; rounded up, so that a scaled value within the range is at most 448.

    Args:
        amax: largest absolute values, at least 0, of any shape.
        dtype: dtype of the scales: float32, bfloat16 or float16.

    Returns:
        Positive scales of the same shape.
    """
    exact = amax.double() / E4M3_MAX
    scale = exact.to(dtype)
    # Adding 1 to the bits of a positive float gives the next larger float.
    above = (scale.view(_BITS[dtype]) + 1).view(dtype)
    scale = torch.where(scale.double() < exact, above, scale)
    return torch.where(exact == 0, torch.ones_like(scale), scale)


def encode(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """values / scale in E4M3, rounded from float32 to nearest even.

    The quotient is clamped to +-448, because a cast of a larger value may give NaN. `scale` broadcasts against
    `values`; neither may hold NaN.
    """
    return (values.float() / scale.float()).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)


def refuse(linear: LinearNode) -> str | None:
    """None: every linear can be in FP8. See `WeightFormat.refuse`."""


def tensors(linear: LinearNode, amax: torch.Tensor, input_amax: float | None) -> tuple[StoredTensor, ...]:
    """The weight [in, out] in E4M3, `<name>.weight_scale` [out], `<name>.input_scale` []; see `WeightFormat.tensors`.

    Scales have the dtype of the linear's arithmetic, because in a strongly typed network the output of DQ has the dtype
    of its scale.
    """
    assert input_amax is not None, "FP8 is calibrated"
    dtype = TORCH_DTYPES[linear.dtype]
    scale, shape = make_scale(amax, dtype), (linear.in_features, linear.out_features)
    input_scale = make_scale(torch.tensor(input_amax, dtype=torch.float64), dtype)

    def codes(blocks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        for block in blocks:
            yield encode(block, scale)

    return (
        StoredTensor(f"{linear.name}.weight", shape, E4M3, encode=codes),
        StoredTensor(f"{linear.name}.weight_scale", tuple(scale.shape), dtype, scale),
        StoredTensor(f"{linear.name}.input_scale", (), dtype, input_scale, of_input=True),
    )


def insert(graph: ir.Graph, linears: Sequence[LinearNode]) -> None:
    """Put Q and DQ around linears; see `WeightFormat.insert`."""
    for group in shared_inputs(linears):
        _quantize_input(graph, group, add_constant(graph, _ZERO_POINT, np.zeros((), ml_dtypes.float8_e4m3fn)))
    for linear in linears:
        _dequantize_weight(graph, linear)


def inserted(model: ir.Model) -> set[str]:
    """Names of the products of FP8 numbers; see `WeightFormat.inserted`."""
    return {str(n.name) for n in model.graph if any(map(_is_fp8, n.inputs))}


def _quantize_input(graph: ir.Graph, group: tuple[LinearNode, ...], zero_point: ir.Value) -> None:
    """The shared nodes and the scale `<name>.input_scale` are named after the first linear of the group."""
    first = group[0]
    source = first.input
    scale = add_initializer(graph, f"{first.name}.input_scale", (), first.dtype)
    codes = make_value(f"{first.name}.input_quantized", source.shape, ir.DataType.FLOAT8E4M3FN)
    values = make_value(f"{first.name}.input_dequantized", source.shape, first.dtype)
    nodes = [
        ir.node("QuantizeLinear", [source, scale, zero_point], outputs=[codes], name=f"{first.name}.input_quantize"),
        ir.node("DequantizeLinear", [codes, scale], outputs=[values], name=f"{first.name}.input_dequantize"),
    ]
    graph.insert_before(first.node, nodes)
    for linear in group:
        linear.node.replace_input_with(0, values)


def _dequantize_weight(graph: ir.Graph, linear: LinearNode) -> None:
    weight = linear.node.inputs[1]
    assert weight is not None
    scale = add_initializer(graph, f"{linear.name}.weight_scale", (linear.out_features,), linear.dtype)
    values = make_value(f"{linear.name}.weight_dequantized", weight.shape, linear.dtype)
    weight.dtype, weight.const_value = ir.DataType.FLOAT8E4M3FN, None
    node = ir.node(
        "DequantizeLinear",
        [weight, scale],
        attributes={"axis": _OUTPUT_AXIS},
        outputs=[values],
        name=f"{linear.name}.weight_dequantize",
    )
    graph.insert_before(linear.node, node)
    linear.node.replace_input_with(1, values)


def _is_fp8(value: ir.Value | None) -> bool:
    """True for an FP8 tensor that was dequantised; NVFP4's block scales are E4M3 too, but have blocks to scale."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return False
    readers = [reader.op_type for reader, _ in node.outputs[0].uses()]
    return node.inputs[0].dtype == ir.DataType.FLOAT8E4M3FN and "DequantizeLinear" not in readers
