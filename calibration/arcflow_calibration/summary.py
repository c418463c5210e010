"""Summarise a scales file: how much the ranges differ between steps, and which layers would overflow float16."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from arcflow_export.formats.scales import ActivationRange, Scales
from arcflow_runtime.maths.dtypes import FLOAT16_MAX

#: Layers whose steps differ by more than this factor are counted. It is one of E4M3's 15 binades of full precision.
FACTOR = 2.0


@dataclass(frozen=True)
class PartSummary:
    """The summary of one part.

    `ratio`: the largest ratio between two steps of one layer, `ratio_layer`. `differing`: number of layers whose steps
    differ by more than `FACTOR`. `overflowing`: layers whose output exceeds float16's range.
    """

    part: str
    layers: int
    ratio: float
    ratio_layer: str
    differing: int
    overflowing: tuple[str, ...]


def summarise(scales: Scales) -> list[PartSummary]:
    """Summarise each part."""
    summaries = []
    for part, layers in scales.parts.items():
        ratios = {name: max(r.amax) / min(r.amax) for name, r in layers.items()}
        worst = max(ratios, key=lambda name: ratios[name])
        differing = sum(ratio > FACTOR for ratio in ratios.values())
        overflowing = tuple(name for name, r in layers.items() if _overflows(r))
        summaries.append(PartSummary(part, len(layers), ratios[worst], worst, differing, overflowing))
    return summaries


def _overflows(r: ActivationRange) -> bool:
    return r.output_amax is not None and max(r.output_amax) > FLOAT16_MAX


def table(summaries: list[PartSummary]) -> str:
    """The summary as a text table."""
    lines = [f"{'part':16}{'layers':>8}{'largest ratio of steps':>24}{'steps differ > 2x':>20}{'output > 65504':>16}"]
    for s in summaries:
        lines.append(f"{s.part:16}{s.layers:>8}{s.ratio:>23.2f}x{s.differing:>20}{len(s.overflowing):>16}")
        if s.ratio > 1:
            lines.append(f"  largest ratio at {s.ratio_layer}")
        for name in s.overflowing:
            lines.append(f"  overflows float16: {name}")
    return "\n".join(lines)


def as_dict(summaries: list[PartSummary]) -> dict[str, object]:
    """The summary as JSON values."""
    return {"parts": [dataclasses.asdict(s) for s in summaries]}
