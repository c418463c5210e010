"""Check what engines are to be built for: a library, targets and the GPU here -> targets, and what each must support.

`arcflow build` and `arcflow compile` check before they start.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from arcflow_runtime.disk.manifest import QuantFormat
from arcflow_runtime.disk.quant_formats import FORMATS
from arcflow_runtime.engines.gpus import Gpu
from arcflow_runtime.engines.tensorrt_library import Library
from arcflow_runtime.errors import EngineError, RequestError

#: The first compute capability that supports bfloat16, as in "sm80"; those of the formats are in `FORMATS`.
FIRST_WITH_BFLOAT16 = 80


def choose_targets(library: Library, targets: Sequence[str], gpu: Gpu | None) -> list[str]:
    """The targets to build for, each once.

    Args:
        library: that builds.
        targets: compute capabilities such as "sm89"; empty means that of this machine's GPU.
        gpu: of this machine.

    Raises:
        RequestError: there is neither a target nor a GPU, or the library cannot build for a target here.
        EngineError: the library builds only on the GPU that it builds for, and there is none.
    """
    if not library.ahead_of_time and gpu is None:
        raise EngineError(
            f"{library.name} can build only on the GPU that it builds for, and the CUDA driver finds none here; "
            "build on the GPU's machine, or with --backend tensorrt-rtx, which needs no GPU"
        )
    if not targets:
        if gpu is None:
            raise RequestError("--target must be given on a machine without a GPU, such as --target sm89")
        targets = [gpu.target]
    for target in targets:
        if library.ahead_of_time:
            library.check_target(target)
        elif gpu is not None and target != gpu.target:
            raise RequestError(f"--target must be {gpu.target} for {library.name} on this {gpu.name}, got {target!r}")
    return list(dict.fromkeys(targets))


def capability(target: str) -> int:
    """The compute capability of a checked target: 89 for "sm89"."""
    return int(target.removeprefix("sm"))


def first_capability(precision: str, formats: Iterable[QuantFormat] = ()) -> int:
    """The first compute capability that computes in a dtype and in number formats for GPUs."""
    found = [FORMATS[name].first_sm or 0 for name in formats]
    return max([FIRST_WITH_BFLOAT16 if precision == "bfloat16" else 0, *found])
