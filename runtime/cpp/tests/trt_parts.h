// Fakes for tests without a GPU: TensorRT engines that run on the CPU in a stream of the fake driver, and the same
// functions on host tensors.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "engine.h"
#include "trt_session.h"

namespace fake {

using namespace arcflow;

constexpr int64_t K = 3, P = 4, C = 16, TEXT = 6, M = 5, HALF_HEAD = 2;

// A function that only the fake driver has.
template <class Function> Function *driver(const char *name) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    void *found = library == nullptr ? nullptr : dlsym(library, name);
    if (found == nullptr) {
        std::fprintf(stderr, "run this with the folder of the fake libcuda.so.1 in LD_LIBRARY_PATH\n");
        std::exit(1);
    }
    return reinterpret_cast<Function *>(found);
}

// Heads that depend on every input of each image: latents, text, modulation and rotary tables.
void backbone(const Shapes &shapes, const std::map<std::string, std::byte *> &at, DType dtype);

// modulation[s, u, m] = timesteps[s] + 100 * pooled_projections[u, 0] + m / 8.
void conditioner(const Shapes &shapes, const std::map<std::string, std::byte *> &at);

// One pixel per token.
void decoder(const Shapes &shapes, const std::map<std::string, std::byte *> &at);

// A session for one of these parts; a conditioner takes at most 8 timesteps.
class Session : public TrtSession {
public:
    Session(std::string part, DType dtype, bool capturable)
        : part_(std::move(part)), dtype_(dtype), capturable_(capturable) {}
    std::unique_ptr<TrtContext> context(const Shapes &inputs, cuda::Stream &stream) override;
    int64_t largest(const std::string &, size_t) override { return 8; }

    int contexts = 0;

private:
    std::string part_;
    DType dtype_;
    bool capturable_;
};

// A manifest whose backbone takes and returns `dtype`.
Manifest manifest_in(DType dtype);

Tensor random_tensor(uint64_t seed, std::vector<int64_t> shape);

// Inputs for 3 images: 0 and 2 have one text length, 1 another. With `prompts` 2 each prompt has its own modulation,
// with 1 all share one.
DenoiseInputs inputs_of(uint64_t seed, int64_t prompts, bool decode, std::vector<double> sigmas = {1, 0.7619, 0});

// The result that a Denoiser must return, computed image by image on host tensors with the library's update.
Denoised expected(const DenoiseInputs &in, DType dtype);

}  // namespace fake
