"""Open a student (base checkpoint, adapter, LoRAs) and check it: -> parts on the meta device and their weight sources.

Without an adapter it is a straight student: the base itself, or a LoRA of it that needs fewer steps.

Export, calibration, verification and evaluation all start from `load_student`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers

from arcflow_export.checkpoint.adapter import SUB_PIXELS, Adapter, LoraPair, check_pair, load_adapter, read_modes
from arcflow_export.checkpoint.layout import (
    MODEL_INDEX,
    VAE_STEM,
    adapter_files,
    base_files,
    lora_files,
    no_model_index,
    read_family,
    vae_files,
)
from arcflow_export.checkpoint.merge import MergedWeights, PlainWeights, WeightSource
from arcflow_export.checkpoint.sources import Location, Resolved, measure, read_json, resolve
from arcflow_export.checkpoint.styles import Style, load_style
from arcflow_export.checkpoint.tensors import TensorIndex
from arcflow_export.errors import SourceError
from arcflow_export.families import PACKED_CHANNELS, UNSUPPORTED_SETTINGS, facts
from arcflow_export.models.families import makers
from arcflow_export.models.layers import ModelPart
from arcflow_runtime.disk.families import facts as family_facts
from arcflow_runtime.disk.manifest import DType, Sampler, Source
from arcflow_runtime.disk.signatures import signature
from arcflow_runtime.lora.names import spellings


@dataclass(frozen=True)
class Student:
    """A base with its adapter and LoRAs, checked; only headers and configs have been read.

    `adapter` is None for a straight student.
    """

    family: str
    base: Resolved
    config: dict[str, Any]
    vae_config: dict[str, Any]
    adapter: Adapter | None
    styles: tuple[Style, ...]
    transformer: MergedWeights
    indexes: dict[str, TensorIndex] = field(repr=False)
    #: The VAE given in place of the base's, or None; `vae_config` and `indexes` are then of this one.
    vae: Resolved | None = None

    @property
    def sampler(self) -> Sampler:
        """How a step is computed from the network's outputs."""
        return self.outline.sampler

    @property
    def base_bytes(self) -> int:
        """Bytes of the base's weights as stored."""
        return sum(ref.num_bytes for index in self.indexes.values() for ref in index.values())

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapter's and LoRAs' weights as stored."""
        loras = sum(style.lora.path.stat().st_size for style in self.styles)
        return loras + (0 if self.adapter is None else sum(ref.num_bytes for ref in self.adapter.index.values()))

    @property
    def lora_bytes(self) -> int:
        """Bytes of the LoRAs' factors in memory, in float32; the linears of a fused one may share A."""
        layers = [layer for style in self.styles for layer in style.lora.layers.values()]
        factors = {id(values): values.nbytes for layer in layers for values in (layer.down, layer.up)}
        return sum(factors.values())

    def source(self, part: str) -> WeightSource:
        """The source of the weights of part `part`."""
        if part in ("backbone", "conditioner"):
            return self.transformer
        component = "vae" if part == "vae_decoder" else part
        loras = _pairs(self.styles, component)
        if loras:
            return MergedWeights(self.indexes[component], {}, loras)
        return PlainWeights(self.indexes[component])

    @property
    def base_parameters(self) -> int:
        """Number of parameters of the base's transformer."""
        return sum(r.numel for r in self.indexes["transformer"].values())

    @cached_property
    def sources(self) -> tuple[Source, Source | None, tuple[Source, ...]]:
        """Base, adapter and LoRAs by name and digest, as a bundle's provenance records them; reads the files once."""
        adapter = self.adapter
        return (
            Source(self.base.name, self.base.revision, self.transformer.index.digest()),
            None if adapter is None else Source(adapter.source.name, adapter.source.revision, adapter.index.digest()),
            tuple(Source(s.source.name, s.source.revision, s.digest, s.scale) for s in self.styles),
        )

    @property
    def vae_source(self) -> Source | None:
        """The VAE given in place of the base's, as a bundle's provenance records it; None if there is none."""
        vae = self.vae
        return None if vae is None else Source(vae.name, vae.revision, self.indexes["vae"].digest())

    def parts(self, dtype: DType | Callable[[str], DType]) -> list[ModelPart]:
        """Every part of the bundle, on the meta device, in the order in which data flows.

        Args:
            dtype: of all parts, or a function from a part's name to its dtype.
        """
        return self.outline.parts(dtype)

    @property
    def outline(self) -> Outline:
        """The part of the student that is known from its configs alone."""
        arc = self.adapter
        k, p = (1, SUB_PIXELS) if arc is None else (arc.num_gaussians, arc.logweights_channels)
        sampler: Sampler = "linear" if arc is None else "momentum"
        return Outline(self.family, self.base.path, self.config, self.vae_config, k, p, self.indexes, sampler)


