/* The arithmetic of the closed-form ArcFlow step for one mode of one sub-pixel (docs/bundle.md, "Update").
 *
 * With s the sigma where the network was evaluated, e the next one, d = s - e and loggamma_0 = 0:
 *
 *     x_e = x_s - sum_k w_k mean_k integral(loggamma_k),   w = softmax_k(logweights)
 *     integral(g) = d phi(g d) = expm1(g d) / g,           integral(0) = d
 *
 * Everything is float32. An error of half an ulp in exp's argument z becomes |z| half ulps in its result. Arguments are
 * therefore kept as unevaluated sums of two floats, and the relative error of a mode's share does not grow with
 * logweights or loggammas.
 *
 * Compiled by nvcc, by NVRTC (which has no headers) and by a host compiler in the tests, which includes <cmath> first.
 */
#ifndef ARCFLOW_UPDATE_MATH_H
#define ARCFLOW_UPDATE_MATH_H

#ifdef __CUDACC__
#define ARCFLOW_BOTH __host__ __device__ __forceinline__
#else
#define ARCFLOW_BOTH inline
#endif

namespace arcflow_update {

ARCFLOW_BOTH unsigned int bits_of(float x) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(x);
#else
    unsigned int bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
#endif
}

ARCFLOW_BOTH float from_bits(unsigned int bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
#endif
}

/* The dtypes of heads and engine inputs: `value` reads a stored element, `round` stores a number, to nearest with ties
 * to even. */
struct Float32 {
    typedef float Stored;
    static ARCFLOW_BOTH float value(Stored stored) { return stored; }
    static ARCFLOW_BOTH Stored round(float x) { return x; }
};

struct BFloat16 {
    typedef unsigned short Stored;
    static ARCFLOW_BOTH float value(Stored stored) {
#ifdef __CUDA_ARCH__
        float x; /* assembly, or the compiler would widen all means when it loads them and need twice the registers */
        asm("mov.b32 %0, {%1, %2};" : "=f"(x) : "h"(static_cast<Stored>(0)), "h"(stored));
        return x;
#else
        return from_bits(static_cast<unsigned int>(stored) << 16);
#endif
    }
    static ARCFLOW_BOTH Stored round(float x) {
        unsigned int bits = bits_of(x);
        if (x != x) return static_cast<Stored>(bits >> 16 | 0x40); /* NaN; adding below could turn it into infinity */
        return static_cast<Stored>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
};

struct Float16 {
    typedef unsigned short Stored;
    static ARCFLOW_BOTH float value(Stored stored) {
#ifdef __CUDA_ARCH__
        float x;
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(stored));
        return x;
#else
        unsigned int sign = static_cast<unsigned int>(stored & 0x8000) << 16, rest = stored & 0x7fff;
        if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | rest << 13);
        return from_bits(sign | bits_of(from_bits(rest << 13) * 0x1p112f)); /* exact, subnormal numbers too */
#endif
    }
    static ARCFLOW_BOTH Stored round(float x) {
#ifdef __CUDA_ARCH__
        Stored stored;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(stored) : "f"(x));
        return stored;
#else
        unsigned int bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
        if (rest > 0x7f800000) return 0x7fff;
        if (rest >= 0x477ff000) return static_cast<Stored>(sign | 0x7c00); /* 65520 and more round to infinity */
        if (rest < 0x38800000) /* below 2^-14: an ulp of 0.5f equals an ulp of a subnormal half, so adding 0.5 rounds */
            return static_cast<Stored>(sign | (bits_of(from_bits(rest) + 0.5f) - 0x3f000000));
        return static_cast<Stored>(sign | ((rest + 0xfff + (rest >> 13 & 1)) - 0x38000000) >> 13);
#endif
    }
};

/* The unevaluated sum of two floats; |low| is at most a few half ulps of `high`. */
struct Sum {
    float high, low;
};

/* d = sigma - next, to 48 bits. */
ARCFLOW_BOTH Sum step_of(double sigma, double next) {
    double step = sigma - next;
    float high = static_cast<float>(step);
    return {high, static_cast<float>(step - high)};
}

/* a + b exactly (Knuth's TwoSum). */
ARCFLOW_BOTH Sum add(float a, float b) {
    float sum = a + b, part = sum - a;
    return {sum, (a - (sum - part)) + (b - part)};
}

/* exp(x) within 3 ulps, 2 of which are expf's on a GPU. The correction is skipped if the result is 0: for an argument
 * of -infinity, `low` is NaN and the result must be 0. */
ARCFLOW_BOTH float exp_of(Sum x) {
    float e = expf(x.high);
    return e == 0 ? e : fmaf(e, fmaf(0.5f * x.low, x.low, x.low), e);
}

/* A mode before the softmax is normalised: `weight` = exp(logweight - top), `share` = weight * integral(loggamma). */
struct Mode {
    float weight, share;
};

/* `top` is the largest logweight of the sub-pixel's modes. Values that are not finite stay so, as in update.py: a NaN,
 * and an infinite mean, logweight or positive loggamma, give NaN or infinity. */
ARCFLOW_BOTH Mode mode_of(float logweight, float top, float loggamma, Sum step) {
    Sum logit = add(logweight, -top);
    Mode mode;
    mode.weight = exp_of(logit);

    Sum z; /* loggamma * d */
    z.high = loggamma * step.high;
    z.low = fmaf(loggamma, step.low, fmaf(loggamma, step.high, -z.high));
    if (fabsf(z.high) < 0x1p-25f) { /* phi(z) is 1 to float32's precision, and z may have lost bits to underflow */
        mode.share = mode.weight * step.high;
    } else if (z.high <= 64) {
        float m = expm1f(z.high);
        if (m != -1) m = fmaf(z.low, m + 1, m);
        mode.share = mode.weight * (m / loggamma);
    } else { /* one exponential of the sum: a small weight times a large integral may fit in float32 when one of them
                does not */
        Sum sum = add(logit.high, z.high);
        sum.low += logit.low + z.low;
        mode.share = exp_of(sum) / loggamma;
    }
    return mode;
}

/* x_e from `mixed`, the sum over modes of share * mean, and `scale`, 1 / (the sum of their weights). */
ARCFLOW_BOTH float stepped(float latent, float mixed, float scale) { return fmaf(-mixed, scale, latent); }

}  // namespace arcflow_update
#endif
