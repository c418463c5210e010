"""Compute the bytes of a student's weights for a dtype per part, and whether they fit in the free memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from arcflow_export.student.load import Student

GIB = 1 << 30
#: Memory to leave free for activations when all weights are loaded. A 1024x1024 image needs about 2 GiB in float32,
#: most of it in the VAE decoder.
_ROOM_BYTES = 3 * GIB


def component_dtypes(student: Student, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """The dtype of each of the base's components, given the dtype of each part of a bundle."""
    part = {"transformer": "backbone", "vae": "vae_decoder"}
    return {name: dtypes.get(part.get(name, name), dtypes["backbone"]) for name in student.indexes}


def weight_bytes(student: Student, dtypes: Mapping[str, torch.dtype]) -> int:
    """Bytes of all weights of base, adapter and LoRAs.

    Args:
        student: from `load_student`.
        dtypes: dtype by the part's name in a bundle.
    """
    components = component_dtypes(student, dtypes)
    return added_bytes(student, dtypes) + sum(
        ref.numel * components[name].itemsize for name, index in student.indexes.items() for ref in index.values()
    )


def added_bytes(student: Student, dtypes: Mapping[str, torch.dtype]) -> int:
    """Bytes of the adapter and the LoRAs, which are in memory even if the base stays on disk."""
    loras = sum(p.a.numel + p.b.numel for s in student.styles for pairs in s.pairs.values() for p in pairs.values())
    adapter = 0 if student.adapter is None else student.adapter.parameters
    return dtypes["backbone"].itemsize * (adapter + loras)


def stays_on_disk(needed_bytes: int, free_bytes: int) -> bool:
    """True if weights of `needed_bytes` do not fit in memory, so that they must be read from disk as they are used."""
    return needed_bytes + _ROOM_BYTES > free_bytes


def free_bytes(device: str = "cpu") -> int:
    """Free memory in bytes: the smallest of the system's, the container's and, for a "cuda" device, the GPU's."""
    import psutil

    free = psutil.virtual_memory().available
    if device.startswith("cuda"):
        free = min(free, torch.cuda.mem_get_info(device)[0])
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        return min(free, int(limit.read_text()) - int(used.read_text()) + _reclaimable())
    except (OSError, ValueError):  # another system, or no limit
        return free


def _reclaimable() -> int:
    """Bytes of the container's page cache: they count as used, but the kernel frees them when memory is needed."""
    stat = Path("/sys/fs/cgroup/memory.stat").read_text().split()
    return int(stat[stat.index("inactive_file") + 1]) + int(stat[stat.index("active_file") + 1])
