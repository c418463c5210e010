"""Identify the contents of files and folders that stages read and write: equal text means unchanged contents."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from arcflow_export.errors import ExportError
from arcflow_runtime.disk.files import hidden, locked, sha256_file
from arcflow_runtime.disk.manifest import ENGINES, MANIFEST, OPENVINO
from arcflow_runtime.lora.scales import ADAPTER_CONFIG

REPORT = "drift.json"


@dataclass(frozen=True)
class Output:
    """The output of a stage, which the stage writes atomically."""

    path: Path
    kind: Literal["bundle", "scales", "report"]

    def identity(self) -> str | None:
        """A hash of the contents: for a bundle of its manifest's digest and file sizes; None if it is missing."""
        try:
            if self.kind == "bundle":
                return _bundle(self.path)
            return sha256_file(self.path / REPORT if self.kind == "report" else self.path)
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return None

    def passed(self) -> bool:
        """False if this is the report of a failed drift gate, else True."""
        if self.kind != "report":
            return True
        try:
            return json.loads((self.path / REPORT).read_bytes())["passed"] is True
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def bytes(self) -> int:
        """Its size on disk; for a bundle without engines and built tokenizers."""
        if self.path.is_file():
            return self.path.stat().st_size
        built = (self.path / ENGINES, self.path / OPENVINO)
        files = (p for p in self.path.rglob("*") if not any(p.is_relative_to(b) for b in built))
        return sum(p.stat().st_size for p in files if p.is_file())

    def clear_leftovers(self) -> None:
        """Remove the leftovers of a process that was killed after it had renamed this output into place."""
        # If another process holds the lock, it writes this output and clears up itself.
        with suppress(ExportError), locked(hidden(self.path, "lock"), ExportError):
            for name in ("partial", "old"):
                shutil.rmtree(hidden(self.path, name), ignore_errors=True)
            if self.kind == "scales":
                self.path.with_name(f"{self.path.name}.state.safetensors").unlink(missing_ok=True)


def identify(path: Path) -> str:
    """SHA-256 of a small file's contents; for a folder or a large file, of names, sizes and modification times.

    Weights are too large to be read for every run. The adapter_config.json beside a file of weights belongs to it,
    since it can change a LoRA's scale.
    """
    config = path.with_name(ADAPTER_CONFIG)
    if path.suffix == ".safetensors" and path.is_file() and config.is_file():
        return digest([_identify(path), _identify(config)])
    return _identify(path)


def _identify(path: Path) -> str:
    if path.is_file() and path.stat().st_size <= 1 << 20:
        return sha256_file(path)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    facts = [[os.path.relpath(p, path), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    return digest(facts)


def digest(facts: object) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@functools.cache
def version(package: str) -> str | None:
    """The installed version of a package, or None if it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _bundle(path: Path) -> str:
    manifest = json.loads((path / MANIFEST).read_bytes())
    return digest([manifest["digest"], [[name, (path / name).stat().st_size] for name in sorted(manifest["files"])]])
