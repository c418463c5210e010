/* Computes a straight student's step on a GPU: velocity of one or two network calls and latents -> latents at the next
 * sigma (docs/bundle.md, "Update"; arcflow_runtime/maths/euler.py).
 *
 *     velocity  [tokens, channels]  float32, float16 or bfloat16: the network's output for the prompt
 *     negative  [tokens, channels]  likewise, for the negative prompt; null if the velocity is not guided
 *     latents   [tokens, channels]  float32
 *     next      [tokens, channels]  float32; may be `latents`
 *     input     [tokens, channels]  the same in the engine's input type, or null
 *     sigmas    [S+1]               float64; the step goes from sigmas[step] to sigmas[step + 1]
 *     scale     [1]                 float32: the guidance scale; null if `negative` is null
 *
 * `channels` is a multiple of 8, and the first five addresses are multiples of 16. All arguments are read from device
 * memory, also sigmas and scale, so a captured graph serves any schedule with as many steps and any scale.
 *
 * Without guidance, next = latents - float(sigmas[step] - sigmas[step + 1]) * velocity, with the bits of euler.py: the
 * product is rounded before the subtraction. With guidance, c = negative + scale * (velocity - negative), rounded after
 * each operation, times |velocity| / |c| takes the place of velocity, and 0 where |c| is 0. The norms are those of a
 * token. Their sums have a fixed order, so equal inputs give equal bits.
 *
 * LANES threads of one warp compute a token together, 16 bytes at a time. Each velocity is read once if a token has at
 * most 16 * LANES bytes, as with 64 channels; with guidance, longer tokens are read twice.
 *
 * geometry.h says how it is launched; there are ceil(tokens / (EULER_THREADS / LANES)) blocks, without shared memory.
 */
#include "update.cu"

namespace arcflow_euler {

using arcflow_update::load_packed;
using arcflow_update::Packed;

struct Arguments {
    const void *velocity, *negative;
    const float *latents;
    float *next;
    void *input;
    const double *sigmas;
    const float *scale;
    long long tokens;
    int step, channels;
};

/* a * b rounded: a compiler would fuse a plain product with the addition that follows. */
__device__ __forceinline__ float product(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

/* The guided velocity before it gets the length of `velocity`. */
__device__ __forceinline__ float guided(float velocity, float negative, float scale) {
    return negative + product(scale, velocity - negative);
}

template <class Head, class In, int LANES> __device__ __forceinline__ void euler(const Arguments &a) {
    constexpr int COUNT = Packed<Head>::COUNT;
    const int lane = static_cast<int>(threadIdx.x) % LANES, chunks = a.channels / COUNT;
    long long token = static_cast<long long>(blockIdx.x) * (static_cast<int>(blockDim.x) / LANES) +
                      static_cast<int>(threadIdx.x) / LANES;
    /* Threads past the last token repeat it and store nothing, so that every lane of a warp takes part in its
     * shuffles. */
    const bool stores = token < a.tokens;
    if (!stores) token = a.tokens - 1;
    const long long first = token * a.channels;
    const float step = static_cast<float>(a.sigmas[a.step] - a.sigmas[a.step + 1]);
    const bool kept = a.negative && chunks <= LANES; /* registers hold the token between the two passes */

    Packed<Head> velocity = {}, negative = {};
    float scale = 0, longer = 1;
    if (a.negative) {
        float norm = 0, guided_norm = 0;
        scale = *a.scale;
        for (int chunk = lane; chunk < chunks; chunk += LANES) {
            velocity = load_packed<Head>(a.velocity, first + chunk * COUNT);
            negative = load_packed<Head>(a.negative, first + chunk * COUNT);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                const float c = guided(velocity[i], negative[i], scale);
                norm += product(velocity[i], velocity[i]);
                guided_norm += product(c, c);
            }
        }
#pragma unroll
        for (int other = LANES / 2; other >= 1; other /= 2) {
            norm += __shfl_xor_sync(arcflow_update::WARP, norm, other, LANES);
            guided_norm += __shfl_xor_sync(arcflow_update::WARP, guided_norm, other, LANES);
        }
        norm = sqrtf(norm);
        guided_norm = sqrtf(guided_norm);
        longer = guided_norm == 0 ? 0 : norm / guided_norm;
    }
    if (!stores) return;

    for (int chunk = lane; chunk < chunks; chunk += LANES) {
        const long long at = first + chunk * COUNT;
        if (!kept) velocity = load_packed<Head>(a.velocity, at);
        if (!kept && a.negative) negative = load_packed<Head>(a.negative, at);
        float moved[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            float v = velocity[i];
            if (a.negative) v = product(guided(v, negative[i], scale), longer);
            moved[i] = product(step, v);
        }
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            const float4 x = *reinterpret_cast<const float4 *>(a.latents + at + i);
            const float4 y = {x.x - moved[i], x.y - moved[i + 1], x.z - moved[i + 2], x.w - moved[i + 3]};
            *reinterpret_cast<float4 *>(a.next + at + i) = y;
            if (a.input) arcflow_update::store_four<In>(a.input, at + i, y);
        }
    }
}

}  // namespace arcflow_euler

/* arcflow_euler_<type of the velocities>_<type of the engine's input> */
#define ARCFLOW_EULER(HEAD, HEAD_TYPE, IN, IN_TYPE, LANES) \
    extern "C" __global__ void __launch_bounds__(ARCFLOW_EULER_THREADS) arcflow_euler_##HEAD##_##IN( \
        const void *velocity, const void *negative, const float *latents, float *next, void *input, \
        const double *sigmas, const float *scale, long long tokens, int step, int channels) { \
        arcflow_euler::euler<arcflow_update::HEAD_TYPE, arcflow_update::IN_TYPE, LANES>( \
            {velocity, negative, latents, next, input, sigmas, scale, tokens, step, channels}); \
    }

#define ARCFLOW_EULERS(HEAD, HEAD_TYPE, LANES) \
    ARCFLOW_EULER(HEAD, HEAD_TYPE, float32, Float32, LANES) \
    ARCFLOW_EULER(HEAD, HEAD_TYPE, float16, Float16, LANES) \
    ARCFLOW_EULER(HEAD, HEAD_TYPE, bfloat16, BFloat16, LANES)

ARCFLOW_EULERS(float32, Float32, ARCFLOW_UPDATE_LANES_32_BIT)
ARCFLOW_EULERS(float16, Float16, ARCFLOW_UPDATE_LANES_16_BIT)
ARCFLOW_EULERS(bfloat16, BFloat16, ARCFLOW_UPDATE_LANES_16_BIT)
