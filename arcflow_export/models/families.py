"""The functions that make the parts of each family; a new family needs an entry here and its own model file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arcflow_export.families import facts
from arcflow_export.models import flux, qwen, text, vae
from arcflow_export.models.layers import ModelPart
from arcflow_runtime.disk.manifest import DType, Sampler

#: (component's folder, dtype, names of the checkpoint's tensors) -> a text encoder.
MakeEncoder = Callable[[Path, DType, Collection[str]], ModelPart]
#: (transformer's config, K, P, dtype of the conditioner, dtype of the backbone, sampler) -> conditioner and backbone.
MakeNetwork = Callable[[dict[str, Any], int, int, DType, DType, Sampler], list[ModelPart]]
#: (the VAE's config, dtype) -> its decoder.
MakeDecoder = Callable[[dict[str, Any], DType], ModelPart]


@dataclass(frozen=True)
class Makers:
    """The functions of one family: text encoders by component (in the order of the data), network, and decoder."""

    encoders: Mapping[str, MakeEncoder]
    network: MakeNetwork
    decoder: MakeDecoder


MAKERS: dict[str, Makers] = {
    "flux": Makers({"text_encoder": text.clip, "text_encoder_2": text.t5}, flux.build, vae.flux_decoder),
    "qwen-image": Makers({"text_encoder": text.qwen}, qwen.build, vae.qwen_decoder),
}


def makers(family: str) -> Makers:
    """The functions that make the parts of a family.

    Raises:
        SourceError: the family is not in the table of families.
    """
    facts(family)
    return MAKERS[family]
