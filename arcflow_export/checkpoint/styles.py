"""Read a style LoRA in diffusers' or Kohya's naming -> LoRA pairs by component and module.

diffusers' own converters translate the key names.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from arcflow_export.checkpoint.adapter import LoraPair
from arcflow_export.checkpoint.layout import lora_files
from arcflow_export.checkpoint.sources import Location, Resolved, resolve
from arcflow_export.checkpoint.tensors import TensorIndex, TensorRef
from arcflow_export.errors import SourceError
from arcflow_export.families import facts

COMPONENTS = ("transformer", "text_encoder")
_SUPPORTED = "bundles take LoRAs of the linears of transformer and text_encoder"
_T5 = ("lora_te2_", "lora_te3_", "text_encoders.t5xxl.")
#: The base's final projection. A student's three heads replace it, so a LoRA for it is skipped.
REPLACED = "transformer.proj_out"


@dataclass(frozen=True)
class MemoryRef(TensorRef):
    """A LoRA factor that a converter made; it is small and stays in memory."""

    value: torch.Tensor | None = None

    def read(self) -> torch.Tensor:
        """Return the factor."""
        assert self.value is not None
        return self.value


@dataclass(frozen=True)
class Style:
    """One style LoRA: its pairs by component and module, and the modules that were skipped."""

    source: Resolved
    scale: float
    digest: str
    pairs: dict[str, dict[str, LoraPair]]
    skipped: tuple[str, ...]


def parse_lora(text: str) -> tuple[str, float]:
    """Split `PATH[:SCALE]` into path and scale (1.0 when not given).

    Raises:
        ValueError: the scale is not a finite number.
    """
    path, sep, tail = text.rpartition(":")
    # The colon may belong to the path: `text` is a path if it exists and the part before the colon does not.
    if not sep or (Path(text).exists() and not Path(path).exists()):
        return text, 1.0
    try:
        scale = float(tail)
    except ValueError:
        raise ValueError(f"--lora must be PATH or PATH:SCALE with a number for SCALE, got {text!r}") from None
    if not abs(scale) < 1e6:
        raise ValueError(f"--lora: SCALE must be a finite number, got {tail!r}")
    return path, scale


def load_style(location: Location, scale: float, family: str) -> Style:
    """Read a style LoRA and convert its keys to diffusers' module names.

    Args:
        location: a .safetensors file, a directory with one, or a hub id.
        scale: the strength given by the user; it multiplies alpha / rank.
        family: of the base.

    Raises:
        SourceError: the file is not a LoRA or is a pickle, no converter knows its keys, or it changes a component that
            bundles do not have.
    """
    source = resolve(location, "LoRA", lora_files)
    index = TensorIndex.open(source.path, "LoRA")
    file = next(iter(index.values())).path
    with safe_open(file, framework="pt") as f:
        metadata = f.metadata() or {}
    raw = {key: ref.read() for key, ref in index.items()}
    if dora := [k for k in raw if "dora_scale" in k or "lora_magnitude_vector" in k]:
        raise SourceError(f"LoRA: {file} is a DoRA ({dora[0]}), which is not supported; give a plain LoRA")
    for key, value in raw.items():
        # diffusers' converter drops these keys silently.
        if (key.startswith(_T5) or key.endswith((".diff", ".diff_b"))) and value.any():
            raise SourceError(f"LoRA: {file}: key {key!r} is not supported; {_SUPPORTED}")
    state, alphas, adapter = _convert(raw, metadata, family, file)
    pairs: dict[str, dict[str, LoraPair]] = {}
    skipped = []
    for key in sorted(state):
        if key.endswith(".lora_B.weight"):
            continue
        module = key.removesuffix(".lora_A.weight")
        partner = f"{module}.lora_B.weight"
        component, _, name = module.partition(".")
        if not key.endswith(".lora_A.weight") or partner not in state or component not in COMPONENTS:
            raise SourceError(f"LoRA: {file}: key {key!r} is not understood; {_SUPPORTED}")
        if module == REPLACED:
            skipped.append(name)
            continue
        a, b = state[key], state[partner]
        rank = a.shape[0]
        divisor = math.sqrt(rank) if adapter.get(f"{component}.use_rslora") else rank
        strength = scale * _alpha(alphas, adapter, module, component, name, rank) / divisor
        pairs.setdefault(component, {})[name] = LoraPair(_memory(file, key, a), _memory(file, partner, b), strength)
    lonely = [k for k in state if k.endswith(".lora_B.weight") and k.replace("lora_B", "lora_A") not in state]
    if lonely or not pairs:
        raise SourceError(f"LoRA: {file}: " + (f"{lonely[0]} has no lora_A" if lonely else "holds no LoRA factors"))
    return Style(source, scale, index.digest(), pairs, tuple(skipped))


def _convert(
    raw: dict[str, torch.Tensor], metadata: dict[str, str], family: str, file: Path
) -> tuple[dict[str, torch.Tensor], dict[str, float], dict[str, Any]]:
    import diffusers
    from diffusers.utils.state_dict_utils import StateDictType, convert_state_dict_to_peft

    found = facts(family)
    pipeline = getattr(diffusers, found.pipeline)
    try:
        if found.lora_alphas:
            state, alphas = pipeline.lora_state_dict(dict(raw), return_alphas=True)
        else:
            state, alphas = pipeline.lora_state_dict(dict(raw)), None
    except Exception as e:  # the converters raise many types for unknown keys
        raise SourceError(f"LoRA: {file}: diffusers' converter does not know its keys ({e})") from None
    # The converter leaves CLIP's factors in an older naming of diffusers.
    text_encoder = {k: v for k, v in state.items() if k.startswith("text_encoder.")}
    state = {k: v for k, v in state.items() if k not in text_encoder}
    state |= convert_state_dict_to_peft(text_encoder, original_type=StateDictType.DIFFUSERS_OLD)
    text = metadata.get("lora_adapter_metadata")
    try:
        adapter = json.loads(text) if text else {}
    except ValueError as e:
        raise SourceError(
            f"LoRA: {file}: its metadata lora_adapter_metadata is not valid JSON ({e}); save the LoRA again"
        ) from None
    known = {
        k if k.split(".")[0] in (*COMPONENTS, "text_encoder_2") else f"transformer.{k}": v for k, v in state.items()
    }
    return (
        known,
        {k: float(v) for k, v in (alphas or {}).items()},
        adapter if isinstance(adapter, dict) else {},
    )


def _alpha(
    alphas: dict[str, float], adapter: dict[str, Any], module: str, component: str, name: str, rank: int
) -> float:
    """The LoRA alpha of a module: from its own key, else from the adapter's metadata, else the rank (a scale of 1)."""
    for key in (f"{module}.alpha", f"{module}.lora_A.alpha", f"{name}.alpha"):
        if key in alphas:
            return alphas[key]
    pattern = adapter.get(f"{component}.alpha_pattern") or {}
    if name in pattern:
        return float(pattern[name])
    return float(adapter.get(f"{component}.lora_alpha", rank))


def _memory(file: Path, key: str, value: torch.Tensor) -> MemoryRef:
    return MemoryRef(file, key, tuple(value.shape), value.dtype, value.contiguous())
