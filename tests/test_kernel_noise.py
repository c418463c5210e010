"""The noise kernel against the Python runtime on a CPU: its arithmetic and its threads. tests/gpu/ has it on a GPU.

Both emulate a fused multiply-add in float64, which rounds twice.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from arcflow_runtime.gpu.kernels import NoiseShape, launch_constants
from arcflow_runtime.maths.noise import _box_muller, draw_latents, streams
from tests.gpu.stored import DTYPES, STORED, narrow
from tests.kernel_source import Guarded, pointer


def bits(x):
    return x.view(np.uint8)


def test_arithmetic_is_the_python_runtimes(kernel_host):
    rng = np.random.default_rng(0)
    u = (rng.integers(0, 1 << 24, (1 << 16, 16)) * 2.0**-24).astype(np.float32)
    u[0] = 0  # both edges of radius and angle
    u[1] = 1 - 2.0**-24
    # Angles around every octant's boundary.
    u[2:18, 8:] = np.clip((np.arange(16)[:, None] / 16 + np.arange(-4, 4) * 2.0**-24), 0, 1 - 2.0**-24)
    out = np.empty_like(u)
    kernel_host.box_muller(pointer(u), pointer(out), ctypes.c_longlong(len(u)))
    np.testing.assert_array_equal(bits(out), bits(_box_muller(u.ravel()).reshape(u.shape)))


def shape_of(images, channels, height, width, patch, dtype="float32"):
    return NoiseShape(images, channels, height, width, patch, dtype)


#: Less than a state, several states with a rest, states that divide the image, other patches and threads' edges.
SHAPES = [
    shape_of(1, 4, 2, 2, 2),
    shape_of(2, 16, 8, 8, 2),
    shape_of(3, 16, 6, 26, 2),
    shape_of(1, 12, 4, 6, 1),
    shape_of(2, 16, 12, 8, 4),
    *(shape_of(2, 4, 12, 20, 2, dtype) for dtype in DTYPES),
]


def expected(shape, seed):
    return draw_latents(seed, shape.images, shape.channels, shape.height, shape.width, shape.patch)


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_threads_give_the_python_runtimes_noise(kernel_host, shape, per_image, second):
    seed = [7, 2**32 + 5, -3][: shape.images] if per_image else 2**63 + 11
    launch = launch_constants()
    theirs = expected(shape, seed)
    with Guarded(kernel_host) as memory:
        sources = memory.put(streams(seed, shape.images, shape.channels * shape.height * shape.width))
        latents = memory.put(np.full_like(theirs, np.nan))
        narrowed = memory.put(np.zeros(theirs.shape, STORED[shape.engine_input])) if second else None
        code = kernel_host.emulate_noise(
            shape.engine_input.encode(), shape.images, launch["NOISE_THREADS"],
            ctypes.c_size_t(launch["NOISE_SHARED_BYTES"]),
            *map(pointer, (sources, latents)), pointer(narrowed) if second else None,
            shape.channels, shape.height, shape.width, shape.patch,
        )  # fmt: skip
        assert code == 0
        np.testing.assert_array_equal(bits(latents), bits(theirs))
        if second:
            np.testing.assert_array_equal(narrowed, narrow(theirs, shape.engine_input))
