"""Save and load the state of a training, as one safetensors file (which cannot run code when read).

Tensors are named `parameter.NAME`, `average.NAME` and, for AdamW, `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`. Other
facts are JSON in the file's metadata. Random generators have no state to save, because every iteration seeds its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from arcflow_distill.errors import DistillError
from arcflow_distill.train.ema import Ema
from arcflow_runtime.disk.files import whole_file

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save_state(
    path: Path,
    parameters: Mapping[str, torch.nn.Parameter],
    ema: Ema,
    optimizer: torch.optim.Optimizer,
    facts: dict[str, Any],
) -> None:
    """Write a checkpoint; an older one stays until this one is complete."""
    tensors = {f"parameter.{name}": p.detach() for name, p in parameters.items()}
    tensors |= {f"average.{name}": t for name, t in ema.tensors.items()}
    for name, parameter in parameters.items():
        for moment, value in optimizer.state[parameter].items():
            tensors[f"{moment}.{name}"] = value
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata={"training": json.dumps(facts)})


def load_state(
    path: Path,
    parameters: Mapping[str, torch.nn.Parameter],
    ema: Ema,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Load a checkpoint's tensors into the parameters, their average and the optimizer.

    Raises:
        DistillError: the file is damaged or belongs to another model.
    """
    try:
        with safe_open(path, framework="pt") as f, torch.no_grad():
            stored = set(f.keys())
            for name, parameter in parameters.items():
                parameter.copy_(f.get_tensor(f"parameter.{name}"))
                ema.tensors[name].copy_(f.get_tensor(f"average.{name}"))
                moments = [m for m in _MOMENTS if f"{m}.{name}" in stored]
                if moments:
                    state = {m: f.get_tensor(f"{m}.{name}").to(parameter.device) for m in moments}
                    optimizer.state[parameter] = state
    except (SafetensorError, RuntimeError) as e:
        raise DistillError(f"{path} does not fit this model ({e}); --overwrite starts again") from None


def read_facts(path: Path) -> dict[str, Any]:
    """Read the facts that `save_state` was given.

    Raises:
        DistillError: the file does not exist, or is not a training checkpoint.
    """
    if not path.is_file():
        raise DistillError(f"--resume: {path} does not exist; leave --resume out to start")
    try:
        with safe_open(path, framework="pt") as f:
            return json.loads(f.metadata()["training"])
    except (SafetensorError, KeyError, TypeError, ValueError) as e:
        raise DistillError(f"--resume: {path} is not a training checkpoint ({e}); --overwrite starts again") from None
