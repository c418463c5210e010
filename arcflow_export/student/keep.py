"""Choose the linears that stay in float32 in a part of reduced precision, from name patterns or measured ranges.

The export (`--keep-float32`, `--scales`) uses this. A kept linear multiplies and adds its bias in float32. Its output
stays in float32 until the next linear or norm of the part's precision, as with T5's `wo` in transformers: if it were
cast back at once, it would still overflow.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from arcflow_export.formats.scales import Scales
from arcflow_export.models.layers import LayerNorm, MatMul, ModelPart, RMSNorm, linear_names
from arcflow_runtime.errors import RequestError
from arcflow_runtime.maths.dtypes import FLOAT16_MAX

if TYPE_CHECKING:
    from arcflow_export.student.load import Student

#: A linear whose output exceeds this share of float16's range on the calibration prompts is kept in float32. Other
#: prompts can give larger values, and a block adds two such outputs: a factor of two, one bit of the exponent.
MARGIN = 0.5
#: Linears whose outputs go into attention directly, without a norm. Attention runs in the part's precision, so their
#: outputs are rounded to it even if the linear is kept in float32.
ATTENTION_INPUTS = frozenset({"to_v", "add_v_proj", "q", "k", "v", "q_proj", "k_proj", "v_proj"})
#: The few linears of a VAE decoder feed convolutions, so this part is kept in float32 as a whole or not at all.
_WHOLE = "vae_decoder"


def linears(part: ModelPart) -> dict[str, MatMul]:
    """The linears of a part by layer name: the key of the weight without `.weight`."""
    found = {layer: part.module.get_submodule(name) for layer, name in linear_names(part).items()}
    return {layer: module for layer, module in found.items() if isinstance(module, MatMul)}


def float32_layers(part: ModelPart) -> tuple[str, ...]:
    """Names of the linears that are in float32 in a part of reduced precision; empty for a float32 part."""
    if part.precision == torch.float32:
        return ()
    return tuple(name for name, module in linears(part).items() if module.weight.dtype == torch.float32)


def matching(parts: list[ModelPart], patterns: Iterable[str]) -> list[tuple[ModelPart, list[str]]]:
    """The linears whose names match a pattern, by part.

    Args:
        parts: all parts of a student.
        patterns: fnmatch patterns for layer names.

    Raises:
        RequestError: a pattern matches no linear of a part in reduced precision; the message suggests one.
    """
    layers = {part.name: list(linears(part)) for part in parts if _reduced(part)}
    matched: dict[str, list[str]] = {name: [] for name in layers}
    for pattern in patterns:
        hits = {name: [n for n in names if fnmatchcase(n, pattern)] for name, names in layers.items()}
        if not any(hits.values()):
            raise RequestError(_no_match(pattern, parts, layers))
        for name, more in hits.items():
            matched[name] += more
    return [(part, matched[part.name]) for part in parts if matched.get(part.name)]


def keep_float32(part: ModelPart, layers: Iterable[str]) -> None:
    """Keep some linears of a part in float32, in place, and let its norms accept float32."""
    found = linears(part)
    for name in layers:
        found[name].float()
        if name.rpartition(".")[2] in ATTENTION_INPUTS:
            found[name].output = part.precision
    _replace_norms(part.module)


def measured(path: Path, student: Student, dtype_of: Any) -> tuple[str, ...]:
    """The layers of float16 parts whose outputs exceeded `MARGIN` of float16's range during calibration.

    Args:
        path: the scales file of `arcflow calibrate`.
        student: the student that it must belong to.
        dtype_of: a function from a part's name to its dtype.

    Raises:
        ArcFlowError: the file is damaged, or belongs to another student.
    """
    scales = Scales.load(path)
    scales.check_student(student.family, student.sources)
    return tuple(
        layer
        for part, layers in scales.parts.items()
        if dtype_of(part) == "float16"
        for layer, seen in layers.items()
        if seen.output_amax is not None and max(seen.output_amax) > MARGIN * FLOAT16_MAX
    )


def _reduced(part: ModelPart) -> bool:
    return part.precision != torch.float32 and part.name != _WHOLE


def _no_match(pattern: str, parts: list[ModelPart], layers: dict[str, list[str]]) -> str:
    where = ", ".join(layers) or "none"
    message = f"--keep-float32: {pattern!r} matches no linear of a part in bfloat16 or float16 ({where})"
    for part in parts:
        if any(fnmatchcase(name, pattern) for name in linears(part)):
            if part.name == _WHOLE:
                return f"{message}; keep the decoder as a whole with --precision {_WHOLE}=float32"
            return f"{message}; {part.name} is in float32 already"
    close = difflib.get_close_matches(pattern, [name for names in layers.values() for name in names], 1)
    return message + (f"; did you mean {close[0]}?" if close else "; names are the weights' keys without '.weight'")


def _replace_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.LayerNorm) and child.elementwise_affine:
            setattr(module, name, LayerNorm(child))
        elif isinstance(child, nn.RMSNorm) and child.weight is not None:
            assert child.eps is not None
            setattr(module, name, RMSNorm(child.weight, child.eps))
        else:
            _replace_norms(child)
