"""The compiled part of the runtime: what it refuses, and that the runtime works without it. See `both_ways`."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from arcflow_runtime.maths.speedups import compiled

needs_compiled = pytest.mark.skipif(compiled is None, reason="the runtime was installed without a C++ compiler")


def arrays(tokens=2, modes=3, channels=8, sub_pixels=4):
    shapes = ((modes, channels), (modes, sub_pixels), (modes - 1, sub_pixels), (channels,), (channels,))
    return [np.zeros((tokens, *shape), np.float32) for shape in shapes]


@needs_compiled
@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("change", [lambda x: x[1:], lambda x: np.concatenate([x, x[:1]]), lambda x: x.astype("f8")])
def test_arrays_of_other_sizes_are_refused(place, change):
    given = arrays()
    compiled.update(*given, 3, 8, 4, 0.5)
    given[place] = change(given[place])
    with pytest.raises(ValueError, match=r"^array \d must have \d+ float32 numbers, got \d+ bytes$"):
        compiled.update(*given, 3, 8, 4, 0.5)


@needs_compiled
@pytest.mark.parametrize("sizes", [(0, 8, 4), (3, 0, 4), (3, 8, 0), (3, 8, 3), (-1, 8, 4), (2**62, 8, 4)])
def test_sizes_out_of_range_are_refused(sizes):
    with pytest.raises(ValueError, match="out of range"):
        compiled.update(*arrays(), *sizes, 0.5)


@needs_compiled
def test_memory_that_cannot_be_written_is_refused():
    out = np.zeros(16, np.float32)
    out.setflags(write=False)
    with pytest.raises((BufferError, TypeError, ValueError)):
        compiled.randn(1, out)
    with pytest.raises((BufferError, TypeError, ValueError)):
        compiled.randn(1, np.zeros((16, 2), np.float32)[:, 0])
    with pytest.raises(ValueError, match="array 0 must have 4 float32 numbers, got 19 bytes"):
        compiled.randn(1, np.zeros(19, np.uint8))


def test_the_runtime_works_without_it():
    code = """
import sys
sys.modules["arcflow_runtime.maths._speedups"] = None
import numpy as np
from arcflow_runtime.maths import noise, speedups, update
assert speedups.compiled is noise.compiled is update.compiled is None
assert noise.randn(1, (16,)).shape == (16,)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
