"""A file or folder that a stage reads or writes -> a short text that differs where its contents do."""

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

REPORT = "drift.json"


@dataclass(frozen=True)
class Output:
    """What a stage writes; it appears whole, by a rename."""

    path: Path
    kind: Literal["bundle", "scales", "report"]

    def identity(self) -> str | None:
        """Of a bundle its manifest's digest and its files' sizes, else a SHA-256; None where it is not there."""
        try:
            if self.kind == "bundle":
                return _bundle(self.path)
            return sha256_file(self.path / REPORT if self.kind == "report" else self.path)
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return None

    def passed(self) -> bool:
        """False for the report of a drift gate that failed."""
        if self.kind != "report":
            return True
        try:
            return json.loads((self.path / REPORT).read_bytes())["passed"] is True
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def bytes(self) -> int:
        """Its size on disk; without what is built from a bundle."""
        if self.path.is_file():
            return self.path.stat().st_size
        built = (self.path / ENGINES, self.path / OPENVINO)
        files = (p for p in self.path.rglob("*") if not any(p.is_relative_to(b) for b in built))
        return sum(p.stat().st_size for p in files if p.is_file())

    def clear_leftovers(self) -> None:
        """Remove what a process left beside it that was killed between the rename and its end."""
        with suppress(ExportError), locked(hidden(self.path, "lock"), ExportError):  # another that writes it clears it
            for name in ("partial", "old"):
                shutil.rmtree(hidden(self.path, name), ignore_errors=True)
            if self.kind == "scales":
                self.path.with_name(f"{self.path.name}.state.safetensors").unlink(missing_ok=True)


def identify(path: Path) -> str:
    """SHA-256 of a small file's contents, or of the names, sizes and times of change of a folder's or a large one's.

    Weights are too large to be read again for each run.
    """
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
    """The installed version of a package, None where it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _bundle(path: Path) -> str:
    manifest = json.loads((path / MANIFEST).read_bytes())
    return digest([manifest["digest"], [[name, (path / name).stat().st_size] for name in sorted(manifest["files"])]])
