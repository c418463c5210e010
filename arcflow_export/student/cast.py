"""Give a torch pipeline the mixed precision of a bundle: another dtype for the modulation, some linears in float32.

A bundle does this in its graphs. Here it is done with hooks on diffusers' and transformers' own modules.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from arcflow_export.student.keep import ATTENTION_INPUTS

_MODULATIONS = (".norm1.linear", ".norm1_context.linear", ".norm.linear", ".img_mod.1", ".txt_mod.1")
#: Prefixes of a text encoder's parameter names in files and in transformers; they depend on the version.
_PREFIXES = ("model.language_model.", "language_model.model.", "text_model.", "model.")


def cast_linears(root: nn.Module) -> None:
    """Cast every linear's input to its weight's dtype, so that it accepts any dtype."""
    for module in root.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda m, args: (args[0].to(m.weight.dtype), *args[1:]))


def cast_conditioner(transformer: Any, dtype: torch.dtype, backbone: torch.dtype) -> None:
    """Run a transformer's conditioning layers in `dtype` and cast the modulation to the dtype of the `backbone`."""
    transformer.time_text_embed.to(dtype)
    for name, module in transformer.named_modules():
        if name == "norm_out.linear" or name.endswith(_MODULATIONS):
            module.to(dtype)
            _cast_output(module, backbone)


def keep_float32(root: nn.Module, layers: Iterable[str], dtype: torch.dtype) -> None:
    """Keep some linears of a component in float32, in place, and let its norms accept float32.

    Args:
        root: the component, after `cast_linears`.
        layers: layer names, as in the graph.
        dtype: dtype of the rest of the component.
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
