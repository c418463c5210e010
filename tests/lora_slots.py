"""Make LoRA files and bundles with slots for tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from arcflow_runtime.disk import manifest as b
from arcflow_runtime.disk.bundle import Bundle
from tests.fake_bundle import write_manifest

#: Part -> the component of the checkpoint that diffusers writes before a LoRA's keys.
COMPONENTS = {"text_encoder": "text_encoder", "backbone": "transformer", "conditioner": "transformer"}
COMPONENTS["modulation"] = "transformer"


def write_lora(path: Path, slots: Mapping[str, b.LoraSlots], rank: int = 4, seed: int = 0, only: str = "") -> Path:
    """Write a LoRA of all slots whose names contain `only`, in diffusers' naming.

    Each product is about 0.3 of its input, which changes an image clearly and overflows nothing.
    """
    random, tensors = np.random.default_rng(seed), {}
    for part, found in slots.items():
        for name, layer in found.layers.items():
            if only in name:
                key = f"{COMPONENTS[part]}.{name}"
                a = random.standard_normal((rank, layer.in_features)) / layer.in_features**0.5
                tensors[f"{key}.lora_A.weight"] = a.astype(np.float32)
                b_ = random.standard_normal((layer.out_features, rank)) * 0.3 / rank**0.5
                tensors[f"{key}.lora_B.weight"] = b_.astype(np.float32)
    save_file(tensors, path)
    return path


def add_slots(root: Path, layers: Mapping[str, Mapping[str, tuple[int, int]]], max_rank: int = 32, **more) -> Path:
    """Give the manifest of a bundle of `fake_bundle` slots: part -> layer -> (in, out); the graphs are dummies."""
    manifest = Bundle.open(root).manifest
    parts = dict(manifest.parts)
    for part, found in layers.items():
        slots = {name: b.SlotLayer(*size, parts[part].precision) for name, size in found.items()}
        parts[part] = dataclasses.replace(parts[part], lora=b.LoraSlots(slots, b.RANK_MULTIPLE, max_rank, **more))
    write_manifest(root, dataclasses.replace(manifest, parts=parts, version=b.LORA_VERSION))
    return root
