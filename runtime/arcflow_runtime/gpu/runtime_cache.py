"""Keep TensorRT-RTX's runtime cache on disk: bytes <-> one file per engine and GPU.

TensorRT-RTX compiles kernels for the GPU when an engine first runs; the cache saves that time in later processes. A
file is replaced atomically under a lock. TensorRT-RTX checks a cache against the machine, so a wrong or damaged file
only costs the time of compiling again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

from arcflow_runtime.disk.files import locked, whole_file
from arcflow_runtime.errors import EngineError
from arcflow_runtime.gpu.kernel_code import cache_folder

_log = logging.getLogger("arcflow")

#: Larger files are ignored; the kernels of one engine take a few MB.
MAX_BYTES = 1 << 30


class RuntimeCacheFile:
    """The cache file of one key: the engine's SHA-256, the library's and the driver's version, and the GPU's name."""

    def __init__(self, key: Sequence[str], folder: Path | None = None) -> None:
        digest = hashlib.sha256("\n".join(key).encode()).hexdigest()
        self.path = (folder or cache_folder()) / f"tensorrt-rtx-{digest[:32]}.cache"
        self._written: str | None = None

    def read(self) -> bytes | None:
        """The cache that an earlier run wrote, or None."""
        try:
            if self.path.stat().st_size > MAX_BYTES:
                return None
            data = self.path.read_bytes()
        except OSError:
            return None
        self._written = hashlib.sha256(data).hexdigest()
        return data

    def write(self, data: bytes) -> None:
        """Write the cache if it changed. A failure is logged as a warning, because it only costs time."""
        digest = hashlib.sha256(data).hexdigest()
        if digest == self._written:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # The C++ library takes the same lock and does not check whether the lock file was removed, so it is kept.
            lock = self.path.with_suffix(".lock")
            with locked(lock, EngineError, wait=True, remove=False), whole_file(self.path) as partial:
                partial.write_bytes(data)
        except (OSError, EngineError) as e:
            reason = e.strerror if isinstance(e, OSError) else e
            _log.warning("TensorRT-RTX's compiled kernels cannot be cached in %s: %s", self.path.parent, reason)
        self._written = digest
