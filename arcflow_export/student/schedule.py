"""Warn if the shift of a base's own scheduler differs from the shift that its student is run with."""

from __future__ import annotations

from pathlib import Path

from arcflow_export.checkpoint.sources import read_json

_CONFIG = Path("scheduler") / "scheduler_config.json"
#: The default shift of diffusers' FlowMatchEulerDiscreteScheduler, for config files without one.
_DEFAULT_SHIFT = 1.0


def shift_warning(base: Path, shift: float) -> str | None:
    """A warning if the base's scheduler has a fixed shift other than `shift`, else None.

    A base whose shift depends on the image size gives no warning, because it says nothing about its students: those of
    FLUX.1-dev and Qwen-Image have a fixed shift nevertheless.

    Args:
        base: the base's directory; without a scheduler in it there is no warning.
        shift: the shift of the bundle or the calibration.

    Raises:
        SourceError: the scheduler's config is damaged.
    """
    path = base / _CONFIG
    if not path.is_file():
        return None
    config = read_json(path, "base checkpoint")
    own = config.get("shift", _DEFAULT_SHIFT)
    if config.get("use_dynamic_shifting") or not isinstance(own, (int, float)) or own == shift:
        return None
    return (
        f"the base's scheduler has shift {own:g} ({path}), the student is run with shift {shift:g}; "
        f"give --shift {own:g} if it was trained with that"
    )
