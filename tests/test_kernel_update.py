"""The kernels of the steps against float64 on a CPU: arithmetic and threads. tests/gpu/ has the kernels on a GPU."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from arcflow_runtime.errors import EngineError
from arcflow_runtime.gpu.kernels import EulerShape, UpdateShape, euler_geometry, euler_name, geometry, kernel_name
from arcflow_runtime.maths.euler import guide
from arcflow_runtime.maths.update import update
from tests.gpu.euler_cases import EULER_CASES, SCALE, EulerCase, check_euler, euler_inputs
from tests.gpu.stored import STORED, narrow, widen
from tests.gpu.update_cases import CASES, EPS, SIGMAS, check, exact, heads, inputs_of
from tests.kernel_source import Guarded, pointer

# The inner functions.


@pytest.mark.parametrize("modes", [1, 2, 16, 33])
@pytest.mark.parametrize(("sigma", "following"), [(1, SIGMAS[1]), (SIGMAS[1], 0), (1, 0), (0.25, 0.2499)])
def test_arithmetic_agrees_with_float64(kernel_host, modes, sigma, following):
    latents, means, logweights, loggammas = heads(np.random.default_rng(modes), 4096, modes, 1, 1)
    latents, out = latents[:, 0].copy(), np.empty(4096, np.float32)
    kernel_host.step_channels(
        *map(pointer, (means, logweights, loggammas, latents, out)),
        ctypes.c_double(sigma), ctypes.c_double(following), ctypes.c_longlong(4096), modes,
    )  # fmt: skip
    result, bound = exact(latents[:, None], means, logweights, loggammas, sigma, following)
    assert (np.abs(out - result[:, 0]) <= bound[:, 0]).all()


def one(kernel_host, logweights, loggammas, means, d=1.0):
    """The sum over modes for a single channel: minus what the step changes."""
    kernel_host.step_channel.restype = ctypes.c_float
    arrays = [np.array(x, np.float32) for x in (means, logweights, loggammas)]
    step = (ctypes.c_double(d), ctypes.c_double(0))
    return -kernel_host.step_channel(*map(pointer, arrays), ctypes.c_float(0), *step, len(logweights))


def test_a_small_weight_meets_a_large_integral(kernel_host):
    # Neither exp(-100) nor exp(120) fits in float32; their product divided by 120 does.
    found = one(kernel_host, [0, -100], [120], [0, 1])
    assert abs(found - np.exp(20.0) / 120) <= 48 * EPS * np.exp(20.0) / 120


@pytest.mark.parametrize(
    ("logweights", "loggamma", "d"),
    [
        ([0, 0], 181, 1 / 3),  # z near 60: the low halves of the step and of z count
        ([0.1, -100], 120, 1.0),  # -100 - 0.1 is no float32: the low half of the logit counts
        ([0.1, -100], 361, 1 / 3),  # the low half of z in the exponential of the sum
        ([0.1, -3.2], 211.1, 1 / 3),  # the rounding of that sum
        ([0, 0], -59.7, 1 / 3),  # expm1 near -1
        ([0.1, -10], 100, 1 / 3),  # a small weight, z below 64
    ],
)
def test_low_halves_of_sums_count(kernel_host, logweights, loggamma, d):
    """Two modes, of which only the second has a mean: share / total, where share = weight * expm1(z) / loggamma.

    The exponential of the sum, or expm1, is 2 EPS and its correction 1, the division 1, and where the weight is an
    exponential of its own 3 EPS and the product 1. The total is within 3 EPS of the second weight, which is at most 1
    of 2, its addition is 1, its reciprocal 1, and the result is rounded once. All of this is exact where the total is 1
    or 2: both weights are 1, or the second is far below EPS.
    """
    w, g = np.float32(logweights).astype(np.float64), float(np.float32(loggamma))
    weight = np.exp(w[1] - w[0])
    expected = weight * np.expm1(g * d) / g / (1 + weight)
    found = one(kernel_host, logweights, [loggamma], [0, 1], d)
    plain = weight == 1 or weight * 2**25 < 1
    merged = g * d > 64 or weight == 1
    bound = (4 if merged else 8) + (0 if plain else 5 + 1)
    assert abs(found - expected) <= bound * EPS * abs(expected)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    ("logweights", "loggammas", "means", "expected"),
    [
        ([0, -np.inf], [1], [2, 3], 2),  # a mode of weight 0
        ([0, 0], [-np.inf], [2, 4], 1),  # a mode that has decayed
        ([0, 0], [np.inf], [2, 4], np.nan),
        ([0, np.inf], [1], [2, 3], np.nan),
        ([0, np.nan], [1], [2, 3], np.nan),
        ([np.nan, 0], [1], [2, 3], np.nan),
        ([0, 0], [np.nan], [2, 3], np.nan),
        ([0, 0], [0], [2, np.inf], np.inf),
        ([0, 0], [0], [-np.inf, np.inf], np.nan),
        ([-np.inf, -np.inf], [0], [1, 2], np.nan),
    ],
)
def test_what_is_not_finite_stays_so(kernel_host, logweights, loggammas, means, expected):
    found = one(kernel_host, logweights, loggammas, means)
    # The Python runtime gives the same.
    shape = (1, 1, len(logweights), 1)
    arrays = [np.array(x, np.float32).reshape(s) for x, s in ((means, shape), (logweights, shape))]
    gammas = np.array(loggammas, np.float32).reshape(1, 1, -1, 1)
    with np.errstate(all="ignore"):
        ours = -update(np.zeros((1, 1, 1), np.float32), *arrays, gammas, 1, 1, 0)[0, 0, 0]
    np.testing.assert_equal(np.float32([found, ours]), np.float32([expected, expected]))


def test_every_half_is_widened_exactly(kernel_host):
    bits = np.arange(1 << 16, dtype=np.uint16)
    out = np.empty(1 << 16, np.float32)
    kernel_host.widen_float16(pointer(bits), pointer(out), ctypes.c_longlong(1 << 16))
    np.testing.assert_array_equal(out, bits.view(np.float16).astype(np.float32))
    kernel_host.widen_bfloat16(pointer(bits), pointer(out), ctypes.c_longlong(1 << 16))
    np.testing.assert_array_equal(out, widen(bits))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_to_nearest_even(kernel_host, dtype):
    # Every half, its neighbours in float32, every tie between two halves, and what overflows.
    every = np.arange(1 << 16, dtype=np.uint16)
    halves = widen(every.view(np.float16) if dtype == "float16" else every)
    with np.errstate(all="ignore"):
        ties = (halves.astype(np.float64) + np.roll(halves, -1)).astype(np.float32) / np.float32(2)
        around = [np.nextafter(x, np.float32(s)) for x in (halves, ties) for s in (-np.inf, np.inf)]
        x = np.concatenate([halves, ties, *around, np.float32([65519.9, 65520, 65536, 3.4e38, 2**-25, 2**-26])])
        expected = narrow(x, dtype)
    out = np.empty(len(x), np.uint16)
    getattr(kernel_host, f"round_{dtype}")(pointer(x), pointer(out), ctypes.c_longlong(len(x)))
    nan = np.isnan(x)
    np.testing.assert_array_equal(out[~nan], expected.view(np.uint16)[~nan])
    assert np.isnan(widen(out.view(np.float16) if dtype == "float16" else out)[nan]).all()


# The kernels with a block's threads as fibres.


@pytest.mark.parametrize("case", CASES, ids=str)
def test_threads_agree_with_float64(kernel_host, case):
    arrays = inputs_of(case)
    grid, block, shared = geometry(case.shape())
    stored = STORED[case.engine_input]
    with Guarded(kernel_host) as memory:
        latents, means, logweights, loggammas = (memory.put(x) for x in arrays)
        out = latents if case.in_place else memory.put(np.full_like(latents, np.nan))
        second = memory.put(np.zeros(latents.shape, stored)) if case.second else None
        for step in (1, 0):
            latents[...] = arrays[0]
            code = kernel_host.emulate(
                kernel_name(case.heads, case.engine_input).encode(), grid, block, ctypes.c_size_t(shared),
                ctypes.c_void_p(means.ctypes.data + case.shift * means.itemsize), pointer(logweights),
                pointer(loggammas), pointer(latents), pointer(out),
                pointer(second) if case.second else None, pointer(memory.put(SIGMAS)),
                ctypes.c_longlong(case.tokens), step, case.modes, case.channels, case.sub_pixels,
            )  # fmt: skip
            assert code == 0
            check(case, arrays, out, second, step)


def test_too_many_modes_are_refused():
    shape = UpdateShape(1, 4096, 64, 4, "float32", "float32")
    with pytest.raises(EngineError, match="the update kernel takes at most 24568 bytes per token for its modes"):
        geometry(shape)


def run_euler(kernel_host, case, arrays, step):
    """One launch: the latents, and the engine's input or None."""
    with Guarded(kernel_host) as memory:
        latents, velocity, negative = (memory.put(x) for x in arrays)
        out = latents if case.in_place else memory.put(np.full_like(latents, np.nan))
        second = memory.put(np.zeros(latents.shape, STORED[case.engine_input])) if case.second else None
        code = kernel_host.emulate_euler(
            euler_name(case.velocity, case.engine_input).encode(), *euler_geometry(case.shape()), pointer(velocity),
            pointer(negative) if case.guided else None, pointer(latents), pointer(out),
            pointer(second) if case.second else None, pointer(memory.put(SIGMAS)),
            pointer(memory.put(np.float32([SCALE]))) if case.guided else None,
            ctypes.c_longlong(case.tokens), step, case.channels,
        )  # fmt: skip
        assert code == 0
        return out.copy(), None if second is None else second.copy()


