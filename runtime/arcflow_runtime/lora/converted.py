"""Files of `arcflow lora convert`: a fitted LoRA <-> a safetensors file with the graphs' input names (rule L1).

A reader needs no knowledge of LoRA files' names: it copies each tensor to the input of the same name.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from arcflow_runtime.disk.files import whole_file
from arcflow_runtime.disk.manifest import Manifest, lora_a, lora_b, seal
from arcflow_runtime.errors import LoraError
from arcflow_runtime.lora.prepare import prepare
from arcflow_runtime.lora.slots import Factors, FittedLora
from arcflow_runtime.lora.tensors import LoraTensors

FORMAT, VERSION = "arcflow-lora", "1"
#: The safetensors format wants a header of a multiple of 8 bytes.
_ALIGNMENT = 8
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def slots_digest(manifest: Manifest) -> str:
    """The SHA-256 of a bundle's slots; bundles with equal slots take the same converted files (L1)."""
    return seal({part: dataclasses.asdict(slots) for part, slots in manifest.slots().items()})


def write_converted(path: Path, lora: FittedLora, manifest: Manifest) -> None:
    """Write a LoRA at scale 1 in the dtypes of the bundle's slots; see `open.open_lora` for how to read it.

    Raises:
        RequestError: a factor is beyond a slot's dtype.
        OSError: the file cannot be written.
    """
    slots = manifest.slots()
    prepared = prepare(manifest, [(0, lora, 1.0)])
    metadata = {"format": FORMAT, "version": VERSION, "slots": slots_digest(manifest), "name": lora.name}
    header: dict[str, Any] = {"__metadata__": metadata}
    arrays = []
    offset = 0
    for part, inputs in prepared.inputs.items():
        dtypes = slots[part].shapes({})
        for name, array in inputs.items():
            offsets = [offset, offset + array.nbytes]
            header[name] = {"dtype": _NAMES[dtypes[name][1]], "shape": array.shape, "data_offsets": offsets}
            offset = offsets[1]
            arrays.append(array)
    # The safetensors library cannot write bfloat16 from numpy.
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with whole_file(path) as partial, partial.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            f.write(array.data)


def is_converted(path: Path) -> bool:
    """True if a file says that `arcflow lora convert` wrote it; False for any other file, damaged ones too."""
    try:
        with safe_open(path, framework="numpy") as f:
            return (f.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def read_converted(path: Path, name: str, manifest: Manifest) -> FittedLora:
    """Read a file that `write_converted` wrote.

    Raises:
        LoraError: it is damaged, of another version, or was converted for other slots.
    """
    tensors = LoraTensors.open(path)
    if (version := tensors.metadata.get("version")) != VERSION:
        raise LoraError(f"{path}: version must be {VERSION}, got {version!r}; convert the LoRA again")
    if tensors.metadata.get("slots") != slots_digest(manifest):
        raise LoraError(f"{path} was converted for a bundle with other slots; convert the LoRA again for this one")
    slots = manifest.slots()
    parts: dict[str, dict[str, Factors]] = {}
    left = set(tensors.entries)
    for part, places in slots.items():
        dtypes = places.shapes({})
        for layer, sizes in places.layers.items():
            pair = (lora_a(layer), lora_b(layer))
            if not left & set(pair):
                continue
            if missing := set(pair) - left:
                raise LoraError(f"{path} lacks {missing.pop()!r}; convert the LoRA again")
            a, b = (tensors.floats(key) for key in pair)
            groups, multiple = a.shape[1] if a.ndim == 3 else 0, places.rank_multiple
            wanted = (sizes.in_features, groups, multiple), (groups, multiple, sizes.out_features)
            stored = [tensors.entries[key].dtype for key in pair]
            rank = groups * multiple
            if (a.shape, b.shape) != wanted or stored != [_NAMES[dtypes[key][1]] for key in pair]:
                raise LoraError(f"{path}: {pair[0]!r} or {pair[1]!r} has another shape or dtype than its slot")
            if not 0 < rank <= places.max_rank:
                raise LoraError(f"{path}: {layer} must have a rank of 1 to {places.max_rank}, got {rank}")
            down, up = a.reshape(-1, rank).T, b.reshape(rank, -1).T
            parts.setdefault(part, {})[layer] = Factors(np.ascontiguousarray(down), np.ascontiguousarray(up), 1.0)
            left -= set(pair)
    if left or not parts:
        raise LoraError(
            f"{path} must hold inputs of this bundle's slots only, got {sorted(left)[:3]}; convert it again"
        )
    return FittedLora(name, parts)
