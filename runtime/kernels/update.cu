/* Computes the closed-form ArcFlow step on a GPU: heads of one network call and latents -> latents at the next sigma.
 *
 *     means      [tokens, K, C*P]   float32, float16 or bfloat16
 *     logweights [tokens, K, P]     likewise, not normalised
 *     loggammas  [tokens, K-1, P]   likewise; mode 0 has loggamma 0
 *     latents    [tokens, C*P]      float32; channel c*P + p belongs to sub-pixel p
 *     next       [tokens, C*P]      float32; may be `latents`
 *     input      [tokens, C*P]      the same in the engine's input type, or null
 *     sigmas     [S+1]              float64; the step goes from sigmas[step] to sigmas[step + 1]
 *
 * All arguments are read from device memory, also the sigmas, so a captured graph serves any schedule with as many
 * steps.
 *
 * LANES threads of one warp compute a token together. They first divide its K*P modes among themselves, and then its
 * channels, 16 bytes of each mode at a time; both pass through shared memory. Each head is read once. Sums have a fixed
 * order, so equal inputs give equal bits.
 *
 * geometry.h says how it is launched; there are ceil(tokens / (threads / LANES)) blocks.
 */
#include "geometry.h"
#include "update_math.h"

namespace arcflow_update {

constexpr int BLOCKS_PER_SM = 4; /* at once, which leaves 128 registers for each thread */
constexpr unsigned int WARP = 0xffffffffu;

struct Arguments {
    const void *means, *logweights, *loggammas;
    const float *latents;
    float *next;
    void *input;
    const double *sigmas;
    long long tokens;
    int step, modes, channels, sub_pixels;
};

/* The first float4 is the block's, the rest its tokens'. */
extern __shared__ float4 arcflow_shared[];
static_assert(sizeof(float4) == ARCFLOW_UPDATE_BLOCK_BYTES, "the tokens' memory begins behind the block's");

/* The token and lane of a thread. Threads past the last token repeat it and store nothing, so that every lane of a warp
 * takes part in its shuffles. */
template <int LANES> struct Place {
    int lane;
    long long token;
    bool stores;
    float *shared; /* ARCFLOW_UPDATE_TOKEN_FLOATS floats of this token */

    __device__ Place(const Arguments &a) {
        int group = static_cast<int>(threadIdx.x) / LANES;
        lane = static_cast<int>(threadIdx.x) % LANES;
        token = static_cast<long long>(blockIdx.x) * (static_cast<int>(blockDim.x) / LANES) + group;
        stores = token < a.tokens;
        if (!stores) token = a.tokens - 1;
        shared =
            reinterpret_cast<float *>(arcflow_shared + 1) + group * ARCFLOW_UPDATE_TOKEN_FLOATS(a.modes, a.sub_pixels);
    }
};

/* Compute d in one thread, because float64 is slow on most GPUs. Other threads read it after __syncthreads. */
__device__ __forceinline__ void share_step(const Arguments &a) {
    if (threadIdx.x == 0) {
        Sum step = step_of(a.sigmas[a.step], a.sigmas[a.step + 1]);
        arcflow_shared[0].x = step.high;
        arcflow_shared[0].y = step.low;
    }
}

__device__ __forceinline__ Sum shared_step() { return {arcflow_shared[0].x, arcflow_shared[0].y}; }

__device__ __forceinline__ float lowest() { return from_bits(0xff800000); } /* minus infinity */

/* The low and high half of a word. */
__device__ __forceinline__ unsigned short low(unsigned int word) { return static_cast<unsigned short>(word & 0xffff); }
__device__ __forceinline__ unsigned short high(unsigned int word) { return static_cast<unsigned short>(word >> 16); }

/* Four neighbouring elements of a head, aligned to their size. */
template <class Head> __device__ __forceinline__ float4 load_four(const void *head, long long first) {
    const uint2 two = *reinterpret_cast<const uint2 *>(static_cast<const typename Head::Stored *>(head) + first);
    return {Head::value(low(two.x)), Head::value(high(two.x)), Head::value(low(two.y)), Head::value(high(two.y))};
}

template <> __device__ __forceinline__ float4 load_four<Float32>(const void *head, long long first) {
    return *reinterpret_cast<const float4 *>(static_cast<const float *>(head) + first);
}

/* 16 bytes of a head, with access to its elements. */
template <class Head> struct Packed {
    static constexpr int COUNT = 8;
    uint4 words;
    __device__ __forceinline__ float operator[](int i) const {
        unsigned int word = i < 2 ? words.x : i < 4 ? words.y : i < 6 ? words.z : words.w;
        return Head::value(i % 2 ? high(word) : low(word));
    }
};

template <> struct Packed<Float32> {
    static constexpr int COUNT = 4;
    float4 words;
    __device__ __forceinline__ float operator[](int i) const {
        return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
    }
};

template <class Head> __device__ __forceinline__ Packed<Head> load_packed(const void *head, long long first) {
    return *reinterpret_cast<const Packed<Head> *>(static_cast<const typename Head::Stored *>(head) + first);
}

/* Four neighbouring elements of the engine's input. */
template <class In> __device__ __forceinline__ void store_four(void *input, long long first, float4 x) {
    uint2 two = {In::round(x.x) | static_cast<unsigned int>(In::round(x.y)) << 16,
                 In::round(x.z) | static_cast<unsigned int>(In::round(x.w)) << 16};
    *reinterpret_cast<uint2 *>(static_cast<typename In::Stored *>(input) + first) = two;
}

template <> __device__ __forceinline__ void store_four<Float32>(void *input, long long first, float4 x) {
    *reinterpret_cast<float4 *>(static_cast<float *>(input) + first) = x;
}

/* Load 16 bytes of the means of up to AHEAD modes, from mode `k` on; `first` is the index of mode 0's first element. */
template <class Head, int MODES, int AHEAD>
__device__ __forceinline__ void load_means(const Arguments &a, long long first, int k, int modes, int channels,
                                           Packed<Head> (&means)[AHEAD]) {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        if (MODES || k + i < modes) means[i] = load_packed<Head>(a.means, first + (k + i) * channels);
}

template <int FOURS>
__device__ __forceinline__ void load_latents(const Arguments &a, long long first, float4 (&latents)[FOURS]) {
#pragma unroll
    for (int i = 0; i < FOURS; ++i) latents[i] = *reinterpret_cast<const float4 *>(a.latents + first + 4 * i);
}

/* The fast path: P = 4 sub-pixels, channels in whole groups of 16 bytes, everything aligned to 16 bytes. MODES is K and
 * CHANNELS is C*P, or 0 if they are known at run time only. Latents and the means of AHEAD modes, as many as registers
 * hold, are loaded while the modes are computed. */
template <class Head, class In, int LANES, int MODES, int CHANNELS, int AHEAD>
__device__ __forceinline__ void update_packed(const Arguments &a) {
    constexpr int COUNT = Packed<Head>::COUNT; /* the general case (MODES 0) is not unrolled, to keep the code short */
    const int modes = MODES ? MODES : a.modes, channels = CHANNELS ? CHANNELS : a.channels, chunks = channels / COUNT;
    const Place<LANES> place(a);
    float4 *shares = reinterpret_cast<float4 *>(place.shared), *loggammas = shares + modes;
    const long long first_mean = place.token * modes * channels, first_latent = place.token * channels;

    Packed<Head> means[AHEAD];
    float4 latents[COUNT / 4];
    int chunk = place.lane;
    if (chunk < chunks) {
        load_means<Head, MODES>(a, first_mean + chunk * COUNT, 0, modes, channels, means);
        load_latents(a, first_latent + chunk * COUNT, latents);
    }

    share_step(a);
#pragma unroll(MODES ? MODES : 1)
    for (int k = place.lane; k < modes; k += LANES) {
        shares[k] = load_four<Head>(a.logweights, (place.token * modes + k) * 4);
        loggammas[k] = {0, 0, 0, 0};
        if (k) loggammas[k] = load_four<Head>(a.loggammas, (place.token * (modes - 1) + k - 1) * 4);
    }
    __syncthreads();

    /* LANES is a multiple of 4, so each lane works on one sub-pixel. */
    float *share = place.shared, *loggamma = share + 4 * modes, top = lowest(), total = 0;
#pragma unroll(MODES ? MODES : 1)
    for (int i = place.lane; i < 4 * modes; i += LANES) top = fmaxf(top, share[i]);
#pragma unroll
    for (int other = LANES / 2; other >= 4; other /= 2) top = fmaxf(top, __shfl_xor_sync(WARP, top, other, LANES));
    const Sum step = shared_step();
#pragma unroll(MODES ? 2 : 1)
    for (int i = place.lane; i < 4 * modes; i += LANES) {
        const Mode mode = mode_of(share[i], top, loggamma[i], step);
        share[i] = mode.share;
        total += mode.weight;
    }
#pragma unroll
    for (int other = LANES / 2; other >= 4; other /= 2) total += __shfl_xor_sync(WARP, total, other, LANES);
    const float own = 1 / total;
    const float4 scale = {__shfl_sync(WARP, own, 0, LANES), __shfl_sync(WARP, own, 1, LANES),
                          __shfl_sync(WARP, own, 2, LANES), __shfl_sync(WARP, own, 3, LANES)};
    __syncwarp();

    while (chunk < chunks) {
        float4 mixed[COUNT / 4];
#pragma unroll
        for (int i = 0; i < COUNT / 4; ++i) mixed[i] = {0, 0, 0, 0};
#pragma unroll 1
        for (int k = 0; k < modes; k += AHEAD) {
            if (k) load_means<Head, MODES>(a, first_mean + chunk * COUNT, k, modes, channels, means);
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                if (!MODES && k + i >= modes) break;
                const float4 four_shares = shares[k + i];
                const Packed<Head> mean = means[i];
#pragma unroll
                for (int four = 0; four < COUNT / 4; ++four) {
                    mixed[four].x = fmaf(four_shares.x, mean[4 * four], mixed[four].x);
                    mixed[four].y = fmaf(four_shares.y, mean[4 * four + 1], mixed[four].y);
                    mixed[four].z = fmaf(four_shares.z, mean[4 * four + 2], mixed[four].z);
                    mixed[four].w = fmaf(four_shares.w, mean[4 * four + 3], mixed[four].w);
                }
            }
        }
        if (place.stores) {
            const long long first = first_latent + chunk * COUNT;
#pragma unroll
            for (int i = 0; i < COUNT / 4; ++i) {
                const float4 x = latents[i];
                const float4 y = {stepped(x.x, mixed[i].x, scale.x), stepped(x.y, mixed[i].y, scale.y),
                                  stepped(x.z, mixed[i].z, scale.z), stepped(x.w, mixed[i].w, scale.w)};
                *reinterpret_cast<float4 *>(a.next + first + 4 * i) = y;
                if (a.input) store_four<In>(a.input, first + 4 * i, y);
            }
        }
        chunk += LANES;
        if (chunk < chunks) {
            load_means<Head, MODES>(a, first_mean + chunk * COUNT, 0, modes, channels, means);
            load_latents(a, first_latent + chunk * COUNT, latents);
        }
    }
}

