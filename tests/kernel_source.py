"""Helpers for tests of the kernels: compile their source for this CPU (`kernel_host.cpp`), guard arrays, use a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from arcflow_runtime.gpu import kernels

ROOT = Path(__file__).parent.parent
DTYPES = ("float32", "float16", "bfloat16")
#: Dtype -> the numpy type that stores it.
STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


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


def widen(x):
    """Convert float32, float16, or bfloat16 stored as uint16 to float32."""
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x.astype(np.float32)


def narrow(x, dtype):
    """Round `x` to `dtype`, ties to even; bfloat16 is returned as uint16."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return x.astype(dtype)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)


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


def open_gpu():
    """Open a GPU: device, stream and loaded kernels; skips without one."""
    core = pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    from arcflow_runtime.engines.gpus import find_gpu

    if find_gpu() is None:
        pytest.skip("the CUDA driver finds no GPU here")
    device = core.Device()
    device.set_current()
    return device, device.create_stream(), kernels.load_kernels(device)


class OnDevice:
    """Copies arrays to and from device memory."""

    def __init__(self, device, stream):
        self.device, self.stream, self.kept = device, stream, []

    def put(self, x):
        from cuda.bindings import driver

        buffer = self.device.allocate(max(x.nbytes, 1), stream=self.stream)
        self.stream.sync()
        self.kept.append(buffer)
        (error,) = driver.cuMemcpyHtoD(int(buffer.handle), x.ctypes.data, x.nbytes)
        assert error == 0
        return int(buffer.handle)

    def get(self, address, like):
        from cuda.bindings import driver

        out = np.empty_like(like)
        self.stream.sync()
        (error,) = driver.cuMemcpyDtoH(out.ctypes.data, address, out.nbytes)
        assert error == 0
        return out
