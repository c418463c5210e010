"""What building an engine takes: bytes of a part's weights -> memory and time, measured with TensorRT-RTX 1.7."""

from __future__ import annotations

from pathlib import Path

from arcflow_runtime.errors import EngineError

GIB = 1 << 30
#: The builder holds the graph's weights, its own copy and the engine at once.
_MEMORY_PER_BYTE, _LIBRARY_BYTES = 2.25, GIB // 2
_SECONDS_PER_BYTE, _START_S = 12.5e-9, 3.0


def builder_bytes(weight_bytes: int) -> int:
    """Peak memory of building one engine."""
    return int(_LIBRARY_BYTES + _MEMORY_PER_BYTE * weight_bytes)


def builder_seconds(weight_bytes: int) -> float:
    """About how long one engine takes on one core of a server."""
    return _START_S + _SECONDS_PER_BYTE * weight_bytes


def available_bytes() -> int | None:
    """Memory that a program may still take, None where the system does not say (Linux does)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def check_memory(part: str, weight_bytes: int, available: int | None) -> None:
    """Refuse a build that would be killed for want of memory, before it starts.

    Raises:
        EngineError: says what is needed, what is free, and what to do.
    """
    needed = builder_bytes(weight_bytes)
    if available is not None and needed > available:
        raise EngineError(
            f"{part}: building its engine needs {needed / GIB:.1f} GiB of memory, {available / GIB:.1f} are free; "
            "build it on a machine with more (--parts leaves this part out here, --anyway tries all the same); "
            "the GPU's machine needs no more than the engine"
        )
