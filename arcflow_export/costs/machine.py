"""Measure this machine for cost estimates: free memory and disk, and speeds of products, disk, hashing and Python."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from arcflow_export.student.memory import free_bytes

_MIB = 1 << 20
#: Bytes written and read to time the disk. Fewer would stay in the disk's own cache.
_DISK_BYTES = 256 * _MIB
_BLOCK = b"\x5a" * (4 * _MIB)
#: Side of the square matrices that are multiplied (about the size of a network's products), and the seconds to measure.
_SIDE, _SECONDS = 1536, 0.4


@dataclass(frozen=True)
class Machine:
    """Free memory and disk, and speeds in floating-point operations and bytes per second.

    `steps` is the number of simple Python statements per second; it limits tracing and graph passes.
    """

    free_memory_bytes: int
    free_disk_bytes: int
    float32_flops: float
    bfloat16_flops: float
    read: float
    write: float
    hash: float
    steps: float


def typical(folder: Path) -> Machine:
    """Free memory and disk of this machine with typical speeds (two cores of a server), without a measurement."""
    free_disk = shutil.disk_usage(folder).free
    return Machine(free_bytes(), free_disk, 150e9, 300e9, 1.5e9, 0.8e9, 1.8e9, 33e6)


def measure(folder: Path) -> Machine:
    """Measure the machine in about three seconds; `folder` is on the disk that will be written to."""
    import torch

    def product(dtype: torch.dtype) -> float:
        a, b = (torch.full((_SIDE, _SIDE), 0.5, dtype=dtype) for _ in range(2))
        return _rate(lambda: torch.matmul(a, b), 2.0 * _SIDE**3)

    write, read = _disk(folder)
    return Machine(
        free_bytes(),
        shutil.disk_usage(folder).free,
        product(torch.float32),
        product(torch.bfloat16),
        read,
        write,
        _rate(lambda: hashlib.sha256(_BLOCK).digest(), len(_BLOCK)),
        _rate(_count, 100_000),
    )


def _rate(work: Callable[[], object], amount: float) -> float:
    """Amount per second in the fastest run, which other processes disturbed least."""
    work()
    best, until = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < until:
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return amount / best


def _count() -> int:
    total = 0
    for i in range(100_000):
        total += i & 3
    return total


def _disk(folder: Path) -> tuple[float, float]:
    """Bytes per second written and read, past the operating system's cache."""
    with tempfile.TemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(_DISK_BYTES // len(_BLOCK)):
            file.write(_BLOCK)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - began
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        while file.read(len(_BLOCK)):
            pass
        return _DISK_BYTES / written, _DISK_BYTES / (time.perf_counter() - began)
