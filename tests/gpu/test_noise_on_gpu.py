"""The noise kernel on a GPU, against the Python runtime.

A GPU has the fused multiply-add that the Python runtime emulates in float64, which rounds twice. So a number may differ
in the last place about once in 2**29 operations; each takes some 16.
"""

from __future__ import annotations

import numpy as np
import pytest

from arcflow_runtime.gpu.kernels import NoiseShape
from arcflow_runtime.maths.noise import draw_latents, streams
from tests.gpu.stored import DTYPES, STORED, narrow

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("seed", [42, [7, 2**32 + 5, -3]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_noise_is_the_python_runtimes(kernels, memory, dtype, seed, record_property, sized):
    side = sized(128, 16)
    shape = NoiseShape(3, 16, side, side, 2, dtype)
    theirs = draw_latents(seed, 3, 16, side, side, 2)
    sources = memory.put(streams(seed, 3, 16 * side * side))
    narrowed = np.empty(theirs.shape, STORED[dtype])
    found = []
    for _ in range(2):
        latents, second = memory.empty(theirs.nbytes), memory.empty(narrowed.nbytes)
        kernels.noise(memory.stream, shape, sources, latents, second)
        found.append((memory.get(latents, theirs), memory.get(second, narrowed)))
    different = [int((ours.view(np.int32) != theirs.view(np.int32)).sum()) for ours, _ in found]
    record_property("numbers whose bits differ", max(different))
    record_property("numbers compared", theirs.size)
    # 0.8 million numbers: 0.02 double roundings expected.
    assert max(different) <= 1
    np.testing.assert_array_equal(found[0][0], found[1][0])
    for ours, second in found:
        np.testing.assert_array_equal(second, narrow(ours, dtype))
