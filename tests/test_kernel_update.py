"""The update kernel against float64: arithmetic and threads on a CPU, and the kernel itself on a GPU.

The bound of `exact` is derived there. It holds on a CPU, whose expf and expm1f are within 1 unit in the last place, and
on a GPU, where they are within 2 and 1 (CUDA C++ Programming Guide, "Mathematical Functions").
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import pytest

from arcflow_runtime.errors import EngineError
from arcflow_runtime.gpu.kernels import UpdateShape, geometry, kernel_name
from arcflow_runtime.maths.update import update
from tests.kernel_source import DTYPES, STORED, Guarded, OnDevice, narrow, pointer, widen

EPS = 2.0**-24  # half a unit in the last place of float32
TINY = 2.0**-149  # the smallest float32
SIGMAS = np.array([1, 3.2 * 0.5 / 2.1, 0])


def exact(latents, means, logweights, loggammas, sigma, following):
    """The step in float64, and how far from it float32 may be; heads of shape [T, K, *].

    Per mode's share of the sum: exp of the weight is 4 EPS (2 places) and its correction 1; expm1 is 2 EPS and its
    correction 1, the division by loggamma 1, the product with the weight 1: 10. One exponential in their place, or
    none where the exponent vanishes, has fewer. K fused multiply-adds add K EPS. The sum of the weights is 5 EPS of
    each plus K - 1 additions, its reciprocal 1. The last operation rounds the result once. One more covers products of
    errors. Weights and shares below float32's normal numbers are rounded to a multiple of TINY.
    """
    means, logweights, loggammas = (x.astype(np.float64) for x in (means, logweights, loggammas))
    modes = means.shape[1]
    w = np.exp(logweights - logweights.max(1, keepdims=True))
    w /= w.sum(1, keepdims=True)
    g = np.concatenate([np.zeros_like(w[:, :1]), loggammas], axis=1)
    d = float(sigma) - float(following)
    z = g * d
    with np.errstate(over="ignore"):
        integral = np.where(np.abs(z) < 1e-9, d * (1 + z / 2), np.expm1(z) / np.where(g == 0, 1, g))
        repeat = (1, 1, means.shape[2] // w.shape[2])
        shares = means * np.tile(w * integral, repeat)
    result = latents.astype(np.float64) - shares.sum(1)
    lost = TINY * (np.abs(means) * np.tile(1 + np.abs(np.where(z > 64, 0, integral)), repeat)).sum(1)
    return result, (2 * modes + 16) * EPS * np.abs(shares).sum(1) + EPS * np.abs(result) + lost


def heads(rng, tokens=64, modes=16, channels=64, sub_pixels=4):
    """Heads that reach every branch: ties, logits of 1e4, loggammas of 30, tiny ones and exact zeros."""
    logweights = rng.standard_normal((tokens, modes, sub_pixels)).astype(np.float32) * 4
    logweights[0] = 1.25  # all equal
    if tokens > 4:
        logweights[1] = rng.uniform(-1e4, 1e4, logweights.shape[1:])
        logweights[2] += 1e4
        logweights[3] = np.float32(-1e4)
    loggammas = rng.uniform(-30, 30, (tokens, modes - 1, sub_pixels)).astype(np.float32)
    loggammas[rng.random(loggammas.shape) < 0.1] = 0
    tiny = rng.random(loggammas.shape) < 0.2
    loggammas[tiny] = rng.choice([1e-45, 1e-38, 1e-20, -1e-20, 1e-8, -3e-8, 1e-4], tiny.sum())
    means = rng.standard_normal((tokens, modes, channels)).astype(np.float32)
    return rng.standard_normal((tokens, channels)).astype(np.float32), means, logweights, loggammas


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


@dataclass(frozen=True)
class Case:
    """Sizes and dtypes of one launch."""

    heads: str
    engine_input: str
    tokens: int = 21
    modes: int = 16
    channels: int = 64
    sub_pixels: int = 4
    shift: int = 0  # elements by which the means are off a 16-byte boundary
    in_place: bool = False
    second: bool = True

    def shape(self) -> UpdateShape:
        return UpdateShape(self.tokens, self.modes, self.channels, self.sub_pixels, self.heads, self.engine_input)


# Every pair of dtypes; the last block partly filled; K below, above and off the number of lanes; more channels than the
# lanes hold, and fewer; what goes the scalar way: odd sizes, other sub-pixels, misaligned heads.
CASES = [
    *(Case(h, i) for h in DTYPES for i in DTYPES),
    *(Case(h, "float16", modes=k, tokens=9) for h in DTYPES for k in (1, 3, 17, 32)),
    *(Case(h, "bfloat16", channels=c, tokens=5) for h in DTYPES for c in (4, 20, 32, 200)),
    *(Case(h, "float32", sub_pixels=p, channels=16 * p, modes=5) for h in DTYPES for p in (1, 9)),
    *(Case(h, "float16", tokens=5, shift=1) for h in DTYPES),
    *(Case(h, h, tokens=t, in_place=True) for h in DTYPES for t in (1, 64)),
    Case("bfloat16", "float16", second=False),
    Case("float16", "float16", tokens=3, modes=90, sub_pixels=4),  # 64 threads per block
]


def inputs_of(case, seed=0):
    """latents float32, and the heads in the case's dtype."""
    latents, *rest = heads(np.random.default_rng(seed), case.tokens, case.modes, case.channels, case.sub_pixels)
    if case.shift:
        rest[0] = np.concatenate([np.zeros(case.shift, np.float32), rest[0].ravel()])
    return latents, *(narrow(x, case.heads) for x in rest)


