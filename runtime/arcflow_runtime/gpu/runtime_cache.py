"""What TensorRT-RTX compiles for a GPU when an engine first runs, kept on disk: bytes <-> one file per key.

A file is replaced whole, under a lock that keeps two processes from doing it at once. TensorRT-RTX checks what it is
given against the machine, so that a wrong or damaged file costs the time of compiling only.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

from arcflow_runtime.disk.files import locked, whole_file
from arcflow_runtime.errors import EngineError
from arcflow_runtime.gpu.kernels import cache_folder

_log = logging.getLogger("arcflow")

#: Larger files are not read: kernels of one engine take some MB.
MAX_BYTES = 1 << 30


class RuntimeCacheFile:
    """The file of one key: the engine's SHA-256, library's version, driver's version and GPU."""

    def __init__(self, key: Sequence[str], folder: Path | None = None) -> None:
        digest = hashlib.sha256("\n".join(key).encode()).hexdigest()
        self.path = (folder or cache_folder()) / f"tensorrt-rtx-{digest[:32]}.cache"
        self._written: str | None = None

    def read(self) -> bytes | None:
        """What an earlier run left, or None."""
        try:
            if self.path.stat().st_size > MAX_BYTES:
                return None
            data = self.path.read_bytes()
        except OSError:
            return None
        self._written = hashlib.sha256(data).hexdigest()
        return data

    def write(self, data: bytes) -> None:
        """Replace the file, unless it holds this already; that it cannot be written is logged and costs time only."""
        digest = hashlib.sha256(data).hexdigest()
        if digest == self._written:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # The C++ library takes the same lock, and does not look whether its file was removed.
            lock = self.path.with_suffix(".lock")
            with locked(lock, EngineError, wait=True, remove=False), whole_file(self.path) as partial:
                partial.write_bytes(data)
        except (OSError, EngineError) as e:
            reason = e.strerror if isinstance(e, OSError) else e
            _log.warning("what TensorRT-RTX compiled cannot be kept in %s: %s", self.path.parent, reason)
        self._written = digest
