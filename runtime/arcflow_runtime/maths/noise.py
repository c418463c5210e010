"""Generate noise: seed and size -> packed latents [B, N, C*p*p] float32, the same numbers as torch's CPU generator.

For 16 or more float32 numbers, torch transforms 24-bit uniforms of its MT19937 with Box-Muller, 8 pairs at a time; log,
sine and cosine are the Cephes polynomials, evaluated with fused multiply-add. The same operations in the same order
give the same bits as torch on x86 with AVX2. On other processors torch calls the C library, and its own numbers differ
from these by up to about 2e-6.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import numpy as np

from arcflow_runtime.errors import RequestError
from arcflow_runtime.maths.speedups import compiled

#: torch transforms uniforms in groups of 16; for fewer than 16 numbers it takes another path.
GROUP = 16
#: The range of seeds that `torch.Generator.manual_seed` accepts.
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1

_F = np.float32
_TWO_PI = _F(2 * np.pi)
_SQRT_HALF = _F(0.707106781186547524)
# Coefficients are float32 values, stored as float64 because `_fma` computes in float64.
_LOG_COEFFICIENTS = (
    np.array(
        [
            7.0376836292e-2,
            -1.1514610310e-1,
            1.1676998740e-1,
            -1.2420140846e-1,
            1.4249322787e-1,
            -1.6668057665e-1,
            2.0000714765e-1,
            -2.4999993993e-1,
            3.3333331174e-1,
        ]
    )
    .astype(_F)
    .astype(np.float64)
)
_LN2_HIGH, _LN2_LOW = _F(0.693359375), _F(-2.12194440e-4)
# -pi/4 as a sum of three float32 numbers.
_PI_4_HIGH, _PI_4_MIDDLE, _PI_4_LOW = _F(-0.78515625), _F(-2.4187564849853515625e-4), _F(-3.77489497744594108e-8)
# Polynomials of cosine and sine, evaluated together: coefficients [3, 2, 1, 1].
_COS_SIN_COEFFICIENTS = (
    np.array(
        [
            [2.443315711809948e-5, -1.9515295891e-4],
            [-1.388731625493765e-3, 8.3321608736e-3],
            [4.166664568298827e-2, -1.6666654611e-1],
        ]
    )
    .astype(_F)
    .astype(np.float64)[..., None, None]
)
_FOUR_OVER_PI = _F(1.27323954473516)
# Uniforms per block, few enough that a block's temporaries stay in the processor's cache.
_BLOCK = 1 << 15
_local = threading.local()


def randn(seed: int, shape: Sequence[int]) -> np.ndarray:
    """Standard normal numbers, as from `torch.randn(shape, generator=torch.Generator().manual_seed(seed))`.

    Args:
        seed: any integer that `torch.Generator.manual_seed` accepts; only its low 32 bits matter.
        shape: the result's shape.

    Returns:
        float32 array of `shape`.

    Raises:
        RequestError: the seed is outside -2**63 ... 2**64 - 1.
    """
    if not MIN_SEED <= seed <= MAX_SEED:
        raise RequestError(f"seed must be between -2**63 and 2**64 - 1, got {seed}; use a smaller number")
    size = math.prod(shape)
    if size < GROUP:
        return _normal_scalar(seed, size).reshape(shape)
    if compiled is not None:
        drawn = np.empty(shape, _F)
        compiled.randn(seed & 0xFFFFFFFF, drawn)
        return drawn
    tail = size % GROUP
    uniforms = (_mt19937(seed, size + (GROUP if tail else 0)) & np.uint64(0xFFFFFF)).astype(_F) * _F(2**-24)
    out = np.empty(size, _F)
    whole = size - tail
    for i in range(0, whole, _BLOCK):
        out[i : min(i + _BLOCK, whole)] = _box_muller(uniforms[i : min(i + _BLOCK, whole)])
    if tail:  # torch draws 16 fresh uniforms and recomputes the last 16 numbers
        out[-GROUP:] = _box_muller(uniforms[-GROUP:])
    return out.reshape(shape)


def pack(latents: np.ndarray, patch_size: int) -> np.ndarray:
    """Pack p x p latent pixels into one token: [B, C, h, w] -> [B, (h/p)*(w/p), C*p*p], channel c*p*p + p*dy + dx."""
    b, c, h, w = latents.shape
    p = patch_size
    tokens = latents.reshape(b, c, h // p, p, w // p, p).transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(tokens).reshape(b, (h // p) * (w // p), c * p * p)


def draw_latents(
    seed: int | Sequence[int], batch: int, channels: int, height: int, width: int, patch_size: int
) -> np.ndarray:
    """The packed noise of a batch, as diffusers draws it with CPU generators.

    Args:
        seed: an int draws [B, C, height, width] from one generator; a sequence gives one seed per image, each of
            which draws [1, C, height, width].
        batch: number of images B.
        channels: latent channels C.
        height: latent height (image height divided by the VAE's scale factor).
        width: latent width.
        patch_size: side p of a token's patch of latent pixels.

    Returns:
        [B, N, C*p*p] float32, N = (height/p) * (width/p).

    Raises:
        RequestError: a seed is out of range.
    """
    if isinstance(seed, int):
        return pack(randn(seed, (batch, channels, height, width)), patch_size)
    return pack(np.concatenate([randn(s, (1, channels, height, width)) for s in seed]), patch_size)


def streams(seed: int | Sequence[int], batch: int, numbers: int) -> np.ndarray:
    """Describe each image's noise for a GPU kernel that generates it; the result equals that of `draw_latents`.

    Args:
        seed: one seed for the batch, or one per image.
        batch: number of images B.
        numbers: numbers per image, C*height*width; a multiple of `GROUP`.

    Returns:
        [B, 2] int64: the generator's 32-bit seed, and the index of the image's first number in its sequence.
    """
    if isinstance(seed, int):
        return np.array([(seed & 0xFFFFFFFF, i * numbers) for i in range(batch)], np.int64)
    return np.array([(s & 0xFFFFFFFF, 0) for s in seed], np.int64)


def _mt19937(seed: int, count: int) -> np.ndarray:
    """The first `count` 32-bit outputs of MT19937 for a seed, as [count] uint64."""
    # RandomState seeds MT19937 as its authors and torch do, and numpy promises never to change that; `random_raw`
    # returns the generator's raw output. Each thread keeps a generator: creating one asks the system for entropy, which
    # takes longer than the noise of a small image.
    if not hasattr(_local, "bits"):
        _local.bits = np.random.MT19937()
        _local.seeding = np.random.RandomState(_local.bits)
    _local.seeding.seed(seed & 0xFFFFFFFF)
    words: np.ndarray = _local.bits.random_raw(count)
    return words


def _normal_scalar(seed: int, size: int) -> np.ndarray:
    """torch's path for fewer than 16 numbers: Box-Muller in float64 from 53-bit uniforms, cosine first, then sine."""
    pairs = (size + 1) // 2
    words = _mt19937(seed, 4 * pairs).reshape(pairs, 2, 2)
    bits = (words[..., 0] << np.uint64(32) | words[..., 1]) & np.uint64(2**53 - 1)
    u = bits.astype(np.float64) * 2.0**-53
    radius, theta = np.sqrt(-2 * np.log1p(-u[:, 1])), 2 * np.pi * u[:, 0]
    normal = np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1)
    return normal.reshape(-1)[:size].astype(_F)


