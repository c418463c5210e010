"""The memory mode of a pipeline: the caller's, or by what its device has free."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.manifest import Manifest
from arcflow_runtime.engines.base import Backend, MeasuredBackend
from arcflow_runtime.engines.modes import MODES, MemoryMode
from arcflow_runtime.errors import RequestError
from arcflow_runtime.generate.request import DEFAULT_SIZE_PX

if TYPE_CHECKING:
    from arcflow_runtime.memory.sums import ImageSize

_log = logging.getLogger("arcflow")


def check_memory(memory: object) -> None:
    """Check that `memory` is a mode, or None.

    Raises:
        RequestError: it is neither.
    """
    if memory is not None and memory not in MODES:
        raise RequestError(
            f"memory must be one of {', '.join(MODES)}, or None to choose by the free memory, got {memory!r}"
        )


def fitting_memory(bundle: Bundle, backend: Backend) -> MemoryMode:
    """The mode that fits the free memory of the backend's device for an image of the usual size.

    If it is not "resident", a warning is logged that says which and why. A backend that does not know its free memory
    gets "resident".

    Raises:
        BundleError: a part's graph cannot be read.
        EngineError: the device cannot be opened, or an engine is missing.
    """
    # Here, because the sums read the layout of the GPU's buffers, and a pipeline whose mode is given needs none of it.
    from arcflow_runtime.memory.choice import choose_mode
    from arcflow_runtime.memory.sums import BundleMemory

    free = backend.free_bytes() if isinstance(backend, MeasuredBackend) else None
    if free is None or not isinstance(backend, MeasuredBackend):
        return "resident"
    built = {part: backend.built_bytes(bundle, part) for part in bundle.manifest.parts}
    memory = BundleMemory(bundle, backend.memory_rules, {p: b for p, b in built.items() if b is not None})
    mode, why = choose_mode(memory.sums(usual_size(bundle.manifest)), free)
    if why is not None:
        _log.warning(why)
    return mode


def usual_size(manifest: Manifest) -> ImageSize:
    """The size that a call without arguments generates, with the longest text."""
    from arcflow_runtime.memory.sums import ImageSize

    ranges, schedule = manifest.ranges, manifest.schedule
    height, width = (min(max(DEFAULT_SIZE_PX, r.min), r.max) for r in (ranges.height_px, ranges.width_px))
    return ImageSize(ranges.batch.min, height, width, manifest.text.max_sequence_length, schedule.num_inference_steps)
