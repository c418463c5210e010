"""Find this machine's GPU through the CUDA driver, without the toolkit or a Python package: -> `Gpu` or None."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

# CUdevice_attribute of cuda.h
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76
_NAME_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """A GPU: its product name, and its compute capability as a target such as "sm89"."""

    name: str
    target: str


def find_gpu() -> Gpu | None:
    """The first GPU visible under `CUDA_VISIBLE_DEVICES`, or None if there is no driver or no GPU."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
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