@dataclass(frozen=True)
class Outline:
    """A student as its configs describe it: family, network sizes, K modes and P sub-pixels.

    `folder` is the base's folder. `keys` has the names of its tensors by component, and is empty without its weights.
    K is 1 for a straight student.
    """

    family: str
    folder: Path
    config: dict[str, Any]
    vae_config: dict[str, Any]
    num_gaussians: int
    logweights_channels: int
    keys: Mapping[str, Collection[str]]
    sampler: Sampler = "momentum"

    @property
    def width(self) -> int:
        """Width of the transformer: number of heads times head dimension."""
        return int(self.config["num_attention_heads"] * self.config["attention_head_dim"])

    @property
    def guidance(self) -> bool:
        """True if the student takes a guidance scale."""
        embeds = bool(self.config.get("guidance_embeds"))
        return embeds and signature(self.family, "conditioner").input("guidance") is not None

    def parts(self, dtype: DType | Callable[[str], DType]) -> list[ModelPart]:
        """See `Student.parts`."""
        of = dtype if callable(dtype) else lambda _: dtype
        folder, k, p = self.folder, self.num_gaussians, self.logweights_channels
        make = makers(self.family)
        return [
            *(encoder(folder / name, of(name), self.keys.get(name, ())) for name, encoder in make.encoders.items()),
            *make.network(self.config, k, p, of("conditioner"), of("backbone"), self.sampler),
            make.decoder(self.vae_config, of("vae_decoder")),
        ]


def read_outline(base: Location, adapter: Location | None) -> Outline:
    """Read a student's configs without its weights; downloads the configs if they are not here.

    Raises:
        SourceError: a file is missing or damaged; the message names it.
    """
    folder = resolve(base, "base checkpoint", base_files, weights=False).path
    if not (folder / MODEL_INDEX).exists():
        raise SourceError(no_model_index("base checkpoint", folder))
    family = read_family(folder / MODEL_INDEX, "base checkpoint")
    config = _transformer_config(folder / "transformer" / "config.json", family)
    vae_config = read_json(folder / "vae" / "config.json", "base checkpoint")
    if adapter is None:
        return Outline(family, folder, config, vae_config, 1, SUB_PIXELS, {}, "linear")
    k, p = read_modes(resolve(adapter, "adapter", adapter_files, weights=False))
    return Outline(family, folder, config, vae_config, k, p, {})


