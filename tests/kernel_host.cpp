// Runs the CUDA kernels' source on a CPU, for tests/test_kernel_*.py: single functions, and whole kernels, where each
// thread of a block is a fibre.
//
// A fibre runs to its next barrier or shuffle and yields; when all have, they continue. So all threads of a block must
// meet the same barriers and shuffles in the same order, which is checked.
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__
#define __launch_bounds__(...)

struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned int x, y;
};
struct alignas(16) uint4 {
    unsigned int x, y, z, w;
};
struct Index {
    unsigned int x;
};
static Index threadIdx, blockIdx, blockDim;

namespace {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr size_t SHARED_FLOATS = 3072;  // 48 KiB

struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    const char *waits_at;  // null after it returned
    float offered;
};
// One for each thread of a block. Their stacks are kept for the next kernel, and what is in them does not matter.
std::vector<Fibre> fibres;
ucontext_t scheduler;
unsigned int current;

void wait_at(const char *where) {
    fibres[current].waits_at = where;
    swapcontext(&fibres[current].context, &scheduler);
}

float shuffle(float value, unsigned int lane, const char *where) {
    fibres[current].offered = value;
    wait_at(where);
    float theirs = fibres.at(lane).offered;
    wait_at(where);
    return theirs;
}

}  // namespace

static void __syncthreads() { wait_at("__syncthreads"); }
static void __syncwarp() { wait_at("__syncwarp"); }
static float __shfl_xor_sync(unsigned int, float value, int mask, int) {
    return shuffle(value, current ^ static_cast<unsigned int>(mask), "__shfl_xor_sync");
}
static float __shfl_sync(unsigned int, float value, int lane, int width) {
    unsigned int lanes = static_cast<unsigned int>(width);
    return shuffle(value, current / lanes * lanes + static_cast<unsigned int>(lane), "__shfl_sync");
}

#include "noise.cu"

namespace arcflow_update {
float4 arcflow_shared[SHARED_FLOATS];
}

namespace {

using Kernel = decltype(&arcflow_update_float32_float32);
const std::map<std::string, Kernel> KERNELS = {
    {"arcflow_update_float32_float32", arcflow_update_float32_float32},
    {"arcflow_update_float32_float16", arcflow_update_float32_float16},
    {"arcflow_update_float32_bfloat16", arcflow_update_float32_bfloat16},
    {"arcflow_update_float16_float32", arcflow_update_float16_float32},
    {"arcflow_update_float16_float16", arcflow_update_float16_float16},
    {"arcflow_update_float16_bfloat16", arcflow_update_float16_bfloat16},
    {"arcflow_update_bfloat16_float32", arcflow_update_bfloat16_float32},
    {"arcflow_update_bfloat16_float16", arcflow_update_bfloat16_float16},
    {"arcflow_update_bfloat16_bfloat16", arcflow_update_bfloat16_bfloat16},
};

using EulerKernel = decltype(&arcflow_euler_float32_float32);
const std::map<std::string, EulerKernel> EULER_KERNELS = {
    {"arcflow_euler_float32_float32", arcflow_euler_float32_float32},
    {"arcflow_euler_float32_float16", arcflow_euler_float32_float16},
    {"arcflow_euler_float32_bfloat16", arcflow_euler_float32_bfloat16},
    {"arcflow_euler_float16_float32", arcflow_euler_float16_float32},
    {"arcflow_euler_float16_float16", arcflow_euler_float16_float16},
    {"arcflow_euler_float16_bfloat16", arcflow_euler_float16_bfloat16},
    {"arcflow_euler_bfloat16_float32", arcflow_euler_bfloat16_float32},
    {"arcflow_euler_bfloat16_float16", arcflow_euler_bfloat16_float16},
    {"arcflow_euler_bfloat16_bfloat16", arcflow_euler_bfloat16_bfloat16},
};

using NoiseKernel = decltype(&arcflow_noise_float32);
const std::map<std::string, NoiseKernel> NOISE_KERNELS = {
    {"float32", arcflow_noise_float32},
    {"float16", arcflow_noise_float16},
    {"bfloat16", arcflow_noise_bfloat16},
};

std::function<void()> kernel;

void run_thread() {
    kernel();
    fibres[current].waits_at = nullptr;
}

void run_block();

void run_grid(unsigned int grid, unsigned int block) {
    fibres.resize(block);
    for (auto &fibre : fibres)
        if (fibre.stack == nullptr) fibre.stack.reset(new char[STACK_BYTES]);
    blockDim = {block};
    for (unsigned int b = 0; b < grid; ++b) {
        blockIdx = {b};
        run_block();
    }
}

void run_block() {
    for (auto &fibre : fibres) {
        getcontext(&fibre.context);
        fibre.context.uc_stack = {fibre.stack.get(), 0, STACK_BYTES};
        fibre.context.uc_link = &scheduler;
        makecontext(&fibre.context, run_thread, 0);
        fibre.waits_at = "start";
    }
    // Shared memory starts with NaN, since it is not zero on a GPU either.
    for (auto &four : arcflow_update::arcflow_shared) four = {NAN, NAN, NAN, NAN};
    while (fibres[0].waits_at != nullptr) {
        for (current = 0; current < fibres.size(); ++current) {
            if (fibres[current].waits_at == nullptr) continue;
            threadIdx = {current};
            swapcontext(&scheduler, &fibres[current].context);
        }
        for (const auto &fibre : fibres) {
            // Threads with nothing to store may return after the last barrier, while others continue.
            const char *first = fibres[0].waits_at == nullptr ? "" : fibres[0].waits_at;
            if (fibre.waits_at != nullptr && std::strcmp(fibre.waits_at, first) != 0) {
                std::fprintf(stderr, "threads of a block wait at %s and %s\n", fibre.waits_at, first);
                std::abort();
            }
        }
    }
}

}  // namespace

