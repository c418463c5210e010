"""Format the tables of `arcflow compile`: the plan before, and what each stage took after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: The values of a row's `state`.
DONE, TO_DO, CHECKED, GIVEN, RAN, FAILED = "done", "to do", "checked again", "given", "ran", "failed"


@dataclass
class StageRow:
    """One stage: its planned and its measured figures; None if unknown."""

    stage: str
    state: str
    output: Path | None = None
    note: str = ""
    planned_seconds: float | None = None
    seconds: float | None = None
    planned_memory_bytes: int | None = None
    peak_bytes: int | None = None
    planned_disk_bytes: int | None = None
    bytes: int | None = None


def plan_table(rows: Sequence[StageRow]) -> str:
    """The table of the stages to run and their estimates."""
    cells = [("stage", "state", "time", "memory", "disk")]
    waiting = [r for r in rows if r.state in (TO_DO, CHECKED)]
    for r in rows:
        shown = (duration(r.planned_seconds), gibibytes(r.planned_memory_bytes), gigabytes(r.planned_disk_bytes))
        cells.append((r.stage, r.state, *(shown if r in waiting else ("", "", ""))))
    known = [r.planned_seconds for r in waiting if r.planned_seconds is not None]
    if len(known) > 1:
        cells.append(("all", "", duration(sum(known)), "", ""))
    notes = [f"{r.stage}: {r.note}" for r in waiting if r.note]
    return "\n".join([_columns(cells), *notes])


def result_table(rows: Sequence[StageRow]) -> str:
    """The table of what each stage took, beside its estimate."""
    cells = [("stage", "state", "planned", "took", "planned", "peak", "size", "output")]
    for r in rows:
        cells.append(
            (
                r.stage,
                r.state,
                duration(r.planned_seconds),
                duration(r.seconds),
                gibibytes(r.planned_memory_bytes),
                gibibytes(r.peak_bytes),
                gigabytes(r.bytes),
                str(r.output or ""),
            )
        )
    return _columns(cells, left=(0, 1, 7))


def duration(seconds: float | None) -> str:
    """Seconds as text, such as "48 s", "12 min", "3.4 h"; empty if unknown."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else "< 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def gibibytes(count: int | None) -> str:
    """A size of memory as text; empty if unknown."""
    return "" if count is None else f"{count / (1 << 30):.2f} GiB"


def gigabytes(count: int | None) -> str:
    """A size on disk as text; empty if unknown."""
    if count is None:
        return ""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _columns(cells: Sequence[Sequence[str]], left: tuple[int, ...] = (0, 1)) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = [
        [f"{c:{w}}" if i in left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(r, widths, strict=True))]
        for r in cells
    ]
    return "\n".join("  ".join(["", *row]).rstrip() for row in aligned)
