"""Build diffusers' pipeline for a student: base checkpoint, adapter and LoRAs -> the pipeline and the three heads.

`reference.TorchStudent` calls this. The adapter's LoRA factors stay unmerged, as in the reference. If the base's
weights stay on disk, only the factors, the heads and the tensors that the adapter replaces are in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import nn

from arcflow_export.checkpoint.adapter import HEADS, Adapter
from arcflow_export.families import facts
from arcflow_export.models.student import Heads
from arcflow_export.student.load import Student
from arcflow_export.student.lora import Factors, read_factors
from arcflow_export.student.memory import component_dtypes
from arcflow_export.student.offload import DiskWeights, empty_components, merge, read_when_used
from arcflow_export.student.straight import Whole


def assemble(student: Student, dtypes: Mapping[str, torch.dtype], device: str, on_disk: bool) -> tuple[Any, nn.Module]:
    """Load a pipeline and give it the student's adapter and LoRAs; without an adapter, the heads pass the velocity on.

    Args:
        student: from `load_student`.
        dtypes: dtype of the weights, by the part's name in a bundle.
        device: torch device to run on.
        on_disk: leave the weights of transformer and text encoders in their files until they are used.

    Raises:
        SourceError: `on_disk` is True and the checkpoint lacks a weight.
    """
    components = component_dtypes(student, dtypes)
    empty = empty_components(student, components) if on_disk else {}
    given = {name: module for name, (module, _) in empty.items()}
    if student.vae is not None:
        given["vae"] = load_vae(student.vae.path, student.vae_config, components["vae"])
    pipe = getattr(diffusers, facts(student.family).pipeline).from_pretrained(
        student.base.path, dtype=components | {"default": dtypes["backbone"]}, use_safetensors=True, **given
    )
    pipe.set_progress_bar_config(disable=True)
    encoders = {name: getattr(pipe, name) for name in facts(student.family).encoders}
    modules = {"transformer": pipe.transformer, **encoders}
    styles = [read_factors(style.lora.path, style.scale, modules) for style in student.styles]
    heads: nn.Module = Whole()
    if student.adapter is not None:
        heads = _attach(pipe.transformer, student.adapter, dtypes["backbone"])
    _add_styles(pipe.transformer, [s.get("transformer", {}) for s in styles], dtypes["backbone"])
    for name, encoder in encoders.items():
        _merge_text_loras(encoder, [s.get(name, {}) for s in styles], empty[name][1] if on_disk else None)
    if hasattr(pipe.text_encoder, "lm_head"):
        pipe.text_encoder.lm_head = nn.Identity()  # only hidden states are used, and the logits would be large
    if not on_disk:
        pipe.to(device)
    for module, weights in empty.values():
        read_when_used(module, weights, device)
    pipe.vae.to(device)
    return pipe, heads.to(device)


def load_vae(folder: Path, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Load a VAE with the class of diffusers that its `config.json` names."""
    return getattr(diffusers, config["_class_name"]).from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)


def _attach(transformer: Any, adapter: Adapter, dtype: torch.dtype) -> Heads:
    """Put the adapter into a base transformer: full tensors, heads, and unmerged LoRA factors."""
    file = next(iter(adapter.index.values())).path
    state = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
    heads = Heads(
        transformer.inner_dim, transformer.config.in_channels, adapter.num_gaussians, adapter.logweights_channels
    )
    heads.load_state_dict({k: v for k, v in state.items() if k.split(".")[0] in HEADS})
    full = {k: v.to(dtype) for k, v in state.items() if "lora" not in k and k.split(".")[0] not in HEADS}
    _, unexpected = transformer.load_state_dict(full, strict=False, assign=True)
    assert not unexpected, unexpected
    transformer.proj_out = nn.Identity()  # the heads read its input instead
    if lora := {k: v.to(dtype) for k, v in state.items() if "lora" in k}:
        _load_factors(transformer, lora, "arcflow")
    return heads.to(dtype).eval()


def _add_styles(transformer: Any, styles: Sequence[Mapping[str, Factors]], dtype: torch.dtype) -> None:
    """Add the unmerged factors of LoRAs; those of a layer that the heads replace change nothing."""
    for i, style in enumerate(styles):
        factors = {}
        for module, pair in style.items():
            if isinstance(transformer.get_submodule(module), nn.Identity):
                continue
            factors[f"{module}.lora_A.weight"] = pair.a.to(dtype)
            factors[f"{module}.lora_B.weight"] = pair.b.to(dtype)
        if factors:
            _load_factors(transformer, factors, f"style{i}")
    names = list(getattr(transformer, "peft_config", {}))
    if len(names) > 1:
        transformer.set_adapters(names, [1.0] * len(names))


def _load_factors(transformer: Any, factors: dict[str, torch.Tensor], name: str) -> None:
    transformer.load_lora_adapter(dict(factors), prefix=None, adapter_name=name, low_cpu_mem_usage=True)
    # peft moves factors to the device of their linear's weight. That is "meta" if the weight stays on disk.
    for key, value in factors.items():
        factor = transformer.get_submodule(f"{key.removesuffix('.weight')}.{name}")
        if factor.weight.is_meta:
            factor.weight = nn.Parameter(value, requires_grad=False)


def _merge_text_loras(encoder: nn.Module, styles: Sequence[Mapping[str, Factors]], weights: DiskWeights | None) -> None:
    for style in styles:
        for module, pair in style.items():
            if weights is not None:
                weights.add_lora(f"{module}.weight", pair)
            else:
                with torch.no_grad():
                    merge(encoder.get_parameter(f"{module}.weight"), pair)
