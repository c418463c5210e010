"""A torch pipeline with one dtype per component -> modulation in a dtype of its own, chosen linears in float32.

What a mixed bundle does in its graphs, done with hooks on diffusers' and transformers' own modules.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from arcflow_export.student.keep import ATTENTION_INPUTS

_MODULATIONS = (".norm1.linear", ".norm1_context.linear", ".norm.linear", ".img_mod.1", ".txt_mod.1")
#: What precedes a text encoder's names in files or in transformers, by their versions.
_PREFIXES = ("model.language_model.", "language_model.model.", "text_model.", "model.")


def cast_linears(root: nn.Module) -> None:
    """Let every linear take any dtype: its input is cast to its weight's."""
    for module in root.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda m, args: (args[0].to(m.weight.dtype), *args[1:]))


def cast_conditioner(transformer: Any, dtype: torch.dtype, backbone: torch.dtype) -> None:
    """Give a transformer's conditioner another dtype than the rest; the modulation is cast to the rest's."""
    transformer.time_text_embed.to(dtype)
    for name, module in transformer.named_modules():
        if name == "norm_out.linear" or name.endswith(_MODULATIONS):
            module.to(dtype)
            _cast_output(module, backbone)


def keep_float32(root: nn.Module, layers: Iterable[str], dtype: torch.dtype) -> None:
    """Keep linears of a component in float32, in place, and let its norms take float32.

    Args:
        root: the component, after `cast_linears`.
        layers: layer names, as in the graph.
        dtype: the component's.
    """
    modules = {_plain(name): module for name, module in root.named_modules()}
    for name in layers:
        module = modules[_plain(name)].float()
        if name.rpartition(".")[2] in ATTENTION_INPUTS:
            _cast_output(module, dtype)
    for module in root.modules():
        if type(module).__name__.endswith("Norm") and getattr(module, "weight", None) is not None:
            module.float().register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
            _cast_output(module, dtype)


def _cast_output(module: nn.Module, dtype: torch.dtype) -> None:
    module.register_forward_hook(lambda _, args, output: output.to(dtype))


def _plain(name: str) -> str:
    return next((name.removeprefix(p) for p in _PREFIXES if name.startswith(p)), name)
