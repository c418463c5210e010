"""A base checkpoint, an adapter and LoRAs -> checked parts on the meta device and where their weights come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arcflow_runtime.bundle import DType

from .adapter import Adapter, LoraPair, check_pair, load_adapter
from .errors import SourceError
from .merge import MergedWeights, PlainWeights, WeightSource
from .models import flux, qwen, text, vae
from .models.layers import Part
from .sources import Location, Resolved, read_json, resolve
from .styles import Style, load_style
from .tensors import TensorIndex

_FOLDERS = (
    "",
    "transformer",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "scheduler",
)


@dataclass(frozen=True)
class Student:
    """A base with its adapter and LoRAs, checked, nothing read but headers and configs."""

    family: str
    base: Resolved
    config: dict[str, Any]
    vae_config: dict[str, Any]
    adapter: Adapter
    styles: tuple[Style, ...]
    transformer: MergedWeights
    indexes: dict[str, TensorIndex] = field(repr=False)

    def source(self, part: str) -> WeightSource:
        """Where the weights of part `part` come from."""
        if part in ("backbone", "conditioner"):
            return self.transformer
        component = "vae" if part == "vae_decoder" else part
        loras = _pairs(self.styles, component)
        if loras:
            return MergedWeights(self.indexes[component], {}, loras)
        return PlainWeights(self.indexes[component])

    @property
    def base_parameters(self) -> int:
        """Parameters of the base's transformer."""
        return sum(r.numel for r in self.indexes["transformer"].values())

    def parts(self, dtype: DType) -> list[Part]:
        """Every part of the bundle, on the meta device, in the order in which data flows."""
        folder, k, p = self.base.path, self.adapter.num_gaussians, self.adapter.logweights_channels
        if self.family == "flux":
            return [
                text.clip(folder / "text_encoder", dtype),
                text.t5(folder / "text_encoder_2", dtype),
                *flux.build(self.config, k, p, dtype),
                vae.decoder(self.vae_config, self.family, dtype),
            ]
        return [
            text.qwen(folder / "text_encoder", dtype),
            *qwen.build(self.config, k, p, dtype),
            vae.decoder(self.vae_config, self.family, dtype),
        ]


def load_student(base: Location, adapter: Location, loras: list[tuple[Location, float]]) -> Student:
    """Find, open and check everything an export needs, reading only configs and headers.

    Raises:
        SourceError: anything is missing, damaged, or does not fit; the message names it.
    """
    base_dir = resolve(base, "base checkpoint", _FOLDERS)
    index = read_json(base_dir.path / "model_index.json", "base checkpoint")
    pipelines = {"FluxPipeline": "flux", "QwenImagePipeline": "qwen-image"}
    family = pipelines.get(str(index.get("_class_name")))
    if family is None:
        raise SourceError(
            f"base checkpoint: {base_dir.path / 'model_index.json'}: _class_name must be one of {sorted(pipelines)}, "
            f"got {index.get('_class_name')!r}"
        )
    components = ["transformer", "vae", "text_encoder"] + (["text_encoder_2"] if family == "flux" else [])
    indexes = {c: TensorIndex.open(base_dir.path / c, f"base checkpoint, {c}") for c in components}
    config = read_json(base_dir.path / "transformer" / "config.json", "base checkpoint")
    vae_config = read_json(base_dir.path / "vae" / "config.json", "base checkpoint")
    adapter_dir = resolve(adapter, "adapter")
    arc = load_adapter(adapter_dir, config, indexes["transformer"])
    if arc.family != family:
        raise SourceError(f"adapter: it is for {arc.family}, the base checkpoint is {family}")
    styles = tuple(load_style(location, scale, family) for location, scale in loras)
    for style in styles:
        for component, pairs in style.pairs.items():
            for module, pair in pairs.items():
                check_pair(module, pair, indexes[component], f"LoRA {style.source.name}")
    merged: dict[str, list[LoraPair]] = {m: [pair] for m, pair in arc.loras.items()}
    for module, more in _pairs(styles, "transformer").items():
        merged.setdefault(module, []).extend(more)
    weights = MergedWeights(indexes["transformer"], arc.full, merged)
    return Student(family, base_dir, config, vae_config, arc, styles, weights, indexes)


def _pairs(styles: tuple[Style, ...], component: str) -> dict[str, list[LoraPair]]:
    out: dict[str, list[LoraPair]] = {}
    for style in styles:
        for module, pair in style.pairs.get(component, {}).items():
            out.setdefault(module, []).append(pair)
    return out


def tokenizer_folders(student: Student) -> dict[str, Path]:
    """The tokenizer folders of the base, by the bundle's name for them."""
    names = ["tokenizer", "tokenizer_2"] if student.family == "flux" else ["tokenizer"]
    return {n: student.base.path / n for n in names}
