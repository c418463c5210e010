"""Named ranges for NVIDIA's profilers, where the package `nvtx` is installed; nothing otherwise."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

try:
    import nvtx
except ModuleNotFoundError:
    nvtx = None


def named_range(name: str) -> AbstractContextManager[object]:
    """Show the `with` block as a range of this name."""
    if nvtx is None:
        return nullcontext()
    block: AbstractContextManager[object] = nvtx.annotate(name, domain="arcflow")
    return block
