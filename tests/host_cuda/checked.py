"""Calls of the driver API for the cases: checked results, page-locked arrays and captures."""

from __future__ import annotations

import ctypes

import numpy as np
from cuda.bindings import driver as cuda

#: The size of most allocations in the cases.
BYTES = 256


def ok(result):
    """The value of a call that must succeed, or a tuple if there are several."""
    error, *values = result
    assert error == cuda.CUresult.CUDA_SUCCESS, error
    return values[0] if len(values) == 1 else tuple(values)


def error(result):
    """The name of a call's error without CUDA_ERROR_."""
    return result[0].name.removeprefix("CUDA_").removeprefix("ERROR_")


def host(array):
    return array.ctypes.data


class Pinned:
    """Page-locked memory as an array."""

    def __init__(self, value):
        self.address = int(ok(cuda.cuMemHostAlloc(BYTES, 0)))
        self.array = np.ctypeslib.as_array((ctypes.c_uint8 * BYTES).from_address(self.address))
        self.array[:] = value


def read(address):
    """Copy from the device, in the default stream."""
    out = np.zeros(BYTES, np.uint8)
    ok(cuda.cuMemcpyDtoH(host(out), address, BYTES))
    return out


def end(stream):
    """End the capture and instantiate its graph."""
    graph = ok(cuda.cuStreamEndCapture(stream))
    executable = ok(cuda.cuGraphInstantiate(graph, 0))
    ok(cuda.cuGraphDestroy(graph))
    return executable
