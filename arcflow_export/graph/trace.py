"""Trace a part on the meta device to its ONNX graph; fake tensors are used, so no weight is in memory."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from arcflow_export.errors import ExportError
from arcflow_export.graph.lower import lower
from arcflow_export.graph.passes import finish
from arcflow_export.models.layers import ModelPart
from arcflow_export.options import OPSETS

#: Largest batch of a bundle. diffusers' VAE takes another code path from 64 images on.
MAX_BATCH = 32
#: Sizes to trace with. They must differ from each other and from 0 and 1; else the tracer assumes that they are equal.
_EXAMPLE = {
    "batch": 2,
    "steps": 3,
    "image_tokens": 24,
    "text_tokens": 40,
    "latent_height": 4,
    "latent_width": 6,
}
_LARGEST = {
    "batch": MAX_BATCH,
    "steps": 1024,
    "image_tokens": 1 << 18,
    "text_tokens": 1 << 16,
    "latent_height": 1 << 10,
    "latent_width": 1 << 10,
}


def trace(part: ModelPart, opset: int) -> ir.Model:
    """Trace a part into an ONNX model whose weights are named initializers without values.

    Args:
        part: the part; its parameters become fake tensors, so it cannot be used afterwards.
        opset: 20, which decomposes attention and RMS norm, or 23, which has both as operators.

    Returns:
        The optimised graph; its initializers have the checkpoint's names.

    Raises:
        ExportError: the tracer or the converter failed; the message names the part.
    """
    names = {s.name for s in part.inputs}
    assert opset in OPSETS and len(names) == len(part.inputs)
    try:
        with _quiet():
            return finish(_convert(part, opset), part)
    except Exception as e:
        raise ExportError(f"{part.name}: conversion to ONNX failed: {type(e).__name__}: {e}") from e


def _convert(part: ModelPart, opset: int) -> ir.Model:
    dims = {name: torch.export.Dim(name, min=1, max=largest) for name, largest in _LARGEST.items()}
    shapes: list[dict[int, Any]] = [
        {i: dims[d] for i, d in enumerate(spec.shape) if isinstance(d, str)} for spec in part.inputs
    ]
    with FakeTensorMode():
        _fake(part.module)
        args = tuple(
            torch.empty([_EXAMPLE[d] if isinstance(d, str) else d for d in s.shape], dtype=getattr(torch, s.dtype))
            for s in part.inputs
        )
        dynamic: Any = tuple(shapes)
        # `forward(timesteps, *rest)` of a conditioner: torch.export wants the rest as one tuple.
        if part.name == "conditioner" and len(shapes) > 1:
            dynamic = (shapes[0], tuple(shapes[1:]))
        program = torch.export.export(part.module, args, dynamic_shapes=dynamic, strict=False)
        program.run_decompositions = partial(lower, program)
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=[s.name for s in part.inputs],
            output_names=[s.name for s in part.outputs],
            optimize=False,
            verbose=False,
        )
    assert onnx_program is not None
    return onnx_program.model


def _fake(module: nn.Module) -> None:
    """Replace meta tensors by fake tensors of the active mode; tied parameters stay tied."""
    memo: dict[int, Any] = {}
    for owner in module.modules():
        for name, tensor in owner._parameters.items():
            if tensor is not None:
                empty = nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype), requires_grad=False)
                owner._parameters[name] = memo.setdefault(id(tensor), empty)
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = memo.setdefault(id(buffer), torch.empty(buffer.shape, dtype=buffer.dtype))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log output and warnings of the converters; their errors are exceptions."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
