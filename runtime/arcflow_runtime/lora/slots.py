"""Fit a LoRA to a bundle's slots: layers by part and linear -> factors by part and slot, checked in size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from arcflow_runtime.disk.manifest import MODULATION, LoraSlots, Manifest, SlotLayer
from arcflow_runtime.errors import LoraError
from arcflow_runtime.lora.layers import LoraLayer
from arcflow_runtime.lora.names import spellings

_SHOWN = 3


@dataclass(frozen=True, eq=False)
class Factors:
    """The change of one linear, W' = W + scale * up @ down, with `down` [r, in] and `up` [out, r] in float32."""

    down: np.ndarray
    up: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return int(self.down.shape[0])


@dataclass(frozen=True, eq=False)
class FittedLora:
    """A LoRA that fits a bundle: its factors by part and slot. The modulation table counts as a part."""

    name: str
    parts: Mapping[str, Mapping[str, Factors]]


def fit(name: str, layers: Mapping[tuple[str, str], LoraLayer], manifest: Manifest) -> FittedLora:
    """Find the slot of every layer of a LoRA.

    Args:
        name: what to call the LoRA in messages.
        layers: from `read_lora`, by part and linear.
        manifest: the bundle's.

    Raises:
        LoraError: the bundle has no slots, or a layer has no slot, another size than its slot, or too large a rank. The
            message names the layer.
    """
    slots = manifest.slots()
    if not slots:
        raise LoraError(
            f"{name}: this bundle has no LoRA slots; export with --lora-slots all, or merge the LoRA with --lora"
        )
    unread = {layer for part in slots.values() for layer in part.unread}
    parts: dict[str, dict[str, Factors]] = {}
    without = []
    for (part, linear), layer in layers.items():
        place = _place(manifest, slots, part, linear)
        if place is None:
            if linear not in unread:
                without.append(linear)
            continue
        where, slot = place
        _check(name, linear, layer, slots[where].layers[slot], slots[where].max_rank)
        parts.setdefault(where, {})[slot] = Factors(layer.down, layer.up, layer.scale)
    if without:
        more = f" and {len(without) - _SHOWN} more" if len(without) > _SHOWN else ""
        raise LoraError(
            f"{name} changes {', '.join(without[:_SHOWN])}{more}, which must have slots in this bundle; export with "
            "--lora-slots all, or with patterns that match them"
        )
    if not parts:
        raise LoraError(f"{name} changes only {next(iter(layers))[1]}, whose output this student never reads")
    return FittedLora(name, parts)


def _place(manifest: Manifest, slots: Mapping[str, LoraSlots], part: str, linear: str) -> tuple[str, str] | None:
    """The part and name of a linear's slot. A conditioner that was baked has its slots in the modulation table."""
    for where in (part, MODULATION) if part == "conditioner" else (part,):
        for name in spellings(manifest.family, part, linear):
            if where in slots and name in slots[where].layers:
                return where, name
    return None


def _check(name: str, linear: str, layer: LoraLayer, slot: SlotLayer, max_rank: int) -> None:
    if (layer.in_features, layer.out_features) != (slot.in_features, slot.out_features):
        raise LoraError(
            f"{name}: {linear} must have {slot.in_features} inputs and {slot.out_features} outputs in this bundle, got "
            f"{layer.in_features} and {layer.out_features}; the LoRA was trained for another model"
        )
    if layer.rank > max_rank:
        raise LoraError(
            f"{name}: {linear} must have a rank of at most {max_rank}, the largest of this bundle, got {layer.rank}; "
            f"export with --lora-max-rank {-(-layer.rank // 8) * 8}"
        )
