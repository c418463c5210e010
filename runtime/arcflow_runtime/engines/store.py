"""The store of built engines in a bundle's `engines` folder: find the engine for this machine, or add a new one.

An engine exists once its record does: the engine is first written completely under its final name, then its record is
renamed into place, then the engine that it replaces is removed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

from arcflow_runtime.disk.bundle import FAST_HASH_BYTES, Bundle, Check
from arcflow_runtime.disk.engine_record import EngineKey, EngineRecord, engine_name, part_key_fields, read_record
from arcflow_runtime.disk.files import is_full, locked_folder, sha256_file
from arcflow_runtime.disk.manifest import ENGINES
from arcflow_runtime.engines.gpus import find_gpu
from arcflow_runtime.engines.modes import EngineBytes
from arcflow_runtime.engines.tensorrt_library import LIBRARIES, this_platform
from arcflow_runtime.errors import EngineError

_PARTIAL = ".partial"


@dataclass(frozen=True)
class Host:
    """The machine and library that an engine must have been built for: fields of `EngineKey` that must match."""

    builder: str
    builder_version: str
    target: str
    gpu: str | None
    platform: str


@dataclass(frozen=True)
class BuildReport:
    """What one build took, and what its builder said about the engine's memory, as in `EngineRecord`."""

    seconds: float
    activation_bytes: tuple[int, ...] | None = None
    allocates_when_run: bool = False


@dataclass(frozen=True)
class BuiltEngine:
    """A built engine in the store: the path of its file, and its record."""

    path: Path
    record: EngineRecord


def this_host(builder: str) -> Host:
    """Describe this machine for engines of the library `builder`.

    Raises:
        EngineError: the library is not installed, or there is no GPU.
    """
    library = LIBRARIES[builder]
    version = library.load().__version__
    gpu = find_gpu()
    if gpu is None:
        raise EngineError(
            f"{builder} engines run on an NVIDIA GPU, and the CUDA driver finds none here; "
            "check that nvidia-smi lists one"
        )
    return Host(builder, version, gpu.target, library.key_gpu(gpu), this_platform())


def find_engine(bundle: Bundle, part: str, host: Host, check: Check = "fast") -> BuiltEngine:
    """Find the engine of `part` that runs on `host`. Its file is read only if library, version and GPU match.

    Args:
        bundle: an opened bundle.
        part: name of one of its parts.
        host: what will run the engine, usually `this_host(builder)`.
        check: "fast" compares the engine's size and hashes files up to 64 MiB; "full" hashes a file of any size.

    Returns:
        The engine. Its record's key gives the shapes that it accepts and the flags it was built with.

    Raises:
        EngineError: there is no engine for the part; or it was built for another library, version, GPU or platform,
            or from another graph or other weights; or its file is damaged.
    """
    found = [(path, record) for path, record in read_records(bundle) if record.key.part == part]
    if not found:
        raise EngineError(f"{bundle.root} has no engine for {part}; {build_command(bundle, part, host)}")
    for name in ("builder", "builder_version", "target", "gpu", "platform"):
        wanted = getattr(host, name)
        fitting = [(path, record) for path, record in found if getattr(record.key, name) == wanted]
        if not fitting:
            have = ", ".join(sorted({str(getattr(record.key, name)) for _, record in found}))
            raise EngineError(
                f"{part}: the engine's {_FIELDS[name]} must be {wanted}, got {have}; "
                f"{build_command(bundle, part, host)}"
            )
        found = fitting
    for name, value in part_key_fields(bundle, part).items():
        fitting = [(path, record) for path, record in found if getattr(record.key, name) == value]
        if not fitting:
            raise EngineError(
                f"{found[0][0]}: the engine of {part} was built from another {name} than the bundle's; "
                f"{build_command(bundle, part, host)}"
            )
        found = fitting
    path, record = found[0]
    engine = path.parent / record.file
    check_engine(engine, record, check)
    return BuiltEngine(engine, record)


def read_records(bundle: Bundle) -> list[tuple[Path, EngineRecord]]:
    """Read every engine's record in the bundle: (path, record), sorted by path.

    Raises:
        EngineError: a record is damaged.
    """
    return [(path, read_record(path)) for path in sorted((bundle.root / ENGINES).glob("*.json"))]


def check_engine(path: Path, record: EngineRecord, check: Check = "fast") -> None:
    """Compare an engine's file with its record.

    Raises:
        EngineError: the file is missing, or its size or SHA-256 differs from the record's.
    """
    what = f"the {record.key.builder} engine of {record.key.part} for {record.key.target}"
    again = "build it again with `arcflow build`"
    if not path.is_file() or path.is_symlink():
        raise EngineError(f"{path}, {what}, is missing; {again}")
    size = path.stat().st_size
    if size != record.bytes:
        raise EngineError(f"{path}, {what}, must have {record.bytes} bytes, got {size}; it was cut or swapped, {again}")
    if (check == "full" or size <= FAST_HASH_BYTES) and sha256_file(path) != record.sha256:
        raise EngineError(f"{path}, {what}, does not match its SHA-256; it was edited or swapped, {again}")


