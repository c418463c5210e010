"""What both CPU engines check: the number of threads, a graph's inputs and outputs, and 8-bit instructions."""

from __future__ import annotations

import functools
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.errors import EngineError, RequestError

_CPUINFO = Path("/proc/cpuinfo")


def check_threads(threads: int | None) -> None:
    """Check a number of threads per engine; None is one per core.

    Raises:
        RequestError: `threads` is below 1 or above the number of cores.
    """
    if threads is not None and threads < 1:
        raise RequestError(f"threads must be at least 1, got {threads}; leave it out to use every core")
    cores = os.cpu_count() or 1
    if threads is not None and threads > cores:
        raise RequestError(
            f"threads must be at most {cores}, one per core of this machine, got {threads}; "
            "leave it out to use every core"
        )


def check_names(bundle: Bundle, part: str, inputs: Iterable[str], outputs: Iterable[str]) -> None:
    """Check that a graph has the inputs and outputs that the manifest lists for `part`.

    Raises:
        EngineError: it has others.
    """
    spec = bundle.manifest.parts[part]
    wanted = (
        ("inputs", [s.name for s in spec.inputs] + list(spec.slot_dtypes), inputs),
        ("outputs", [s.name for s in spec.outputs], outputs),
    )
    for kind, listed, found in wanted:
        expected, names = sorted(listed), sorted(found)
        if expected != names:
            raise EngineError(
                f"{part}: the {kind} of {spec.graph} must be {expected}, "
                f"as in the manifest, got {names}; export the bundle again"
            )


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@functools.cache
def saturates_uint8_int8() -> bool:
    """True on an x86 CPU without VNNI, whose fast products of uint8 and int8 saturate in 16 bits."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        return not has_vnni(_CPUINFO.read_text(encoding="utf-8", errors="replace"))
    except OSError:  # unknown: exact rather than fast
        return True


def has_vnni(cpuinfo: str) -> bool:
    """True if the text of /proc/cpuinfo names an instruction that adds 8-bit products in 32 bits."""
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    return flags is not None and not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags[1].split())
