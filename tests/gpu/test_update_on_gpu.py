"""The kernels of the steps on a GPU, against float64 and the Python runtime. `*_cases.py` derive the bounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from arcflow_runtime.gpu.kernels import UpdateShape
from arcflow_runtime.maths.update import update
from tests.gpu.euler_cases import EULER_CASES, SCALE, EulerCase, check_euler, euler_inputs
from tests.gpu.stored import DTYPES, STORED, widen
from tests.gpu.update_cases import CASES, SIGMAS, Case, check, exact, inputs_of

pytestmark = pytest.mark.gpu


def launch(kernels, memory, case, arrays, runs=1):
    """(float32 latents, engine input) of each run, both steps of it from the same latents."""
    latents, means, logweights, loggammas = arrays
    stored = STORED[case.engine_input]
    fixed = [memory.put(x) for x in (means, logweights, loggammas)]
    fixed[0] += case.shift * means.itemsize
    sigmas, second = memory.put(SIGMAS), memory.empty(latents.size * np.dtype(stored).itemsize)
    results = []
    for _ in range(runs):
        for step in (0, 1):
            start = memory.put(latents)
            out = start if case.in_place else memory.empty(latents.nbytes)
            kernels.update(memory.stream, case.shape(), *fixed, start, out, second if case.second else 0, sigmas, step)
            results.append((memory.get(out, latents), memory.get(second, np.empty(latents.shape, stored))))
    return results


#: One of as many tokens as an image of 1024 pixels, but few on the driver made of host memory.
LARGE = Case("bfloat16", "bfloat16", tokens=4096)


@pytest.mark.parametrize("case", [*CASES, LARGE], ids=str)
def test_the_update_agrees_with_float64(kernels, memory, case, record_property, sized):
    case = replace(case, tokens=sized(case.tokens, min(case.tokens, 64)))
    arrays = inputs_of(case)
    results = launch(kernels, memory, case, arrays)
    worst = [
        check(case, arrays, out, second if case.second else None, step) for step, (out, second) in enumerate(results)
    ]
    record_property("largest error as a fraction of its bound", max(worst))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_update_agrees_with_the_python_runtime(kernels, memory, dtype, sized):
    case = Case(dtype, dtype, tokens=sized(4096, 64))
    latents, *rest = arrays = inputs_of(case)
    wide = [widen(x)[None] for x in rest]
    for step, (out, _) in enumerate(launch(kernels, memory, case, arrays)):
        ours = update(latents[None], *wide, SIGMAS[step], SIGMAS[step], SIGMAS[step + 1])[0]
        _, bound = exact(latents, *(x[0] for x in wide), SIGMAS[step], SIGMAS[step + 1])
        assert (np.abs(out - ours) <= 2 * bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_launches_are_equal_bit_for_bit(kernels, memory, dtype, sized):
    case = Case(dtype, dtype, tokens=sized(4096, 64))
    first, second, *others = launch(kernels, memory, case, inputs_of(case), runs=sized(20, 2))
    for out, again in zip(others[::2], others[1::2], strict=True):
        for x, y in zip((*first, *second), (*out, *again), strict=True):
            np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_is_converted(kernels, memory, dtype):
    # One mode of weight 1 and a step of -1 from 0: the heads' value itself, then rounded back to its bits.
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(1024, 64)
    values = widen(bits.view(np.float16) if dtype == "float16" else bits)
    finite = np.isfinite(values)
    means = np.where(finite, bits, np.uint16(0))
    zeros = np.zeros(values.shape, np.float32)
    one_mode = memory.put(np.zeros((1024, 4), np.uint16))
    shape = UpdateShape(1024, 1, 64, 4, dtype, dtype)
    out, second = memory.empty(zeros.nbytes), memory.empty(bits.nbytes)
    addresses = (memory.put(means), one_mode, one_mode, memory.put(zeros), out, second)
    kernels.update(memory.stream, shape, *addresses, memory.put(np.array([-1.0, 0.0])), 0)
    np.testing.assert_array_equal(memory.get(out, zeros), np.where(finite, values, 0))
    back = memory.get(second, bits)
    same = (back == means) | (np.where(finite, values, 0) == 0)
    assert same.all()


def launch_euler(kernels, memory, case, arrays):
    """(float32 latents, engine input) of both steps, each from the same latents."""
    latents, velocity, negative = arrays
    stored = STORED[case.engine_input]
    heads = [memory.put(velocity), memory.put(negative) if case.guided else 0]
    sigmas, scale = memory.put(SIGMAS), memory.put(np.float32([SCALE])) if case.guided else 0
    second, results = memory.empty(latents.size * np.dtype(stored).itemsize), []
    for step in (0, 1):
        start = memory.put(latents)
        out = start if case.in_place else memory.empty(latents.nbytes)
        addresses = (*heads, start, out, second if case.second else 0, sigmas, scale)
        kernels.euler(memory.stream, case.shape(), *addresses, step)
        made = memory.get(second, np.empty(latents.shape, stored)) if case.second else None
        results.append((memory.get(out, latents), made))
    return results


@pytest.mark.parametrize("case", [*EULER_CASES, EulerCase("bfloat16", "bfloat16", 4096, guided=True)], ids=str)
def test_a_straight_step(kernels, memory, case, sized):
    """Bits of the Python runtime, or with guidance float64 within its bound; equal bits again."""
    case = replace(case, tokens=sized(case.tokens, min(case.tokens, 64)))
    arrays = euler_inputs(case)
    results, again = (launch_euler(kernels, memory, case, arrays) for _ in "12")
    for step, ((out, second), (other, _)) in enumerate(zip(results, again, strict=True)):
        check_euler(case, arrays, out, second, step)
        np.testing.assert_array_equal(other, out)
