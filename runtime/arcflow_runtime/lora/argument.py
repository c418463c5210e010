"""Parse the option --lora of the commands: `PATH[:SCALE]` -> path and scale."""

from __future__ import annotations

from pathlib import Path


def parse_lora(text: str) -> tuple[str, float]:
    """Split `PATH[:SCALE]` into path and scale (1.0 when not given).

    Raises:
        ValueError: the scale is not a finite number.
    """
    path, sep, tail = text.rpartition(":")
    # The colon may belong to the path: `text` is a path if it exists and the part before the colon does not.
    if not sep or (Path(text).exists() and not Path(path).exists()):
        return text, 1.0
    try:
        scale = float(tail)
    except ValueError:
        raise ValueError(f"--lora must be PATH or PATH:SCALE with a number for SCALE, got {text!r}") from None
    if not abs(scale) < 1e6:
        raise ValueError(f"--lora: SCALE must be a finite number, got {tail!r}")
    return path, scale
