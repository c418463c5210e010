"""Read a style LoRA for the student in torch, independently of the exporter's reader: file and modules -> factors.

It goes the other way round. The exporter's reader translates a key of the file to a linear. This one lists, for each
linear of diffusers' and transformers' modules, every key that it may have in a file, and looks those up. A fused linear
is cut by the sizes of the modules, and peft's own function matches patterns. So a mistake in one of the two shows as a
difference in `arcflow verify`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import nn

from arcflow_export.errors import SourceError

#: The authors' names of FLUX's linears, with those of diffusers that they hold, in order.
_AUTHORS = {
    "double_blocks.#.img_attn.qkv": ["transformer_blocks.#.attn.to_q", "@.to_k", "@.to_v"],
    "double_blocks.#.txt_attn.qkv": ["transformer_blocks.#.attn.add_q_proj", "@.add_k_proj", "@.add_v_proj"],
    "double_blocks.#.img_attn.proj": ["transformer_blocks.#.attn.to_out.0"],
    "double_blocks.#.txt_attn.proj": ["transformer_blocks.#.attn.to_add_out"],
    "double_blocks.#.img_mlp.0": ["transformer_blocks.#.ff.net.0.proj"],
    "double_blocks.#.img_mlp.2": ["transformer_blocks.#.ff.net.2"],
    "double_blocks.#.txt_mlp.0": ["transformer_blocks.#.ff_context.net.0.proj"],
    "double_blocks.#.txt_mlp.2": ["transformer_blocks.#.ff_context.net.2"],
    "double_blocks.#.img_mod.lin": ["transformer_blocks.#.norm1.linear"],
    "double_blocks.#.txt_mod.lin": ["transformer_blocks.#.norm1_context.linear"],
    "double_blocks.#.processor.qkv_lora1": ["transformer_blocks.#.attn.to_q", "@.to_k", "@.to_v"],
    "double_blocks.#.processor.qkv_lora2": ["transformer_blocks.#.attn.add_q_proj", "@.add_k_proj", "@.add_v_proj"],
    "double_blocks.#.processor.proj_lora1": ["transformer_blocks.#.attn.to_out.0"],
    "double_blocks.#.processor.proj_lora2": ["transformer_blocks.#.attn.to_add_out"],
    "single_blocks.#.linear1": [
        "single_transformer_blocks.#.attn.to_q",
        "@.to_k",
        "@.to_v",
        "single_transformer_blocks.#.proj_mlp",
    ],
    "single_blocks.#.processor.qkv": ["single_transformer_blocks.#.attn.to_q", "@.to_k", "@.to_v"],
    "single_blocks.#.linear2": ["single_transformer_blocks.#.proj_out"],
    "single_blocks.#.processor.proj": ["single_transformer_blocks.#.proj_out"],
    "single_blocks.#.modulation.lin": ["single_transformer_blocks.#.norm.linear"],
    "transformer_blocks.#.attn.to_qkv": ["transformer_blocks.#.attn.to_q", "@.to_k", "@.to_v"],
    "transformer_blocks.#.attn.to_added_qkv": ["transformer_blocks.#.attn.add_q_proj", "@.add_k_proj", "@.add_v_proj"],
    "transformer_blocks.#.attn.to_out": ["transformer_blocks.#.attn.to_out.0"],
    "single_transformer_blocks.#.attn.to_qkv": ["single_transformer_blocks.#.attn.to_q", "@.to_k", "@.to_v"],
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
}
_WRAPPERS = re.compile(r"base_model\.model\.|\bmodule\.|_orig_mod\.")
_SWAPPED = "final_layer.adaLN_modulation.1"
#: What comes before a module's name in a file, by component; with dots for the underscores of flat names.
_PREFIXES = {
    "transformer": "transformer diffusion_model model.diffusion_model lora.transformer lora.unet lycoris",
    "text_encoder": "text_encoder lora.te lora.te1 text_encoders.clip_l.transformer text_encoders.clip_l "
    "text_encoders.qwen25_7b.transformer text_encoders.qwen25_7b",
    "text_encoder_2": "text_encoder_2 lora.te2 lora.te3 text_encoders.t5xxl.transformer text_encoders.t5xxl",
}
#: What may come before a text encoder's layers, besides the module's own name.
_INNER = ("", "text_model.", "model.language_model.", "language_model.model.", "language_model.", "model.")
_FACTOR = re.compile(
    r"(.+?)(?:[._]lora)?(?:\.lora_linear_layer)?\.(?:lora_)?(A|B|down|up)(?:\.(?!weight$)[^.]+)?(?:\.weight)?"
)


@dataclass(frozen=True)
class Factors:
    """LoRA factors of one linear, A [r, in] and B [out, r] in float32; the scale is in B."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True)
class _Rows:
    """A linear of a module, and its rows of B in the file."""

    component: str
    linear: str
    start: int
    stop: int
    swapped: bool


