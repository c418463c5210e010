import functools
import time

import numpy as np
import pytest

from arcflow_runtime.errors import RequestError
from arcflow_runtime.maths.noise import draw_latents, pack, randn

pytestmark = pytest.mark.usefixtures("both_ways")

SEEDS = [0, 1, 7, 42, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**63, 2**64 - 1, -1, -42, -(2**63)]
SHAPES = [
    (1,),
    (2,),
    (5,),
    (15,),
    (16,),
    (17,),
    (31,),
    (32,),
    (33,),
    (100,),
    (1, 16, 8, 8),
    (3, 5, 7),
    (70001,),
]

# With AVX2 both sides do the same float32 operations in the same order. What is left is the double rounding
# of a fused multiply-add emulated in float64: one case in 2**29, worth one unit in the last place of a
# polynomial, at most 2 units of the largest normal, 6. Below 16 numbers both use the C library's float64
# functions: the float32 results differ only if an error of 1e-16 crosses a rounding boundary. Without AVX2,
# torch rounds the angle from float64 and so has another angle in [0, 2 pi): half a unit of 2 pi, 2.4e-7,
# times the radius, 6, and the functions' own few units.
AVX2_TOLERANCE, TOLERANCE = 2 * np.spacing(np.float32(6)), 6 * 2.4e-7 + 8 * np.spacing(np.float32(6))


@functools.cache
def has_avx2() -> bool:
    return any(x in pytest.importorskip("torch").backends.cpu.get_cpu_capability() for x in ("AVX2", "AVX512"))


def reference(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()


@pytest.mark.parametrize("seed", SEEDS)
def test_randn_equals_torch(seed):
    tolerance = AVX2_TOLERANCE if has_avx2() else TOLERANCE
    for shape in SHAPES:
        ours, theirs = randn(seed, shape), reference(seed, shape)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, err_msg=str((seed, shape)))


def test_randn_is_torch_bit_for_bit():
    if not has_avx2():
        pytest.skip("torch has another last bit without AVX2")
    ours = np.concatenate([randn(s, (1, 16, 128, 128)).ravel() for s in range(8)])
    theirs = np.concatenate([reference(s, (1, 16, 128, 128)).ravel() for s in range(8)])
    # 2 million numbers of some 25 fused operations: 0.1 double roundings expected, and few reach the result.
    assert (ours != theirs).sum() <= 2


def test_randn_covers_every_uniform_near_the_edges():
    # Uniforms 0 (log 1 = 0, angle 0) are rare in a stream, so the transform is given them.
    from arcflow_runtime.maths.noise import _box_muller

    u = np.zeros(16, np.float32)
    out = _box_muller(u)
    assert (out == 0).all()
    assert not np.signbit(out).any()
    u[:8] = 1 - 2**-24  # the largest radius
    assert np.isfinite(_box_muller(u)).all()


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seed_out_of_range(seed):
    with pytest.raises(
        RequestError,
        match=rf"^seed must be between -2\*\*63 and 2\*\*64 - 1, got {seed}; use a smaller number$",
    ):
        randn(seed, (16,))


def test_pack_is_channel_major():
    latents = np.arange(2 * 16 * 4 * 6, dtype=np.float32).reshape(2, 16, 4, 6)
    packed = pack(latents, 2)
    assert packed.shape == (2, 6, 64)
    for c, y, x in [(0, 0, 0), (3, 1, 2), (15, 3, 5)]:
        assert packed[1, (y // 2) * 3 + x // 2, c * 4 + 2 * (y % 2) + x % 2] == latents[1, c, y, x]


def test_pack_equals_diffusers():
    torch = pytest.importorskip("torch")
    from diffusers import FluxPipeline

    latents = randn(0, (2, 16, 8, 12))
    theirs = FluxPipeline._pack_latents(torch.from_numpy(latents), 2, 16, 8, 12).numpy()
    np.testing.assert_array_equal(pack(latents, 2), theirs)


def test_one_seed_draws_the_batch_in_one_call_and_a_list_one_per_image():
    batch = draw_latents(5, 2, 16, 8, 8, 2)
    np.testing.assert_array_equal(batch, pack(randn(5, (2, 16, 8, 8)), 2))
    each = draw_latents((5, 6), 2, 16, 8, 8, 2)
    np.testing.assert_array_equal(each[0], draw_latents(5, 1, 16, 8, 8, 2)[0])
    np.testing.assert_array_equal(each[1], draw_latents(6, 1, 16, 8, 8, 2)[0])


def test_a_megapixel_takes_milliseconds():
    randn(0, (16,))
    times = []
    for _ in range(5):
        start = time.process_time()  # what other processes take does not count
        randn(0, (1, 16, 128, 128))
        times.append(time.process_time() - start)
    # Measured 6 ms; ten times that still does not show beside a network call.
    assert min(times) < 0.06