/* The slow path: any number of modes, sub-pixels and channels, without alignment. */
template <class Head, class In, int LANES> __device__ __forceinline__ void update_scalar(const Arguments &a) {
    typedef typename Head::Stored Stored;
    const Place<LANES> place(a);
    const int p_count = a.sub_pixels;
    const Stored *means = static_cast<const Stored *>(a.means) + place.token * a.modes * a.channels;
    const Stored *logweights = static_cast<const Stored *>(a.logweights) + place.token * a.modes * p_count;
    const Stored *loggammas = static_cast<const Stored *>(a.loggammas) + place.token * (a.modes - 1) * p_count;
    float *shares = place.shared, *scales = shares + a.modes * p_count;

    share_step(a);
    __syncthreads();
    const Sum step = shared_step();
#pragma unroll 1
    for (int p = place.lane; p < p_count; p += LANES) {
        float top = lowest(), total = 0;
#pragma unroll 1
        for (int k = 0; k < a.modes; ++k) {
            float logit = Head::value(logweights[k * p_count + p]);
            shares[k * p_count + p] = logit;
            top = fmaxf(top, logit);
        }
#pragma unroll 1
        for (int k = 0; k < a.modes; ++k) {
            float loggamma = k ? Head::value(loggammas[(k - 1) * p_count + p]) : 0;
            Mode mode = mode_of(shares[k * p_count + p], top, loggamma, step);
            shares[k * p_count + p] = mode.share;
            total += mode.weight;
        }
        scales[p] = 1 / total;
    }
    __syncwarp();
    if (!place.stores) return;
#pragma unroll 1
    for (int c = place.lane; c < a.channels; c += LANES) {
        float mixed = 0;
#pragma unroll 1
        for (int k = 0; k < a.modes; ++k)
            mixed = fmaf(shares[k * p_count + c % p_count], Head::value(means[k * a.channels + c]), mixed);
        const long long at = place.token * a.channels + c;
        const float y = stepped(a.latents[at], mixed, scales[c % p_count]);
        a.next[at] = y;
        if (a.input) static_cast<typename In::Stored *>(a.input)[at] = In::round(y);
    }
}

