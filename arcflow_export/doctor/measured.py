"""How long each stage took elsewhere: a student's name -> the committed results of `benchmarks/`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class MeasuredStage:
    """One stage as it was measured: wall time, peak resident memory, bytes written; `what` is the work it did."""

    seconds: float
    peak_bytes: int
    disk_bytes: int
    what: str


@dataclass(frozen=True)
class Measured:
    """The measurements of one student: the machine, the bytes of its checkpoints, and the stages by name."""

    where: str
    download_bytes: int
    stages: Mapping[str, MeasuredStage]


def measured(student: str) -> Measured | None:
    """The measurements of the student of this name; None if there are none."""
    data = json.loads((files("arcflow_export") / "doctor" / "measured.json").read_text(encoding="utf-8")).get(student)
    if data is None:
        return None
    stages = {name: MeasuredStage(**row) for name, row in data["stages"].items()}
    return Measured(data["where"], data["download_bytes"], stages)