def _box_muller(uniforms: np.ndarray) -> np.ndarray:
    """Turn each 16 uniforms in [0, 1) into 16 normals: the first 8 give the radius, the last 8 the angle."""
    u = uniforms.reshape(-1, 2, 8)
    radius = _log(_F(1) - u[:, 0])
    radius *= _F(-2)
    np.sqrt(radius, out=radius)
    out = np.empty_like(u)
    np.multiply(_cos_sin(_TWO_PI * u[:, 1]), radius, out=out.transpose(1, 0, 2))
    out += _F(0)  # turns -0 into +0, like torch's `fma(x, std, mean)`
    return out.reshape(-1)


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray | np.float64) -> np.ndarray:
    """a * b + c, rounded to float32 once; `a` is float32, `b` and `c` are float32 values stored as float64."""
    # The product is exact in float64. The sum is rounded to float64 and then to float32, which differs from a single
    # rounding in about one of 2**29 cases.
    result = a.astype(np.float64)
    result *= b
    result += c
    return result.astype(_F)


def _polynomial(x: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    y = (wide * coefficients[0] + coefficients[1]).astype(_F)
    for c in coefficients[2:]:
        y = _fma(y, wide, c)
    return y


def _log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of positive normal float32 numbers (Cephes logf).

    Cephes's products by a power of two or by the high half of log 2 are exact in float32, so a plain product and sum
    equal its fused multiply-add there.
    """
    mantissa, exponent = np.frexp(x)  # in [0.5, 1)
    small = mantissa < _SQRT_HALF
    exponent = exponent.astype(_F) - small
    x = np.where(small, mantissa + mantissa, mantissa) - _F(1)
    z = x * x
    y = _fma(_polynomial(x, _LOG_COEFFICIENTS) * x, z, exponent * _LN2_LOW)
    y += z * _F(-0.5)
    x += y
    x += exponent * _LN2_HIGH
    return x


def _cos_sin(x: np.ndarray) -> np.ndarray:
    """Cosine and sine, [2, n, 8], of float32 numbers [n, 8] in [0, 2 pi] (Cephes cosf and sinf)."""
    octant = ((x * _FOUR_OVER_PI).astype(np.int32) + 1) & ~1
    y = octant.astype(_F)
    x = x + y * _PI_4_HIGH  # y is at most 8, so this product and the next are exact in float32
    x += y * _PI_4_MIDDLE
    x = _fma(y, _PI_4_LOW.astype(np.float64), x)
    z = x * x
    terms = np.empty((2, *x.shape), _F)
    terms[0], terms[1] = z, x
    addends = terms.copy()
    addends[0] *= _F(-0.5)
    polynomial = _polynomial(z, _COS_SIN_COEFFICIENTS)
    polynomial *= z
    cos_sin = _fma(polynomial, terms, addends)
    cos_sin[0] += _F(1)
    cos_sin = np.where((octant & 2) != 0, cos_sin[::-1], cos_sin)
    signs = cos_sin.view(np.int32)
    signs[0] ^= ((octant + 2) & 4) << 29
    signs[1] ^= (octant & 4) << 29
    return cos_sin
