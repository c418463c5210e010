"""Read the JSON results of benchmarks, and name the machine on which they were measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(name: str) -> dict[str, Any]:
    """The results in `results/NAME.json`."""
    data: dict[str, Any] = json.loads((Path(__file__).parent / "results" / f"{name}.json").read_text())
    return data


def machine_line(data: dict[str, Any]) -> str:
    """The machine and the versions of the packages, as a sentence."""
    m = data["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    return f"{m['cpu']}, {m['cores']} cores, {m['memory_bytes'] / 2**30:.1f} GiB, Python {m['python']}, {versions}."
