"""Choose which files of a checkpoint on the hub to download: a listing -> file names.

Export, calibration, the comparison with torch and distillation all use these lists. So the stage that runs first
downloads everything that the later ones need.
"""

from __future__ import annotations

from pathlib import Path

from arcflow_export.checkpoint.shards import pick_weights
from arcflow_export.checkpoint.sources import Listing, read_json
from arcflow_export.errors import SourceError
from arcflow_export.families import facts, family_of_pipeline, pipelines
from arcflow_runtime.lora.scales import ADAPTER_CONFIG

MODEL_INDEX = "model_index.json"
#: Beginning of the names of a VAE's weight files. TAEF1's repository has the weights in other formats beside them.
VAE_STEM = "diffusion_pytorch_model"


def base_files(listing: Listing) -> list[str]:
    """The files of a base checkpoint: configs, tokenizers, the scheduler's settings, and one copy of the weights.

    Raises:
        SourceError: model_index.json is missing, its pipeline is not supported, or a folder has no usable weights.
    """
    if MODEL_INDEX not in listing.names:
        raise SourceError(no_model_index(listing.what, listing.where))
    family = read_family(listing.read(MODEL_INDEX), listing.what)
    found = [MODEL_INDEX]
    for folder in facts(family).folders:
        names = listing.within(folder.name)
        picked = [name for name in folder.texts if name in names]
        if folder.stem is not None:
            picked += _weights(listing, folder.name, folder.stem)
        found += [f"{folder.name}/{name}" for name in picked]
    return found


def adapter_files(listing: Listing) -> list[str]:
    """The files of an adapter: its config and weights.

    Raises:
        SourceError: the config or the weights are missing, or it is unclear which weights to use.
    """
    if "config.json" not in listing.names:
        folders = sorted(n.removesuffix("/config.json") for n in listing.names if n.endswith("/config.json"))
        hint = (
            f"; give --adapter-subfolder, one of {', '.join(folders)}" if folders else "; is this an ArcFlow adapter?"
        )
        raise SourceError(f"{listing.what}: {listing.where} has no config.json{hint}")
    return ["config.json", *_weights(listing)]


def lora_files(listing: Listing) -> list[str]:
    """The weight files of a LoRA, and peft's file with its alpha.

    Raises:
        SourceError: there are none, or it is unclear which to use.
    """
    return [*_weights(listing), *({ADAPTER_CONFIG} & listing.names)]


def vae_files(listing: Listing) -> list[str]:
    """The files of a VAE: its config and weights.

    Raises:
        SourceError: the config or the weights are missing, or it is unclear which weights to use.
    """
    if "config.json" not in listing.names:
        raise SourceError(f"{listing.what}: {listing.where} has no config.json; give a VAE in diffusers format")
    return ["config.json", *_weights(listing, stem=VAE_STEM)]


def read_family(model_index: Path, what: str) -> str:
    """The family of the pipeline that `model_index` describes.

    Raises:
        SourceError: the file cannot be read, or its pipeline is not supported.
    """
    name = read_json(model_index, what).get("_class_name")
    family = family_of_pipeline(name)
    if family is None:
        raise SourceError(f"{what}: {model_index}: _class_name must be one of {pipelines()}, got {name!r}")
    return family


def no_model_index(what: str, where: object) -> str:
    """The error message for a base without model_index.json."""
    return f"{what}: {where} has no {MODEL_INDEX}; give the directory of a whole diffusers pipeline"


def _weights(listing: Listing, folder: str = "", stem: str | None = None) -> list[str]:
    prefix = f"{folder}/" if folder else ""
    where = f"{listing.where}/{folder}" if folder else listing.where
    picked = pick_weights(listing.within(folder), lambda name: listing.read(prefix + name), where, listing.what, stem)
    return [*picked.files, *([picked.index] if picked.index else [])]
