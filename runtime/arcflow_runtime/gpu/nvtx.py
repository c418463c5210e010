"""Named ranges in the timelines of NVIDIA's profilers, if the package `nvtx` is installed; otherwise no-ops."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

try:
    import nvtx
except ModuleNotFoundError:
    nvtx = None


def named_range(name: str) -> AbstractContextManager[object]:
    """A context manager that shows its block as a range called `name` in the profiler's timeline."""
    if nvtx is None:
        return nullcontext()
    block: AbstractContextManager[object] = nvtx.annotate(name, domain="arcflow")
    return block
