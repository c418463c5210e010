"""A student and a dtype per part -> the bytes of its weights, and whether they fit in the memory that is free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from arcflow_export.student.load import Student

GIB = 1 << 30
#: Memory to leave for activations beside weights that are loaded whole. A 1024x1024 image needs about 2 GiB in float32,
#: of which the VAE decoder takes most.
_ROOM_BYTES = 3 * GIB


def component_dtypes(student: Student, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """The dtype of each of the base's networks, from the dtype of each part of a bundle."""
    part = {"transformer": "backbone", "vae": "vae_decoder"}
    return {name: dtypes.get(part.get(name, name), dtypes["backbone"]) for name in student.indexes}


def weight_bytes(student: Student, dtypes: Mapping[str, torch.dtype]) -> int:
    """Bytes of every weight of base, adapter and LoRAs.

    Args:
        student: from `load_student`.
        dtypes: by the part's name in a bundle.
    """
    components = component_dtypes(student, dtypes)
    return added_bytes(student, dtypes) + sum(
        ref.numel * components[name].itemsize for name, index in student.indexes.items() for ref in index.values()
    )


def added_bytes(student: Student, dtypes: Mapping[str, torch.dtype]) -> int:
    """Bytes of the adapter and the LoRAs, which are in memory even where the base stays on disk."""
    loras = sum(p.a.numel + p.b.numel for s in student.styles for pairs in s.pairs.values() for p in pairs.values())
    return dtypes["backbone"].itemsize * (student.adapter.parameters + loras)


def stays_on_disk(needed_bytes: int, free_bytes: int) -> bool:
    """Whether weights of `needed_bytes` must be read from disk as they are used, for want of memory."""
    return needed_bytes + _ROOM_BYTES > free_bytes


def free_bytes(device: str = "cpu") -> int:
    """Free memory: of the system, within the container's limit if it has one, and of the GPU if it is the device."""
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
    """Bytes of the container's page cache, which count as used and are given up on demand."""
    stat = Path("/sys/fs/cgroup/memory.stat").read_text().split()
    return int(stat[stat.index("inactive_file") + 1]) + int(stat[stat.index("active_file") + 1])
