"""Write trained tensors as an adapter in the released format: config.json and one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from arcflow_distill.train.folders import ADAPTER_FILES
from arcflow_export.checkpoint.adapter import SUB_PIXELS
from arcflow_export.families import facts
from arcflow_runtime.disk.files import whole_directory


def write_adapter(
    out: Path,
    tensors: Mapping[str, torch.Tensor],
    base_config: Mapping[str, Any],
    family: str,
    modes: int,
    dtype: torch.dtype,
    record: dict[str, Any],
) -> Path:
    """Write an adapter directory atomically; it replaces an older one.

    Args:
        out: the directory.
        tensors: the trained tensors by their names in the released format.
        base_config: the base transformer's settings.
        family: the base's family.
        modes: K, the number of modes.
        dtype: dtype in which the tensors are stored.
        record: the settings and history of the training, written to training.json.
    """
    found = facts(family)
    config: dict[str, Any] = {"_class_name": found.adapter} | {key: base_config[key] for key in found.adapter_sizes}
    config |= {"out_channels": config["in_channels"] if found.adapter_out_channels else None}
    config |= {"num_gaussians": modes, "logweights_channels": SUB_PIXELS}
    with whole_directory(out) as folder:
        (folder / ADAPTER_FILES[0]).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        stored = {name: t.detach().to("cpu", dtype).contiguous() for name, t in tensors.items()}
        save_file(stored, folder / ADAPTER_FILES[1], metadata={"policy_config": json.dumps({"type": "ArcFlow"})})
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return out
