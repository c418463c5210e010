"""Prepare the LoRAs of a request: fitted LoRAs and their scales -> the graphs' inputs, by part and name (rule B14)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from arcflow_runtime.disk.manifest import MODULATION, LoraSlots, Manifest, SlotLayer, lora_a, lora_b
from arcflow_runtime.disk.signatures import signature
from arcflow_runtime.errors import RequestError
from arcflow_runtime.lora.slots import Factors, FittedLora
from arcflow_runtime.maths.dtypes import cast

#: Identifies LoRAs with their scales: (number of the loaded LoRA, scale), sorted.
SetKey = tuple[tuple[int, float], ...]


@dataclass(frozen=True, eq=False)
class PreparedLoras:
    """LoRAs that are ready to run.

    Attributes:
        key: identifies the LoRAs and their scales.
        text_key: the same for those that change a text encoder; equal keys give equal embeddings.
        inputs: part -> input -> array [in, R/8, 8] or [R/8, 8, out], in the slot's dtype and read-only. Layers that no
            LoRA changes are left out.
        ranks: part -> layer -> its rank R.
    """

    key: SetKey
    text_key: SetKey
    inputs: Mapping[str, Mapping[str, np.ndarray]] = field(repr=False)
    ranks: Mapping[str, Mapping[str, int]] = field(repr=False)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for arrays in self.inputs.values() for array in arrays.values())

    def of(self, part: str) -> Mapping[str, np.ndarray]:
        """The inputs of one part; empty if no LoRA changes it."""
        return self.inputs.get(part, {})


#: No LoRA at all.
NO_LORAS = PreparedLoras((), (), {}, {})


def blank_loras(manifest: Manifest, rank: int) -> PreparedLoras:
    """A LoRA of zeros that has this rank in every slot, for warm-up.

    Raises:
        RequestError: the bundle has no slots, or takes no such rank.
    """
    slots = manifest.slots()
    largest = max((part.max_rank for part in slots.values()), default=0)
    if not 1 <= rank <= largest:
        raise RequestError(f"lora_ranks must be between 1 and {largest} for this bundle, got {rank}")
    ranks = {part: dict.fromkeys(found.layers, rank) for part, found in slots.items() if part != MODULATION}
    # Loaded LoRAs are numbered from 0 on.
    return PreparedLoras(((-1, float(rank)),), (), {}, ranks)


def prepare(manifest: Manifest, loras: Sequence[tuple[int, FittedLora, float]]) -> PreparedLoras:
    """Join LoRAs along the rank, with their scales in the second factor.

    Args:
        manifest: the bundle's.
        loras: (number, LoRA, scale) of each; the number identifies it.

    Raises:
        RequestError: a layer's ranks add up to more than the bundle takes, or a factor overflows the slot's dtype; the
            message names the layer.
    """
    inputs: dict[str, dict[str, np.ndarray]] = {}
    ranks: dict[str, dict[str, int]] = {}
    for part, slots in manifest.slots().items():
        for name, slot in slots.layers.items():
            found = [(lora.name, lora.parts[part][name], scale) for _, lora, scale in loras if _has(lora, part, name)]
            if found:
                rank = _rank(name, found, slots)
                a, b = _join(name, slot, found, rank, slots.rank_multiple)
                inputs.setdefault(part, {}).update({lora_a(name): a, lora_b(name): b})
                ranks.setdefault(part, {})[name] = rank
    text = {part for part in inputs if part in manifest.parts and _is_encoder(manifest, part)}
    return PreparedLoras(
        tuple(sorted((number, scale) for number, _, scale in loras)),
        tuple(sorted((number, scale) for number, lora, scale in loras if text & lora.parts.keys())),
        inputs,
        ranks,
    )


def _has(lora: FittedLora, part: str, name: str) -> bool:
    return name in lora.parts.get(part, {})


def _is_encoder(manifest: Manifest, part: str) -> bool:
    return signature(manifest.family, part).input("input_ids") is not None


def _rank(name: str, found: Sequence[tuple[str, Factors, float]], slots: LoraSlots) -> int:
    """The rank of the joined factors, rounded up to the multiple that a slot takes."""
    total = sum(factors.rank for _, factors, _ in found)
    rank = -(-total // slots.rank_multiple) * slots.rank_multiple
    if rank > slots.max_rank:
        shown = ", ".join(f"{lora} ({factors.rank})" for lora, factors, _ in found)
        raise RequestError(
            f"loras: the ranks at {name} must add up to at most {slots.max_rank} in this bundle, got {total}: {shown}; "
            f"give fewer LoRAs, or export with --lora-max-rank {rank}"
        )
    return rank


def _join(
    name: str, slot: SlotLayer, found: Sequence[tuple[str, Factors, float]], rank: int, multiple: int
) -> tuple[np.ndarray, np.ndarray]:
    """Factors [in, R/8, 8] and [R/8, 8, out]; the rank that is left over is zeros."""
    a = np.zeros((slot.in_features, rank), np.float32)
    b = np.zeros((rank, slot.out_features), np.float32)
    start = 0
    for _, factors, scale in found:
        end = start + factors.rank
        a[:, start:end] = factors.down.T
        # The caller checks the result for infinities, so numpy's overflow warnings are silenced here.
        with np.errstate(over="ignore"):
            np.multiply(factors.up.T, np.float32(factors.scale * scale), out=b[start:end])
        start = end
    with np.errstate(over="ignore"):
        low, high = cast(a, slot.dtype), cast(b, slot.dtype)
    for given, made in ((a, low), (b, high)):
        if not np.isfinite(given).all() or (slot.dtype == "float16" and not np.isfinite(made).all()):
            loras = " and ".join(lora for lora, _, _ in found)
            raise RequestError(
                f"loras: the factors of {loras} at {name} must be finite in {slot.dtype}, got values beyond its range; "
                "give a smaller scale"
            )
    shaped = low.reshape(-1, rank // multiple, multiple), high.reshape(rank // multiple, multiple, -1)
    for array in shaped:
        array.setflags(write=False)
    return shaped
