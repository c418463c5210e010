"""Choose a memory mode: sums and free bytes -> the mode, and a sentence that says why if it is not "resident"."""

from __future__ import annotations

from arcflow_runtime.engines.modes import MODES, MemoryMode
from arcflow_runtime.memory.sums import Sums

GB = 10**9


def fitting_mode(sums: Sums, free_bytes: int) -> MemoryMode | None:
    """The mode that keeps the most parts loaded among those that fit; None if none does."""
    return next((mode for mode in MODES if sums.peak(mode) <= free_bytes), None)


def choose_mode(sums: Sums, free_bytes: int) -> tuple[MemoryMode, str | None]:
    """The mode to use, and one sentence about it; None for "resident", about which there is nothing to say."""
    found = fitting_mode(sums, free_bytes)
    if found == "resident":
        return found, None
    mode: MemoryMode = found or "low"
    needs = [f"{gigabytes(sums.peak(m))} GB with {m!r}" for m in MODES[: MODES.index(mode) + 1]]
    size = f"an image of {sums.size.height_px} x {sums.size.width_px} px"
    text = f"memory={mode!r}: {size} needs up to {', '.join(needs)}, and {gigabytes(free_bytes)} GB of the "
    text += f"{sums.rules.place}'s memory are free"
    if found is None:
        text += "; generate smaller images, or use a bundle in FP8 (arcflow quantize)"
    return mode, text


def gigabytes(nbytes: int) -> str:
    """Bytes in GB of 10^9 bytes, such as "9.5", or "0.024" below a tenth."""
    value = nbytes / GB
    return f"{value:.1f}" if value >= 0.1 else f"{value:.3f}"