def read_factors(path: Path, scale: float, modules: Mapping[str, nn.Module]) -> dict[str, dict[str, Factors]]:
    """Read a LoRA file.

    Args:
        path: the .safetensors file.
        scale: the user's.
        modules: diffusers' and transformers' modules, by component.

    Returns:
        Factors by component and name of the linear in its module.

    Raises:
        SourceError: a key of a factor belongs to no linear.
    """
    with safe_open(path, framework="pt") as f:
        metadata = f.metadata() or {}
        pairs = _pairs(f.keys())
        tensors = {key: f.get_tensor(key) for key in f.keys() if key.endswith(".alpha") or key in _keys(pairs)}  # noqa: SIM118
    config, named = path.with_name("adapter_config.json"), path.with_name("adapter_model.safetensors")
    settings = json.loads(config.read_text()) if config.exists() and (path == named or not named.exists()) else {}
    places = {_flat(alias): rows for alias, rows in _places(modules)}
    out: dict[str, dict[str, Factors]] = {}
    for stem, (down, up) in pairs.items():
        name = _WRAPPERS.sub("", stem).replace(".processor.to_", ".to_")
        a, b = (tensors[key].float().flatten(1) for key in (down, up))
        if (rows := places.get(_flat(name))) is None:
            if not b.any():
                continue  # it changes nothing
            raise SourceError(f"LoRA: {path}: the torch side knows no linear for {down!r}")
        for row in rows:
            names = (name, row.linear) if len(rows) == 1 else (name,)
            own = tensors.get(f"{stem}.alpha", tensors.get(f"{stem.removeprefix('transformer.')}.alpha"))
            strength = scale * _strength(names, row.component, len(a), own, metadata, settings)
            part = torch.cat(b.chunk(2)[::-1]) if row.swapped else b[row.start : row.stop]
            found = Factors(a, (part.double() * strength).float())
            out.setdefault(row.component, {})[row.linear] = found
    return out


def _pairs(keys: list[str]) -> dict[str, tuple[str, str]]:
    """A module's name in the file -> the keys of A and B."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        match = _FACTOR.fullmatch(key)
        if match and ("lora" in key or "processor" in key):
            found.setdefault(match[1], {})["A" if match[2] in ("A", "down") else "B"] = key
    return {name: (pair["A"], pair["B"]) for name, pair in found.items() if len(pair) == 2}


def _keys(pairs: Mapping[str, tuple[str, str]]) -> set[str]:
    return {key for pair in pairs.values() for key in pair}


def _places(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, list[_Rows]]]:
    """Every name that a module may have in a file -> the linears that it changes."""
    for component, module in modules.items():
        sizes = {name: len(child.weight) for name, child in module.named_modules() if isinstance(child, nn.Linear)}
        for name, size in sizes.items():
            core = re.sub(rf"^({'|'.join(map(re.escape, _INNER[1:]))})", "", name)
            inner = ("",) if component == "transformer" else _INNER
            for prefix in _prefixes(component):
                for before in inner:
                    yield f"{prefix}{before}{core}", [_Rows(component, name, 0, size, False)]
        if component == "transformer":
            for alias, rows in _fused(sizes):
                for prefix in _prefixes(component):
                    yield f"{prefix}{alias}", rows


def _prefixes(component: str) -> list[str]:
    return ["", *(f"{prefix}." for prefix in _PREFIXES[component].split())]


def _fused(sizes: Mapping[str, int]) -> Iterator[tuple[str, list[_Rows]]]:
    numbers = sorted({int(n) for name in sizes for n in re.findall(r"blocks\.(\d+)\.", name)})
    for theirs, ours in _AUTHORS.items():
        for number in numbers if "#" in theirs else [0]:
            names = [n.replace("@", ours[0].rpartition(".")[0]).replace("#", str(number)) for n in ours]
            if not all(name in sizes for name in names):
                continue
            start, rows = 0, []
            for name in names:
                rows.append(_Rows("transformer", name, start, start + sizes[name], theirs == _SWAPPED))
                start += sizes[name]
            yield theirs.replace("#", str(number)), rows


def _strength(
    names: tuple[str, ...],
    component: str,
    rank: int,
    own: torch.Tensor | None,
    metadata: Mapping[str, str],
    settings: Mapping[str, Any],
) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA; 1 without an alpha."""
    stated = dict(settings)
    for key, value in (json.loads(metadata.get("lora_adapter_metadata") or "{}") | dict(metadata)).items():
        place, _, setting = key.rpartition(".")
        if place in ("", component) and setting in ("lora_alpha", "alpha_pattern", "use_rslora"):
            stated[setting] = json.loads(value.lower()) if isinstance(value, str) else value
    if "lora_alpha" not in stated and "ss_network_alpha" in metadata and own is None:
        stated["lora_alpha"] = metadata["ss_network_alpha"]
    alpha = stated.get("lora_alpha", rank)
    patterns = stated.get("alpha_pattern") or {}
    for name in names:
        alpha = patterns.get(get_pattern_key(patterns, name), alpha)
    if own is not None:
        alpha = own.double().item()
    return float(alpha) / (rank**0.5 if stated.get("use_rslora") else rank)


def _flat(name: str) -> str:
    return name.replace(".", "_")
