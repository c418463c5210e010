"""What both CPU engines check: the number of threads, and a graph's inputs and outputs."""

from __future__ import annotations

import os
from collections.abc import Iterable

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.errors import EngineError, RequestError


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