__device__ __forceinline__ bool aligned(const void *p) { return reinterpret_cast<unsigned long long>(p) % 16 == 0; }

template <class Head, class In> __device__ __forceinline__ void update(const Arguments &a) {
    constexpr int LANES =
        sizeof(typename Head::Stored) == 4 ? ARCFLOW_UPDATE_LANES_32_BIT : ARCFLOW_UPDATE_LANES_16_BIT;
    const bool packed = a.sub_pixels == 4 && a.channels % Packed<Head>::COUNT == 0 && aligned(a.means) &&
                        aligned(a.logweights) && aligned(a.loggammas) && aligned(a.latents) && aligned(a.next) &&
                        aligned(a.input);
    if (packed && a.modes == 16 && a.channels == 64)
        update_packed<Head, In, LANES, 16, 64, ARCFLOW_UPDATE_THREADS / LANES>(a);
    else if (packed) update_packed<Head, In, LANES, 0, 0, 4>(a);
    else update_scalar<Head, In, LANES>(a);
}

}  // namespace arcflow_update

/* arcflow_update_<type of the heads>_<type of the engine's input> */
#define ARCFLOW_UPDATE(HEAD, HEAD_TYPE, IN, IN_TYPE) \
    extern "C" __global__ void __launch_bounds__(ARCFLOW_UPDATE_THREADS, arcflow_update::BLOCKS_PER_SM) \
        arcflow_update_##HEAD##_##IN(const void *means, const void *logweights, const void *loggammas, \
                                     const float *latents, float *next, void *input, const double *sigmas, \
                                     long long tokens, int step, int modes, int channels, int sub_pixels) { \
        arcflow_update::update<arcflow_update::HEAD_TYPE, arcflow_update::IN_TYPE>( \
            {means, logweights, loggammas, latents, next, input, sigmas, tokens, step, modes, channels, sub_pixels}); \
    }

#define ARCFLOW_UPDATES(HEAD, HEAD_TYPE) \
    ARCFLOW_UPDATE(HEAD, HEAD_TYPE, float32, Float32) \
    ARCFLOW_UPDATE(HEAD, HEAD_TYPE, float16, Float16) \
    ARCFLOW_UPDATE(HEAD, HEAD_TYPE, bfloat16, BFloat16)

ARCFLOW_UPDATES(float32, Float32)
ARCFLOW_UPDATES(float16, Float16)
ARCFLOW_UPDATES(bfloat16, BFloat16)
