// Fakes for tests without a GPU: TensorRT engines that run on the CPU in a stream of the driver made of host memory
// (tests/host_cuda), the same functions on host tensors, and that driver's controls.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "engine.h"
#include "lora.h"
#include "trt_session.h"

namespace fake {

using namespace arcflow;

constexpr int64_t K = 3, P = 4, C = 16, TEXT = 6, POOL = 2, M = 5, HALF_HEAD = 2, TOKEN_PX = 16;

// A function that only the driver made of host memory has; host_cuda.h documents them.
template <class Function> Function *control(const char *name) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    void *found = library == nullptr ? nullptr : dlsym(library, name);
    if (found == nullptr) {
        std::fprintf(stderr, "run this with the folder that tests/host_cuda/build.py wrote in LD_LIBRARY_PATH\n");
        std::exit(1);
    }
    return reinterpret_cast<Function *>(found);
}

// The kinds of host_cuda_live.
enum Live { device_bytes, pinned_bytes, streams, events, graphs, executables };

// CUresult codes, and the flags of host_cuda_fail.
constexpr int out_of_memory = 2, unknown = 999, capture_unsupported = 900;
constexpr int always = 0, in_capture = 1;

inline size_t live(Live kind) { return control<size_t(int)>("host_cuda_live")(kind); }
inline long calls(const char *function) { return control<long(const char *)>("host_cuda_calls")(function); }
inline void reset_driver() { control<void()>("host_cuda_reset")(); }
inline void fail(const char *function, long nth, int error, int when = always) {
    control<void(const char *, long, int, int)>("host_cuda_fail")(function, nth, error, when);
}
inline int failures_pending() { return control<int()>("host_cuda_failures_pending")(); }

// Heads that depend on every input of each image: latents, text, modulation, rotary tables and LoRAs.
void backbone(const Shapes &shapes, const std::map<std::string, std::byte *> &at, DType dtype);

// modulation[s, u, m] = timesteps[s] / 1000 + pooled[u] + guidance[u] + m / 8, and a number for the LoRAs.
void conditioner(const Shapes &shapes, const std::map<std::string, std::byte *> &at, DType dtype);

// Every pixel of a token has the token's colour.
void decoder(const Shapes &shapes, const std::map<std::string, std::byte *> &at);

// A session for one of these parts. A run overwrites its workspace, and fails if its context was freed before.
class Session : public TrtSession {
public:
    Session(std::string part, DType dtype) : part_(std::move(part)), dtype_(dtype) {}
    std::unique_ptr<TrtContext> context(const Shapes &inputs, cuda::Stream &stream) override;
    std::string misfit(const Shapes &inputs) override;

    std::string obstacle;
    int64_t max_batch = 4, max_steps = 8;
    int contexts = 0, live_contexts = 0, most_contexts = 0;
    std::function<void()> before_enqueue = [] {};  // what an engine's library might do in each run

private:
    std::string part_;
    DType dtype_;
};

// A manifest of FLUX's family whose backbone takes and returns `dtype`, and whose conditioner takes and returns
// `conditioned`. With `max_rank` above 0, the backbone has the LoRA slot "to_q" and the conditioner the slot "norm".
Manifest manifest_in(DType dtype, DType conditioned, int64_t max_rank = 0);

// A LoRA of both slots, of this rank and scale.
ScaledLora lora_of(uint64_t number, int64_t rank, float scale, const Manifest &manifest);

Tensor random_tensor(uint64_t seed, std::vector<int64_t> shape);

// A job of `images` images of 2 x 3 tokens, each with another text of `text_tokens` tokens.
DenoiseJob job_of(uint64_t seed, int64_t images = 3, bool pixels = true, std::vector<double> sigmas = {1, 0.7619, 0},
                  int64_t text_tokens = 4, int64_t height = 2, int64_t width = 3);

// The result that a Denoiser must return, computed image by image on host tensors with the library's update.
Denoised expected(const DenoiseJob &job, const Manifest &manifest);

}  // namespace fake