extern "C" {

// Run an update kernel. Returns 0, or 1 if there is no kernel of this name or its shared memory does not fit.
int emulate(const char *name, unsigned int grid, unsigned int block, size_t shared_bytes, const void *means,
            const void *logweights, const void *loggammas, const float *latents, float *next, void *input,
            const double *sigmas, long long tokens, int step, int modes, int channels, int sub_pixels) {
    const auto found = KERNELS.find(name);
    if (found == KERNELS.end() || shared_bytes > sizeof arcflow_update::arcflow_shared) return 1;
    kernel = [=] {
        found->second(means, logweights, loggammas, latents, next, input, sigmas, tokens, step, modes, channels,
                      sub_pixels);
    };
    run_grid(grid, block);
    return 0;
}

// The same for a kernel of a straight student's step.
int emulate_euler(const char *name, unsigned int grid, unsigned int block, const void *velocity, const void *negative,
                  const float *latents, float *next, void *input, const double *sigmas, const float *scale,
                  long long tokens, int step, int channels) {
    const auto found = EULER_KERNELS.find(name);
    if (found == EULER_KERNELS.end()) return 1;
    kernel = [=] { found->second(velocity, negative, latents, next, input, sigmas, scale, tokens, step, channels); };
    run_grid(grid, block);
    return 0;
}

// The same for a noise kernel, chosen by the dtype of the engine's input.
int emulate_noise(const char *input_type, unsigned int grid, unsigned int block, size_t shared_bytes,
                  const long long *streams, float *latents, void *input, int channels, int height, int width,
                  int patch) {
    const auto found = NOISE_KERNELS.find(input_type);
    if (found == NOISE_KERNELS.end() || shared_bytes > sizeof arcflow_update::arcflow_shared) return 1;
    kernel = [=] { found->second(streams, latents, input, channels, height, width, patch); };
    run_grid(grid, block);
    return 0;
}

// Normal numbers of 24-bit uniforms [groups, 16], as the kernel computes them.
void box_muller(const float *uniforms, float *out, long long groups) {
    for (long long i = 0; i < 16 * groups; ++i) {
        if (i % 16 >= 8) continue;
        const arcflow_random::Pair two = arcflow_random::box_muller(uniforms[i], uniforms[i + 8]);
        out[i] = two.first;
        out[i + 8] = two.second;
    }
}

// One channel of one token with the kernels' inner functions: the step of its modes.
float step_channel(const float *means, const float *logweights, const float *loggammas, float latent, double sigma,
                   double next, int modes) {
    using namespace arcflow_update;
    const Sum step = step_of(sigma, next);
    float top = lowest(), total = 0, mixed = 0;
    for (int k = 0; k < modes; ++k) top = fmaxf(top, logweights[k]);
    for (int k = 0; k < modes; ++k) {
        const Mode mode = mode_of(logweights[k], top, k ? loggammas[k - 1] : 0, step);
        total += mode.weight;
        mixed = fmaf(mode.share, means[k], mixed);
    }
    return stepped(latent, mixed, 1 / total);
}

// step_channel over [rows, modes] means and logweights, [rows, modes - 1] loggammas, [rows] latents.
void step_channels(const float *means, const float *logweights, const float *loggammas, const float *latents,
                   float *out, double sigma, double next, long long rows, int modes) {
    for (long long i = 0; i < rows; ++i) {
        out[i] = step_channel(means + i * modes, logweights + i * modes, loggammas + i * (modes - 1), latents[i], sigma,
                              next, modes);
    }
}

void widen_float16(const unsigned short *in, float *out, long long count) {
    for (long long i = 0; i < count; ++i) out[i] = arcflow_update::Float16::value(in[i]);
}
void widen_bfloat16(const unsigned short *in, float *out, long long count) {
    for (long long i = 0; i < count; ++i) out[i] = arcflow_update::BFloat16::value(in[i]);
}
void round_float16(const float *in, unsigned short *out, long long count) {
    for (long long i = 0; i < count; ++i) out[i] = arcflow_update::Float16::round(in[i]);
}
void round_bfloat16(const float *in, unsigned short *out, long long count) {
    for (long long i = 0; i < count; ++i) out[i] = arcflow_update::BFloat16::round(in[i]);
}

// Memory that ends at a page boundary before an inaccessible page; null on failure.
void *guarded(size_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), whole = (bytes + page - 1) / page * page;
    void *begin = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (begin == MAP_FAILED) return nullptr;
    char *end = static_cast<char *>(begin) + whole;
    if (mprotect(end, page, PROT_NONE)) return nullptr;
    return end - bytes;
}

void free_guarded(void *memory, size_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), whole = (bytes + page - 1) / page * page;
    munmap(static_cast<char *>(memory) + bytes - whole, whole + page);
}
}
