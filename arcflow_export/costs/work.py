"""Count the work of one call of a part, before its export or in a bundle: operations, weights, largest activation.

Operations are the multiplications and additions of matrix products, attention and convolutions; others are negligible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import onnx_ir as ir
import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from arcflow_export.emulate.emulate import load_graph
from arcflow_export.emulate.sizes import Sizes, dimensions
from arcflow_export.models.layers import ModelPart, parameters
from arcflow_runtime.disk.bundle import Bundle

#: A value of shape [..., n, n] counts as an attention's scores if n is at least this many tokens.
_SCORE_TOKENS = 2048


@dataclass(frozen=True)
class PartWork:
    """One part, and one call of it for one image.

    `weight_bytes`: bytes of its weights in the bundle. `tensors`: number of weights. `largest`: elements of the largest
    weight. `flops`: operations of the call. `activation`: elements of the largest value, not counting scores of
    attention. `precision`: dtype of its arithmetic.
    """

    parameters: int
    weight_bytes: int
    tensors: int
    largest: int
    flops: int
    activation: int
    precision: str


#: Side of a token in pixels, in both families: a token packs 2 x 2 latents of 8 x 8 pixels.
TOKEN_PX = 16


def call_sizes(height_px: int, width_px: int, text_tokens: int, steps: int) -> dict[str, int]:
    """The sizes of the symbolic dimensions of the parts' inputs, for one image."""
    height, width = height_px // TOKEN_PX, width_px // TOKEN_PX
    sizes = {"batch": 1, "steps": steps, "text_tokens": text_tokens, "image_tokens": height * width}
    return sizes | {"latent_height": height, "latent_width": width}


def part_work(part: ModelPart, sizes: Sizes) -> PartWork:
    """Count the work of a part before its export; torch runs it on meta tensors."""
    inputs = [
        torch.empty(
            [sizes[d] if isinstance(d, str) else d for d in s.shape], dtype=getattr(torch, s.dtype), device="meta"
        )
        for s in part.inputs
    ]
    with FlopCounterMode(display=False) as counter, _Largest() as largest, torch.inference_mode():
        part.module(*inputs)
    params = parameters(part)
    return PartWork(
        sum(prod(p.shape) for p in params),
        sum(prod(p.shape) * p.dtype.itemsize for p in params),
        len(params),
        max(prod(p.shape) for p in params),
        int(counter.get_total_flops()),
        largest.elements,
        str(part.precision).removeprefix("torch."),
    )


def bundle_work(bundle: Bundle, part: str, sizes: Sizes) -> PartWork:
    """Count the work of a bundle's part, from its graph."""
    spec = bundle.manifest.parts[part]
    graph = load_graph(bundle, part).graph
    values = (dimensions(v, sizes) for node in graph for v in node.outputs)
    return PartWork(
        spec.parameters,
        bundle.manifest.files[spec.weights].bytes,
        len(graph.initializers),
        max(v.const_value.size for v in graph.initializers.values() if v.const_value is not None),
        graph_flops(graph, sizes),
        max(_product(dims) for dims in values if not _scores(dims)),
        spec.precision,
    )


class _Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and not _scores(list(tensor.shape)):
                self.elements = max(self.elements, tensor.numel())
        return found


def _scores(dims: Sequence[int | None]) -> bool:
    """True if a value [..., tokens, tokens] holds scores of attention, which are computed for some rows at a time."""
    return len(dims) > 2 and dims[-1] == dims[-2] and (dims[-1] or 0) >= _SCORE_TOKENS


def graph_flops(graph: ir.Graph, sizes: Sizes) -> int:
    """Operations of a graph; an unknown dimension of an attention is assumed to be the number of tokens."""
    return sum(node_flops(node, sizes) for node in graph)


def node_flops(node: ir.Node, sizes: Sizes) -> int:
    """Operations of one node."""
    if node.op_type not in ("MatMul", "MatMulInteger", "Gemm", "Attention", "Conv"):
        return 0
    first, second = (dimensions(v, sizes) if v is not None else [] for v in node.inputs[:2])
    out = dimensions(node.outputs[0], sizes)
    if node.op_type == "Conv":
        return 2 * _product(out) * _product(second[1:])
    if node.op_type == "Attention":  # queries [B, H, T, D], keys [B, H, S, D]: two products
        return 2 * 2 * _product(first) * (second[-2] or 1)
    rows = out[-2] if len(out) > 1 else 1
    inner = first[-1] or (second[-2] if len(second) > 1 else None) or rows
    columns = out[-1] or second[-1] or rows
    return 2 * _product(out[:-1]) * (inner or 1) * (columns or 1)


def _product(dims: Sequence[int | None]) -> int:
    return prod(d or 1 for d in dims)
