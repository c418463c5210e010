"""Read a LoRA file: path and family -> `LoraFile`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from arcflow_runtime.disk.manifest import Sampler
from arcflow_runtime.errors import LoraError
from arcflow_runtime.lora.families import FAMILIES, lora_family
from arcflow_runtime.lora.keys import PLAIN_WEIGHTS, Module, SortedKeys, sort_keys
from arcflow_runtime.lora.layers import LoraFile, LoraLayer, Skipped
from arcflow_runtime.lora.names import find, part_of, split_prefix
from arcflow_runtime.lora.scales import Scales
from arcflow_runtime.lora.target import Target
from arcflow_runtime.lora.tensors import LoraTensors

#: The base's final projection. The three heads of a momentum student replace it.
REPLACED = ("transformer", "proj_out")
#: Models whose LoRAs are often given by mistake -> what their keys contain.
_OTHER_MODELS = {
    "Stable Diffusion": r"(down|up|input|output)_blocks[._]\d|mid(dle)?_block[._]",
    "Stable Diffusion 3": r"joint_blocks[._]\d|transformer_blocks[._]\d+[._](attn2|norm1_context_2)",
    "FLUX.2": r"to_qkv_mlp_proj|(double|single)_stream_modulation",
    "Wan": r"(^|[._])blocks[._]\d+[._](self|cross)_attn",
}
_KINDS = "bundles take LoRAs of the linears of the transformer and the text encoders"


def read_lora(path: Path, family: str, sampler: Sampler = "momentum") -> LoraFile:
    """Read a LoRA file.

    Args:
        path: a .safetensors file. An adapter_config.json beside it is read too.
        family: of the model, as in a bundle's manifest: "flux" or "qwen-image".
        sampler: of the model, likewise.

    Raises:
        LoraError: the file is damaged, is not a LoRA or is one for another model, or holds something that is not
            supported. The message names the first key.
    """
    lora_family(family)
    tensors = LoraTensors.open(path)
    _check_architecture(tensors, family)
    keys = sort_keys(tensors.entries)
    if not keys.modules and not keys.unknown and PLAIN_WEIGHTS.issuperset(keys.unsupported.values()):
        raise LoraError(f"LoRA: {path} holds no LoRA factors; is it a LoRA?")
    skipped = [Skipped(key, "is a buffer that the model computes itself") for key in keys.buffers]
    skipped += _check_unsupported(tensors, keys)
    if keys.unknown:
        raise _not_understood(tensors, keys.unknown, family)
    if keys.clash is not None:
        raise LoraError(f"LoRA: {path}: {keys.clash[0]!r} and {keys.clash[1]!r} are the same factor; remove one")
    if len(keys.adapters) > 1:
        names = ", ".join(map(repr, sorted(keys.adapters)))
        raise LoraError(f"LoRA: {path} must hold one adapter, got {names}; save each to its own file")
    if not keys.modules:
        raise LoraError(f"LoRA: {path} holds no LoRA factors; is it a LoRA?")
    reader = _Reader(tensors, family, sampler)
    targets = reader.targets(keys.modules.values(), skipped)
    reader.check_alphas(targets)
    layers: dict[tuple[str, str], LoraLayer] = {}
    for module, target in targets:
        for name, layer in reader.layers(module, target, skipped):
            at = (part_of(family, target.component, name), name)
            if at in layers:
                raise LoraError(
                    f"LoRA: {path}: {layers[at].key!r} and {module.name!r} both change {name}; remove one of them"
                )
            layers[at] = layer
    skipped += [Skipped(pattern, "matches no module of the file") for pattern in reader.unmatched()]
    if not layers:
        raise LoraError(f"LoRA: {path} changes nothing: {skipped[0].key!r} {skipped[0].reason}; give another LoRA")
    found = MappingProxyType(dict(sorted(layers.items())))
    return LoraFile(path, family, found, tuple(skipped), len(tensors.entries), reader.config)


def families_of(path: Path) -> list[str]:
    """The families that have every linear that a LoRA file names; a LoRA of attention alone can have several.

    Args:
        path: a .safetensors file.

    Raises:
        LoraError: it is not a valid safetensors file.
    """
    tensors = LoraTensors.open(path)
    modules = sort_keys(tensors.entries).modules
    stated = [family for family in FAMILIES if _architecture(tensors).startswith(FAMILIES[family].architectures)]
    return [f for f in stated or FAMILIES if modules and all(find(name, f) is not None for name in modules)]


class _Reader:
    """Reads the modules of one file."""

    def __init__(self, tensors: LoraTensors, family: str, sampler: Sampler):
        self._tensors, self._family, self._path = tensors, family, tensors.path
        self._replaced = REPLACED if sampler == "momentum" else None
        self._scales = Scales(tensors.path, tensors.metadata)
        self._own: dict[str, float] = {}
        self.config = self._scales.config

    def targets(self, modules: Iterable[Module], skipped: list[Skipped]) -> list[tuple[Module, Target]]:
        """Every module with the linears that it changes; those that change nothing go to `skipped`."""
        found, unknown = [], []
        for module in self._joined(modules):
            if module.down is None or module.up is None:
                raise self._lonely(module)
            target = find(module.name, self._family)
            if target is not None and (target.component, target.names[0]) == self._replaced:
                skipped.append(Skipped(module.name, "is a layer that the student's heads replace"))
            elif target is not None:
                found.append((module, target))
            elif self._tensors.is_zero(module.up):
                skipped.append(Skipped(module.name, "is no linear of the model, and its factor is all zeros"))
            else:
                unknown.append(module.down)
        if unknown:
            raise _not_understood(self._tensors, unknown, self._family)
        return found

    def _joined(self, modules: Iterable[Module]) -> list[Module]:
        """Give an alpha that stands alone to the module of the same linears; some tools leave out the prefix there."""
        kept = {module.name: module for module in modules}
        lone = [m for m in kept.values() if m.down is None and m.up is None]
        if not lone:
            return list(kept.values())
        by_target: dict[Target | None, list[Module]] = {}
        for module in kept.values():
            if module.down is not None or module.up is not None:
                by_target.setdefault(find(module.name, self._family), []).append(module)
        for module in lone:
            target = find(module.name, self._family)
            same = by_target.get(target, []) if target is not None else []
            if len(same) == 1 and kept[same[0].name].alpha is None:
                del kept[module.name]
                kept[same[0].name] = replace(same[0], alpha=module.alpha)
        return list(kept.values())

    def check_alphas(self, targets: Sequence[tuple[Module, Target]]) -> None:
        """Read every alpha tensor, and compare them with the metadata."""
        self._own = {m.alpha: self._tensors.number(m.alpha) for m, _ in targets if m.alpha is not None}
        self._scales.check_kohya(self._own)

    def unmatched(self) -> list[str]:
        """Patterns for alpha or rank that no module matched."""
        return self._scales.unmatched()

    def layers(self, module: Module, target: Target, skipped: list[Skipped]) -> Iterator[tuple[str, LoraLayer]]:
        """The layers of one module, by linear: several if it is fused."""
        assert module.down is not None and module.up is not None
        down, up = self._factor(module.down), self._factor(module.up)
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.size or not up.size:
            raise LoraError(
                f"LoRA: {self._path}: {module.name!r} must be A [r, in] and B [out, r] with r at least 1, got A "
                f"{list(self._tensors.entries[module.down].shape)} and B {list(self._tensors.entries[module.up].shape)}"
            )
        rank = down.shape[0]
        own = None if module.alpha is None else (module.alpha, self._own[module.alpha])
        scale = self._scales.of(target.component, self._spelt(module.name, target), rank, own)
        if target.swapped:
            up = np.roll(up, len(up) // 2, axis=0)
        start = 0
        for name, rows in zip(target.names, self._rows(module, target, down, up), strict=True):
            part = up[start : start + rows]
            start += rows
            used = np.flatnonzero(part.any(axis=0)) if len(target.names) > 1 else np.arange(rank)
            if not used.size:
                skipped.append(Skipped(module.name, f"changes nothing in {name}: its rows of B are all zeros"))
                continue
            # Tools that train q, k and v apart store them as one module with blocks of zeros.
            a, b = (down, part) if used.size == rank else (down[used], part[:, used])
            layer = LoraLayer(
                target.component, _frozen(a), _frozen(b), scale.value, scale.source, module.name, scale.alpha, rank
            )
            yield name, layer

    def _rows(self, module: Module, target: Target, down: np.ndarray, up: np.ndarray) -> list[int]:
        """How many rows of B each linear of a fused one has; q, k and v are as wide as the input."""
        rows, width, parts = len(up), down.shape[1], len(target.names)
        if target.split == "whole":
            if target.swapped and rows % 2:
                raise self._size(module, "an even number of rows", rows)
            return [rows]
        if target.split == "equal":
            if rows % parts:
                raise self._size(module, f"a multiple of {parts} rows", rows)
            return [rows // parts] * parts
        if rows <= 3 * width:
            raise self._size(module, f"more than {3 * width} rows, 3 times the input and the MLP", rows)
        return [*[width] * (parts - 1), rows - width * (parts - 1)]

    def _size(self, module: Module, wanted: str, rows: int) -> LoraError:
        return LoraError(
            f"LoRA: {self._path}: {module.up!r} must have {wanted}, got {rows}; it was trained for another model"
        )

    def _factor(self, key: str) -> np.ndarray:
        """A factor in float32; that of a 1 x 1 convolution [a, b, 1, 1] is the linear's [a, b]."""
        values = self._tensors.floats(key)
        return values.reshape(values.shape[:2]) if values.shape[2:] == (1, 1) else values

    def _spelt(self, module: str, target: Target) -> list[str]:
        """The names of a module that a pattern of peft's may mean; a fused module has none of diffusers' names."""
        _, name = split_prefix(module, self._family)
        names = [name, f"{target.component}.{name}"]
        return [*names, *target.names] if len(target.names) == 1 else names

    def _lonely(self, module: Module) -> LoraError:
        if module.down is None and module.up is None:
            return LoraError(f"LoRA: {self._path}: {module.alpha!r} is an alpha without factors; save the LoRA again")
        have, lack = (module.down, "B") if module.up is None else (module.up, "A")
        return LoraError(f"LoRA: {self._path}: {have} has no lora_{lack}; save the LoRA again")


