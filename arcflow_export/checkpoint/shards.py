"""Choose which safetensors files of a folder hold its weights, from their names: for local folders and for the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from arcflow_export.checkpoint.sources import read_json
from arcflow_export.errors import SourceError

#: Endings of pickle files, which can run code when read.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
#: Depending on its version, diffusers puts a variant's name before or after ".safetensors.index".
_VARIANT = re.compile(r".+?\.([^.]+)\.safetensors\.index\.json|.+?\.safetensors\.index\.([^.]+)\.json")


@dataclass(frozen=True)
class Weights:
    """File names within one folder: the index (None for a single file) and the files with tensors."""

    index: str | None
    files: tuple[str, ...]


def pick_weights(
    names: Collection[str], read: Callable[[str], Path], where: object, what: str, stem: str | None = None
) -> Weights:
    """Choose a folder's plain weights; variants such as `model.fp16.safetensors` are ignored.

    Args:
        names: names of the files in the folder.
        read: returns the local path of a named file; used to read an index.
        where: the folder, for messages.
        what: the kind of checkpoint, for messages.
        stem: the required beginning of the file's name, such as `diffusion_pytorch_model`; None for any.

    Raises:
        SourceError: there is no safetensors file, only pickles or only a variant; it is unclear which file to use; or
            an index is damaged or lists a missing file.
    """
    if stem is not None:
        names = [n for n in names if n.startswith((f"{stem}.", f"{stem}-"))]
    indexes = sorted(n for n in names if n.endswith(".safetensors.index.json") and n.count(".") == 3)
    if len(indexes) > 1:
        raise SourceError(f"{what}: {where} holds {indexes}; give a folder with one of them")
    if indexes:
        return Weights(indexes[0], _shards(indexes[0], names, read, where, what))
    single = sorted(n for n in names if n.endswith(".safetensors"))
    plain = [n for n in single if n.count(".") == 1]
    if len(plain) == 1:
        return Weights(None, (plain[0],))
    if len(single) == 1 and stem is None:
        return Weights(None, (single[0],))
    for name in sorted(names):
        if variant := _variant(name, stem):
            raise SourceError(
                f"{what}: {where} holds the weights only as the variant {variant!r} ({name}); "
                "give a checkpoint that was saved without a variant"
            )
    if single:
        raise SourceError(f"{what}: {where} holds {single} and no index; give a folder with one of them")
    if pickles := sorted(n for n in names if n.endswith(PICKLES)):
        raise SourceError(
            f"{what}: {where} holds only pickles ({', '.join(pickles)}), which can run code when read; "
            "convert them to safetensors first"
        )
    raise SourceError(f"{what}: {where} holds no {stem or ''}.safetensors{' file' if stem is None else ''}")


def _variant(name: str, stem: str | None) -> str | None:
    """The variant in the name of an index, or of a single file with this stem; None if there is none."""
    if match := _VARIANT.fullmatch(name):
        return match.group(1) or match.group(2)
    if stem is not None and (match := re.fullmatch(rf"{re.escape(stem)}\.([^.]+)\.safetensors", name)):
        return match.group(1)
    return None


def _shards(
    index: str, names: Collection[str], read: Callable[[str], Path], where: object, what: str
) -> tuple[str, ...]:
    weight_map = read_json(read(index), what).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{what}: {where}/{index} has no 'weight_map'; download it again")
    shards = sorted({str(v) for v in weight_map.values()})
    for name in shards:
        if Path(name).name != name:
            raise SourceError(f"{what}: {where}/{index} names {name!r}, which is outside its directory")
        if name not in names:
            raise SourceError(f"{what}: {where}/{name} is missing, but {index} lists it")
    return tuple(shards)
