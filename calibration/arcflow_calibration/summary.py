"""A file of scales -> what to look at: how far the steps differ, and what would overflow float16."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from arcflow_export.formats.scales import Range, Scales
from arcflow_runtime.maths.dtypes import FLOAT16_MAX

#: Steps that differ by more are counted: E4M3 holds 15 binades at full precision, this is one of them.
FACTOR = 2.0


@dataclass(frozen=True)
class PartSummary:
    """One part: `ratio` is the largest of a layer's steps over its smallest, at `ratio_layer`."""

    part: str
    layers: int
    ratio: float
    ratio_layer: str
    differing: int
    overflowing: tuple[str, ...]


def summarise(scales: Scales) -> list[PartSummary]:
    """A summary per part."""
    summaries = []
    for part, layers in scales.parts.items():
        ratios = {name: max(r.amax) / min(r.amax) for name, r in layers.items()}
        worst = max(ratios, key=lambda name: ratios[name])
        differing = sum(ratio > FACTOR for ratio in ratios.values())
        overflowing = tuple(name for name, r in layers.items() if _overflows(r))
        summaries.append(PartSummary(part, len(layers), ratios[worst], worst, differing, overflowing))
    return summaries


def _overflows(r: Range) -> bool:
    return r.output_amax is not None and max(r.output_amax) > FLOAT16_MAX


def table(summaries: list[PartSummary]) -> str:
    """The summary as text."""
    lines = [f"{'part':16}{'layers':>8}{'largest ratio of steps':>24}{'steps differ > 2x':>20}{'output > 65504':>16}"]
    for s in summaries:
        lines.append(f"{s.part:16}{s.layers:>8}{s.ratio:>23.2f}x{s.differing:>20}{len(s.overflowing):>16}")
        if s.ratio > 1:
            lines.append(f"  largest ratio at {s.ratio_layer}")
        for name in s.overflowing:
            lines.append(f"  overflows float16: {name}")
    return "\n".join(lines)


def as_dict(summaries: list[PartSummary]) -> dict[str, object]:
    """The summary for JSON."""
    return {"parts": [dataclasses.asdict(s) for s in summaries]}
