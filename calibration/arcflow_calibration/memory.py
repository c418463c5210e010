"""Whether a student fits: its weights' bytes against the memory that is free, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from arcflow_export.load import Student

from .errors import CalibrationError
from .options import Settings

_GIB = 1 << 30


def check_memory(student: Student, settings: Settings) -> None:
    """Check that the weights fit in memory, and in the GPU's where it is used; activations come on top.

    Raises:
        CalibrationError: says how much is needed, how much is free, and what to do.
    """
    needed = weight_bytes(student, settings)
    _compare(needed, _free_bytes(), "memory", settings)
    if settings.device.startswith("cuda"):
        _compare(needed, torch.cuda.mem_get_info()[0], "GPU memory", settings)


def weight_bytes(student: Student, settings: Settings) -> int:
    """Bytes of every weight of base, adapter and LoRAs in the settings' dtype."""
    size = getattr(torch, settings.dtype).itemsize
    loras = sum(p.a.numel + p.b.numel for s in student.styles for pairs in s.pairs.values() for p in pairs.values())
    base = sum(ref.numel for index in student.indexes.values() for ref in index.values())
    return size * (base + student.adapter.parameters + loras)


def _compare(needed: int, free: int, what: str, settings: Settings) -> None:
    if needed <= free:
        return
    smaller = "--dtype bfloat16 halves it; or " if settings.dtype == "float32" else ""
    raise CalibrationError(
        f"the student's weights need {needed / _GIB:.1f} GiB of {what} in {settings.dtype}, {free / _GIB:.1f} GiB are "
        f"free; {smaller}calibrate where they fit: scales.json is small and is used on any machine"
    )


def _free_bytes() -> int:
    """What the system, and the container's limit where there is one, leave free."""
    import psutil

    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        return min(free, int(limit.read_text()) - int(used.read_text()) + _reclaimable())
    except (OSError, ValueError):  # another system, or no limit
        return free


def _reclaimable() -> int:
    """Bytes of the container's page cache, which count as used and are given up on demand."""
    stat = Path("/sys/fs/cgroup/memory.stat").read_text().split()
    return int(stat[stat.index("inactive_file") + 1]) + int(stat[stat.index("active_file") + 1])
