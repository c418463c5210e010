"""NVFP4 for Blackwell GPUs: E2M1 numbers with two levels of scales -> the numbers, and the nodes around a product.

An E2M1 number has one mantissa bit: 0, 0.5, 1, 1.5, 2, 3, 4 and 6, with a sign. Every 16 numbers along the input
dimension share a block scale in E4M3, and every tensor has one float32 scale: value = number * block scale * tensor
scale. The tensor scale is chosen so that the largest block scale is 448, the largest E4M3 number. Formulas and numbers
are those of nvidia-modelopt's ONNX exporter.

A quantised linear is MatMul(DQ(Q(x)), DQ(w)), cast to the dtype of its arithmetic. Weights are stored; the block scales
of an activation are computed while the engine runs, by the operator of `graph/nvfp4.py`. Its tensor scale comes from
calibration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir
import torch

from arcflow_export.graph.linears import LinearNode, shared_inputs
from arcflow_export.graph.nvfp4 import DOMAIN, DYNAMIC_QUANTIZE, VERSION, dynamic_quantize
from arcflow_export.quantize.format import StoredTensor
from arcflow_export.quantize.fp8 import E4M3
from arcflow_export.quantize.nodes import add_initializer, make_value
from arcflow_runtime.maths.dtypes import E2M1_MAX, E4M3_MAX, NVFP4_BLOCK

#: Two E2M1 numbers in a byte, the first in the low half.
E2M1 = torch.float4_e2m1fn_x2
#: The smallest positive E4M3 number. A block of very small numbers gets this scale, because 0 would make NaN of them.
_E4M3_MIN = 2.0**-9
#: Halfway between neighbouring E2M1 numbers. Ties go to the even code, so at odd places they go up.
_HALFWAY = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def make_tensor_scale(amax: torch.Tensor) -> torch.Tensor:
    """The tensor scale amax / (6 * 448) in float32, or 1 where amax is 0.

    Args:
        amax: largest absolute values, at least 0, of any shape.
    """
    scale = amax.float() / (E2M1_MAX * E4M3_MAX)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def make_block_scales(weight: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """The E4M3 scale of every block of 16 inputs: its largest absolute weight / (6 * tensor scale), rounded to nearest.

    Args:
        weight: [in, out] in float32, bfloat16 or float16, without NaN; `in` is a multiple of 16.
        tensor_scale: float32 [].

    Returns:
        E4M3 [in / 16, out]: at least 2^-9, and 1 for a block of zeros.
    """
    amax = weight.float().abs().unflatten(0, (-1, NVFP4_BLOCK)).amax(1)
    scales = amax / (E2M1_MAX * tensor_scale)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return scales.clamp(_E4M3_MIN, E4M3_MAX).to(E4M3)


def encode(weight: torch.Tensor, block_scales: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """weight / (block scale * tensor scale) in E2M1, rounded from float32 to nearest even; larger values become +-6.

    Args:
        weight: [in, out] in float32, bfloat16 or float16, without NaN; `out` is even.
        block_scales: from `make_block_scales`.
        tensor_scale: float32 [].

    Returns:
        E2M1 [in, out / 2]: neighbouring outputs share a byte.
    """
    scale = (block_scales.float() * tensor_scale).unsqueeze(1)
    values = (weight.float().unflatten(0, (-1, NVFP4_BLOCK)) / scale).flatten(0, 1)
    magnitude, halfway = values.abs(), torch.tensor(_HALFWAY)
    codes = torch.bucketize(magnitude, halfway)
    codes += (magnitude.unsqueeze(-1) == halfway[1::2]).any(-1)
    codes += torch.where(values < 0, 8, 0)
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8).view(E2M1)


def refuse(linear: LinearNode) -> str | None:
    """Sizes that NVFP4 cannot hold; see `WeightFormat.refuse`."""
    if linear.in_features % NVFP4_BLOCK or linear.out_features % 2:
        return (
            f"must have a multiple of {NVFP4_BLOCK} inputs and an even number of outputs for NVFP4, got "
            f"{linear.in_features} and {linear.out_features}; leave it out in the policy"
        )
    return None


def tensors(linear: LinearNode, amax: torch.Tensor, input_amax: float | None) -> tuple[StoredTensor, ...]:
    """The stored tensors; see `WeightFormat.tensors`.

    The weight [in, out] in E2M1, `<name>.weight_scale` [in / 16, out] in E4M3, and the float32 tensor scales
    `<name>.weight_scale_2` [] and `<name>.input_scale` [].
    """
    assert input_amax is not None, "NVFP4 is calibrated"
    scale, name = make_tensor_scale(amax.max()), linear.name
    rows, columns = linear.in_features, linear.out_features

    def numbers(blocks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        for block in _whole_blocks(blocks):
            yield encode(block, make_block_scales(block, scale), scale)

    def block_scales(blocks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        for block in _whole_blocks(blocks):
            yield make_block_scales(block, scale)

    input_scale = make_tensor_scale(torch.tensor(input_amax, dtype=torch.float64))
    return (
        StoredTensor(f"{name}.weight", (rows, columns), E2M1, encode=numbers),
        StoredTensor(f"{name}.weight_scale", (rows // NVFP4_BLOCK, columns), E4M3, encode=block_scales),
        StoredTensor(f"{name}.weight_scale_2", (), torch.float32, scale),
        StoredTensor(f"{name}.input_scale", (), torch.float32, input_scale),
    )


def insert(graph: ir.Graph, linears: Sequence[LinearNode]) -> None:
    """Put the nodes around linears; see `WeightFormat.insert`."""
    if linears:
        graph.opset_imports[DOMAIN] = VERSION
    for group in shared_inputs(linears):
        values = _quantize_input(graph, group[0])
        for linear in group:
            linear.node.replace_input_with(0, values)
            _dequantize_weight(graph, linear)


def inserted(model: ir.Model) -> set[str]:
    """Names of the linears whose weight is in E2M1; see `WeightFormat.inserted`."""
    found = set()
    for node in model.graph:
        weight = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if weight is not None and weight.is_initializer() and weight.dtype == ir.DataType.FLOAT4E2M1:
            found.add(str(weight.name).removesuffix(".weight"))
    return found


def _quantize_input(graph: ir.Graph, first: LinearNode) -> ir.Value:
    """The shared nodes and the scale `<name>.input_scale` are named after the first linear of the group."""
    source, name = first.input, first.name
    assert source.shape is not None
    scale = add_initializer(graph, f"{name}.input_scale", (), ir.DataType.FLOAT)
    numbers = make_value(f"{name}.input_quantized", source.shape, ir.DataType.FLOAT4E2M1)
    shape = ir.Shape([*source.shape[:-1], first.in_features // NVFP4_BLOCK])
    narrow = make_value(f"{name}.input_block_scale", shape, ir.DataType.FLOAT8E4M3FN)
    graph.insert_before(first.node, dynamic_quantize(source, scale, numbers, narrow, f"{name}.input_quantize"))
    return _dequantize(graph, first, "input", numbers, narrow, scale, -1)


def _dequantize_weight(graph: ir.Graph, linear: LinearNode) -> None:
    weight, name = linear.node.inputs[1], linear.name
    assert weight is not None
    weight.dtype, weight.const_value = ir.DataType.FLOAT4E2M1, None
    shape = (linear.in_features // NVFP4_BLOCK, linear.out_features)
    narrow = add_initializer(graph, f"{name}.weight_scale", shape, ir.DataType.FLOAT8E4M3FN)
    scale = add_initializer(graph, f"{name}.weight_scale_2", (), ir.DataType.FLOAT)
    linear.node.replace_input_with(1, _dequantize(graph, linear, "weight", weight, narrow, scale, 0))


def _dequantize(
    graph: ir.Graph, linear: LinearNode, what: str, numbers: ir.Value, narrow: ir.Value, scale: ir.Value, axis: int
) -> ir.Value:
    """Numbers * (block scales * tensor scale), in the dtype of the linear's arithmetic.

    The block scales stay in float32, and so does the product: TensorRT-RTX 1.7.1 cannot build a DequantizeLinear whose
    `output_dtype` is narrower. Its engines have neither the product nor the cast.
    """
    name, f32 = f"{linear.name}.{what}", ir.DataType.FLOAT
    scales = make_value(f"{name}_block_scale_dequantized", narrow.shape, f32)
    wide = make_value(f"{name}_dequantized", numbers.shape, f32)
    nodes = [
        ir.node("DequantizeLinear", [narrow, scale], outputs=[scales], name=f"{name}_block_scale_dequantize"),
        ir.node(
            "DequantizeLinear",
            [numbers, scales],
            attributes={"axis": axis, "block_size": NVFP4_BLOCK},
            outputs=[wide],
            name=f"{name}_dequantize",
        ),
    ]
    if linear.dtype != f32:
        wide = make_value(f"{name}_cast", numbers.shape, linear.dtype)
        nodes.append(
            ir.node("Cast", nodes[-1].outputs, attributes={"to": linear.dtype}, outputs=[wide], name=f"{name}_cast")
        )
    graph.insert_before(linear.node, nodes)
    return wide


def _whole_blocks(blocks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same rows in blocks whose numbers of rows are multiples of 16."""
    rest: torch.Tensor | None = None
    for block in blocks:
        joined = block if rest is None else torch.cat([rest, block])
        whole = len(joined) - len(joined) % NVFP4_BLOCK
        if whole:
            yield joined[:whole]
        # A copy, because the source may use a block's memory again.
        rest = joined[whole:].clone() if whole < len(joined) else None
    assert rest is None, "rows are a multiple of the block"