def means_of(case, means):
    return means[case.shift :].reshape(case.tokens, case.modes, case.channels) if case.shift else means


def check(case, arrays, out, second, step):
    latents, means, logweights, loggammas = arrays
    wide = [widen(x) for x in (means_of(case, means), logweights, loggammas)]
    result, bound = exact(latents, *wide, SIGMAS[step], SIGMAS[step + 1])
    assert (np.abs(out - result) <= bound).all()
    if second is not None:
        np.testing.assert_array_equal(second, narrow(out, case.engine_input))


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


# On a GPU.


def launch_on(kernel_gpu, case, arrays, runs=1):
    """(float32 latents, engine input) of each run, both steps of it from the same latents."""
    device, stream, kernels = kernel_gpu
    memory = OnDevice(device, stream)
    latents, means, logweights, loggammas = arrays
    stored = STORED[case.engine_input]
    fixed = [memory.put(x) for x in (means, logweights, loggammas)]
    fixed[0] += case.shift * means.itemsize
    sigmas, second = memory.put(SIGMAS), memory.put(np.zeros(latents.shape, stored))
    results = []
    for _ in range(runs):
        for step in (0, 1):
            start = memory.put(latents)
            out = start if case.in_place else memory.put(np.zeros_like(latents))
            kernels.update(stream, case.shape(), *fixed, start, out, second if case.second else 0, sigmas, step)
            results.append((memory.get(out, latents), memory.get(second, np.zeros(latents.shape, stored))))
    return results


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, Case("bfloat16", "bfloat16", tokens=4096)], ids=str)
def test_the_gpu_agrees_with_float64(kernel_gpu, case):
    arrays = inputs_of(case)
    for step, (out, second) in enumerate(launch_on(kernel_gpu, case, arrays)):
        check(case, arrays, out, second if case.second else None, step)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gpu_agrees_with_the_python_runtime(kernel_gpu, dtype):
    case = Case(dtype, dtype, tokens=4096)
    latents, *rest = arrays = inputs_of(case)
    wide = [widen(x)[None] for x in rest]
    for step, (out, _) in enumerate(launch_on(kernel_gpu, case, arrays)):
        ours = update(latents[None], *wide, SIGMAS[step], SIGMAS[step], SIGMAS[step + 1])[0]
        _, bound = exact(latents, *(x[0] for x in wide), SIGMAS[step], SIGMAS[step + 1])
        assert (np.abs(out - ours) <= 2 * bound).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_launches_are_equal_bit_for_bit(kernel_gpu, dtype):
    case = Case(dtype, dtype, tokens=4096)
    first, second, *others = launch_on(kernel_gpu, case, inputs_of(case), runs=20)
    for out, again in zip(others[::2], others[1::2], strict=True):
        for x, y in zip((*first, *second), (*out, *again), strict=True):
            np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8))


@pytest.mark.gpu
def test_the_gpu_converts_every_half(kernel_gpu):
    # One mode of weight 1 and a step of -1 from 0: the heads' value itself, then rounded back to its bits.
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(1024, 64)
    device, stream, kernels = kernel_gpu
    for dtype in ("float16", "bfloat16"):
        memory = OnDevice(device, stream)
        values = widen(bits.view(np.float16) if dtype == "float16" else bits)
        finite = np.isfinite(values)
        means = np.where(finite, bits, np.uint16(0))
        zeros = np.zeros(values.shape, np.float32)
        one_mode = memory.put(np.zeros((1024, 4), np.uint16))
        shape = UpdateShape(1024, 1, 64, 4, dtype, dtype)
        out, second = memory.put(zeros), memory.put(bits * 0)
        addresses = (memory.put(means), one_mode, one_mode, memory.put(zeros), out, second)
        kernels.update(stream, shape, *addresses, memory.put(np.array([-1.0, 0.0])), 0)
        np.testing.assert_array_equal(memory.get(out, zeros), np.where(finite, values, 0))
        back = memory.get(second, bits)
        same = (back == means) | (np.where(finite, values, 0) == 0)
        assert same.all()
