"""The shift of a base's own scheduler and the one that its student is to have -> a warning, or nothing."""

from __future__ import annotations

from pathlib import Path

from arcflow_export.checkpoint.sources import read_json

_CONFIG = Path("scheduler") / "scheduler_config.json"
#: diffusers' default of FlowMatchEulerDiscreteScheduler, for files that leave it out.
_DEFAULT_SHIFT = 1.0


def shift_warning(base: Path, shift: float) -> str | None:
    """A sentence if the base's scheduler has a fixed shift other than `shift`.

    A base whose shift depends on the image size says nothing of its students: those of FLUX.1-dev and Qwen-Image have
    a fixed one all the same.

    Args:
        base: the base's directory; one without a scheduler gives no warning.
        shift: of the bundle or the calibration.

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
