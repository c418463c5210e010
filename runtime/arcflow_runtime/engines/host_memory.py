"""How much memory this machine has left: -> bytes, or None where the system does not say."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Bytes that a new process can use without swapping: Linux's MemAvailable, or less if the container has a limit.

    None on other systems.
    """
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)
    limit = _left_in_container()
    return min((n for n in (free, limit) if n is not None), default=None)


def _left_in_container() -> int | None:
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = (_CGROUP / "memory.stat").read_text().split()
    except (OSError, ValueError):  # another system, or "max"
        return None
    # The page cache counts as used, but the kernel frees it when memory is needed.
    cached = (int(stat[stat.index(name) + 1]) for name in ("inactive_file", "active_file") if name in stat)
    return max(limit - used + sum(cached), 0)
