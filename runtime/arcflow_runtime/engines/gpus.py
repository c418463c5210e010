"""Find this machine's GPU and CUDA driver, without the toolkit or a Python package: -> `Gpu`, `Driver` or None."""

from __future__ import annotations

import ctypes
import re
import sys
from dataclasses import dataclass
from pathlib import Path

# CUdevice_attribute of cuda.h
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76
_NAME_BYTES = 256
#: Where Linux's kernel module names the driver's version.
_KERNEL_MODULE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Gpu:
    """A GPU: its product name, and its compute capability as a target such as "sm89"."""

    name: str
    target: str


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver: its version if the system tells, the newest CUDA (major, minor) that it runs, and the memory in
    bytes of the first visible GPU, 0 without one.
    """

    version: str | None
    cuda: tuple[int, int]
    memory_bytes: int


def find_driver() -> Driver | None:
    """The driver of this machine, with or without a visible GPU; None if there is none."""
    cuda, number = _load_driver(), ctypes.c_int()
    if cuda is None or cuda.cuDriverGetVersion(ctypes.byref(number)):
        return None
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    if not cuda.cuInit(0) and not cuda.cuDeviceGet(ctypes.byref(device), 0):
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    # CUDA 13.2 is the number 13020.
    return Driver(_kernel_module(), (number.value // 1000, number.value % 1000 // 10), memory.value)


def _load_driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def _kernel_module() -> str | None:
    try:
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", _KERNEL_MODULE.read_text(errors="replace"))
    except OSError:
        return None
    return None if found is None else found.group(1)


def find_gpu() -> Gpu | None:
    """The first GPU visible under `CUDA_VISIBLE_DEVICES`, or None if there is no driver or no GPU."""
    cuda = _load_driver()
    if cuda is None:
        return None
    device, name = ctypes.c_int(), ctypes.create_string_buffer(_NAME_BYTES)
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if cuda.cuDeviceGetName(name, _NAME_BYTES, device):
        return None
    capability = []
    for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR):
        value = ctypes.c_int()
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        capability.append(value.value)
    return Gpu(name.value.decode(errors="replace"), "sm{}{}".format(*capability))