def _check_unsupported(tensors: LoraTensors, keys: SortedKeys) -> Iterator[Skipped]:
    """Refuse what a plain LoRA does not have, unless it is a change of zero."""
    for key, kind in keys.unsupported.items():
        if kind.startswith("a change of") and tensors.is_zero(key):
            yield Skipped(key, f"is {kind} by zero")
            continue
        if kind == "DoRA":
            raise LoraError(f"LoRA: {tensors.path} is a DoRA ({key}), which is not supported; give a plain LoRA")
        raise LoraError(f"LoRA: {tensors.path}: key {key!r} is {kind}, which is not supported; {_KINDS}")


def _architecture(tensors: LoraTensors) -> str:
    """The model's name in the metadata, in lower case and without separators; empty if there is none."""
    stated = tensors.metadata.get("modelspec.architecture") or tensors.metadata.get("ss_base_model_version") or ""
    return re.sub(r"[^a-z0-9]", "", stated.lower())


def _check_architecture(tensors: LoraTensors, family: str) -> None:
    """Refuse a file whose metadata names another family; the names of attention's linears are the same in all."""
    stated = _architecture(tensors)
    for other, entry in FAMILIES.items():
        if other != family and stated.startswith(entry.architectures):
            raise _other_model(tensors.path, entry.title, family)


def _not_understood(tensors: LoraTensors, keys: Sequence[str], family: str) -> LoraError:
    modules = sort_keys(tensors.entries).modules
    ours = all(find(name, family) is not None for name in modules)
    for other, entry in FAMILIES.items():
        if not ours and all(find(name, other) is not None for name in modules):
            return _other_model(tensors.path, entry.title, family)
    for title, pattern in _OTHER_MODELS.items():
        if any(re.search(pattern, key) for key in keys):
            return _other_model(tensors.path, title, family)
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return LoraError(f"LoRA: {tensors.path}: key {keys[0]!r}{more} is not understood; {_KINDS}")


def _other_model(path: Path, title: str, family: str) -> LoraError:
    return LoraError(
        f"LoRA: {path} is a LoRA for {title}, the model is {lora_family(family).title}; give a LoRA for this model"
    )


def _frozen(values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values)
    values.flags.writeable = False
    return values
