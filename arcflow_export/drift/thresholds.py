"""What the drift gate enforces: a policy's [thresholds] table -> checked `Thresholds`; light to import."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from arcflow_runtime.errors import RequestError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Thresholds:
    """Limits of the drift from the reference; None is not enforced. Those of single layers have defaults.

    Args:
        heads: relative RMS error of the means on the reference's own inputs, mean over prompts, worst step; at most.
        latents: relative RMS error of the final latents, mean over prompts; at most.
        psnr: of the pictures, in dB, mean over prompts; at least.
        judge: drop of the judge's shares of pictures, named right and right and clean, the larger; at most.
        layers: relative RMS error of any quantised linear's output on the reference's own input, worst step; at most.
            Two E4M3 operands of 3 mantissa bits give about 0.04, so several times that is a wrong scale.
        headroom: how many times the largest input seen an activation scale may reach; at most. E4M3 has exponents, so
            a scale far too large costs little here and much where inputs are small: it is found by this alone.
    """

    heads: float | None = None
    latents: float | None = None
    psnr: float | None = None
    judge: float | None = None
    layers: float | None = 0.2
    headroom: float | None = 8.0


#: Without a policy.
DEFAULT = Thresholds(heads=0.05, latents=0.05, psnr=25.0, judge=0.02)


def parse_thresholds(table: Mapping[str, object], where: str) -> Thresholds:
    """Check a decoded [thresholds] table.

    Args:
        table: limits by name; all are optional.
        where: what it comes from, for messages.

    Raises:
        RequestError: a key is unknown, or a value is no finite number of at least 0.
    """
    known = [f.name for f in dataclasses.fields(Thresholds)]
    if unknown := sorted(table.keys() - set(known)):
        raise RequestError(f"{where}: [thresholds] has unknown keys {unknown}; known are {known}")
    values: dict[str, float] = {}
    for name, value in table.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise RequestError(f"{where}: thresholds.{name} must be a number of at least 0, got {value!r}")
        values[name] = float(value)
    return Thresholds(**values)


def times(value: float, limit: float | None) -> float:
    """How many times `limit` a value is; Inf for anything above a limit of 0, 0 where there is none."""
    if limit is None:
        return 0.0
    if limit > 0:
        return value / limit
    return math.inf if value > 0 else 0.0


def read_thresholds(path: Path) -> Thresholds:
    """The [thresholds] of a policy file in TOML.

    Raises:
        RequestError: the file is missing or no TOML, or a limit is unknown or out of range.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise RequestError(f"--policy: {path} cannot be read as TOML ({e}); give a policy's name or its file") from None
    table = data.get("thresholds", {})
    if not isinstance(table, dict):
        raise RequestError(f"--policy: {path}: thresholds must be a table, got {table!r}")
    return parse_thresholds(table, str(path))
