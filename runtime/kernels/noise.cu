/* Generates noise on a GPU as packed latents, equal bit for bit to torch's CPU generator.
 *
 *     streams    [images, 2]          int64: a generator's seed, of which the low 32 bits count, and the index of the
 *                                     image's first number in the generator's sequence, a multiple of 16
 *     latents    [images, N, C*p*p]   float32, N = (h/p) * (w/p), channel c*p*p + p*dy + dx
 *     input      [images, N, C*p*p]   the same in the engine's input type, or null
 *
 * The generator fills [C, h, w]; C*h*w must be a multiple of 16. All arguments are read from device memory, so a
 * captured graph serves any seeds.
 *
 * One block makes one image. The next MT19937 state needs only one barrier: each thread makes words that are 227 places
 * apart, and these depend on old words and on each other only. Shared memory holds two states, so that threads turn one
 * state into numbers while others already make the next.
 *
 * geometry.h says how it is launched.
 */
#include "euler.cu"
#include "noise_math.h"

namespace arcflow_random {

static_assert(ARCFLOW_NOISE_SHARED_BYTES == 2 * WORDS * sizeof(unsigned int), "two states fit");

struct Arguments {
    const long long *streams;
    float *latents;
    void *input;
    int channels, height, width, patch;
};

__device__ __forceinline__ void twist(const unsigned int *state, unsigned int *next) {
    constexpr int APART = WORDS - MIDDLE;
    for (int k = static_cast<int>(threadIdx.x); k < APART; k += static_cast<int>(blockDim.x)) {
        unsigned int word = twisted(state[k], state[k + 1], state[k + MIDDLE]);
        next[k] = word;
        word = twisted(state[k + APART], state[k + APART + 1], word);
        next[k + APART] = word;
        const int last = k + 2 * APART;
        if (last >= WORDS) continue;
        /* The last word's successor is the first word of the next state, which another thread makes; so compute it
         * here. */
        const unsigned int behind = last + 1 < WORDS ? state[last + 1] : twisted(state[0], state[1], state[MIDDLE]);
        next[last] = twisted(state[last], behind, word);
    }
}

/* Store number `i` of an image [C, h, w] at its place in the packed latents. */
template <class In> __device__ __forceinline__ void store(const Arguments &a, int i, float x) {
    const int pixel = i % (a.height * a.width), across = a.width / a.patch;
    const int top = pixel / a.width, left = pixel % a.width;
    const int token = top / a.patch * across + left / a.patch;
    const int channel = (i / (a.height * a.width) * a.patch + top % a.patch) * a.patch + left % a.patch;
    const int tokens = a.height / a.patch * across, channels = a.channels * a.patch * a.patch;
    const long long at = (static_cast<long long>(blockIdx.x) * tokens + token) * channels + channel;
    a.latents[at] = x;
    if (a.input) static_cast<typename In::Stored *>(a.input)[at] = In::round(x);
}

template <class In> __device__ __forceinline__ void generate(const Arguments &a) {
    unsigned int *state = reinterpret_cast<unsigned int *>(arcflow_update::arcflow_shared), *next = state + WORDS;
    const long long first = a.streams[2 * blockIdx.x + 1];
    const int count = a.channels * a.height * a.width;
    if (threadIdx.x == 0) {
        unsigned int word = static_cast<unsigned int>(a.streams[2 * blockIdx.x]);
        state[0] = word;
        for (int k = 1; k < WORDS; ++k) state[k] = word = seeded(word, static_cast<unsigned int>(k));
    }
    __syncthreads();
#pragma unroll 1
    for (long long begin = 0; begin < first + count; begin += WORDS) {
        twist(state, next);
        __syncthreads(); /* now all threads have read `state`, so the next twist may overwrite it */
        for (int pair = static_cast<int>(threadIdx.x); pair < WORDS / 2; pair += static_cast<int>(blockDim.x)) {
            const int place = pair / (GROUP / 2) * GROUP + pair % (GROUP / 2);
            const long long i = begin + place - first;
            if (i < 0 || i >= count) continue;
            const Pair two = box_muller(uniform(next[place]), uniform(next[place + GROUP / 2]));
            store<In>(a, static_cast<int>(i), two.first);
            store<In>(a, static_cast<int>(i) + GROUP / 2, two.second);
        }
        unsigned int *made = next;
        next = state;
        state = made;
    }
}

}  // namespace arcflow_random

/* arcflow_noise_<type of the engine's input> */
#define ARCFLOW_NOISE(IN, IN_TYPE) \
    extern "C" __global__ void __launch_bounds__(ARCFLOW_NOISE_THREADS) arcflow_noise_##IN( \
        const long long *streams, float *latents, void *input, int channels, int height, int width, int patch) { \
        arcflow_random::generate<arcflow_update::IN_TYPE>({streams, latents, input, channels, height, width, patch}); \
    }

ARCFLOW_NOISE(float32, Float32)
ARCFLOW_NOISE(float16, Float16)
ARCFLOW_NOISE(bfloat16, BFloat16)
