"""int8 for CPUs: weights with one symmetric scale per output channel, activations quantised per token while it runs.

A quantised linear is

    s = max(max_k |x|, tiny) / 127                  per token, over the input's features
    q = QuantizeLinear(x / s, scale 1, zero 128)    uint8, so q - 128 is in -127 ... 127
    y = MatMulInteger(q, w, 128) * s * weight_scale

in standard operators. Linears that read the same tensor share s and q. There is no calibration.

- Per token, so that an image does not depend on the others of its batch, and one large token does not cost the others
  their precision.
- uint8 with zero point 128 and not int8, because ONNX Runtime 1.32's kernels on x86 are fast for uint8 x int8 only. The
  numbers are the same.
- On an x86 CPU without VNNI, uint8 x int8 products saturate in 16 bits. There, `engines/onnxruntime.py` sets the
  session option `session.x64quantprecision`, so that weights keep their 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
import torch

from arcflow_export.graph.linears import LinearNode, shared_inputs
from arcflow_export.quantize.format import StoredTensor
from arcflow_export.quantize.nodes import add_constant, add_initializer, make_value

INT8_MAX = 127.0
#: The least scale, so that a token of zeros is not divided by 0: the smallest normal float32.
TINY = float(np.finfo(np.float32).tiny)
_ZERO = 128


def make_scale(amax: torch.Tensor) -> torch.Tensor:
    """amax / 127 in float32, or 1 where amax is 0.

    Args:
        amax: largest absolute value of each output channel, [out].

    Returns:
        Positive scales [out].
    """
    scale = (amax.double() / INT8_MAX).float().clamp_(min=TINY)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def encode(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """values / scale in int8, rounded from float32 to nearest even, from -127 to 127."""
    return (values.float() / scale).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)


def refuse(linear: LinearNode) -> str | None:
    """See `WeightFormat.refuse`."""
    if linear.dtype != ir.DataType.FLOAT:
        return (
            f"must compute in float32 for int8, got {linear.dtype.name}; export the bundle with --dtype float32, or "
            "with --dtype bfloat16 --keep-float32 '*' for a CPU with bfloat16"
        )
    return None


def tensors(linear: LinearNode, amax: torch.Tensor, input_amax: float | None) -> tuple[StoredTensor, ...]:
    """The weight [in, out] in int8 and `<name>.weight_scale` [out] in float32; see `WeightFormat.tensors`."""
    scale, shape = make_scale(amax), (linear.in_features, linear.out_features)

    def codes(blocks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        for block in blocks:
            yield encode(block, scale)

    return (
        StoredTensor(f"{linear.name}.weight", shape, torch.int8, encode=codes),
        StoredTensor(f"{linear.name}.weight_scale", tuple(scale.shape), torch.float32, scale),
    )


def insert(graph: ir.Graph, linears: Sequence[LinearNode]) -> None:
    """Quantise the inputs and replace the products; see `WeightFormat.insert`."""
    for group in shared_inputs(linears):
        codes, zero, scale = _quantize_input(graph, group[0])
        for linear in group:
            _multiply(graph, linear, codes, zero, scale)


def inserted(model: ir.Model) -> set[str]:
    """Names of the integer products; see `WeightFormat.inserted`."""
    return {str(node.name) for node in model.graph if node.op_type == "MatMulInteger"}


def _quantize_input(graph: ir.Graph, first: LinearNode) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Quantise the input of a group, whose nodes are named after its first linear: codes, zero point and scale."""
    source = first.input
    f32, u8, rows = ir.DataType.FLOAT, ir.DataType.UINT8, _rows(source.shape)
    zero = add_constant(graph, "constant.int8_zero_point", np.array(_ZERO, np.uint8))
    one = add_constant(graph, "constant.int8_one", np.array(1, np.float32))
    tiny = add_constant(graph, "constant.int8_tiny", np.array(TINY, np.float32))
    step = add_constant(graph, "constant.int8_step", np.array(1 / INT8_MAX, np.float32))
    last = add_constant(graph, "constant.int8_axis", np.array([-1], np.int64))
    nodes: list[ir.Node] = []

    def add(op: str, what: str, inputs: list[ir.Value], shape: ir.Shape | None, dtype: ir.DataType = f32) -> ir.Value:
        value = make_value(f"{first.name}.input_{what}", shape, dtype)
        nodes.append(ir.node(op, inputs, outputs=[value], name=f"{first.name}.input_{what}_{op.lower()}"))
        return value

    largest = add("ReduceMax", "amax", [add("Abs", "size", [source], source.shape), last], rows)
    scale = add("Max", "scale", [add("Mul", "unit", [largest, step], rows), tiny], rows)
    scaled = add("Div", "scaled", [source, scale], source.shape)
    codes = add("QuantizeLinear", "quantized", [scaled, one, zero], source.shape, u8)
    graph.insert_before(first.node, nodes)
    return codes, zero, scale


def _multiply(graph: ir.Graph, linear: LinearNode, codes: ir.Value, zero: ir.Value, input_scale: ir.Value) -> None:
    """Replace the linear's MatMul by the integer product and its two scales; the product keeps the linear's name."""
    weight, output, name = linear.node.inputs[1], linear.node.outputs[0], linear.name
    assert weight is not None
    weight.dtype, weight.const_value = ir.DataType.INT8, None
    scale = add_initializer(graph, f"{name}.weight_scale", (linear.out_features,), ir.DataType.FLOAT)
    product = make_value(f"{name}.product", output.shape, ir.DataType.INT32)
    wide = make_value(f"{name}.product_float", output.shape, ir.DataType.FLOAT)
    half = make_value(f"{name}.product_scaled", output.shape, ir.DataType.FLOAT)
    result = make_value(f"{name}.output", output.shape, ir.DataType.FLOAT)
    nodes = [
        ir.node("MatMulInteger", [codes, weight, zero], outputs=[product], name=name),
        ir.node("Cast", [product], attributes={"to": ir.DataType.FLOAT}, outputs=[wide], name=f"{name}.product_cast"),
        ir.node("Mul", [wide, input_scale], outputs=[half], name=f"{name}.input_rescale"),
        ir.node("Mul", [half, scale], outputs=[result], name=f"{name}.weight_rescale"),
    ]
    graph.insert_before(linear.node, nodes)
    for i, out in enumerate(graph.outputs):
        if out is output:
            result.name, graph.outputs[i] = output.name, result
    output.replace_all_uses_with(result)
    graph.remove(linear.node, safe=True)


def _rows(shape: ir.Shape | None) -> ir.Shape | None:
    return None if shape is None else ir.Shape([*shape[:-1], 1])
