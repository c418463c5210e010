"""Open a style LoRA: a file, directory or hub id -> LoRA pairs by component and linear.

The runtime's reader, `arcflow_runtime.lora`, knows the files' formats.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from arcflow_export.checkpoint.adapter import LoraPair
from arcflow_export.checkpoint.layout import lora_files
from arcflow_export.checkpoint.sources import Location, Resolved, check_present, resolve
from arcflow_export.checkpoint.tensors import TensorRef, digest_of, weight_files
from arcflow_export.errors import SourceError
from arcflow_runtime.disk.manifest import Sampler
from arcflow_runtime.errors import LoraError
from arcflow_runtime.lora.layers import LoraFile, LoraLayer
from arcflow_runtime.lora.read import read_lora


@dataclass(frozen=True)
class MemoryRef(TensorRef):
    """A LoRA factor in float32; it is small and stays in memory."""

    value: np.ndarray | None = None

    def read(self) -> torch.Tensor:
        """Return a copy of the factor, which torch may write to."""
        assert self.value is not None
        return torch.from_numpy(self.value.copy())


@dataclass(frozen=True)
class Style:
    """One style LoRA: the file as read, the user's scale, and the pairs by component and linear."""

    source: Resolved
    scale: float
    digest: str
    lora: LoraFile
    pairs: dict[str, dict[str, LoraPair]]


def load_style(location: Location, scale: float, family: str, sampler: Sampler = "momentum") -> Style:
    """Read a style LoRA.

    Args:
        location: a .safetensors file, a directory with one, or a hub id.
        scale: the strength given by the user; it multiplies the file's own scale.
        family: of the base.
        sampler: of the student.

    Raises:
        SourceError: the file is damaged, not a LoRA or for another model, or holds something that is not supported; the
            message names the first key.
    """
    source = resolve(location, "LoRA", lora_files)
    file, *others = weight_files(source.path, "LoRA")
    if others:
        raise SourceError(
            f"LoRA: {source.path} must hold one .safetensors file, got {1 + len(others)} shards; join them"
        )
    check_present(file, "LoRA")
    try:
        lora = read_lora(file, family, sampler)
    except LoraError as e:
        raise SourceError(str(e)) from None
    pairs: dict[str, dict[str, LoraPair]] = {}
    for (_, name), layer in lora.layers.items():
        pairs.setdefault(layer.component, {})[name] = _pair(file, layer, scale)
    return Style(source, scale, _digest(lora), lora, pairs)


def _digest(lora: LoraFile) -> str:
    """SHA-256 of the file, and of the adapter_config.json that belongs to it: that can change the scale."""
    digest = digest_of([lora.path])
    return digest if lora.config is None else hashlib.sha256(digest.encode() + lora.config.read_bytes()).hexdigest()


def _pair(file: Path, layer: LoraLayer, scale: float) -> LoraPair:
    a, b = (MemoryRef(file, layer.key, v.shape, torch.float32, v) for v in (layer.down, layer.up))
    return LoraPair(a, b, scale * layer.scale)
