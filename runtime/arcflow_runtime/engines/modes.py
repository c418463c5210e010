"""The memory modes of a pipeline: which parts of a bundle stay loaded between images."""

from __future__ import annotations

from typing import Literal, get_args

#: "resident": all parts stay loaded. "balanced": those that every image needs. "low": none.
MemoryMode = Literal["resident", "balanced", "low"]
#: The modes, from the one that needs the most memory to the one that needs the least.
MODES: tuple[MemoryMode, ...] = get_args(MemoryMode)
#: The parts that every image needs. The others are needed only for a new prompt, guidance scale or number of steps.
EVERY_IMAGE = ("backbone", "vae_decoder")


def keeps(mode: MemoryMode, part: str) -> bool:
    """True if `part` stays loaded in `mode`."""
    return mode == "resident" or (mode == "balanced" and part in EVERY_IMAGE)
