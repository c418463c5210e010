"""What an engine depends on, and the record of it that lies beside the engine: `EngineRecord` <-> JSON.

Engines are specified in `docs/bundle.md`; rule numbers (`E1`...) below cite it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arcflow_runtime.disk.bundle import Bundle
from arcflow_runtime.disk.manifest import DType, seal
from arcflow_runtime.disk.sealed import read_sealed, sealed_json
from arcflow_runtime.errors import EngineError

FORMAT = "arcflow-engine"
VERSION = 1


@dataclass(frozen=True)
class Shapes:
    """One input's smallest, best and largest shape; all equal where it is static."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


Profile = Mapping[str, Shapes]


@dataclass(frozen=True)
class EngineKey:
    """Everything that changes an engine; an engine with another key is never used.

    `graph` and `weights` are SHA-256 of the part's files; quantisation scales are in them. `gpu` is the product name
    for a library that builds for the very GPU it runs on, and None for one that builds for a compute capability.
    `optimization_level` and `workspace_bytes` are None where the builder's default holds.
    """

    part: str
    graph: str
    weights: str
    precision: DType
    profiles: tuple[Profile, ...]
    flags: tuple[str, ...]
    optimization_level: int | None
    workspace_bytes: int | None
    builder: str
    builder_version: str
    target: str
    gpu: str | None
    platform: str

    def digest(self) -> str:
        """SHA-256 of the key in canonical JSON (E3)."""
        return seal(dataclasses.asdict(self))

    def differences(self, other: EngineKey) -> list[str]:
        """What changed from this key to `other`, one short text per field; empty if they are equal."""
        found = []
        for f in dataclasses.fields(self):
            old, new = getattr(self, f.name), getattr(other, f.name)
            if old == new:
                continue
            if f.name == "profiles":
                found.append("the shape profile")
            elif f.name in ("graph", "weights"):
                found.append(f"the {f.name} ({old[:12]} to {new[:12]})")
            else:
                found.append(f"{f.name} ({_shown(old)} to {_shown(new)})")
        return found


@dataclass(frozen=True)
class EngineRecord:
    """The JSON beside an engine: its file in the same folder, its size and SHA-256, and its key."""

    file: str
    bytes: int
    sha256: str
    key: EngineKey
    created: str
    build_seconds: float
    format: str = FORMAT
    version: int = VERSION

    def to_json(self) -> str:
        """The record as JSON text, sealed with its digest."""
        return sealed_json(self)


def part_key_fields(bundle: Bundle, part: str) -> dict[str, Any]:
    """The fields of an `EngineKey` that the bundle gives: part, graph, weights and precision."""
    spec, files = bundle.manifest.parts[part], bundle.manifest.files
    return {
        "part": part,
        "graph": files[spec.graph].sha256,
        "weights": files[spec.weights].sha256,
        "precision": spec.precision,
    }


def read_record(path: Path) -> EngineRecord:
    """Read and check one record; the engine itself is not looked at.

    Raises:
        EngineError: it is no record, of another version, or was edited.
    """
    record: EngineRecord = read_sealed(EngineRecord, path, "an engine's record", _AGAIN)
    if Path(record.file).name != record.file or record.file in ("", ".", ".."):
        raise EngineError(f"{path}: file {record.file!r} must lie beside its record; {_AGAIN}")
    return record


def engine_name(key: EngineKey) -> str:
    """The file name of an engine, without its ending; records of the same part and target have the same name."""
    words = [key.part, key.builder, key.target]
    if key.gpu is not None:
        # Two products of one compute capability each have their own.
        words.append(hashlib.sha256(key.gpu.encode()).hexdigest()[:8])
    return "-".join(words)


def _shown(value: object) -> str:
    if value is None:
        return "none"
    return "+".join(value) or "none" if isinstance(value, tuple) else str(value)


_AGAIN = "build the engine again with `arcflow build`"