def load_student(
    base: Location, adapter: Location | None, loras: list[tuple[Location, float]], vae: Location | None = None
) -> Student:
    """Find, download, open and check a base, an adapter and LoRAs; reads only configs and headers.

    Args:
        base: the base checkpoint.
        adapter: the ArcFlow adapter; None for a straight student.
        loras: style LoRAs with their scales.
        vae: a VAE to decode with in place of the base's.

    Raises:
        SourceError: a file is missing or damaged, or does not fit the others; the message names it.
    """
    # Check all three before the first download, which may take an hour.
    measure(base, "base checkpoint", base_files)
    if adapter is not None:
        measure(adapter, "adapter", adapter_files)
    for location, _ in loras:
        measure(location, "LoRA", lora_files)
    if vae is not None:
        measure(vae, "VAE", vae_files)
    base_dir = resolve(base, "base checkpoint", base_files)
    if not (base_dir.path / MODEL_INDEX).exists():
        raise SourceError(no_model_index("base checkpoint", base_dir.path))
    family = read_family(base_dir.path / MODEL_INDEX, "base checkpoint")
    components = ["transformer", "vae", *facts(family).encoders]
    indexes = {c: TensorIndex.open(base_dir.path / c, f"base checkpoint, {c}") for c in components}
    config = _transformer_config(base_dir.path / "transformer" / "config.json", family)
    vae_config = read_json(base_dir.path / "vae" / "config.json", "base checkpoint")
    vae_dir = None if vae is None else resolve(vae, "VAE", vae_files)
    if vae_dir is not None:
        vae_config = read_json(vae_dir.path / "config.json", "VAE")
        single = vae_dir.path / f"{VAE_STEM}.safetensors"
        indexes["vae"] = TensorIndex.open(single if single.exists() else vae_dir.path, "VAE")
    arc = None
    if adapter is not None:
        arc = load_adapter(resolve(adapter, "adapter", adapter_files), config, indexes["transformer"])
    if arc is not None and arc.family != family:
        raise SourceError(
            f"adapter: it is made for {arc.family}, but the base checkpoint is {family}; give an adapter of {family}"
        )
    sampler: Sampler = "linear" if arc is None else "momentum"
    styles = tuple(_fitted(load_style(location, scale, family, sampler), indexes) for location, scale in loras)
    merged: dict[str, list[LoraPair]] = {} if arc is None else {m: [pair] for m, pair in arc.loras.items()}
    for module, more in _pairs(styles, "transformer").items():
        merged.setdefault(module, []).extend(more)
    weights = MergedWeights(indexes["transformer"], {} if arc is None else arc.full, merged)
    return Student(family, base_dir, config, vae_config, arc, styles, weights, indexes, vae_dir)


def _transformer_config(path: Path, family: str) -> dict[str, Any]:
    """The base transformer's config, with the class's defaults for missing keys.

    For example, FLUX.1-dev's own file has no `axes_dims_rope`.
    """
    data = read_json(path, "base checkpoint")
    signature = inspect.signature(getattr(diffusers, facts(family).transformer).__init__).parameters.values()
    config = {p.name: p.default for p in signature if p.default is not inspect.Parameter.empty} | data
    for key in ("in_channels", "num_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim"):
        if not isinstance(config[key], int) or config[key] < 1:
            raise SourceError(f"base checkpoint: {path}: {key} must be a positive integer, got {config[key]!r}")
    # The class's default is a tuple. The adapter's config, which it is compared with, has a list.
    config["axes_dims_rope"] = axes = list(config["axes_dims_rope"] or ())
    if sum(axes) != config["attention_head_dim"]:
        raise SourceError(
            f"base checkpoint: {path}: axes_dims_rope must add up to attention_head_dim "
            f"{config['attention_head_dim']}, got {axes}"
        )
    if config["in_channels"] != PACKED_CHANNELS:
        raise SourceError(
            f"base checkpoint: {path}: in_channels must be {PACKED_CHANNELS}, got {config['in_channels']}; "
            "students of inpainting and control models are not supported"
        )
    for key in UNSUPPORTED_SETTINGS:
        if config.get(key):
            raise SourceError(f"base checkpoint: {path}: {key} is not supported; the base must be Qwen/Qwen-Image's")
    return config


def _fitted(style: Style, indexes: dict[str, TensorIndex]) -> Style:
    """Rename a style's linears as in the base's files, and check every pair against its linear."""
    pairs: dict[str, dict[str, LoraPair]] = {}
    for (part, name), layer in style.lora.layers.items():
        index, pair = indexes[layer.component], style.pairs[layer.component][name]
        names = spellings(style.lora.family, part, name)
        there = next((n for n in names if f"{n}.weight" in index), name)
        check_pair(there, pair, index, f"LoRA {style.source.name}, module {layer.key!r}", layer.component)
        pairs.setdefault(layer.component, {})[there] = pair
    return dataclasses.replace(style, pairs=pairs)


def _pairs(styles: tuple[Style, ...], component: str) -> dict[str, list[LoraPair]]:
    out: dict[str, list[LoraPair]] = {}
    for style in styles:
        for module, pair in style.pairs.get(component, {}).items():
            out.setdefault(module, []).append(pair)
    return out


def tokenizer_folders(student: Student) -> dict[str, Path]:
    """The tokenizer folders of the base, by the bundle's name for them."""
    return {name: student.base.path / name for name in family_facts(student.family).tokenizers}
