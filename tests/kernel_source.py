"""Helpers for tests of the kernels: compile their source for this CPU (`kernel_host.cpp`), guard arrays."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def build_host(folder: Path) -> ctypes.CDLL:
    """Compile the source for this CPU; skips without a C++ compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler here: the kernels' source cannot be built for this CPU")
    library = folder / "kernel_host.so"
    # -ffp-contract=off: the compiler must not fuse operations that the source keeps apart.
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    source = ROOT / "tests" / "kernel_host.cpp"
    subprocess.run([compiler, *flags, f"-I{ROOT / 'runtime/kernels'}", source, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.guarded.restype = ctypes.c_void_p
    return loaded


def pointer(x):
    return ctypes.c_void_p(x.ctypes.data)


class Guarded:
    """Copies arrays so that each ends at a protected page: access beyond the end crashes."""

    def __init__(self, host):
        self.host, self.made = host, []

    def put(self, x):
        size = ctypes.c_size_t(x.nbytes)
        address = self.host.guarded(size)
        assert address
        self.made.append((address, size))
        kept = np.ctypeslib.as_array((ctypes.c_uint8 * x.nbytes).from_address(address)).view(x.dtype).reshape(x.shape)
        kept[...] = x
        return kept

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for address, size in self.made:
            self.host.free_guarded(ctypes.c_void_p(address), size)