@pytest.mark.parametrize("case", EULER_CASES, ids=str)
def test_a_straight_step_has_the_bits_of_python_or_agrees_with_float64(kernel_host, case):
    arrays = euler_inputs(case)
    for step in (0, 1):
        check_euler(case, arrays, *run_euler(kernel_host, case, arrays, step), step)


def test_guidance_of_what_is_not_finite_is_that_of_the_python_runtime(kernel_host):
    """Also of numbers whose squares overflow or vanish."""
    case = EulerCase("float32", "float32", 6, guided=True)
    latents, velocity, negative = euler_inputs(case)
    for token, (v, n) in enumerate([(np.nan, 1), (1, np.inf), (1e30, 1), (1e-30, 1e-30), (1, 1e30)], 1):
        velocity[token, 5], negative[token, 5] = v, n
    velocity[4], negative[4] = 1e-30, 1e-30  # the token's norm vanishes
    out, _ = run_euler(kernel_host, case, (latents, velocity, negative), 1)
    with np.errstate(all="ignore"):
        expected = latents - np.float32(SIGMAS[1]) * guide(velocity[None], negative[None], SCALE)[0]
    np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))
    assert np.isnan(out).any(1).tolist() == [False, True, True, True, False, False]
    np.testing.assert_array_equal(out[[0, 4]], latents[[0, 4]])


def test_channels_that_the_straight_step_does_not_take():
    message = "the kernel for a straight step takes a multiple of 8 channels, got 60"
    with pytest.raises(EngineError, match=f"^{message}$"):
        euler_geometry(EulerShape(1, 60, "bfloat16", "bfloat16"))
