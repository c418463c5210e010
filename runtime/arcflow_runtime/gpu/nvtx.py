"""Named ranges in the timelines of NVIDIA's profilers, if the package `nvtx` is installed; otherwise no-ops."""

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
