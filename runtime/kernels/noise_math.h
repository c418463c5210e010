/* The arithmetic of torch's normal numbers on a CPU: MT19937, and a Box-Muller transform of 24-bit uniforms whose
 * logarithm, sine and cosine are the Cephes polynomials (docs/bundle.md, "Noise"; arcflow_runtime/maths/noise.py).
 *
 * Products and sums are rounded where torch rounds them, so a compiler must not fuse operations that are separate here.
 */
#ifndef ARCFLOW_NOISE_MATH_H
#define ARCFLOW_NOISE_MATH_H

#include "geometry.h"
#include "update_math.h"

namespace arcflow_random {

using arcflow_update::bits_of;
using arcflow_update::from_bits;

constexpr int WORDS = 624, MIDDLE = 397; /* the state has WORDS words; each new word uses the one MIDDLE places on */
constexpr int GROUP = ARCFLOW_NOISE_GROUP;

ARCFLOW_BOTH float product(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

ARCFLOW_BOTH float sum(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

/* a * b + c with one rounding. On a CPU the product is exact in float64, and the sum is rounded to float64 and then to
 * float32. This differs from one rounding in about one of 2^29 cases, and needs no hardware for fused operations. */
ARCFLOW_BOTH float fused(float a, float b, float c) {
#ifdef __CUDA_ARCH__
    return fmaf(a, b, c);
#else
    return static_cast<float>(static_cast<double>(a) * static_cast<double>(b) + static_cast<double>(c));
#endif
}

ARCFLOW_BOTH float root(float x) {
#ifdef __CUDA_ARCH__
    return __fsqrt_rn(x);
#else
    return sqrtf(x);
#endif
}

/* The next word of a state that a seed initialises. */
ARCFLOW_BOTH unsigned int seeded(unsigned int previous, unsigned int place) {
    return 1812433253u * (previous ^ previous >> 30) + place;
}

/* A word of the next state, made of three words of the old one: the word at its place, its successor, and the one
 * MIDDLE places on. */
ARCFLOW_BOTH unsigned int twisted(unsigned int word, unsigned int behind, unsigned int far) {
    const unsigned int joined = (word & 0x80000000u) | (behind & 0x7fffffffu);
    return far ^ joined >> 1 ^ (behind & 1 ? 0x9908b0dfu : 0);
}

/* The 24-bit uniform in [0, 1) of a generator's output. */
ARCFLOW_BOTH float uniform_of(unsigned int output) {
    return static_cast<float>(output & 0xffffff) * 5.9604644775390625e-8f; /* 2^-24 */
}

/* The uniform of a state's word, which the generator tempers before it gives it out. */
ARCFLOW_BOTH float uniform(unsigned int word) {
    word ^= word >> 11;
    word ^= word << 7 & 0x9d2c5680u;
    word ^= word << 15 & 0xefc60000u;
    return uniform_of(word ^ word >> 18);
}

/* Natural logarithm of a positive normal number (Cephes logf). */
ARCFLOW_BOTH float logarithm(float x) {
    const int bits = static_cast<int>(bits_of(x));
    const float mantissa = from_bits(static_cast<unsigned int>((bits & 0x7fffff) | 0x3f000000)); /* in [0.5, 1) */
    const bool small = mantissa < 0.707106781186547524f;
    const float exponent = static_cast<float>((bits >> 23) - 126 - (small ? 1 : 0));
    x = sum(sum(mantissa, -1), small ? mantissa : 0);
    const float z = product(x, x);
    float y = 7.0376836292e-2f;
    y = fused(y, x, -1.1514610310e-1f);
    y = fused(y, x, 1.1676998740e-1f);
    y = fused(y, x, -1.2420140846e-1f);
    y = fused(y, x, 1.4249322787e-1f);
    y = fused(y, x, -1.6668057665e-1f);
    y = fused(y, x, 2.0000714765e-1f);
    y = fused(y, x, -2.4999993993e-1f);
    y = fused(y, x, 3.3333331174e-1f);
    y = fused(product(y, x), z, product(exponent, -2.12194440e-4f));
    y = fused(z, -0.5f, y);
    return fused(exponent, 0.693359375f, sum(x, y));
}

struct Pair {
    float first, second; /* `second` comes GROUP / 2 places after `first` */
};

/* Two normal numbers of two uniforms: the first gives the radius, the second the angle (Cephes cosf and sinf). */
ARCFLOW_BOTH Pair box_muller(float radius_uniform, float angle_uniform) {
    const float radius = root(product(-2, logarithm(sum(1, -radius_uniform))));
    float x = product(6.28318530717958647692f, angle_uniform);
    const int octant = (static_cast<int>(product(x, 1.27323954473516f)) + 1) & ~1;
    const float y = static_cast<float>(octant);
    x = fused(y, -0.78515625f, x);
    x = fused(y, -2.4187564849853515625e-4f, x);
    x = fused(y, -3.77489497744594108e-8f, x);
    const float z = product(x, x);
    float cosine = fused(2.443315711809948e-5f, z, -1.388731625493765e-3f);
    cosine = product(fused(cosine, z, 4.166664568298827e-2f), z);
    cosine = sum(fused(cosine, z, product(z, -0.5f)), 1);
    float sine = fused(-1.9515295891e-4f, z, 8.3321608736e-3f);
    sine = product(fused(sine, z, -1.6666654611e-1f), z);
    sine = fused(sine, x, x);
    const bool odd = octant & 2;
    const float first = odd ? sine : cosine, second = odd ? cosine : sine;
    /* Adding zero turns -0 into +0. */
    return {sum(product(radius, (octant + 2) & 4 ? -first : first), 0),
            sum(product(radius, octant & 4 ? -second : second), 0)};
}

}  // namespace arcflow_random

#endif
