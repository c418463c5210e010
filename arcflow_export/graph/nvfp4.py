"""The operator that rounds an activation to NVFP4; ONNX has none, so graphs have TensorRT's own (B16).

`TRT_FP4DynamicQuantize(x, scale) -> (numbers, block scales)` with the attributes `axis`, `block_size` and `scale_type`.
x is [..., in] and `scale` the float32 scale [] of the tensor. The numbers are E2M1 [..., in], the block scales E4M3
[..., in / 16].
"""

from __future__ import annotations

import onnx_ir as ir

from arcflow_runtime.maths.dtypes import NVFP4_BLOCK

#: Domain and type of the operator, and the version of the domain that TensorRT's exporters state.
DOMAIN, DYNAMIC_QUANTIZE, VERSION = "trt", "TRT_FP4DynamicQuantize", 1


def dynamic_quantize(
    source: ir.Value, scale: ir.Value, numbers: ir.Value, block_scales: ir.Value, name: str
) -> ir.Node:
    """A node that rounds `source` [..., in] along its last axis."""
    attributes = {"axis": -1, "block_size": NVFP4_BLOCK, "scale_type": int(ir.DataType.FLOAT8E4M3FN)}
    return ir.node(
        DYNAMIC_QUANTIZE,
        [source, scale],
        attributes=attributes,
        domain=DOMAIN,
        outputs=[numbers, block_scales],
        name=name,
    )
