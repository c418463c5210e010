"""The JSON record beside each built engine: `EngineRecord` <-> JSON. Its key lists everything the engine depends on.

The format is specified in `docs/bundle.md`; the rule numbers (`E1`...) below refer to it.
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
VERSION = 2


@dataclass(frozen=True)
class ShapeRange:
    """The smallest, optimal and largest shape of one input, as in a TensorRT profile; all equal for a static input."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


#: A TensorRT optimisation profile: input name -> its range of shapes.
Profile = Mapping[str, ShapeRange]


def accepts(profile: Profile, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """True if inputs of these shapes are within a profile's ranges."""
    return all(
        len(shape) == len(profile[name].min)
        and all(a <= d <= b for a, d, b in zip(profile[name].min, shape, profile[name].max, strict=True))
        for name, shape in shapes.items()
    )


@dataclass(frozen=True)
class EngineKey:
    """Everything that changes a built engine. An engine is used only if its whole key matches.

    `graph` and `weights` are the SHA-256 of the part's files, which include any quantisation scales. `gpu` is the GPU's
    product name if the library builds for the GPU it runs on, or None if it builds for a compute capability.
    `optimization_level` and `workspace_bytes` are None for the builder's default.
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
        """The fields that differ between this key and `other`, described in one short text each; empty if equal."""
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
    """The contents of an engine's record: the engine's file name in the same folder, size, SHA-256 and key.

    `activation_bytes` is the scratch memory that the engine needs on the GPU for the largest shapes of each profile, as
    its builder reported it; None if it did not. `allocates_when_run` is true if the engine allocates GPU memory in each
    run besides, so that its runs cannot be captured into a CUDA graph.
    """

    file: str
    bytes: int
    sha256: str
    key: EngineKey
    created: str
    build_seconds: float
    activation_bytes: tuple[int, ...] | None
    allocates_when_run: bool
    format: str = FORMAT
    version: int = VERSION

    def to_json(self) -> str:
        """The record as JSON text, sealed with its digest."""
        return sealed_json(self)


@dataclass(frozen=True)
class _FirstRecord:
    """A record of version 1, which says nothing of the engine's memory."""

    file: str
    bytes: int
    sha256: str
    key: EngineKey
    created: str
    build_seconds: float
    format: str = FORMAT
    version: int = 1


def part_key_fields(bundle: Bundle, part: str) -> dict[str, Any]:
    """The fields of an `EngineKey` that come from the bundle: part, graph, weights and precision."""
    spec, files = bundle.manifest.parts[part], bundle.manifest.files
    return {
        "part": part,
        "graph": files[spec.graph].sha256,
        "weights": files[spec.weights].sha256,
        "precision": spec.precision,
    }


def read_record(path: Path) -> EngineRecord:
    """Read and check one engine's record, without looking at the engine itself.

    Raises:
        EngineError: the file is not an engine's record, has an unsupported version, or was edited.
    """
    found = read_sealed(EngineRecord, path, "an engine's record", _HOW_TO_REBUILD, older=(_FirstRecord,))
    if isinstance(found, _FirstRecord):
        found = EngineRecord(
            **vars(found) | {"activation_bytes": None, "allocates_when_run": False, "version": VERSION}
        )
    record: EngineRecord = found
    if Path(record.file).name != record.file or record.file in ("", ".", ".."):
        raise EngineError(f"{path}: file {record.file!r} must lie beside its record; {_HOW_TO_REBUILD}")
    return record


def engine_name(key: EngineKey) -> str:
    """The file name of an engine's record without the extension; the same for engines of one part, builder and GPU."""
    words = [key.part, key.builder, key.target]
    if key.gpu is not None:
        # Two GPU products of one compute capability have separate engines.
        words.append(hashlib.sha256(key.gpu.encode()).hexdigest()[:8])
    return "-".join(words)


def _shown(value: object) -> str:
    if value is None:
        return "none"
    return "+".join(value) or "none" if isinstance(value, tuple) else str(value)


_HOW_TO_REBUILD = "build the engine again with `arcflow build`"
