"""Predict the cost of building an engine: bytes of a part's weights -> memory and time, measured on TensorRT-RTX 1.7.

Used by `arcflow build` and by the cost plan of `arcflow compile`.
"""

from __future__ import annotations

from arcflow_runtime.errors import EngineError

GIB = 1 << 30
#: The builder holds the graph's weights, its own copy of them and the engine at the same time.
_MEMORY_PER_BYTE, _LIBRARY_BYTES = 2.25, GIB // 2
_SECONDS_PER_BYTE, _START_S = 12.5e-9, 3.0


def builder_bytes(weight_bytes: int) -> int:
    """Peak memory in bytes while one engine is built."""
    return int(_LIBRARY_BYTES + _MEMORY_PER_BYTE * weight_bytes)


def builder_seconds(weight_bytes: int) -> float:
    """Approximate seconds to build one engine on one core of a server."""
    return _START_S + _SECONDS_PER_BYTE * weight_bytes


def check_memory(part: str, weight_bytes: int, available: int | None) -> None:
    """Check before a build starts that it will not run out of memory.

    Args:
        part: name of the part, for the message.
        weight_bytes: size of the part's weights.
        available: from `engines/host_memory.py`; None skips the check.

    Raises:
        EngineError: the build needs more memory than is available; says how much, and what to do.
    """
    needed = builder_bytes(weight_bytes)
    if available is not None and needed > available:
        raise EngineError(
            f"{part}: building its engine needs {needed / GIB:.1f} GiB of memory, {available / GIB:.1f} are free; "
            "build it on a machine with more memory, which need not be the one with the GPU "
            "(--parts can leave this part out here, --anyway tries it regardless)"
        )