def engine_bytes(bundle: Bundle, record: EngineRecord) -> EngineBytes:
    """What a loaded engine takes: as much as its file has, and the part's weights if they are not in it.

    An engine that streams its weights counts without them, because it keeps on the GPU only what has room there.
    """
    flags, spec = record.key.flags, bundle.manifest.parts[record.key.part]
    weights = bundle.manifest.files[spec.weights].bytes
    if "WEIGHT_STREAMING" in flags:
        taken = max(record.bytes - weights, 0)
    else:
        taken = record.bytes + ("STRIP_PLAN" in flags) * weights
    known = () if record.activation_bytes is None else zip(record.key.profiles, record.activation_bytes, strict=False)
    return EngineBytes(taken, tuple(known))


def find_built(bundle: Bundle, key: EngineKey) -> tuple[BuiltEngine | None, list[str]]:
    """Find the engine with exactly this key.

    Returns:
        (engine, []) if there is one; (None, differences) if the store holds an engine with another key or a damaged one
        in its place; (None, []) if it holds none.
    """
    path = bundle.root / ENGINES / f"{engine_name(key)}.json"
    if not path.exists():
        return None, []
    try:
        record = read_record(path)
        if changed := record.key.differences(key):
            return None, changed
        check_engine(path.parent / record.file, record)
    except EngineError as e:
        return None, [f"the engine is damaged ({e})"]
    return BuiltEngine(path.parent / record.file, record), []


@contextmanager
def locked_store(bundle: Bundle) -> Iterator[None]:
    """Lock the bundle's engines for writing, and remove files that killed builds left.

    Raises:
        EngineError: another build holds the lock, or the folder cannot be written.
    """
    folder = bundle.root / ENGINES
    with locked_folder(folder, f"another build is writing engines of {bundle.root}; wait for it", "engines"):
        _remove_orphans(bundle)
        yield


def write_engine(
    bundle: Bundle, key: EngineKey, build: Callable[[BinaryIO], BuildReport], created: datetime | None = None
) -> BuiltEngine:
    """Build an engine and add it to the store atomically; the caller holds `locked_store`.

    Args:
        bundle: the bundle it belongs to.
        key: the engine's key.
        build: writes the engine to the file that it is given.
        created: the time to record; None for now.

    Raises:
        EngineError: the disk is full, or `build` raised it. An earlier engine of the same name stays in place.
    """
    folder = bundle.root / ENGINES
    name = engine_name(key)
    partial = folder / f"{name}{_PARTIAL}"
    engine = folder / f"{name}-{key.digest()[:16]}.engine"
    try:
        with partial.open("wb") as f:
            report = build(f)
            f.flush()
            os.fsync(f.fileno())
        record = EngineRecord(
            file=engine.name,
            bytes=partial.stat().st_size,
            sha256=sha256_file(partial),
            key=key,
            created=(created or datetime.now(timezone.utc)).isoformat(timespec="seconds"),
            build_seconds=round(report.seconds, 3),
            activation_bytes=report.activation_bytes,
            allocates_when_run=report.allocates_when_run,
        )
        os.replace(partial, engine)
        with partial.open("w", encoding="utf-8") as f:
            f.write(record.to_json())
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, folder / f"{name}.json")
    except OSError as e:
        if is_full(e):
            raise EngineError(f"the disk of {folder} is full; the unfinished engine was removed") from e
        raise
    finally:
        partial.unlink(missing_ok=True)
        _remove_orphans(bundle)
    return BuiltEngine(engine, record)


def _remove_orphans(bundle: Bundle) -> None:
    """Remove engines that no record names, and unfinished files of killed builds."""
    folder = bundle.root / ENGINES
    kept = set()
    for path in folder.glob("*.json"):
        try:
            kept.add(read_record(path).file)
        except EngineError:
            return  # the engine of a damaged record is unknown, so nothing can be called an orphan
    for path in folder.iterdir():
        if path.suffix == _PARTIAL or (path.suffix == ".engine" and path.name not in kept):
            path.unlink()


def build_command(bundle: Bundle, part: str, host: Host) -> str:
    """The `arcflow build` command that makes an engine of `part` for `host`; for error messages."""
    target = f" --target {host.target}" if LIBRARIES[host.builder].ahead_of_time else ""
    return f"run: arcflow build {bundle.root} --backend {host.builder}{target} --parts {part}"


_FIELDS = {
    "builder": "library",
    "builder_version": "library's version",
    "target": "compute capability",
    "gpu": "GPU",
    "platform": "platform",
}
